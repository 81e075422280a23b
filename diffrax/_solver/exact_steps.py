"""The steps of those solvers that `BitExact` takes, as moves."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from equinox.internal import ω
from jaxtyping import Array, PyTree

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, Y
from .._damped_gap import Stacks
from .._known_controls import has_no_controls
from .._moves import Kick, Kicked, Mix, Move, Point
from .._same_bits import SameBits
from .base import AbstractSolver
from .._term import AbstractTerm


class Step(eqx.Module):
    """What there is to a step besides `y`."""

    terms: PyTree[AbstractTerm]
    t0: RealScalarLike
    t1: RealScalarLike
    args: Args
    same_bits: SameBits

    def control(self, term: AbstractTerm, t0: RealScalarLike | None = None) -> Any:
        t0 = self.t0 if t0 is None else t0
        if has_no_controls(term):
            return term.contr(t0, self.t1)
        return self.same_bits(lambda: term.contr(t0, self.t1))


class Made(NamedTuple):
    """A step that was made."""

    start: Point
    end: Point
    kicks: list[Kicked]


class AbstractExactStep(eqx.Module):
    """How `solver` makes a step."""

    solver: eqx.AbstractVar[AbstractSolver]

    def split(self, y: Y) -> tuple[PyTree, ...]:
        """`y`, as parts of which each is moved as a whole."""
        return (y,)

    def join(self, values: tuple[PyTree, ...]) -> Y:
        """`y`, from the values of all parts."""
        return values[0]

    def others(self, y0: Y) -> tuple[PyTree, ...]:
        """The other parts, at the start of a solve."""
        del y0
        return ()

    def carry(self, terms: PyTree, t0: RealScalarLike, y0: Y, args: Args) -> PyTree:
        """What is carried along, at the start of a solve."""
        del terms, t0, y0, args
        return None

    def stacks(self, counts: PyTree[Array]) -> Stacks | None:
        """What is forgotten, at the start of a solve."""
        del counts
        return None

    @abc.abstractmethod
    def moves(self, step: Step, carry: PyTree) -> Sequence[Move]:
        """All of a step. `carry` is that at its start, if it cannot be computed going
        back."""

    def after(self, step: Step, carry: PyTree) -> PyTree:
        """`carry` after the moves of a step."""
        del step
        return carry

    def record(self, carry: PyTree) -> PyTree:
        """What of `carry` cannot be computed going back."""
        del carry
        return None

    def across_jump(
        self, step: Step, point: Point, made_jump: BoolScalarLike
    ) -> PyTree:
        """`point.carry`, where there may be a jump at `step.t0` ahead of the step."""
        del step, made_jump
        return point.carry

    def before_jump(
        self, step: Step, point: Point, recorded: PyTree, next_made_jump: BoolScalarLike
    ) -> PyTree:
        """`point.carry` at `step.t1`, from what undoing the step that came next left of
        it, and from what was recorded."""
        del step, recorded, next_made_jump
        return point.carry

    def dense_info(self, made: Made) -> DenseInfo:
        y0, y1 = (self.join(point.values) for point in (made.start, made.end))
        return dict(y0=y0, y1=y1)

    def error(self, made: Made) -> Y | None:
        del made
        return None

    def has_failed(self, point: Point) -> BoolScalarLike:
        """Whether there is no going on from here."""
        del point
        return False


class Shears(AbstractExactStep):
    """That of a solver which knows how: `AbstractReversibleSolver.shears`."""

    solver: Any

    def split(self, y):
        return tuple(y)

    def join(self, values):
        return values

    def moves(self, step, carry):
        shears = self.solver.shears(step.terms, step.t0, step.t1, step.args)
        return [Kick(to, increment) for to, increment in shears]


class Leapfrog(AbstractExactStep):
    """The two steps of `LeapfrogMidpoint` take turns. The start of the one before is
    carried along."""

    solver: AbstractSolver

    def others(self, y0):
        return (y0,)

    def carry(self, terms, t0, y0, args):
        del terms, y0, args
        return t0

    def moves(self, step, carry):
        control = step.control(step.terms, carry)

        def evaluate(values):
            y0, _ = values
            return step.terms.vf_prod(step.t0, y0, step.args, control)

        return [Kick(1, evaluate), Mix(((0, 1), (1, 0)))]

    def after(self, step, carry):
        return step.t0

    def record(self, carry):
        return carry

    def before_jump(self, step, point, recorded, next_made_jump):
        return recorded


class Heun(AbstractExactStep):
    r"""`ReversibleHeun` is symmetric: half a kick, a reflection, and half a kick.

        y <- y + f(t0, yhat) h / 2,   yhat <- 2 y - yhat,   y <- y + f(t1, yhat) h / 2
    """

    solver: AbstractSolver

    def others(self, y0):
        return (y0,)

    def carry(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def moves(self, step, carry):
        control = step.control(step.terms)

        def increment(vf):
            return (0.5 * step.terms.prod(vf, control) ** ω).ω

        return [
            Kick(0, self._evaluate(step, step.t0), increment, "start"),
            Mix(((1, 0), (2, -1))),
            Kick(0, self._evaluate(step, step.t1), increment, "end"),
        ]

    @staticmethod
    def _evaluate(step: Step, t: RealScalarLike) -> Callable:
        def evaluate(values):
            _, yhat = values
            return step.terms.vf(t, yhat, step.args)

        return evaluate

    def across_jump(self, step, point, made_jump):
        return self._again_if(made_jump, step, step.t0, point)

    def before_jump(self, step, point, recorded, next_made_jump):
        return self._again_if(next_made_jump, step, step.t1, point)

    def _again_if(
        self, pred: BoolScalarLike, step: Step, t: RealScalarLike, point: Point
    ) -> PyTree:
        if pred is False:
            return point.carry

        def again():
            vf = step.same_bits(self._evaluate(step, t), point.values)
            return jtu.tree_map(lambda a, b: jnp.where(pred, a, b), vf, point.carry)

        return lax.cond(eqxi.unvmap_any(pred), again, lambda: point.carry)

    def error(self, made):
        first, second = made.kicks
        return (second.increment**ω - first.increment**ω).ω
