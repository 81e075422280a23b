from collections.abc import Callable
from typing import ClassVar, TypeAlias

import jax.numpy as jnp
import jax.tree_util as jtu
from equinox.internal import ω
from jaxtyping import PyTree

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, VF, Y
from .._evaluate_where import evaluate_where
from .._heuristics import is_sde
from .._local_interpolation import ThirdOrderHermitePolynomialInterpolation
from .._solution import RESULTS
from .._term import AbstractTerm
from .base import (
    AbstractAdaptiveSolver,
    AbstractReversibleSolver,
    AbstractStratonovichSolver,
)


# The second state `v`.
_SolverState: TypeAlias = PyTree


class AsynchronousLeapfrog(
    AbstractAdaptiveSolver, AbstractReversibleSolver, AbstractStratonovichSolver
):
    r"""Asynchronous leapfrog method, which MALI is built on.

    Carries along a second state $v$ that follows the vector field, and starts as $v_0 =
    f(t_0, y_0)$. With $h = t_1 - t_0$ and the damping parameter $\eta$, one step is

    $$y_m = y_0 + \frac{h}{2} v_0, \qquad u = f(t_0 + \frac{h}{2}, y_m), \qquad
    v_1 = v_0 + 2 \eta (u - v_0), \qquad y_1 = y_m + \frac{h}{2} v_1.$$

    2nd order method for $\eta = 1$; 1st order with damping ($\eta < 1$), as $v$ then
    lags behind the vector field by $\frac{1 - \eta}{2 \eta} h$ in time. Uses 1
    evaluation of the vector field for each step. Has an error estimate for adaptive
    step sizing: $\frac{h}{2} (u - v_0)$, half of how far it is from Euler's method.
    Uses 3rd order Hermite interpolation for dense/ts output, with $v$ as the
    derivative.

    When used to solve SDEs, converges to the Stratonovich solution for $\eta = 1$: with
    strong order 0.5, or 1 if the noise is commutative. With damping it does not
    converge at all, unless the noise is additive; so that is refused.

    **What is reversed, and how well.** `backward_step` takes one evaluation of the
    vector field and is exact up to rounding, for any step sizes. Going back over $n$
    steps multiplies that rounding by up to $|1 - 2 \eta|^{-n}$: not at all without
    damping, but for $\eta = 0.9$ by $10^{10}$ over 100 steps. The exception is a jump
    (`made_jump=True`), where $v$ is evaluated anew. What it was before that is
    forgotten, so that the step before a jump cannot be undone:
    [`diffrax.ReversibleAdjoint`][] makes it again.

    **Stability.** For $y' = a y$ this is stable if $h a$ is inside of an ellipse around
    $-\frac{1 - \eta}{\eta}$, of half-axes $\frac{1 - \eta}{\eta}$ along the real axis
    and 1 along the imaginary one. So for $\eta = 1$ between $-i$ and $i$ alone; for
    $\eta = 0.9$ the real interval is $[-0.22, 0]$.

    **Best at** cheap steps at loose tolerances, and oscillations without damping.

    !!! warning "When not to use this"

        For problems with dissipation: without damping, $v$ there swings about the
        vector field ever more widely. Damping helps against that at the cost of the
        order, and of going back over many steps.

    ??? cite "References"

        ```bibtex
        @article{mutze2013asynchronous,
            author={Mutze, Ulrich},
            title={An asynchronous leapfrog method II},
            journal={arXiv:1311.6602},
            year={2013},
        }

        @inproceedings{zhuang2021mali,
            author={Zhuang, Juntang and Dvornek, Nicha C. and Tatikonda, Sekhar and
                Duncan, James S.},
            title={{MALI}: {A} memory efficient and reverse accurate integrator for
                {N}eural {ODE}s},
            booktitle={International Conference on Learning Representations},
            year={2021},
        }
        ```
    """

    eta: RealScalarLike = 1.0

    term_structure: ClassVar = AbstractTerm
    interpolation_cls: ClassVar[
        Callable[..., ThirdOrderHermitePolynomialInterpolation]
    ] = ThirdOrderHermitePolynomialInterpolation
    shared_evaluations = (0,)

    def __check_init__(self):
        if not isinstance(self.eta, (int, float)):
            raise ValueError(
                "`eta` in `AsynchronousLeapfrog(eta=...)` must be a Python number, but "
                f"got {self.eta}. Its value has to be known in advance."
            )
        if not 0 < self.eta <= 1 or self.eta == 0.5:
            raise ValueError(
                "Must have `0 < eta <= 1` and not `eta == 0.5` in "
                f"`AsynchronousLeapfrog(eta=...)`, but got {self.eta}. One half is the "
                "value for which a step cannot be undone; those just below one are the "
                "usual ones."
            )

    def order(self, terms: PyTree[AbstractTerm]) -> int:
        del terms
        # With damping, `v` lags behind by a part of `h`.
        return 2 if self.eta == 1 else 1

    def strong_order(self, terms: PyTree[AbstractTerm]) -> RealScalarLike:
        del terms
        return 0.5

    def error_order(self, terms: PyTree[AbstractTerm]) -> RealScalarLike | None:
        if is_sde(terms):
            return super().error_order(terms)
        return 2

    def init(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> _SolverState:
        del t1
        if self.eta != 1 and is_sde(terms):
            raise ValueError(
                f"Cannot use `AsynchronousLeapfrog(eta={self.eta})` to solve an SDE: "
                "with damping it does not converge to the solution. Consider using "
                "`AsynchronousLeapfrog()` instead."
            )
        return terms.vf(t0, y0, args)

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
        v0 = evaluate_where(made_jump, lambda: terms.vf(t0, y0, args), solver_state)
        control = terms.contr(t0, t1)
        k0 = terms.prod(v0, control)
        ym = (y0**ω + 0.5 * k0**ω).ω
        u = terms.vf(_middle(t0, t1), ym, args)
        change = (u**ω - v0**ω).ω
        v1 = (v0**ω + 2 * self.eta * change**ω).ω
        k1 = terms.prod(v1, control)
        y1 = (ym**ω + 0.5 * k1**ω).ω
        y_error = (0.5 * terms.prod(change, control) ** ω).ω
        dense_info = dict(y0=y0, y1=y1, k0=k0, k1=k1)
        return y1, y_error, dense_info, v1, RESULTS.successful

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
        del made_jump  # Whatever `v0` was, `step` did not make use of it.
        v1 = solver_state
        control = terms.contr(t0, t1)
        k1 = terms.prod(v1, control)
        ym = (y1**ω - 0.5 * k1**ω).ω
        u = terms.vf(_middle(t0, t1), ym, args)
        damping = 1 - 2 * self.eta
        v0 = ((v1**ω - 2 * self.eta * u**ω) / damping).ω
        k0 = terms.prod(v0, control)
        y0 = (ym**ω - 0.5 * k0**ω).ω
        dense_info = dict(y0=y0, y1=y1, k0=k0, k1=k1)
        return y0, dense_info, v0

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
        del terms, t1, y1, args, recorded
        if made_jump is False:
            return solver_state
        # The step after a jump starts with another `v`, and nothing is left of this
        # one. `ReversibleAdjoint` then makes the step again.
        return jtu.tree_map(lambda x: jnp.where(made_jump, jnp.nan, x), solver_state)

    def func(self, terms: AbstractTerm, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        return terms.vf(t0, y0, args)


AsynchronousLeapfrog.__init__.__doc__ = """**Arguments:**

- `eta`: The damping parameter $\\eta$: a float with `0 < eta <= 1` other than 0.5. The
    default of 1 is no damping.

**Raises:**

`ValueError` if `eta` is none of these, or (when solving) for an SDE with damping.
"""


def _middle(t0: RealScalarLike, t1: RealScalarLike) -> RealScalarLike:
    return t0 + 0.5 * (t1 - t0)
