from collections.abc import Callable
from typing import Any

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
        y: Any = list(y1)
        for half, increment in reversed(self.shears(terms, t0, t1, args)):
            y[half] = (y[half] ** ω - increment(y) ** ω).ω
        y0 = tuple(y)
        return y0, dict(y0=y0, y1=y1), None

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
