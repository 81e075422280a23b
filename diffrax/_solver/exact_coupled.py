import jax.numpy as jnp
import jax.tree_util as jtu
from equinox.internal import ω
from jaxtyping import PyTree

from .._custom_types import RealScalarLike
from .._damped_gap import Damping
from .._lattice import full_size
from .._moves import Damp, Kick, Point
from .euler import Euler
from .exact_steps import AbstractExactStep, Made
from .reversible import (
    _combine,
    _last_stage,
    _negative,
    _norm,
    _stages,
    UReversible,
)


class ExactCoupled(AbstractExactStep):
    """`UReversible`; or what it would be for a `coupling_parameter` of one, with which
    nothing is forgotten."""

    solver: UReversible
    damping: Damping | None
    size: PyTree[RealScalarLike]

    def others(self, terms, t0, y0, args):
        return (y0,)

    def stacks(self, counts):
        return None if self.damping is None else self.damping.start(counts[0])

    def moves(self, step, carry):
        del carry
        tableau = self.solver._tableau
        control = step.terms.contr(step.t0, step.t1)

        def forward(values):
            _, z = values
            return _stages(tableau, step.terms, step.t0, step.t1, z, step.args, control)

        def backward(values):
            y, _ = values
            negative = _negative(control)
            return _stages(
                tableau, step.terms, step.t1, step.t0, y, step.args, negative
            )

        def increment(k):
            return _combine(tableau.b_sol, k)

        def decrement(k):
            return _negative(_combine(tableau.b_sol, k))

        damp = [] if self.damping is None else [Damp(self.damping)]
        return [*damp, Kick(0, forward, increment), Kick(1, backward, decrement)]

    def _gap(self, point: Point) -> PyTree:
        y, z = point.values
        return (y**ω - z**ω).ω

    def _all_stages(self, made: Made) -> list[PyTree]:
        first, second = made.kicks
        tableau = self.solver._tableau
        return _last_stage(tableau, first.evaluated, second.evaluated)

    def dense_info(self, made):
        info = super().dense_info(made)
        if isinstance(self.solver.solver, Euler):
            return info
        # Where each stage gets an equal share of what is lost of the gap: see
        # `UReversible`.
        factor = 1.0 if self.damping is None else self.damping.factor
        lost = ((1 - factor) * self._gap(made.start) ** ω).ω
        k = jtu.tree_map(
            lambda d, *x: jnp.stack([xi - d for xi in x]), lost, *self._all_stages(made)
        )
        return dict(info, k=k)

    def error(self, made):
        error = _combine(self.solver._tableau.b_error, self._all_stages(made))
        if self.damping is None:
            # No smaller step makes the gap any smaller.
            return jtu.tree_map(jnp.abs, error)
        gaps = self._gap(made.start), self._gap(made.end)
        infinite = jtu.tree_map(
            lambda x: jnp.array(jnp.inf, jnp.finfo(x.dtype).dtype), error
        )
        return jtu.tree_map(self.solver._error, error, *gaps, infinite)

    def has_room(self, point):
        return self.damping is None or self.damping.has_room(point.stacks)

    def has_failed(self, point):
        y, _ = point.values
        failed = jnp.array(False)
        sizes = full_size(y, self.size)
        for x, gap, size in zip(*map(jtu.tree_leaves, (y, self._gap(point))), sizes):
            failed |= _norm(gap) > self.solver.max_gap * jnp.maximum(_norm(x), size)
        return failed
