from collections.abc import Callable

from equinox.internal import ω

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike
from .._term import AbstractTerm
from ._upstream_semi_implicit_euler import (
    _ErrorEstimate as _ErrorEstimate,
    _SolverState as _SolverState,
    SemiImplicitEuler as _SemiImplicitEuler,
    Ya as Ya,
    Yb as Yb,
)
from .base import AbstractReversibleSolver


class SemiImplicitEuler(_SemiImplicitEuler, AbstractReversibleSolver):
    """Semi-implicit Euler's method.

    Symplectic method of 1st order, for a pair of states each of which drives the other.
    Does not support adaptive step sizing. Uses 1st order local linear interpolation for
    dense/ts output.

    Algebraically reversible: `backward_step` subtracts the two increments in the
    opposite order, with one evaluation of each of the two vector fields, and is exact
    up to rounding for any step size. (Stepping forward with a negative step is not its
    inverse, but that of the method with the two updates in the opposite order.)

    Not for systems with damping, nor where the error has to be controlled: there is no
    error estimate.

    ??? cite "Reference"

        ```bibtex
        @book{hairer2013geometric,
          title={Geometric Numerical Integration: Structure-Preserving Algorithms for
                 Ordinary Differential Equations},
          author={Hairer, E. and Lubich, C. and Wanner, G.},
          isbn={9783662050187},
          series={Springer Series in Computational Mathematics},
          year={2013},
          publisher={Springer Berlin Heidelberg}
        }
        ```
    """

    shared_evaluations = (0,)

    def backward_step(
        self,
        terms: tuple[AbstractTerm, AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: tuple[Ya, Yb],
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[tuple[Ya, Yb], DenseInfo, _SolverState]:
        del solver_state, made_jump

        term_1, term_2 = terms
        y1_1, y1_2 = y1

        control1 = term_1.contr(t0, t1)
        control2 = term_2.contr(t0, t1)
        y0_2 = (y1_2**ω - term_2.vf_prod(t0, y1_1, args, control2) ** ω).ω
        y0_1 = (y1_1**ω - term_1.vf_prod(t0, y0_2, args, control1) ** ω).ω

        y0 = (y0_1, y0_2)
        dense_info = dict(y0=y0, y1=y1)
        return y0, dense_info, None

    def shears(
        self,
        terms: tuple[AbstractTerm, AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        args: Args,
    ) -> list[tuple[int, Callable]]:
        controls = [term.contr(t0, t1) for term in terms]

        def shear(i):
            return lambda y: terms[i].vf_prod(t0, y[1 - i], args, controls[i])

        return [(0, shear(0)), (1, shear(1))]


SemiImplicitEuler.__init__.__doc__ = """**Arguments:** None"""
