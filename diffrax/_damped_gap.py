"""Multiplying the difference of two points of a lattice by a factor below one, such
that this can be undone to the last bit.

The factor is `n / d`, with `d` a power of two and `n = d - 1`. Multiplying by `n` and
dividing by `d` forgets a digit to base `d`, and makes one to base `n` up: so the one
that is forgotten is put on a stack of digits, and the other one is taken from there
(Maclaurin, Duvenaud and Adams, 2015). What is stored grows by `log2(d / n)` bits for
each number and step; 0.0014 bits for a factor of 0.999.

The difference is known to one digit to base `d` below the spacing of the lattice, so
that it is by less than one spacing that the digit which is made up changes it.
"""

import functools as ft
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from equinox.internal import ω
from jaxtyping import Array, Bool, Int, PyTree, UInt

from ._lattice import Part


class Stack(eqx.Module):
    """What was forgotten, for each number of one leaf.

    - `fraction`: the digit of the difference below the spacing of the lattice.
    - `top`: the top of the stack, as one number.
    - `rows`: what is below that.
    """

    fraction: UInt[Array, "..."]
    top: UInt[Array, "..."]
    rows: UInt[Array, "rows ..."]


class Stacks(eqx.Module):
    """For each leaf; and how often it was damped."""

    num_steps: Int[Array, ""]
    leaves: list[Stack]


class Damping(NamedTuple):
    """Multiplying by `1 - 2**-power`, up to `max_steps` times."""

    power: int
    max_steps: int

    @classmethod
    def nearest(cls, factor: float, max_steps: int) -> "Damping":
        """The one of those factors that is nearest to `factor`, in the logarithm of
        what it is off from one."""
        if factor < 0.5:
            raise ValueError(
                f"Cannot use `BitExact(solver)` with a damping by {factor} per step: "
                "the smallest factor is one half."
            )
        return cls(round(-math.log2(1 - factor)), max_steps)

    @property
    def factor(self) -> float:
        return 1 - 2.0**-self.power

    def start(self, counts: PyTree[Array]) -> Stacks | None:
        """`None` if there is nothing to be damped."""
        if len(jtu.tree_leaves(counts)) == 0:
            return None
        return Stacks(
            num_steps=jnp.array(0, jnp.int32),
            leaves=[self._start(n) for n in jtu.tree_leaves(counts)],
        )

    def _start(self, count: Array) -> Stack:
        num_bits = count.dtype.itemsize * 8
        if self.power > max_power(num_bits):
            raise ValueError(
                f"Cannot use `BitExact(solver)` with {num_bits}-bit precision and a "
                f"damping by {self.factor} per step: the factor nearest to one is "
                f"{1 - 2.0 ** -max_power(num_bits)}. Consider a solver without damping."
            )
        num_rows = self.max_steps // self._period(num_bits)
        zeros = jnp.zeros(count.shape, f"uint{num_bits}")
        rows = jnp.zeros((num_rows, *count.shape), f"uint{num_bits // 2}")
        return Stack(zeros, zeros, rows)

    def damp(
        self, part: Part, other: Part, stacks: Stacks | None
    ) -> tuple[Part, Stacks | None]:
        """`part` nearer to `other`. NaN if their difference, or what was forgotten, is
        more than there is room for."""
        if stacks is None:
            return part, None
        is_good = self.has_room(stacks)
        for gap in jtu.tree_leaves(_gaps(part, other)):
            limit = 2 ** (gap.dtype.itemsize * 8 - 2 - self.power)
            is_good &= jnp.all((gap <= limit) & (gap >= -limit))
        part, stacks = self._both(self._damp, part, other, stacks, 1)
        return part.nan_unless(is_good), stacks

    def has_room(self, stacks: Stacks | None) -> Bool[Array, ""]:
        """For one more step."""
        if stacks is None:
            return jnp.array(True)
        return stacks.num_steps < self.max_steps

    def undo(
        self, part: Part, other: Part, stacks: Stacks | None
    ) -> tuple[Part, Stacks | None]:
        if stacks is None:
            return part, None
        return self._both(self._undo, part, other, stacks, -1)

    def _both(
        self, fn: Any, part: Part, other: Part, stacks: Stacks, sign: int
    ) -> tuple[Part, Stacks]:
        gaps, treedef = jtu.tree_flatten(_gaps(part, other))
        num_steps = stacks.num_steps + sign
        # The number of this step, be it made or undone.
        index = jnp.maximum(stacks.num_steps, num_steps)
        out = [fn(index, *x) for x in zip(gaps, stacks.leaves, strict=True)]
        gaps = jtu.tree_unflatten(treedef, [gap for gap, _ in out])
        factor = self.factor if sign > 0 else 1 / self.factor
        smooth = jtu.tree_map(
            lambda x, z: z + factor * (x - z), part.value, other.value
        )
        part = part.of((gaps**ω + other.count**ω).ω, smooth)
        return part, Stacks(num_steps, [stack for _, stack in out])

    def _damp(self, index: Array, gap: Array, stack: Stack) -> tuple[Array, Stack]:
        top = (stack.top << self._shift(stack.top)) | stack.fraction
        top, digit = _divmod(top, self._n)
        gap = gap * self._n + digit.astype(gap.dtype)
        fraction = (gap & (2**self.power - 1)).astype(top.dtype)
        top, rows = self._push(index, top, stack.rows)
        return gap >> self._shift(gap), Stack(fraction, top, rows)

    def _undo(self, index: Array, gap: Array, stack: Stack) -> tuple[Array, Stack]:
        top, rows = self._pop(index, stack.top, stack.rows)
        gap = (gap << self._shift(gap)) | stack.fraction.astype(gap.dtype)
        gap, digit = _divmod(gap, self._n)
        top = top * self._n + digit.astype(top.dtype)
        fraction = top & (2**self.power - 1)
        return gap, Stack(fraction, top >> self._shift(top), rows)

    def _period(self, num_bits: int) -> int:
        return period(num_bits, self.power, self.max_steps + 1)

    @property
    def _n(self) -> int:
        return 2**self.power - 1

    def _shift(self, x: Array) -> Array:
        return jnp.array(self.power, x.dtype)

    def _push(self, index: Array, top: Array, rows: Array) -> tuple[Array, Array]:
        """Moves the lower half of `top` to `rows`, if it is time for that."""
        if rows.shape[0] == 0:
            return top, rows
        is_time, row, half = self._row(index, top, rows)
        new = jnp.where(is_time, top.astype(rows.dtype), 0)
        rows = rows.at[row].set(new, mode="drop")
        return jnp.where(is_time, top >> half, top), rows

    def _pop(self, index: Array, top: Array, rows: Array) -> tuple[Array, Array]:
        if rows.shape[0] == 0:
            return top, rows
        is_time, row, half = self._row(index, top, rows)
        last = rows.at[row].get(mode="fill", fill_value=0).astype(top.dtype)
        rows = rows.at[row].set(jnp.zeros_like(top, rows.dtype), mode="drop")
        return jnp.where(is_time, (top << half) | last, top), rows

    def _row(self, index: Array, top: Array, rows: Array) -> tuple[Any, Any, Array]:
        num_bits = top.dtype.itemsize * 8
        every = self._period(num_bits)
        is_time = index % every == 0
        # There is no such row if not.
        row = jnp.where(is_time, index // every - 1, rows.shape[0])
        return is_time, row, jnp.array(num_bits // 2, top.dtype)


def _gaps(part: Part, other: Part) -> PyTree[Array]:
    return (part.count**ω - other.count**ω).ω


def _divmod(x: Array, n: int) -> tuple[Array, Array]:
    """For negative `x`, too, the remainder is positive."""
    quotient = x // n
    return quotient, x - quotient * n


def max_power(num_bits: int) -> int:
    """The largest one for which there is room: then a difference may be of half the
    bits."""
    return num_bits // 2 - 2


@ft.cache
def period(num_bits: int, power: int, at_most: int) -> int:
    """After how many steps at most the lower half of the top of a stack has to be moved
    below, for there to be room for one more digit all the time; or `at_most`."""
    d = 2**power
    largest = 2 ** (num_bits - power) - 1
    top = largest >> num_bits // 2
    for steps in range(at_most):
        # The largest that may come of it.
        top = (top * d + d - 1) // (d - 1)
        if top > largest:
            return steps
    return at_most
