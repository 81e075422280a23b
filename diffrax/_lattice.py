"""Points of a lattice: numbers that can be added to, and subtracted from, exactly."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from equinox.internal import ω
from jaxtyping import Array, Bool, PyTree

from ._custom_types import BoolScalarLike, RealScalarLike


# How far from where it started a coordinate may be, as a power of two of spacings. Four
# times as far must not overflow: a move doubles one of them at most, and adds another.
# What is farther becomes NaN at that move.
_max_power = {32: 28, 64: 60}


def num_bits(x: Any) -> int:
    return jnp.finfo(x.dtype).bits


class Part(eqx.Module):
    """A PyTree of floating-point arrays, the values of which are points of a lattice.

    - `value`: what it is, rounded to its dtype. Differentiating it is differentiating
        what would have been computed without a lattice.
    - `count`: by how many spacings it is off from where it started.
    - `start`: the bits of where it started. (They have no derivative.)
    - `spacing`: that of the lattice, a power of two, for each leaf.

    A complex leaf is two real ones, stacked.
    """

    value: PyTree[Array]
    count: PyTree[Array]
    start: PyTree[Array]
    spacing: tuple[float, ...] = eqx.field(static=True)

    @classmethod
    def at(cls, value: PyTree[Array], spacing: tuple[float, ...]) -> "Part":
        """Where it starts."""
        start = jtu.tree_map(_to_bits, value)
        count = jtu.tree_map(jnp.zeros_like, start)
        return cls(value, count, start, spacing)

    def of(self, count: PyTree[Array], smooth: PyTree[Array]) -> "Part":
        """Another point, which is NaN where `smooth` is, and the derivative of which is
        that of `smooth`."""
        leaves = zip(*map(jtu.tree_leaves, (count, self.start, smooth)), self.spacing)
        value = [_with_derivative(_to_value(n, s, x, h), x) for n, s, x, h in leaves]
        value = jtu.tree_unflatten(jtu.tree_structure(smooth), value)
        return Part(value, count, self.start, self.spacing)

    def move(self, increment: PyTree[Array], sign: int) -> "Part":
        """With `sign` times `increment` added, which is rounded to the lattice. NaN if
        that is too large or no number."""
        increment = jtu.tree_map(_as_dtype_of, increment, self.value)
        steps, is_good = self._round(increment)
        add = lambda a, b: a + b if sign > 0 else a - b
        moved = self.of(
            jtu.tree_map(add, self.count, steps),
            jtu.tree_map(add, self.value, increment),
        )
        return moved.nan_unless(is_good & jnp.invert(moved.is_outside()))

    def nearest(self, value: PyTree[Array]) -> "Part":
        """`value`, rounded to the lattice. NaN likewise."""
        start = jtu.tree_map(_from_bits, self.start, value)
        count, is_good = self._round((value**ω - start**ω).ω)
        return self.of(count, value).nan_unless(is_good)

    def nan_unless(self, is_good: BoolScalarLike) -> "Part":
        value = jtu.tree_map(lambda x: jnp.where(is_good, x, jnp.nan), self.value)
        return Part(value, self.count, self.start, self.spacing)

    def _round(self, x: PyTree[Array]) -> tuple[PyTree[Array], Bool[Array, ""]]:
        """In spacings; and whether there is room for that."""
        steps, is_good = [], jnp.array(True)
        for leaf, spacing in zip(jtu.tree_leaves(x), self.spacing, strict=True):
            leaf = _stack(lax.stop_gradient(leaf))
            scaled = jnp.round(leaf / spacing)
            # Not for NaN, either.
            is_small = jnp.abs(scaled) <= 2 ** _max_power[num_bits(leaf)]
            is_good &= jnp.all(is_small)
            steps.append(jnp.where(is_small, scaled, 0).astype(_int_like(leaf)))
        return jtu.tree_unflatten(jtu.tree_structure(x), steps), is_good

    def is_elsewhere(self) -> Bool[Array, ""]:
        """Whether `value` is not what the count says; or no number."""
        elsewhere = jnp.array(False)
        trees = self.count, self.start, self.value
        for n, s, x, h in zip(*map(jtu.tree_leaves, trees), self.spacing, strict=True):
            elsewhere |= jnp.any(_to_value(n, s, x, h) != lax.stop_gradient(x))
        return elsewhere

    def is_outside(self) -> Bool[Array, ""]:
        """Whether any of it is farther from where it started than there is room for, or
        no number."""
        outside = jnp.array(False)
        for n, x in zip(*map(jtu.tree_leaves, (self.count, self.value))):
            limit = 2 ** _max_power[n.dtype.itemsize * 8]
            outside |= jnp.any((n > limit) | (n < -limit)) | jnp.any(~jnp.isfinite(x))
        return outside


def full_size(y: PyTree[Array], size: PyTree[RealScalarLike]) -> list[float]:
    """`size`, which is a prefix of `y`, for each leaf of that."""
    try:
        full = jtu.tree_map(lambda s, sub: jtu.tree_map(lambda _: s, sub), size, y)
    except ValueError as e:
        raise ValueError(
            "`size` in `BitExact(solver, size)` must be a number, or a PyTree of "
            "numbers of the structure of `y0` or a prefix of that, but got "
            f"`size={size}` and `y0` of the structure {jtu.tree_structure(y)}."
        ) from e
    return [float(s) for s in jtu.tree_leaves(full)]


def spacings(y: PyTree[Array], size: PyTree[RealScalarLike]) -> tuple[float, ...]:
    """For each leaf: as far apart as floating-point numbers of about that `size`."""
    pairs = zip(full_size(y, size), jtu.tree_leaves(y), strict=True)
    return tuple(_spacing(s, x.dtype) for s, x in pairs)


def _spacing(size: float, dtype: Any) -> float:
    limits = jnp.finfo(dtype)
    # The range takes up that many spacings; and there has to be a number for each.
    smallest = float(limits.tiny) / float(limits.eps)
    largest = float(limits.max) / 2 ** (_max_power[limits.bits] - limits.nmant)
    if not smallest <= size <= largest / 4:
        raise ValueError(
            f"Cannot use `BitExact(solver, size={size})` with {limits.bits}-bit "
            f"precision: must have `{smallest:.2g} <= size <= {largest / 4:.2g}`."
        )
    return 2.0 ** math.ceil(math.log2(size)) * float(limits.eps)


def _as_dtype_of(x: Array, y: Array) -> Array:
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(y):
        raise ValueError(
            "Cannot use `BitExact(solver)` to add complex numbers to real ones. "
            "Consider making `y0` complex."
        )
    return x.astype(y.dtype)


def _stack(x: Array) -> Array:
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x


def _unstack(x: Array, like: Array) -> Array:
    return lax.complex(x[0], x[1]) if jnp.iscomplexobj(like) else x


def _int_like(x: Array) -> Any:
    return jnp.dtype(f"int{num_bits(x)}")


def _to_bits(x: Array) -> Array:
    x = lax.stop_gradient(_stack(x))
    return lax.bitcast_convert_type(x, _int_like(x))


def _from_bits(bits: Array, like: Array) -> Array:
    x = lax.bitcast_convert_type(bits, jnp.finfo(like.dtype).dtype)
    return _unstack(x, like)


def _to_value(count: Array, start: Array, like: Array, spacing: float) -> Array:
    start = lax.bitcast_convert_type(start, jnp.finfo(like.dtype).dtype)
    value = start + spacing * count.astype(start.dtype)
    # Adding zero loses the sign of zero.
    return _unstack(jnp.where(count == 0, start, value), like)


@jax.custom_jvp
def _with_derivative(value: Array, smooth: Array) -> Array:
    """`value`, or NaN where `smooth` is; with the derivative of `smooth`."""
    return jnp.where(jnp.isnan(smooth), smooth, value)


@_with_derivative.defjvp
def _with_derivative_jvp(primals, tangents):
    value, smooth = primals
    _, t_smooth = tangents
    return _with_derivative(value, smooth), t_smooth
