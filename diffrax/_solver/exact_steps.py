"""The steps of those solvers that `BitExact` takes, as moves of points of a lattice."""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
from jaxtyping import Array, PyTree

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, Y
from .._damped_gap import Stacks
from .._fence import fence
from .._known_controls import has_no_controls, map_single_terms, TermWithControl
from .._moves import Kick, Kicked, Mix, Move, Point
from .._same_bits import SameBits
from .base import AbstractSolver


class _ExactControl(TermWithControl):
    """A term, the control of which has the same bits whenever it is evaluated."""

    same_bits: SameBits

    def contr(self, t0, t1, **kwargs):
        return self.same_bits(lambda: self.wrapped.contr(t0, t1, **kwargs))


class Setting(eqx.Module):
    """What there is to a step besides where it starts."""

    terms: Any
    t0: RealScalarLike
    t1: RealScalarLike
    args: Args
    same_bits: SameBits

    @classmethod
    def of(
        cls, terms: Any, t0: RealScalarLike, t1: RealScalarLike, y: Y, args: Args
    ) -> "Setting":
        same_bits = SameBits(t0)

        def exact(term):
            # That of an `ODETerm` is a single subtraction.
            return term if has_no_controls(term) else _ExactControl(term, same_bits)

        # With the fence that going back would put there, if it were not there yet.
        terms = map_single_terms(exact, fence(terms, y))
        return cls(terms, t0, t1, args, same_bits)

    @property
    def middle(self) -> RealScalarLike:
        return self.t0 + 0.5 * (self.t1 - self.t0)


class Made(NamedTuple):
    """A step that was made, or undone."""

    start: Point
    end: Point
    kicks: list[Kicked]


class AbstractExactStep(eqx.Module):
    """How `solver` makes a step."""

    solver: eqx.AbstractVar[AbstractSolver]
    # Whether `y` is a tuple, each entry of which is moved by itself. (If so then there
    # are no other parts.)
    splits_y: ClassVar[bool] = False
    # Whether those parts that are no part of `y` start where `y` does.
    others_start_at_y: ClassVar[bool] = True

    def split(self, y: Y) -> tuple[PyTree, ...]:
        return tuple(y) if self.splits_y else (y,)

    def join(self, values: tuple[PyTree, ...]) -> Y:
        """`y`, from the values of all parts."""
        return values if self.splits_y else values[0]

    def others(
        self, terms: PyTree, t0: RealScalarLike, y0: Y, args: Args
    ) -> tuple[PyTree, ...]:
        """The other parts, at the start of a solve."""
        del terms, t0, y0, args
        return ()

    def carry(self, terms: PyTree, t0: RealScalarLike, y0: Y, args: Args) -> PyTree:
        """What else is carried along, at the start of a solve."""
        del terms, t0, y0, args
        return None

    def stacks(self, counts: Sequence[PyTree[Array]]) -> Stacks | None:
        """What has been forgotten, at the start of a solve."""
        del counts
        return None

    @abc.abstractmethod
    def moves(self, step: Setting, carry: PyTree) -> Sequence[Move]:
        """All moves of a step. What of `carry` cannot be computed going back, is here
        what it is at the start of the step."""

    def after(self, step: Setting, carry: PyTree) -> PyTree:
        """`carry` after the moves of a step."""
        del step
        return carry

    def record(self, carry: PyTree) -> PyTree:
        """What of `carry` cannot be computed going back."""
        del carry
        return None

    def across_jump(
        self, step: Setting, point: Point, made_jump: BoolScalarLike
    ) -> Point:
        """Where to start a step from, if that may be across a jump."""
        del step, made_jump
        return point

    def before_jump(
        self,
        step: Setting,
        point: Point,
        recorded: PyTree,
        next_made_jump: BoolScalarLike,
    ) -> Point:
        """Where a step ended, from where the one that came next started, which may have
        been across a jump, and from what was recorded."""
        del step, recorded, next_made_jump
        return point

    def dense_info(self, made: Made) -> DenseInfo:
        y0, y1 = (self.join(point.values) for point in (made.start, made.end))
        return dict(y0=y0, y1=y1)

    def error(self, made: Made) -> Y | None:
        del made
        return None

    def has_room(self, point: Point) -> BoolScalarLike:
        """Whether what one more step forgets can be stored."""
        del point
        return True

    def has_failed(self, point: Point) -> BoolScalarLike:
        """Whether there is no going on from here."""
        del point
        return False


class ExactShears(AbstractExactStep):
    """That of a solver which knows how: see `AbstractReversibleSolver.shears`."""

    solver: Any
    splits_y: ClassVar[bool] = True

    def moves(self, step, carry):
        shears = self.solver.shears(step.terms, step.t0, step.t1, step.args)
        return [Kick(to, increment) for to, increment in shears]


class ExactLeapfrogMidpoint(AbstractExactStep):
    """`LeapfrogMidpoint`, the two last points of which take turns. The time of the one
    before is carried along."""

    solver: AbstractSolver

    def others(self, terms, t0, y0, args):
        return (y0,)

    def carry(self, terms, t0, y0, args):
        return t0

    def moves(self, step, carry):
        control = step.terms.contr(carry, step.t1)

        def evaluate(values):
            y0, _ = values
            return step.terms.vf_prod(step.t0, y0, step.args, control)

        return [Kick(1, evaluate), Mix(((0, 1), (1, 0)))]

    def after(self, step, carry):
        return step.t0

    def record(self, carry):
        return carry

    def before_jump(self, step, point, recorded, next_made_jump):
        return point._replace(carry=recorded)
