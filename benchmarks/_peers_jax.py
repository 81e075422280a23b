"""The gradients that `peers.py` measures, by Diffrax and by JAX itself."""

import time
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
from _peers_problems import MAX_STEPS, Method, Prepared, Problem, Work
from jax.experimental.ode import odeint
from jax.flatten_util import ravel_pytree


SOLVERS: dict[str, Callable[[], Any]] = {
    "Tsit5": diffrax.Tsit5,
    "Dopri8": diffrax.Dopri8,
    "UReversible(Tsit5)": lambda: diffrax.UReversible(diffrax.Tsit5()),
    "Heun": diffrax.Heun,
    "ReversibleHeun": diffrax.ReversibleHeun,
}
ADJOINTS: dict[str, Callable[..., Any]] = {
    "RecursiveCheckpointAdjoint": diffrax.RecursiveCheckpointAdjoint,
    "DirectAdjoint": diffrax.DirectAdjoint,
    "BacksolveAdjoint": diffrax.BacksolveAdjoint,
    "ForwardMode": diffrax.ForwardMode,
    "ReversibleAdjoint": diffrax.ReversibleAdjoint,
}


def make_adjoint(gradient: str) -> Any:
    """From `"Name"` or `"Name(checkpoints=8)"`."""
    name, _, rest = gradient.partition("(checkpoints=")
    return ADJOINTS[name](**({"checkpoints": int(rest[:-1])} if rest else {}))


class _InSinglePrecision(diffrax.AbstractBrownianPath):
    """The path that float32 would have, for a solve in float64."""

    # In a function: Diffrax would see an `UnsafeBrownianPath`, and refuse to
    # differentiate. It has the same increments each time for the same steps.
    get: Callable[[], Any] = eqx.field(static=True)
    levy_area: Any = eqx.field(static=True)

    @property
    def t0(self):
        return self.get().t0

    @property
    def t1(self):
        return self.get().t1

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        t0, t1 = (None if t is None else jnp.float32(t) for t in (t0, t1))
        increment = self.get().evaluate(t0, t1, left, use_levy)
        to_float64 = lambda x: jnp.asarray(x, jnp.float64)
        return jax.tree.map(to_float64, increment)


def _brownian_motion(problem: Problem, noise: str, steps: int) -> Any:
    shape = jax.ShapeDtypeStruct(problem.y0.shape, jnp.float32)
    if noise == "UnsafeBrownianPath":
        path = diffrax.UnsafeBrownianPath(shape, jr.key(0))
    else:
        t0, t1 = jnp.float32(0), jnp.float32(problem.t1)
        tol = problem.t1 / steps / 2
        path = diffrax.VirtualBrownianTree(t0, t1, tol, shape, jr.key(0))
    if problem.dtype == "float32":
        return path
    return _InSinglePrecision(get=lambda: path, levy_area=path.levy_area)


def _terms(problem: Problem, noise: str, work: Work) -> Any:
    ode = diffrax.ODETerm(lambda t, y, params: problem.field(jnp, t, y, params))
    diffusion = problem.diffusion
    if diffusion is None:
        return ode
    assert work.steps is not None
    operator = lambda t, y, params: lx.DiagonalLinearOperator(
        diffusion(jnp, t, y, params)
    )
    path = _brownian_motion(problem, noise, work.steps)
    return diffrax.MultiTerm(ode, diffrax.ControlTerm(operator, path))


def make_loss(
    problem: Problem, method: Method, work: Work
) -> Callable[[list[Any], Any, Any], Any]:
    """Of the parameters, `y0`, and the tolerance, which makes no difference to constant
    steps. NaN if the solve fails."""
    controlled = work.steps is None
    solver, adjoint = SOLVERS[method.solver](), make_adjoint(method.gradient)

    def loss(params, y0, tol):
        sol = diffrax.diffeqsolve(
            _terms(problem, method.noise, work),
            solver,
            t0=0.0,
            t1=problem.t1,
            dt0=problem.t1 / work.steps if work.steps is not None else None,
            y0=y0,
            args=params,
            stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol)
            if controlled
            else diffrax.ConstantStepSize(),
            adjoint=adjoint,
            max_steps=MAX_STEPS if controlled else work.steps,
            throw=False,
        )
        assert sol.ys is not None
        failed = sol.result != diffrax.RESULTS.successful
        return jnp.where(failed, jnp.nan, jnp.sum(sol.ys[-1] ** 2)), sol.stats

    return loss


def _odeint_loss(problem: Problem, work: Work) -> Callable[[list[Any], Any, Any], Any]:
    # The tolerance has to be known when it is compiled: so it is not that of `loss`.
    assert work.tol is not None
    options: dict[str, Any] = dict(rtol=work.tol, atol=work.tol, mxstep=MAX_STEPS)

    def loss(params, y0, _):
        field = lambda y, t, *params: problem.field(jnp, t, y, list(params))
        ts = jnp.array([0.0, problem.t1], y0.dtype)
        ys = odeint(field, y0, ts, *params, **options)
        return jnp.sum(ys[-1] ** 2), {}

    return loss


def prepare(problem: Problem, method: Method, work: Work) -> Prepared:
    """Compiles it. To be called, and what it returns to be run, with 64-bit precision
    enabled if the problem is of that."""
    of_jax = method.tool == "jax"
    loss = _odeint_loss(problem, work) if of_jax else make_loss(problem, method, work)
    forward = method.gradient == "ForwardMode"
    derivative = jax.jacfwd if forward else jax.grad
    gradient = jax.jit(derivative(loss, argnums=(0, 1), has_aux=True))
    params, y0 = jax.tree.map(jnp.asarray, (problem.params, problem.y0))
    inputs = params, y0, jnp.asarray(work.tol or 0.0, problem.dtype)
    start = time.perf_counter()
    compiled: Any = gradient.lower(*inputs).compile()
    seconds = time.perf_counter() - start

    def flatten(result):
        return np.asarray(ravel_pytree(result[0])[0])

    temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    details = dict(compile_seconds=seconds, temp_bytes=temp_bytes)
    return Prepared(lambda: jax.block_until_ready(compiled(*inputs)), flatten, details)
