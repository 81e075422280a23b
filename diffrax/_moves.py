"""Steps of a solver as moves of points of a lattice, each of which can be undone to the
last bit."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from equinox.internal import ω
from jaxtyping import Array, PyTree

from ._damped_gap import Damping, Stacks
from ._lattice import Part
from ._same_bits import SameBits


class Point(NamedTuple):
    """Where a solve is.

    - `parts`: those of `y`, and others that the solver carries along.
    - `carry`: what else it carries along, which is not rounded.
    - `stacks`: what was forgotten in damping. `None` if there is no such thing.
    """

    parts: tuple[Part, ...]
    carry: PyTree
    stacks: Stacks | None

    def set(self, i: int, part: Part) -> "Point":
        parts = (*self.parts[:i], part, *self.parts[i + 1 :])
        return self._replace(parts=parts)

    @property
    def values(self) -> tuple[PyTree[Array], ...]:
        return tuple(part.value for part in self.parts)


class Kicked(NamedTuple):
    """What a kick has evaluated, and what it has added."""

    evaluated: PyTree
    increment: PyTree[Array]


class Kick(NamedTuple):
    """Adds `increment(evaluate(values))` to part `to`, on the value of which that must
    not depend. `None` for the identity.

    `carried` is for a solver that evaluates the same at the end of a step and at the
    start of the next one: whether this is the one or the other.
    """

    to: int
    evaluate: Callable[[tuple[PyTree, ...]], PyTree]
    increment: Callable[[PyTree], PyTree[Array]] | None = None
    carried: Literal["start", "end"] | None = None

    def make(self, same_bits: SameBits, point: Point) -> tuple[Point, Kicked]:
        return self._move(same_bits, point, 1, is_known=self.carried == "start")

    def undo(self, same_bits: SameBits, point: Point) -> tuple[Point, Kicked]:
        return self._move(same_bits, point, -1, is_known=self.carried == "end")

    def _move(
        self, same_bits: SameBits, point: Point, sign: int, is_known: bool
    ) -> tuple[Point, Kicked]:
        if is_known:
            found = point.carry
        else:
            found = same_bits(self.evaluate, point.values)
        increment = found
        if self.increment is not None:
            # All of what was evaluated takes part in this: see `SameBits`.
            increment = _nan_if_any(found, same_bits(self.increment, found))
        if self.carried is not None:
            point = point._replace(carry=found)
        part = point.parts[self.to].move(increment, sign)
        return point.set(self.to, part), Kicked(found, increment)


class Mix(NamedTuple):
    """Takes integer combinations of all parts. `matrix` is its own inverse, and its rows
    add up to one."""

    matrix: tuple[tuple[int, ...], ...]

    def make(self, same_bits: SameBits, point: Point) -> tuple[Point, None]:
        del same_bits
        counts = [self._combine(row, [p.count for p in point.parts]) for row in self.matrix]
        values = [self._combine(row, point.values) for row in self.matrix]
        parts = map(Part.of, point.parts, counts, values)
        return point._replace(parts=tuple(parts)), None

    undo = make

    @staticmethod
    def _combine(row: tuple[int, ...], trees: Sequence[PyTree]) -> PyTree:
        terms = [c * tree**ω for c, tree in zip(row, trees) if c != 0]
        return ft.reduce(lambda x, y: x + y, terms).ω


class Damp(NamedTuple):
    """Draws the first part nearer to the second one."""

    damping: Damping

    def make(self, same_bits: SameBits, point: Point) -> tuple[Point, None]:
        return self._move(self.damping.damp, point), None

    def undo(self, same_bits: SameBits, point: Point) -> tuple[Point, None]:
        return self._move(self.damping.undo, point), None

    @staticmethod
    def _move(fn: Any, point: Point) -> Point:
        part, other = point.parts
        part, stacks = fn(part, other, point.stacks)
        return Point((part, other), point.carry, stacks)


Move = Kick | Mix | Damp


def make(
    moves: Sequence[Move], same_bits: SameBits, point: Point
) -> tuple[Point, list[Kicked]]:
    """Makes all moves. Returns also what the kicks among them did."""
    kicks = []
    for move in moves:
        point, kicked = move.make(same_bits, point)
        if kicked is not None:
            kicks.append(kicked)
    return point, kicks


def undo(
    moves: Sequence[Move], same_bits: SameBits, point: Point
) -> tuple[Point, list[Kicked]]:
    """Undoes all moves."""
    kicks = []
    for move in reversed(moves):
        point, kicked = move.undo(same_bits, point)
        if kicked is not None:
            kicks.append(kicked)
    return point, kicks[::-1]


def _nan_if_any(found: PyTree, increment: PyTree[Array]) -> PyTree[Array]:
    is_nan = jnp.array(False)
    for x in jtu.tree_leaves(eqx.filter(found, eqx.is_inexact_array)):
        if x.size > 0:
            is_nan |= jnp.isnan(x.ravel()[0])
    return jtu.tree_map(lambda x: jnp.where(is_nan, jnp.nan, x), increment)
