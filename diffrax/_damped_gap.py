"""Multiplying the difference of two points of a lattice by a factor below one, such that
this can be undone to the last bit.

The factor is `n / d`, with `d` a power of two and `n = d - 1`. Multiplying by `n` and
dividing by `d` forgets a digit to base `d`, and makes one to base `n` up: so the one
that is forgotten is put on a stack of digits, and the other one is taken from there
(Maclaurin, Duvenaud and Adams, 2015). What is stored grows by `log2(d / n)` bits for
each number and step; 0.0014 bits for a factor of 0.999.

The difference is known to one digit to base `d` below the spacing of the lattice, so
that it is by less than one spacing that the digit which is made up changes it.
"""

import functools as ft
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree, UInt

from ._custom_types import BoolScalarLike
from ._lattice import Part


class Stack(eqx.Module):
    """What was forgotten, for each number of one leaf.

    - `fraction`: the digit of the difference below the spacing of the lattice.
    - `top`: the top of the stack, as one number.
    - `rows`: what is below that.
    """

    fraction: UInt[Array, "*shape"]
    top: UInt[Array, "*shape"]
    rows: UInt[Array, "rows *shape"]


class Stacks(eqx.Module):
    """For each leaf; and how often it was damped."""

    num_steps: Int[Array, ""]
    leaves: list[Stack]


class Damping(NamedTuple):
    """Multiplying by `1 - 2**-power`, up to `max_steps` times."""

    power: int
    max_steps: int

    @property
    def factor(self) -> float:
        return 1 - 2.0**-self.power

    def start(self, counts: PyTree[Array]) -> Stacks:
        return Stacks(
            num_steps=jnp.array(0, jnp.int32),
            leaves=[self._start(n) for n in jtu.tree_leaves(counts)],
        )

    def _start(self, count: Array) -> Stack:
        num_bits = count.dtype.itemsize * 8
        num_rows = self.max_steps // period(num_bits, self.power)
        zeros = jnp.zeros(count.shape, f"uint{num_bits}")
        rows = jnp.zeros((num_rows, *count.shape), f"uint{num_bits // 2}")
        return Stack(zeros, zeros, rows)

    def damp(self, part: Part, other: Part, stacks: Stacks | None) -> tuple[Part, Stacks | None]:
        """`part` nearer to `other`."""
        return self._both(self._damp, part, other, stacks, 1)

    def undo(self, part: Part, other: Part, stacks: Stacks | None) -> tuple[Part, Stacks | None]:
        return self._both(self._undo, part, other, stacks, -1)

    def _both(
        self, fn: Any, part: Part, other: Part, stacks: Stacks | None, sign: int
    ) -> tuple[Part, Stacks | None]:
        if stacks is None:  # There is nothing to be damped.
            return part, None
        counts, treedef = jtu.tree_flatten(part.count)
        others = jtu.tree_leaves(other.count)
        num_steps = stacks.num_steps + sign
        # The number of this step, be it made or undone.
        index = jnp.maximum(stacks.num_steps, num_steps)
        out = [
            fn(index, gap, stack)
            for gap, stack in zip(
                [n - m for n, m in zip(counts, others)], stacks.leaves, strict=True
            )
        ]
        counts = [gap + m for (gap, _), m in zip(out, others)]
        factor = self.factor if sign > 0 else 1 / self.factor
        smooth = jtu.tree_map(
            lambda x, z: z + factor * (x - z), part.value, other.value
        )
        part = part.of(jtu.tree_unflatten(treedef, counts), smooth)
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
        every = period(num_bits, self.power)
        is_time = index % every == 0
        # There is no such row if not.
        row = jnp.where(is_time, index // every - 1, rows.shape[0])
        return is_time, row, jnp.array(num_bits // 2, top.dtype)

    def is_full(self, part: Part, other: Part, stacks: Stacks | None) -> BoolScalarLike:
        """Whether the difference, or what was forgotten, is more than there is room
        for."""
        if stacks is None:
            return False
        full = stacks.num_steps > self.max_steps
        for n, m in zip(*map(jtu.tree_leaves, (part.count, other.count))):
            limit = 2 ** (n.dtype.itemsize * 8 - 2 - self.power)
            full |= jnp.any(jnp.abs(n - m) > limit)
        return full


def _divmod(x: Array, n: int) -> tuple[Array, Array]:
    """For negative `x`, too, the remainder is positive."""
    quotient = x // n
    return quotient, x - quotient * n


def max_power(num_bits: int) -> int:
    """The largest one for which there is room."""
    return num_bits // 2 - 2


@ft.cache
def period(num_bits: int, power: int) -> int:
    """After how many steps at most the lower half of the top of a stack has to be moved
    below, for there to be room for one more digit all the time."""
    d = 2**power
    largest = 2 ** (num_bits - power) - 1
    top, steps = largest >> num_bits // 2, 0
    while True:
        # The largest that may come of it.
        top = (top * d + d - 1) // (d - 1)
        if top > largest:
            return steps
        steps += 1
