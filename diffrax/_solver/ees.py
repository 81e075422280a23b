import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar

import equinox.internal as eqxi
import numpy as np
from equinox.internal import ω
from jaxtyping import Array, PyTree, Shaped

from .._custom_types import RealScalarLike, Y
from .._local_interpolation import ThirdOrderHermitePolynomialInterpolation
from .base import AbstractStratonovichSolver
from .runge_kutta import AbstractERK, ButcherTableau


def _tableau(a_lower: list[list[float]], b_sol: list[float]) -> ButcherTableau:
    """With Euler's method for the error estimate."""
    b_error = np.array(b_sol)
    b_error[0] -= 1
    return ButcherTableau(
        a_lower=tuple(map(np.array, a_lower)),
        b_sol=np.array(b_sol),
        b_error=b_error,
        c=np.array([sum(a_i) for a_i in a_lower]),
    )


@ft.cache
def _ees25_tableau(x: float) -> ButcherTableau:
    a21 = (1 + 2 * x) / (4 * (1 - x))
    a31 = (4 * x - 1) ** 2 / (4 * (x - 1) * (1 - 4 * x**2))
    a32 = (1 - x) / (1 - 4 * x**2)
    return _tableau([[a21], [a31, a32]], [x, 1 / 2, 1 / 2 - x])


_s = 2**0.5
_ees27_tableau = _tableau(
    [
        [(2 - _s) / 3],
        [(-4 + _s) / 24, (4 + _s) / 8],
        [(-176 + 145 * _s) / 168, 3 * (8 - 5 * _s) / 56, 3 * (3 - _s) / 7],
    ],
    [
        (5 - 3 * _s) / 14,
        (3 + _s) / 14,
        3 * (-1 + 2 * _s) / 14,
        (9 - 4 * _s) / 14,
    ],
)


class _TableauOfInstance:
    """The tableau for the `x` of an instance; of the class, that for the default."""

    def __get__(self, solver: Any, cls: Any) -> ButcherTableau:
        return _ees25_tableau(0.1 if solver is None else solver.x)


def _parabola(
    *,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y0: Y,
    y1: Y,
    k: PyTree[Shaped[Array, "order ?*y"], "Y"],
) -> ThirdOrderHermitePolynomialInterpolation:
    """Through both ends, and along the vector field at the start."""
    k0 = ω(k)[0].ω
    k1 = (2 * (y1**ω - y0**ω) - k0**ω).ω
    return ThirdOrderHermitePolynomialInterpolation(
        t0=t0, t1=t1, y0=y0, y1=y1, k0=k0, k1=k1
    )


class EES25(AbstractERK, AbstractStratonovichSolver):
    r"""The explicit and effectively symmetric method EES(2, 5; $x$).

    2nd order explicit Runge--Kutta method. Has an embedded Euler method for adaptive
    step sizing. Uses 3 stages. Uses 2nd order interpolation, a parabola, for dense/ts
    output.

    When used to solve SDEs, converges to the Stratonovich solution: with strong order
    0.5, or 1 if the noise is commutative.

    **Effectively symmetric**: a step of size $h$ and then one of size $-h$ miss the
    start by $O(h^6)$ alone, where those of another 2nd order method with three stages
    miss it by $O(h^4)$. So over a long time, the solution of a problem that is
    symmetric in time behaves nearly like that of a symmetric method.

    **What is reversed, and how well.** [`diffrax.ReversibleAdjoint`][] corrects the
    step back until it is exact up to rounding, as it does for every Runge--Kutta
    method; but here that takes no correction if $h^6$ is below rounding, and few
    otherwise. The authors of the method do not correct it. For their way of going back,
    use `FixedPointReversible(EES25(), max_corrections=0)`. Then the certificate of the
    adjoint tells how far off the steps are: with some states stored, as by default,
    those are made again for which that is too much; with `checkpoints=0` and
    `on_failure="ignore"`, the gradient is that of the authors, and
    [`diffrax.reversal_report`][] has its error.

    **Stability.** For $y' = a y$, a step multiplies by $1 + z + \frac{z^2}{2} +
    \frac{z^3}{8}$ with $z = h a$, whatever $x$ is. So it is stable on $[-3.087, 0]$;
    along the imaginary axis it grows slightly, by 0.8 percent at $i$.

    **Best at** oscillations and SDEs, if going back is to be cheap. For the accuracy of
    a solution, [`diffrax.Bosh3`][] does more with as many evaluations.

    ??? cite "Reference"

        ```bibtex
        @article{shmelev2025explicit,
            author={Shmelev, Daniil and Ebrahimi-Fard, Kurusch and Tapia, Nikolas and
                Salvi, Cristopher},
            title={Explicit and effectively symmetric {R}unge--{K}utta methods},
            journal={arXiv:2507.21006},
            year={2025},
        }
        ```
    """

    x: RealScalarLike = 0.1

    tableau: ClassVar[ButcherTableau] = _TableauOfInstance()  # pyright: ignore
    interpolation_cls: ClassVar[
        Callable[..., ThirdOrderHermitePolynomialInterpolation]
    ] = staticmethod(_parabola)

    def __init__(self, x: RealScalarLike = 0.1):
        if not isinstance(x, (int, float)):
            raise ValueError(
                f"`x` in `EES25(x=...)` must be a Python number, but got {x}. Its "
                "value has to be known in advance."
            )
        if not np.isfinite(x) or x in (-0.5, 0.5, 1):
            raise ValueError(
                f"Cannot use `EES25(x={x})`: there is no such method for `x` of -0.5, "
                "0.5, 1 and what is not finite. Consider using the default, 0.1."
            )
        self.scan_kind = None
        self.x = x

    def order(self, terms):
        del terms
        return 2

    def strong_order(self, terms):
        del terms
        return 0.5


EES25.__init__.__doc__ = """**Arguments:**

- `x`: The parameter of this family of methods, a float.

**Raises:**

`ValueError` for those `x` at which the tableau is singular: -0.5, 0.5 and 1.
"""


class EES27(AbstractERK, AbstractStratonovichSolver):
    r"""The explicit and effectively symmetric method EES(2, 7; $x$), for $x = (5 - 3
    \sqrt{2}) / 14$.

    2nd order explicit Runge--Kutta method. Has an embedded Euler method for adaptive
    step sizing. Uses 4 stages. Uses 2nd order interpolation, a parabola, for dense/ts
    output.

    When used to solve SDEs, converges to the Stratonovich solution: with strong order
    0.5, or 1 if the noise is commutative.

    Everything that is said of [`diffrax.EES25`][] is so here, with one stage more for
    two orders more: a step of size $h$ and then one of size $-h$ miss the start by
    $O(h^8)$. For $y' = a y$, a step multiplies by $1 + z + \frac{z^2}{2} + \frac{2 -
    \sqrt{2}}{4} z^3 + \frac{3 - 2 \sqrt{2}}{8} z^4$ with $z = h a$. So it is stable on
    $[-3.916, 0]$; along the imaginary axis it grows slightly, by 0.02 percent at $i$.

    ??? cite "Reference"

        ```bibtex
        @article{shmelev2025explicit,
            author={Shmelev, Daniil and Ebrahimi-Fard, Kurusch and Tapia, Nikolas and
                Salvi, Cristopher},
            title={Explicit and effectively symmetric {R}unge--{K}utta methods},
            journal={arXiv:2507.21006},
            year={2025},
        }
        ```
    """

    tableau: ClassVar[ButcherTableau] = _ees27_tableau
    interpolation_cls: ClassVar[
        Callable[..., ThirdOrderHermitePolynomialInterpolation]
    ] = staticmethod(_parabola)

    def order(self, terms):
        del terms
        return 2

    def strong_order(self, terms):
        del terms
        return 0.5


eqxi.doc_remove_args("scan_kind")(EES27.__init__)
EES27.__init__.__doc__ = """**Arguments:** None"""
