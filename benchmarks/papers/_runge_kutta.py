"""The Runge--Kutta methods of the papers that Diffrax does not have."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import numpy as np
from jaxtyping import Array


def _no_error(num_stages: int) -> np.ndarray:
    return np.zeros(num_stages)


class _FixedStep(diffrax.AbstractERK):
    """Without an error estimate."""

    interpolation_cls: ClassVar[
        Callable[..., diffrax.ThirdOrderHermitePolynomialInterpolation]
    ] = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k


class Ralston3(_FixedStep):
    """Ralston's method of order 3."""

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(np.array([1 / 2]), np.array([0, 3 / 4])),
        b_sol=np.array([2 / 9, 1 / 3, 4 / 9]),
        b_error=_no_error(3),
        c=np.array([1 / 2, 3 / 4]),
    )

    def order(self, terms):
        del terms
        return 3


class RK4(_FixedStep):
    """The Runge--Kutta method of order 4."""

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(np.array([1 / 2]), np.array([0, 1 / 2]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=_no_error(4),
        c=np.array([1 / 2, 1 / 2, 1.0]),
    )

    def order(self, terms):
        del terms
        return 4


class Unrolled(diffrax.AbstractAdaptiveSolver):
    """An explicit Runge--Kutta method the stages of which are written out one after the
    other, with nothing carried from step to step. That is less to run than Diffrax's
    loop over the stages, and is what McCallum and Foster compare with."""

    method: diffrax.AbstractERK

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., diffrax.LocalLinearInterpolation]] = (
        diffrax.LocalLinearInterpolation
    )

    def order(self, terms):
        return self.method.order(terms)

    def init(self, terms, t0, t1, y0, args):
        del terms, t0, t1, y0, args
        return None

    def step(self, terms, t0, t1, y0: Array, args, solver_state, made_jump):
        del solver_state, made_jump
        tableau: Any = self.method.tableau
        control = terms.contr(t0, t1)
        k = [terms.vf_prod(t0, y0, args, control)]
        for a_i, c_i in zip(tableau.a_lower, tableau.c, strict=True):
            y_i = y0 + _combine(a_i, k)
            k.append(terms.vf_prod(t0 + float(c_i) * (t1 - t0), y_i, args, control))
        y1 = y0 + _combine(tableau.b_sol, k)
        error = _combine(tableau.b_error, k) if np.any(tableau.b_error) else None
        return y1, error, dict(y0=y0, y1=y1), None, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


def _combine(coefficients: np.ndarray, k: list[Array]) -> Any:
    return sum(float(c) * k_i for c, k_i in zip(coefficients, k) if c != 0)
