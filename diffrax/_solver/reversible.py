import functools as ft
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from equinox.internal import ω
from jaxtyping import Array, Int, PyTree

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
from .._local_interpolation import AbstractLocalInterpolation
from .._solution import RESULTS
from .._term import AbstractTerm
from .base import (
    AbstractAdaptiveSolver,
    AbstractItoSolver,
    AbstractReversibleSolver,
    AbstractSolver,
    AbstractWrappedSolver,
)
from .euler import Euler
from .runge_kutta import AbstractERK, AbstractRungeKutta, ButcherTableau


class _History(eqx.Module):
    """What the solve has been like so far, for each leaf of `y`: that against which to
    judge the gap. Every step can be added to it, and taken away from it again."""

    num_steps: Int[Array, ""]
    # The sum of the mean squares of the solution after each step.
    squares: PyTree[Array]
    # The sum of the norms of the error estimates, damped in each step as the gap is.
    errors: PyTree[Array]

    @classmethod
    def start(cls, y0: Y) -> "_History":
        squares = jtu.tree_map(_mean_square, y0)
        return cls(jnp.asarray(1), squares, jtu.tree_map(jnp.zeros_like, squares))

    def add(self, y1: Y, error: Y, damping: RealScalarLike) -> "_History":
        squares = (self.squares**ω + ω(y1).call(_mean_square)).ω
        errors = (damping * self.errors**ω + ω(error).call(_norm)).ω
        return _History(self.num_steps + 1, squares, errors)

    def remove(self, y1: Y, error: Y, damping: RealScalarLike) -> "_History":
        squares = (self.squares**ω - ω(y1).call(_mean_square)).ω
        errors = ((self.errors**ω - ω(error).call(_norm)) / damping).ω
        return _History(self.num_steps - 1, squares, errors)


# The second state `z`, and the history.
_SolverState: TypeAlias = tuple[PyTree, _History]

# Euler's method together with an evaluation at the end of the step, as in any FSAL
# method. `UReversible` has that evaluation anyway; half the difference to Heun's method
# is the error estimate.
_euler_tableau = ButcherTableau(
    a_lower=(np.array([1.0]),),
    b_sol=np.array([1.0, 0.0]),
    b_error=np.array([0.5, -0.5]),
    c=np.array([1.0]),
)

# How much of the gap is part of the error estimate: with 0.1 an adaptive step size
# controller keeps the gap below 10 times the tolerance. A weight of 1 makes the error
# that is to be expected from the tolerance, accumulated over many steps, a reason to
# reject steps.
_gap_weight = 0.1


class UReversible(
    AbstractAdaptiveSolver, AbstractReversibleSolver, AbstractWrappedSolver
):
    r"""Makes an explicit Runge--Kutta method algebraically reversible, by coupling it
    with a second copy of the state.

    With $\Psi_h(t, y)$ the increment of the wrapped method over a step of size $h$,
    $\lambda$ the coupling parameter and $z$ the second state ($z = y$ at the start),
    one step is

    $$y_1 = \lambda y_0 + (1 - \lambda) z_0 + \Psi_h(t_0, z_0)$$

    $$z_1 = z_0 - \Psi_{-h}(t_1, y_1)$$

    and the same two equations, solved for $z_0$ and then for $y_0$, undo it. For
    controlled and stochastic differential equations the increment of the control takes
    the place of $h$.

    The order of convergence is that of the wrapped method. Each step makes twice its
    evaluations of the vector field, forward and backward alike; an error estimate and
    an interpolation of the same order as those of the wrapped method come with that.
    When solving SDEs, converges to the Stratonovich solution if the wrapped method
    does.

    **What is reversed, and how well.** `backward_step` is exact up to rounding, for any
    step sizes. Going back over $n$ steps multiplies that rounding by up to
    $\lambda^{-n}$: with the default coupling parameter by $e^{10}$ over 10,000 steps.
    For more steps choose a coupling parameter nearer to one, so that $n (1 - \lambda)$
    stays below 10 or so.

    !!! example

        ```python
        import diffrax
        import jax.numpy as jnp

        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]])),
            diffrax.UReversible(diffrax.Tsit5()),
            t0=0,
            t1=1,
            dt0=0.01,
            y0=jnp.array([0.0, 1.0]),
            adjoint=diffrax.ReversibleAdjoint(),
        )
        assert jnp.allclose(sol.ys[-1, 0], jnp.sin(1.0), rtol=1e-5)
        ```

    !!! warning "When not to use this"

        The coupled pair has a second, spurious mode of solution. Where the solution of
        $y' = a y$ decays ($a < 0$) this mode is damped only if
        $h |a| \leq -\ln \lambda$, which for the default coupling parameter is 0.001,
        whatever the order of the wrapped method. So this is a solver for oscillating,
        growing, or slowly decaying dynamics; not for dissipative or stiff ones, nor for
        chaotic ones with a strong contraction.

        The gap $y - z$ shows this mode (about half of it is the resulting error of
        $y$), so that it does not go unnoticed:

        - it is part of the error estimate, so that an adaptive step size controller
            chooses steps that are small enough to keep it near the tolerance. That can
            be very many steps;
        - a solve fails (with `RESULTS.nonlinear_divergence`, or `RESULTS.nonfinite`) if
            the gap exceeds `max_gap` times the root-mean-square value of the solution
            so far, unless that can be put down to the error estimates: to steps that
            are large, rather than unstable. (Around Euler's method, which cannot tell
            the two apart, if it exceeds 30 times as much.) Each leaf of `y0` counts for
            itself, but not each entry: values of very different sizes belong into
            leaves of their own, or else a gap that is large for a small one of them
            does not fail a solve with constant steps.

    ??? cite "Reference"

        ```bibtex
        @article{mccallum2024efficient,
            author={McCallum, Sam and Foster, James},
            title={Efficient, Accurate and Stable Gradients for Neural ODEs},
            journal={arXiv:2410.11648},
            year={2024},
        }
        ```
    """

    solver: AbstractSolver
    coupling_parameter: RealScalarLike = 0.999
    max_gap: RealScalarLike = 0.1

    def __check_init__(self):
        name = type(self.solver).__name__
        if isinstance(self.solver, type):
            name = self.solver.__name__
            raise ValueError(
                f"Cannot use `UReversible({name})`: pass an instance of the method, "
                f"`UReversible({name}())`."
            )
        if isinstance(self.solver, AbstractWrappedSolver):
            raise ValueError(
                f"Cannot use `UReversible({name}(...))`: it wraps explicit "
                "Runge--Kutta methods, not other wrappers. Wrap the method itself, and "
                "apply the other wrapper to the result, for example "
                "`HalfSolver(UReversible(Heun()))`."
            )
        if not isinstance(self.solver, (AbstractERK, Euler)):
            raise ValueError(
                f"Cannot use `UReversible({name}())`: only explicit Runge--Kutta "
                "methods can be wrapped, for example `UReversible(Tsit5())`."
            )
        if isinstance(self.solver, AbstractERK):
            if not isinstance(self.solver.tableau, ButcherTableau):
                raise ValueError(
                    f"Cannot use `UReversible({name}())`: only methods with a single "
                    "Butcher tableau can be wrapped."
                )
            if type(self.solver).step is not AbstractRungeKutta.step:
                raise ValueError(
                    f"Cannot use `UReversible({name}())`: its `step` is not that of "
                    "its Butcher tableau. Consider subclassing "
                    "`diffrax.AbstractReversibleSolver` instead."
                )
        for name in ("coupling_parameter", "max_gap"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)):
                raise ValueError(
                    f"`{name}` in `UReversible(solver, {name}=...)` must be a Python "
                    f"number, but got {value}. Its value has to be known in advance."
                )
        if not 0 < self.coupling_parameter < 1:
            raise ValueError(
                "Must have `0 < coupling_parameter < 1` in `UReversible(solver, "
                f"coupling_parameter)`, but got {self.coupling_parameter}. Values just "
                "below one, such as the default of 0.999, are usual."
            )
        if not self.max_gap > 0:
            raise ValueError(
                "Must have `max_gap > 0` in `UReversible(solver, max_gap=...)`, but "
                f"got {self.max_gap}. Pass `max_gap=float('inf')` to never fail a "
                "solve."
            )

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self) -> Callable[..., AbstractLocalInterpolation]:  # pyright: ignore
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def scan_kind(self):
        # `DirectAdjoint` and `ForwardMode` set this on everything that looks like a
        # Runge--Kutta method, if it is `None`. Our stages are unrolled: there is no
        # loop here that would need to be differentiated in some other way.
        return "lax"

    @property
    def shared_evaluations(self) -> tuple[int, ...]:
        # `backward_step` makes the two halves of `step` in the opposite order.
        num_stages = _num_stages(self._tableau)
        return (*range(num_stages, 2 * num_stages), *range(num_stages))

    @property
    def _tableau(self) -> ButcherTableau:
        if isinstance(self.solver, Euler):
            return _euler_tableau
        else:
            assert isinstance(self.solver, AbstractERK)
            assert isinstance(self.solver.tableau, ButcherTableau)
            return self.solver.tableau

    def order(self, terms: PyTree[AbstractTerm]) -> int | None:
        return self.solver.order(terms)

    def strong_order(self, terms: PyTree[AbstractTerm]) -> RealScalarLike | None:
        return self.solver.strong_order(terms)

    def error_order(self, terms: PyTree[AbstractTerm]) -> RealScalarLike | None:
        return self.solver.error_order(terms)

    def init(
        self,
        terms: AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> _SolverState:
        del t0, t1, args
        if is_sde(terms) and isinstance(self.solver, AbstractItoSolver):
            raise ValueError(
                f"Cannot use `UReversible({type(self.solver).__name__}())` to solve an "
                "SDE: it converges to the Itô solution, and only methods that converge "
                "to the Stratonovich solution can be made reversible like this. "
                "Consider using `UReversible(Heun())`, together with the Stratonovich "
                "form of the SDE."
            )
        return y0, _History.start(y0)

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
        del made_jump  # No vector field is carried over from the last step.
        z0, history0 = solver_state
        tableau = self._tableau
        control = terms.contr(t0, t1)

        k = _stages(tableau, terms, t0, t1, z0, args, control)
        gap0 = (y0**ω - z0**ω).ω
        increment = _combine(tableau.b_sol, k)
        y1 = (z0**ω + self.coupling_parameter * gap0**ω + increment**ω).ω

        k_back = _stages(tableau, terms, t1, t0, y1, args, _negative(control))
        z1 = (z0**ω - _combine(tableau.b_sol, k_back) ** ω).ω
        gap1 = (y1**ω - z1**ω).ω

        k = _last_stage(tableau, k, k_back)
        error = _combine(tableau.b_error, k)
        history1 = history0.add(y1, error, self.coupling_parameter)
        max_gaps = self._max_gaps(increment, history1)
        y_error = jtu.tree_map(self._error, error, gap0, gap1, max_gaps)
        result = self._result(gap1, max_gaps)
        dense_info = self._dense_info(y0, y1, gap0, k)
        return y1, y_error, dense_info, (z1, history1), result

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
        z1, history1 = solver_state
        tableau = self._tableau
        control = terms.contr(t0, t1)

        k_back = _stages(tableau, terms, t1, t0, y1, args, _negative(control))
        z0 = (z1**ω + _combine(tableau.b_sol, k_back) ** ω).ω
        k = _stages(tableau, terms, t0, t1, z0, args, control)
        increment = _combine(tableau.b_sol, k)
        gap0 = ((y1**ω - z0**ω - increment**ω) / self.coupling_parameter).ω
        y0 = (z0**ω + gap0**ω).ω

        k = _last_stage(tableau, k, k_back)
        error = _combine(tableau.b_error, k)
        history0 = history1.remove(y1, error, self.coupling_parameter)
        dense_info = self._dense_info(y0, y1, gap0, k)
        return y0, dense_info, (z0, history0)

    def func(self, terms: AbstractTerm, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        return self.solver.func(terms, t0, y0, args)

    def _error(self, error, gap0, gap1, max_gap):
        # The smaller the step, the nearer the gap comes to being multiplied by the
        # coupling parameter. A gap that shrinks like this is no reason to reject a
        # step: as no smaller step could do any better, every step would be rejected if
        # the gap were just above the tolerance. So the gap is counted in full only if
        # it does not shrink.
        norm0 = _norm(gap0)
        norm1 = _norm(gap1)
        shrunk = self.coupling_parameter * norm0
        tiny = jnp.finfo(norm0.dtype).tiny
        growth = (norm1 - shrunk) / (norm0 - shrunk + tiny)
        # A tolerance may be so loose that what the solve fails at comes first. So it
        # counts the more the nearer that is.
        left = jnp.maximum(1 - norm1 / (max_gap + tiny), 1e-6)
        weight = _gap_weight * jnp.clip(growth, 0, 1) / left
        return jnp.abs(error) + weight * jnp.abs(lax.stop_gradient(gap1))

    def _max_gaps(self, increment: Y, history1: _History) -> PyTree[Array]:
        """How large the norm of the gap may be, for each leaf, for the solve to go
        on."""
        sizes = [
            jnp.sqrt(x / history1.num_steps.astype(x.dtype))
            for x in jtu.tree_leaves(history1.squares)
        ]

        def _max_gap(inc, size, error):
            if self.max_gap == float("inf"):
                return jnp.full_like(size, jnp.inf)
            # A leaf that is zero, up to the rounding errors of the others, is none to
            # judge by.
            sqrt_eps = float(np.sqrt(jnp.finfo(size.dtype).eps))
            size = ft.reduce(
                jnp.maximum, [sqrt_eps * x.astype(size.dtype) for x in sizes], size
            )
            if isinstance(self.solver, Euler):
                # The error estimate of Euler's method is half of what drives the gap,
                # be that a large step or an unstable one.
                return 30 * self.max_gap * size
            # The error estimates of a solve that is unstable grow along with the gap,
            # but that then is several times the size of the solution. At the start of a
            # solve from zero, `size` is small.
            explained = jnp.maximum(2 * error, _norm(inc))
            return jnp.clip(explained, self.max_gap * size, 10 * self.max_gap * size)

        size = jtu.tree_unflatten(jtu.tree_structure(history1.squares), sizes)
        return jtu.tree_map(_max_gap, increment, size, history1.errors)

    def _result(self, gap1: Y, max_gaps: PyTree[Array]) -> RESULTS:
        diverged = False
        nonfinite = False
        for gap, max_gap in zip(jtu.tree_leaves(gap1), jtu.tree_leaves(max_gaps)):
            diverged = diverged | (_norm(gap) > max_gap)
            nonfinite = nonfinite | ~jnp.isfinite(_norm(gap))
        result: Any = RESULTS.successful
        if len(jtu.tree_leaves(gap1)) == 0:
            return result
        result = RESULTS.where(diverged, RESULTS.nonlinear_divergence, result)  # pyright: ignore
        return RESULTS.where(nonfinite, RESULTS.nonfinite, result)  # pyright: ignore

    def _dense_info(self, y0: Y, y1: Y, gap0: Y, k: list[Y]) -> DenseInfo:
        if isinstance(self.solver, Euler):
            return dict(y0=y0, y1=y1)
        # The stages belong to a step of the wrapped method from `z0`, but the output is
        # to pass through `y0` and `y1`. Each stage gets an equal share of the part of
        # the gap that is lost over the step: then `y0 + Σ_i b_i k_i` is `y1`, and any
        # interpolation that is exact for linear functions adds to that of the wrapped
        # method a gap that is linear in time.
        lost = ((1 - self.coupling_parameter) * gap0**ω).ω
        k = jtu.tree_map(lambda d, *x: jnp.stack([xi - d for xi in x]), lost, *k)
        return dict(y0=y0, y1=y1, k=k)


UReversible.__init__.__doc__ = """**Arguments:**

- `solver`: The explicit Runge--Kutta method to wrap: any [`diffrax.AbstractERK`][], or
    [`diffrax.Euler`][]. (Its `scan_kind` is not used, as its stages are unrolled here.)
- `coupling_parameter`: The coupling parameter $\\lambda$; a float between zero and one.
    A smaller value damps the gap between the two states faster, and so stays stable for
    larger steps, but multiplies the rounding errors by $1/\\lambda$ for each step on
    the way back.
- `max_gap`: How large a gap between the two states may become before the solve fails:
    a fraction of the root-mean-square value of the solution, for each leaf of `y0`. The
    default of 0.1 corresponds to an error of 5 percent. Pass `float("inf")` to let
    every gap pass.

**Raises:**

`ValueError` if `solver` is itself a wrapper or has no single Butcher tableau, or if one
of the other arguments is outside its range.
"""


def _mean_square(x):
    # No gradient: used for no more than the choice of a step size, and to tell failure.
    x = lax.stop_gradient(x)
    return jnp.sum(jnp.real(x * jnp.conj(x))) / max(x.size, 1)


def _norm(x):
    return jnp.sqrt(_mean_square(x))


def _negative(control: Control) -> Control:
    return (-(control**ω)).ω


def _combine(coefficients: np.ndarray, k: list[Y]) -> Y:
    """`Σ_i coefficients[i] * k[i]`, without those terms that are zero."""
    terms = [(float(c), k_i) for c, k_i in zip(coefficients, k) if c != 0]
    if len(terms) == 0:
        return jtu.tree_map(jnp.zeros_like, k[0])
    (c, k_i), *terms = terms
    out = c * k_i**ω
    for c, k_i in terms:
        out = out + c * k_i**ω
    return out.ω


def _num_stages(tableau: ButcherTableau) -> int:
    """How many there are without the last one of a first-same-as-last method."""
    return tableau.num_stages - 1 if tableau.fsal else tableau.num_stages


def _stages(
    tableau: ButcherTableau,
    terms: AbstractTerm,
    t0: RealScalarLike,
    t1: RealScalarLike,
    y0: Y,
    args: Args,
    control: Any,
    k0: Y | None = None,
) -> list[Y]:
    """The stages `k_i` of one step, without the last one if that is the first stage of
    the step that comes next. If `k0`, the first one, is known then it is not evaluated.
    """
    num_stages = _num_stages(tableau)
    k = [terms.vf_prod(t0, y0, args, control) if k0 is None else k0]
    for a_i, c_i in zip(tableau.a_lower[: num_stages - 1], tableau.c):
        # No floating point error
        t_i = t1 if c_i == 1 else t0 + float(c_i) * (t1 - t0)
        y_i = (y0**ω + _combine(a_i, k) ** ω).ω
        k.append(terms.vf_prod(t_i, y_i, args, control))
    return k


def _last_stage(tableau: ButcherTableau, k: list[Y], k_back: list[Y]) -> list[Y]:
    # The last stage of an FSAL method, which only its error estimate and interpolation
    # make use of, is evaluated at the end of the step. So is the first stage of the
    # step back.
    if tableau.fsal:
        return [*k, _negative(k_back[0])]
    else:
        return k
