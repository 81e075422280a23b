"""How rounding errors grow while going back over a solve.

Where going back expands errors, and contracts them again later, there is nothing to be
seen of it once it comes to a state that is known; but the gradient has been taken at
states that were wrong. So an error of the size of rounding is carried along the
reconstruction: an estimate of how far it may be off.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from equinox.internal import ω
from jaxtyping import Array, Int, PyTree, Real, UInt32

from ._custom_types import IntScalarLike, RealScalarLike
from ._invert_step import max_abs


class Probe(eqx.Module):
    """An error of the size of rounding that is carried along: an estimate of how far
    off going back may be since the last state that was known.

    - `error`: of `y`, and of the solver state if that is the hint.
    - `since`: the time down to which it has been carried.
    - `waiting`: for how many steps it has not been carried on. -1 where it starts.
    - `rate`: by how much of itself it changes per unit of time.
    """

    error: PyTree[Array]
    since: Real[Array, ""]
    waiting: Int[Array, ""]
    rate: Real[Array, ""]

    @classmethod
    def start(cls, error: PyTree[Array]) -> "Probe":
        dtype = jnp.result_type(float)
        return cls(
            error=error,
            since=jnp.zeros((), dtype),
            waiting=jnp.array(-1),
            rate=jnp.array(jnp.inf, dtype),
        )

    def next(
        self, index: IntScalarLike, t0: RealScalarLike, t1: RealScalarLike
    ) -> tuple["Probe", Any, Any]:
        """Before going back over step `index`, from `t1` to `t0`. Returns also how long
        it is that the error has not been carried along for, with this step; and whether
        it can wait for a step more, as it would change by less than a tenth.

        It is every fourth step on average at which it does not: which ones is as good
        as random, so that no period of the vector field can hide behind it; and none
        that is short, as that is a bad one to judge the others by."""
        t0, t1 = (jnp.asarray(t).astype(self.since.dtype) for t in (t0, t1))
        since = jnp.where(self.waiting < 0, t1, self.since)
        span = jnp.abs(since - t0)
        is_turn = _mix(jnp.asarray(index).astype(jnp.uint32)) % np.uint32(4) == 0
        is_short = 2 * jnp.abs(t1 - t0) * (self.waiting + 1) < span
        can_wait = (jnp.invert(is_turn) | is_short) & (self.waiting < _longest_wait)
        can_wait = can_wait & (self.rate * span < 0.1)
        return Probe(self.error, since, self.waiting, self.rate), span, can_wait

    def wait(
        self, t0: RealScalarLike, t1: RealScalarLike
    ) -> tuple["Probe", PyTree[Array]]:
        """Without the error having been carried over the step; and about what would
        have been its `share_of`."""
        length = jnp.abs(jnp.asarray(t1) - jnp.asarray(t0)).astype(self.rate.dtype)
        share = jtu.tree_map(
            lambda x: (self.rate * length).astype(jnp.finfo(x.dtype).dtype), self.error
        )
        return Probe(self.error, self.since, self.waiting + 1, self.rate), share

    def carried(
        self,
        error: PyTree[Array],
        t0: RealScalarLike,
        share: PyTree[Array],
        span: Real[Array, ""],
    ) -> "Probe":
        """With the error having been carried down to `t0`."""
        dtype = self.since.dtype
        shares = [x.astype(dtype) for x in jtu.tree_leaves(share)]
        rate = ft.reduce(jnp.maximum, shares, jnp.zeros((), dtype)) / span
        # Zero times infinity where there is no time.
        rate = jnp.where(span > 0, rate, jnp.inf)
        since = jnp.asarray(t0).astype(dtype)
        return Probe(error, since, jnp.zeros_like(self.waiting), rate)


_longest_wait = 11


def _mix(bits: UInt32[Array, " *size"]) -> UInt32[Array, " *size"]:
    """As good as random: a hash."""
    bits = (bits + np.uint32(1)) * np.uint32(0x9E3779B1)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return bits ^ (bits >> np.uint32(15))


def _noise(x: Array, step: IntScalarLike) -> Array:
    """Numbers between -1 and 1, as good as random, and others for each `step`: a hash
    of their indices."""
    seed = jnp.asarray(step).astype(jnp.uint32) * np.uint32(0x85EBCA77)
    bits = _mix(jnp.arange(x.size, dtype=jnp.uint32) + seed)
    # Not at once in the precision of `x`: 2^31 is infinite in some.
    unit = (bits >> np.uint32(1)).astype(jnp.int32).astype(jnp.float32) * 2.0**-30 - 1
    return unit.astype(jnp.finfo(x.dtype).dtype).reshape(x.shape)


def rounding(
    tree: PyTree[Array], step: IntScalarLike, share: PyTree[Array] | None = None
) -> PyTree[Array]:
    """An error such as rounding makes, and in no special direction.

    That of an addition is relative to each entry. What is added has been computed from
    all entries, each of which is rounded: so it is off by a `share` of the rounding
    error of the largest entry of the leaf; none if `None`.

    It is another one at each step, as that of rounding is. So where errors are neither
    expanded nor contracted, those of `n` steps add up to `sqrt(n)` of one."""

    def _rounding(x, max_x, share_x):
        eps = float(jnp.finfo(x.dtype).eps)
        # Not more than all of it.
        part = jnp.minimum(jnp.asarray(share_x, max_x.dtype), 1)
        size = jnp.abs(x) + part * max_x
        return (eps * size * _noise(x, step)).astype(x.dtype)

    if share is None:
        share = jtu.tree_map(lambda _: 0.0, tree)
    return jtu.tree_map(_rounding, tree, max_abs(tree), share)


def share_of(change: PyTree[Array], error: PyTree[Array]) -> PyTree[Array]:
    """How much of the largest entry of an error a step adds to any entry. One number
    for each leaf."""

    def _share(max_change, max_error):
        return max_change / jnp.where(max_error > 0, max_error, 1)

    return jtu.tree_map(_share, max_abs(change), max_abs(error))


def derivative(
    fn: Callable[[PyTree], PyTree],
    x: PyTree[Array],
    value: PyTree[Array],
    direction: PyTree[Array],
) -> PyTree[Array]:
    """The derivative of `fn` at `x`, where it is `value`, in a direction: to half of
    the digits, for one evaluation, and also if `fn` has no rule for forward-mode
    autodifferentiation. All leaves are floating-point arrays."""

    def _ratio(_x, _direction):
        eps = float(jnp.finfo(_x.dtype).eps)
        max_x = jnp.max(jnp.abs(_x), initial=0)
        max_direction = jnp.max(jnp.abs(_direction), initial=0)
        # Not larger than a part of `sqrt(eps)` of this leaf.
        ratio = jnp.where(max_direction > 0, eps**0.5 * max_x / max_direction, jnp.inf)
        return jnp.where(max_x > 0, ratio, jnp.inf).astype(jnp.result_type(float))

    ratios = jtu.tree_leaves(jtu.tree_map(_ratio, x, direction))
    ratio: Real[Array, ""] = ft.reduce(jnp.minimum, ratios, jnp.array(jnp.inf))
    ratio = jnp.where(jnp.isfinite(ratio), ratio, 1)

    def _move(_x, _direction):
        return _x + ratio.astype(_x.dtype) * _direction

    def _quotient(new, old):
        return (new - old) / ratio.astype(old.dtype)

    moved = fn(jtu.tree_map(_move, x, direction))
    return jtu.tree_map(_quotient, moved, value)


def advance(
    increment: Callable[[PyTree], PyTree],
    y1: PyTree[Array],
    value: PyTree[Array],
    error: PyTree[Array],
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Carries an error over a step back of a method of at least second order, for two
    evaluations. `increment` is the product of the vector field, as a function of `y1`,
    and the control; `value` is what it is at `y1`. Returns the error, and its
    `share_of`."""
    first = derivative(increment, y1, value, error)
    second = derivative(increment, y1, value, first)
    return (error**ω - first**ω + 0.5 * second**ω).ω, share_of(first, error)
