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
    """Takes integer combinations of all parts, which must start at the same point.
    `matrix` is its own inverse, and each of its rows adds up to one."""

    matrix: tuple[tuple[int, ...], ...]

    def make(self, same_bits: SameBits, point: Point) -> tuple[Point, None]:
        del same_bits
        counts = [part.count for part in point.parts]
        counts = [self._combine(row, counts) for row in self.matrix]
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
        del same_bits
        return self._move(self.damping.damp, point), None

    def undo(self, same_bits: SameBits, point: Point) -> tuple[Point, None]:
        del same_bits
        return self._move(self.damping.undo, point), None

    @staticmethod
    def _move(fn: Any, point: Point) -> Point:
        part, other = point.parts
        part, stacks = fn(part, other, point.stacks)
        return Point((part, other), point.carry, stacks)


class Reflect(NamedTuple):
    """Takes part `to` to the other side of `evaluate(values)`, which must not depend on
    it, if `is_reflection`; and then draws it nearer to that, if there is `damping`."""

    to: int
    evaluate: Callable[[tuple[PyTree, ...]], PyTree]
    damping: Damping | None = None
    is_reflection: bool = True

    def make(self, same_bits: SameBits, point: Point) -> tuple[Point, None]:
        part, stacks = point.parts[self.to], point.stacks
        center = part.nearest(same_bits(self.evaluate, point.values))
        if self.is_reflection:
            part = self._reflect(part, center)
        if self.damping is not None:
            part, stacks = self.damping.damp(part, center, stacks)
        return point.set(self.to, part)._replace(stacks=stacks), None

    def undo(self, same_bits: SameBits, point: Point) -> tuple[Point, None]:
        part, stacks = point.parts[self.to], point.stacks
        center = part.nearest(same_bits(self.evaluate, point.values))
        if self.damping is not None:
            part, stacks = self.damping.undo(part, center, stacks)
        if self.is_reflection:
            part = self._reflect(part, center)
        return point.set(self.to, part)._replace(stacks=stacks), None

    @staticmethod
    def _reflect(part: Part, center: Part) -> Part:
        return part.of(
            (2 * center.count**ω - part.count**ω).ω,
            (2 * center.value**ω - part.value**ω).ω,
        )


Move = Kick | Mix | Damp | Reflect


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
