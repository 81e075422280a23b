import abc
from collections.abc import Callable
from typing import ClassVar, TYPE_CHECKING, TypeAlias

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx


if TYPE_CHECKING:
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar
from equinox.internal import ω
from jaxtyping import Array, PyTree

from .._custom_types import (
    Args,
    BoolScalarLike,
    Control,
    DenseInfo,
    RealScalarLike,
    VF,
    Y,
)
from .._heuristics import is_sde
from .._local_interpolation import (
    LocalLinearInterpolation,
    ThirdOrderHermitePolynomialInterpolation,
)
from .._root_to_rounding import leaf_sizes, RootToRounding
from .._solution import RESULTS
from .._term import AbstractTerm
from .base import (
    AbstractAdaptiveSolver,
    AbstractImplicitSolver,
    AbstractReversibleSolver,
    AbstractStratonovichSolver,
)
from .reversible import _combine, _negative


_SolverState: TypeAlias = None
_Matrix: TypeAlias = tuple[tuple[float, ...], ...]

# The nodes are the roots of Legendre's polynomials, moved to [0, 1].
_r = 3**0.5 / 6
_midpoint_a = ((0.5,),)
_midpoint_b = np.array([1.0])
_gauss4_a = ((0.25, 0.25 - _r), (0.25 + _r, 0.25))
_gauss4_b = np.array([0.5, 0.5])
# Of second order, by the quadrature with the nodes 0 and `1 / 2 + _r`.
_w = 1 / (1 + 2 * _r)
_gauss4_error = np.array([_w - 1, 0.5, 0.5 - _w])
# The value at 1 of a parabola with given values at the nodes 0, `1 / 2 - _r` and
# `1 / 2 + _r`.
_gauss4_end = np.array([1.0, -(3**0.5), 3**0.5])


class _StageEquations(eqx.Module):
    """That each stage is the vector field, where it leads to, times the control."""

    a: _Matrix = eqx.field(static=True)

    def __call__(self, k: list[PyTree[Array]], inputs: PyTree) -> list[PyTree[Array]]:
        terms, t0, t1, y0, args, control = inputs
        k = [_to_complex(k_i, y0) for k_i in k]
        out = []
        for a_i, k_i in zip(self.a, k, strict=True):
            t_i = t0 + sum(a_i) * (t1 - t0)
            y_i = (y0**ω + _combine(np.array(a_i), k) ** ω).ω
            equation = (k_i**ω - terms.vf_prod(t_i, y_i, args, control) ** ω).ω
            out.append(_to_real(equation))
        return out


# A vector field of complex numbers need not have a complex derivative.


def _to_real(y: Y) -> PyTree[Array]:
    is_complex = jnp.iscomplexobj
    return jtu.tree_map(
        lambda x: jnp.stack([x.real, x.imag]) if is_complex(x) else x, y
    )


def _to_complex(y: PyTree[Array], like: Y) -> Y:
    is_complex = jnp.iscomplexobj
    return jtu.tree_map(
        lambda x, x2: lax.complex(x[0], x[1]) if is_complex(x2) else x, y, like
    )


class AbstractGaussLegendre(
    AbstractImplicitSolver,
    AbstractAdaptiveSolver,
    AbstractReversibleSolver,
    AbstractStratonovichSolver,
):
    """The fully implicit Runge--Kutta methods of the highest order."""

    _a: AbstractClassVar[_Matrix]
    _b: AbstractClassVar[np.ndarray]

    term_structure: ClassVar = AbstractTerm

    def strong_order(self, terms: PyTree[AbstractTerm]) -> RealScalarLike:
        del terms
        return 0.5

    def init(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> _SolverState:
        del terms, t0, t1, y0, args
        return None

    def step(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y, DenseInfo, _SolverState, RESULTS]:
        del solver_state, made_jump
        control = terms.contr(t0, t1)
        k0, k, result = self._stages(terms, t0, t1, y0, args, control)
        y1 = (y0**ω + _combine(self._b, k) ** ω).ω
        dense_info = self._dense_info(y0, y1, k0, k)
        return y1, self._error(k0, k), dense_info, None, result

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
        """The same step in the opposite direction: its stages are the negatives of
        those of `step`."""
        del solver_state, made_jump
        control = terms.contr(t0, t1)
        _, k, _ = self._stages(terms, t1, t0, y1, args, _negative(control))
        y0 = (y1**ω + _combine(self._b, k) ** ω).ω
        k0 = terms.vf_prod(t0, y0, args, control)
        k = [_negative(k_i) for k_i in reversed(k)]
        return y0, self._dense_info(y0, y1, k0, k), None

    def func(self, terms: AbstractTerm, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        return terms.vf(t0, y0, args)

    def _stages(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        control: Control,
    ) -> tuple[Y, list[Y], RESULTS]:
        """The increment at the start, the first guess at each stage; and the stages."""
        k0 = terms.vf_prod(t0, y0, args, control)
        guess, size = _to_real(k0), leaf_sizes(y0, k0)
        sol = optx.root_find(
            _StageEquations(self._a),
            self.root_finder,
            [guess for _ in self._a],
            (terms, t0, t1, y0, args, control),
            options=dict(size=[lax.stop_gradient(size) for _ in self._a]),
            throw=False,
            max_steps=self.root_find_max_steps,
        )
        k = [_to_complex(k_i, y0) for k_i in sol.value]
        return k0, k, RESULTS.promote(sol.result)

    @abc.abstractmethod
    def _error(self, k0: Y, k: list[Y]) -> Y:
        """The error estimate."""

    @abc.abstractmethod
    def _dense_info(self, y0: Y, y1: Y, k0: Y, k: list[Y]) -> DenseInfo:
        """What the interpolation needs."""


class ImplicitMidpoint(AbstractGaussLegendre):
    r"""Implicit midpoint method.

    $$y_1 = y_0 + h f\left(t_0 + \tfrac{h}{2}, \tfrac{1}{2} (y_0 + y_1)\right)$$

    2nd order implicit method, the Gauss--Legendre method of one stage. Has an embedded
    Euler method for adaptive step sizing. Uses 1st order local linear interpolation for
    dense/ts output.

    When used to solve SDEs, converges to the Stratonovich solution: with strong order
    0.5, or 1 if the noise is commutative.

    **What is preserved.** Symplectic, for every Hamiltonian system, separable or not.
    Quadratic invariants (angular momenta, norms) are conserved up to rounding. For $y'
    = a y$ a step multiplies by $\frac{1 + z/2}{1 - z/2}$ with $z = h a$, which is of
    modulus less than one in the whole left half-plane (A-stable), and one on the
    imaginary axis.

    **What is reversed, and how well.** Symmetric: the same method with the step $-h$
    undoes a step, and its stages are the same. This is exact up to rounding, as the
    equations are solved up to rounding by default; it takes the solution of these
    equations once more. With another `root_finder`, it is exact up to its tolerance.

    **Best at** Hamiltonian systems that are not separable, over long times; at keeping
    a quadratic invariant; and at moderately stiff problems without strong damping.

    !!! warning "When not to use this"

        If an explicit method is stable with the steps that you want: each step here
        takes a Jacobian and some five evaluations of the vector field. On very stiff
        problems fast modes are not damped, but change sign at every step: there
        [`diffrax.Kvaerno5`][] is better. In a step of a large state, the Jacobian is
        what takes the memory; see `root_finder`.

    ??? cite "Reference"

        ```bibtex
        @book{hairer2006geometric,
            author={Hairer, Ernst and Lubich, Christian and Wanner, Gerhard},
            title={Geometric Numerical Integration},
            edition={Second},
            publisher={Springer},
            year={2006},
            note={Sections II.1.3, V.2, VI.4, VIII.6},
        }
        ```
    """

    root_finder: optx.AbstractRootFinder = RootToRounding()
    root_find_max_steps: int = 50

    _a: ClassVar[_Matrix] = _midpoint_a
    _b: ClassVar[np.ndarray] = _midpoint_b
    interpolation_cls: ClassVar[Callable[..., LocalLinearInterpolation]] = (
        LocalLinearInterpolation
    )

    def order(self, terms: PyTree[AbstractTerm]) -> int:
        del terms
        return 2

    def _error(self, k0: Y, k: list[Y]) -> Y:
        return (k[0] ** ω - k0**ω).ω

    def _dense_info(self, y0: Y, y1: Y, k0: Y, k: list[Y]) -> DenseInfo:
        del k0, k
        return dict(y0=y0, y1=y1)


class GaussLegendre4(AbstractGaussLegendre):
    r"""The Gauss--Legendre method of two stages.

    4th order implicit method. Has an embedded 2nd order method for adaptive step
    sizing. Uses 4th order interpolation for dense/ts output, by the polynomial of third
    degree which has the vector field as its derivative at the start and at both stages.

    When used to solve SDEs, converges to the Stratonovich solution: with strong order
    0.5, or 1 if the noise is commutative.

    Everything that is said of [`diffrax.ImplicitMidpoint`][] is so here: symplectic,
    symmetric, A-stable, and conserves quadratic invariants. For $y' = a y$ a step
    multiplies by $\frac{1 + z/2 + z^2/12}{1 - z/2 + z^2/12}$ with $z = h a$. The
    equations of a step have twice as many unknowns.

    ??? cite "Reference"

        ```bibtex
        @book{hairer2006geometric,
            author={Hairer, Ernst and Lubich, Christian and Wanner, Gerhard},
            title={Geometric Numerical Integration},
            edition={Second},
            publisher={Springer},
            year={2006},
            note={Sections II.1.3, V.2, VI.4, VIII.6},
        }
        ```
    """

    root_finder: optx.AbstractRootFinder = RootToRounding()
    root_find_max_steps: int = 50

    _a: ClassVar[_Matrix] = _gauss4_a
    _b: ClassVar[np.ndarray] = _gauss4_b
    interpolation_cls: ClassVar[
        Callable[..., ThirdOrderHermitePolynomialInterpolation]
    ] = ThirdOrderHermitePolynomialInterpolation

    def order(self, terms: PyTree[AbstractTerm]) -> int:
        del terms
        return 4

    def error_order(self, terms: PyTree[AbstractTerm]) -> RealScalarLike | None:
        return super().error_order(terms) if is_sde(terms) else 3

    def _error(self, k0: Y, k: list[Y]) -> Y:
        return _combine(_gauss4_error, [k0, *k])

    def _dense_info(self, y0: Y, y1: Y, k0: Y, k: list[Y]) -> DenseInfo:
        return dict(y0=y0, y1=y1, k0=k0, k1=_combine(_gauss4_end, [k0, *k]))


ImplicitMidpoint.__init__.__doc__ = GaussLegendre4.__init__.__doc__ = """**Arguments:**

- `root_finder`: an [Optimistix](https://github.com/patrick-kidger/optimistix) root
    finder to solve the equations of each step. By default, by a chord method up to
    rounding, whatever the tolerances of the step size controller. It forms the Jacobian
    of the vector field; for a large state pass, for example,
    `optimistix.Newton(rtol=1e-12, atol=1e-12, linear_solver=lineax.GMRES(1e-3, 1e-3))`.
- `root_find_max_steps`: the maximum number of steps that the root finder is allowed to
    make before the step is rejected; or, with constant steps, before the solve fails.
"""
