from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from equinox.internal import ω
from jaxtyping import Array, PyTree, Real

from .._closed_function import close_function, ClosedFunction
from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, Y
from .._evaluate_where import evaluate_where
from .._invert_step import max_abs, relative_distance, solve_linear
from .._term import AbstractTerm
from ._upstream_reversible_heun import (
    _SolverState as _SolverState,
    ReversibleHeun as _ReversibleHeun,
)
from .base import AbstractReversibleSolver


class ReversibleHeun(_ReversibleHeun, AbstractReversibleSolver):
    r"""Reversible Heun method.

    2nd order method with an embedded 1st order method for adaptive step sizing. Uses 1
    evaluation of the vector field for each step. Uses 1st order local linear
    interpolation for dense/ts output.

    When used to solve SDEs, converges to the Stratonovich solution.

    Algebraically reversible: `backward_step` takes one evaluation of the vector field
    and is exact up to rounding, for any step sizes. The exception is a step that starts
    with a jump (`made_jump=True`). There the vector field was evaluated at $y_0$
    itself, so that $y_0$ is found by a fixed-point iteration to rounding level, and is
    NaN if that does not converge (if the step size times the Lipschitz constant of the
    vector field exceeds about 2). In that case [`diffrax.ReversibleAdjoint`][] makes
    the step again.

    Only stable for the eigenvalues of the Jacobian on the imaginary axis (with $|h
    \lambda| \leq 1$), so not for stiff problems, nor over long times for problems with
    strong dissipation.

    ??? cite "Reference"

        ```bibtex
        @article{kidger2021efficient,
            author={Kidger, Patrick and Foster, James and Li, Xuechen and Lyons, Terry},
            title={{E}fficient and {A}ccurate {G}radients for {N}eural {SDE}s},
            year={2021},
            journal={Advances in Neural Information Processing Systems}
        }
        ```
    """

    # A step ends with the vector field that the next one starts with.
    carried_evaluations = (0,)

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
        yhat1, vf1 = solver_state

        control = terms.contr(t0, t1)
        yhat0 = (2 * y1**ω - yhat1**ω - terms.prod(vf1, control) ** ω).ω
        vf0 = terms.vf(t0, yhat0, args)

        def start(_vf0):
            return (y1**ω - 0.5 * terms.prod((_vf0**ω + vf1**ω).ω, control) ** ω).ω

        guess = start(vf0)
        # There, `step` used the vector field at `y0`, rather than that at `yhat0`.
        y0 = evaluate_where(
            made_jump,
            lambda: _fixed_point(lambda y: start(terms.vf(t0, y, args)), guess),
            guess,
        )

        dense_info = dict(y0=y0, y1=y1)
        return y0, dense_info, (yhat0, vf0)

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
        del y1, recorded
        yhat1, vf1 = solver_state
        # Undoing a step across a jump leaves us with the vector field after the jump.
        return yhat1, evaluate_where(made_jump, lambda: terms.vf(t1, yhat1, args), vf1)


def _fixed_point(fn: Callable[[Y], Y], y: Y) -> Y:
    """Solves `fn(y) == y` to rounding level, starting at `y`. NaN if there is no doing
    that."""
    if len(jtu.tree_leaves(y)) == 0:
        return y
    out, error = _iterate(y, close_function(fn, y))
    return jtu.tree_map(lambda x: jnp.where(error <= 8, x, jnp.nan), out)


# With a rule of its own, so that it can be differentiated any number of times.
@eqx.filter_custom_jvp
def _iterate(start: Y, fn: ClosedFunction) -> tuple[Y, Real[Array, ""]]:
    """The solution of `fn(y) == y`, and how far it is off, in units of rounding."""
    size = jtu.tree_map(lambda x: jnp.where(x == 0, 1, x), max_abs(start))

    def cond_fun(carry):
        index, _, error = carry
        return (error > 8) & (index < 256)

    def body_fun(carry):
        index, y, _ = carry
        new = fn(y)
        return index + 1, new, relative_distance(new, y, size)

    infinity = jnp.array(jnp.inf, jnp.result_type(float))
    _, y, error = lax.while_loop(cond_fun, body_fun, (jnp.array(0), start, infinity))
    return y, error


@_iterate.def_jvp
def _iterate_jvp(primals, tangents):
    """Differentiates the equation."""
    start, fn = primals
    _, t_fn = tangents
    y, error = _iterate(start, fn)
    _, rhs = eqx.filter_jvp(lambda _fn: _fn(y), (fn,), (t_fn,))
    _, derivative = jax.linearize(fn, y)
    operator = lambda x: (x**ω - derivative(x) ** ω).ω
    return (y, error), (solve_linear(operator, lambda x: x, rhs), None)


ReversibleHeun.__init__.__doc__ = """**Arguments:** None"""
