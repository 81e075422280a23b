"""The exact steps of solvers that carry a vector field along."""

import abc
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from equinox.internal import ω
from jaxtyping import PyTree

from .._custom_types import BoolScalarLike, RealScalarLike
from .._damped_gap import Damping
from .._evaluate_where import evaluate_where
from .._lattice import Part
from .._moves import Kick, Mix, Point, Reflect
from .asynchronous_leapfrog import AsynchronousLeapfrog
from .base import AbstractSolver
from .exact_steps import AbstractExactStep, Setting


class AbstractCarrying(AbstractExactStep):
    """Evaluates the same vector field at the end of a step and at the start of the next
    one, and carries it along. (Unless there is a jump in between.)"""

    @abc.abstractmethod
    def evaluate(self, step: Setting, t: RealScalarLike) -> Callable:
        """What is evaluated at `t`, a function of the values of all parts."""

    def carry(self, terms, t0, y0, args):
        # As going back evaluates it.
        step = Setting.of(terms, t0, t0, y0, args)
        values = (*self.split(y0), *self.others(terms, t0, y0, args))
        return step.same_bits(self.evaluate(step, t0), values)

    def across_jump(self, step, point, made_jump):
        return self._again_if(made_jump, step, step.t0, point)

    def before_jump(self, step, point, recorded, next_made_jump):
        del recorded
        return self._again_if(next_made_jump, step, step.t1, point)

    def _again_if(
        self, pred: BoolScalarLike, step: Setting, t: RealScalarLike, point: Point
    ) -> Point:
        def again():
            return step.same_bits(self.evaluate(step, t), point.values)

        return point._replace(carry=evaluate_where(pred, again, point.carry))


class ExactReversibleHeun(AbstractCarrying):
    """`ReversibleHeun` is half a kick, a reflection, and half a kick:

    y <- y + f(t0, yhat) h / 2,   yhat <- 2 y - yhat,   y <- y + f(t1, yhat) h / 2
    """

    solver: AbstractSolver

    def others(self, terms, t0, y0, args):
        return (y0,)

    def evaluate(self, step, t):
        def evaluate(values):
            _, yhat = values
            return step.terms.vf(t, yhat, step.args)

        return evaluate

    def moves(self, step, carry):
        del carry
        control = step.terms.contr(step.t0, step.t1)

        def increment(vf):
            return (0.5 * step.terms.prod(vf, control) ** ω).ω

        return [
            Kick(0, self.evaluate(step, step.t0), increment, "start"),
            Mix(((1, 0), (2, -1))),
            Kick(0, self.evaluate(step, step.t1), increment, "end"),
        ]

    def error(self, made):
        first, second = made.kicks
        return (second.increment**ω - first.increment**ω).ω


class ExactVelocityVerlet(AbstractCarrying):
    """`VelocityVerlet`."""

    solver: AbstractSolver
    splits_y: ClassVar[bool] = True

    def evaluate(self, step, t):
        _, kick = step.terms

        def evaluate(values):
            q, _ = values
            return kick.vf(t, q, step.args)

        return evaluate

    def moves(self, step, carry):
        del carry
        drift, kick = step.terms
        control1, control2 = (x.contr(step.t0, step.t1) for x in step.terms)

        def increment(vf):
            return kick.prod(vf, (0.5 * control2**ω).ω)

        def move(values):
            _, v = values
            return drift.vf_prod(step.middle, v, step.args, control1)

        return [
            Kick(1, self.evaluate(step, step.t0), increment, "start"),
            Kick(0, move),
            Kick(1, self.evaluate(step, step.t1), increment, "end"),
        ]


class ExactAsynchronousLeapfrog(AbstractExactStep):
    """`AsynchronousLeapfrog` is half a step along `v`, a reflection of `v` about the
    vector field, after which it may be damped, and half a step along the new `v`."""

    solver: AsynchronousLeapfrog
    damping: Damping | None
    others_start_at_y: ClassVar[bool] = False

    def others(self, terms, t0, y0, args):
        vf = terms.vf(t0, y0, args)
        if not _is_like(vf, y0):
            raise ValueError(
                "Cannot use `BitExact(AsynchronousLeapfrog(...))` with terms whose "
                "vector field is not like `y0`, such as those of SDEs and CDEs. "
                "Consider using `BitExact(ReversibleHeun(), size)`."
            )
        return (vf,)

    def stacks(self, counts):
        return None if self.damping is None else self.damping.start(counts[1])

    def has_room(self, point):
        return self.damping is None or self.damping.has_room(point.stacks)

    def moves(self, step, carry):
        del carry
        control = step.terms.contr(step.t0, step.t1)

        def half(values):
            _, v = values
            return (0.5 * step.terms.prod(v, control) ** ω).ω

        def evaluate(values):
            y, _ = values
            return step.terms.vf(step.middle, y, step.args)

        reflect = Reflect(1, evaluate, self.damping, float(self.solver.eta) > 0.5)
        return [Kick(0, half), reflect, Kick(0, half)]

    def across_jump(self, step, point, made_jump):
        y, v = point.parts

        def again():
            values = y.value, v.value
            vf = step.same_bits(
                lambda values: step.terms.vf(step.t0, values[0], step.args), values
            )
            return Part.at(vf, v.spacing)

        return point.set(1, evaluate_where(made_jump, again, v))

    def before_jump(self, step, point, recorded, next_made_jump):
        del step, recorded
        if next_made_jump is False:
            return point
        # As in `AsynchronousLeapfrog`: nothing is left of it, and the step cannot be
        # undone.
        y, v = point.parts
        value = jtu.tree_map(lambda x: jnp.where(next_made_jump, jnp.nan, x), v.value)
        return point.set(1, Part(value, v.count, v.start, v.spacing))

    def dense_info(self, made):
        first, second = made.kicks
        k0, k1 = ((2 * kick.increment**ω).ω for kick in (first, second))
        return dict(super().dense_info(made), k0=k0, k1=k1)

    def error(self, made):
        first, second = made.kicks
        difference = (second.increment**ω - first.increment**ω).ω
        return (difference**ω / (2 * self.solver.eta)).ω


def _is_like(x: PyTree, y: PyTree) -> bool:
    like = lambda tree: jax.eval_shape(lambda: jtu.tree_map(jnp.asarray, tree))
    return eqx.tree_equal(like(x), like(y)) is True
