from equinox.internal import ω
from jaxtyping import PyTree

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, Y
from .._term import AbstractTerm
from ._upstream_leapfrog_midpoint import (
    _ErrorEstimate as _ErrorEstimate,
    _SolverState as _SolverState,
    LeapfrogMidpoint as _LeapfrogMidpoint,
)
from .base import AbstractReversibleSolver


class LeapfrogMidpoint(_LeapfrogMidpoint, AbstractReversibleSolver):
    r"""Leapfrog/midpoint method.

    2nd order linear multistep method. Does not support adaptive step sizing. Uses 1st
    order local linear interpolation for dense/ts output.

    Algebraically reversible: $y_{n-1} = y_{n+1} - (t_{n+1} - t_{n-1}) f(t_n, y_n)$
    takes one evaluation of the vector field, and is exact up to rounding for any step
    sizes. The time $t_{n-1}$ is the one thing that going backwards cannot compute when
    the steps vary in size; it is recorded (one scalar for each step).

    Only stable for the eigenvalues of the Jacobian on the imaginary axis (with $|h
    \lambda| \leq 1$), so not for problems with dissipation: the difference between
    odd and even steps then grows without bound.

    Not to be confused with the many other methods called "leapfrog", or with the
    midpoint method, the explicit Runge--Kutta method [`diffrax.Midpoint`][].

    ??? cite "Reference"

        ```bibtex
        @article{shampine2009stability,
            title={Stability of the leapfrog/midpoint method},
            author={L. F. Shampine},
            journal={Applied Mathematics and Computation},
            volume={208},
            number={1},
            pages={293-298},
            year={2009},
        }
        ```
    """

    shared_evaluations = (0,)

    def backward_step(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, DenseInfo, _SolverState]:
        del made_jump
        tm1, y0 = solver_state
        control = terms.contr(tm1, t1)
        ym1 = (y1**ω - terms.vf_prod(t0, y0, args, control) ** ω).ω
        dense_info = dict(y0=y0, y1=y1)
        return y0, dense_info, (tm1, ym1)

    def record_state(self, solver_state: _SolverState) -> RealScalarLike:
        tm1, _ = solver_state
        return tm1

    def restore_state(
        self,
        terms: AbstractTerm,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: _SolverState,
        recorded: PyTree,
        made_jump: BoolScalarLike,
    ) -> _SolverState:
        del terms, t1, y1, args, made_jump
        # `step` returned `(t0, y0)`. Its `t0` is known to `backward_step` anyway, so
        # that its place can be taken by the `tm1` that `backward_step` has to return.
        _, y0 = solver_state
        return recorded, y0


LeapfrogMidpoint.__init__.__doc__ = """**Arguments:** None"""
