from typing import Any

from jaxtyping import PyTree

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, Y
from .._term import AbstractTerm
from .base import AbstractReversibleSolver, HalfSolver


def records_state(solver: Any) -> bool:
    """Whether a reversible solver needs to record anything at every step."""
    return type(solver).record_state is not AbstractReversibleSolver.record_state


class ReversibleHalfSolver(HalfSolver, AbstractReversibleSolver):
    """[`diffrax.HalfSolver`][] around a reversible solver: undoes the two half-steps,
    one after the other, and makes the full step once more for the sake of its
    `dense_info`. It is exact up to rounding wherever the solver that it wraps is.

    This is what [`diffrax.ReversibleAdjoint`][] uses in place of a `HalfSolver`. Not
    for solvers that need to record anything: the record is of whole steps only.
    """

    def __check_init__(self):
        if records_state(self.solver):
            name = type(self.solver).__name__
            raise ValueError(
                f"Cannot use `HalfSolver({name}())` with a reversible adjoint, as "
                f"`{name}` records part of its state at every step. Consider using "
                "`HalfSolver(ReversibleHeun())` instead."
            )

    def backward_step(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: Any,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, DenseInfo, Any]:
        solver: Any = self.solver
        thalf = t0 + 0.5 * (t1 - t0)
        yhalf, _, solver_state = solver.backward_step(
            terms, thalf, t1, y1, args, solver_state, made_jump=False
        )
        y0, _, solver_state = solver.backward_step(
            terms, t0, thalf, yhalf, args, solver_state, made_jump
        )
        _, _, dense_info, _, _ = solver.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        return y0, dense_info, solver_state

    def restore_state(
        self,
        terms: PyTree[AbstractTerm],
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: Any,
        recorded: PyTree,
        made_jump: BoolScalarLike,
    ) -> Any:
        solver: Any = self.solver
        return solver.restore_state(
            terms, t1, y1, args, solver_state, recorded, made_jump
        )
