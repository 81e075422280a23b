"""The reversible solvers as solvers: forwards, and with every other adjoint."""

import functools as ft
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from diffrax._solver._upstream_leapfrog_midpoint import LeapfrogMidpoint as _Leapfrog
from diffrax._solver._upstream_reversible_heun import ReversibleHeun as _ReversibleHeun
from diffrax._solver._upstream_semi_implicit_euler import (
    SemiImplicitEuler as _SemiImplicitEuler,
)


_ERKS = (
    diffrax.Euler,
    diffrax.Heun,
    diffrax.Midpoint,
    diffrax.Ralston,
    diffrax.Bosh3,
    diffrax.Tsit5,
    diffrax.Dopri5,
    diffrax.Dopri8,
)
# Euler's method, which is not one for Diffrax; one that is first-same-as-last; and one
# that is not. The others are like these but for their tableau.
_different = diffrax.Euler, diffrax.Heun, diffrax.Bosh3
_ALL_ERKS = [
    pytest.param(cls, marks=() if cls in _different else pytest.mark.slow)
    for cls in _ERKS
]


def _pendulum(t, y, args):
    # Driven; neither damped nor at rest.
    x, v = y
    return jnp.stack([v, jnp.cos(t) - jnp.sin(x)])


_y0 = jnp.array([1.0, 0.5])


def _solve(
    solver: Any,
    dt0: Any,
    terms: Any = None,
    t0: Any = 0.0,
    t1: Any = 2.0,
    y0: Any = _y0,
    **kwargs: Any,
) -> Any:
    terms = diffrax.ODETerm(_pendulum) if terms is None else terms
    kwargs = dict(max_steps=2**14) | kwargs
    return diffrax.diffeqsolve(terms, solver, t0, t1, dt0, y0, **kwargs)


#
# The replaced solvers
#


@pytest.mark.parametrize(
    "ours, upstreams",
    (
        (diffrax.SemiImplicitEuler, _SemiImplicitEuler),
        (diffrax.LeapfrogMidpoint, _Leapfrog),
        (diffrax.ReversibleHeun, _ReversibleHeun),
    ),
    ids=lambda cls: cls.__module__.rsplit(".")[-1],
)
def test_forward_is_upstreams(ours, upstreams):
    assert issubclass(ours, upstreams)
    assert issubclass(ours, diffrax.AbstractReversibleSolver)
    if ours is diffrax.SemiImplicitEuler:
        field = diffrax.ODETerm(lambda t, y, args: jnp.sin(y) + jnp.cos(t))
        kwargs = dict(terms=(field, field), y0=(_y0, 2 * _y0))
    else:
        kwargs = dict()
    saveat = diffrax.SaveAt(
        t0=True, ts=[0.3, 1.0], steps=True, dense=True, solver_state=True
    )
    step_to = diffrax.StepTo(ts=jnp.array([0.0, 0.1, 0.5, 0.55, 2.0]))
    controllers = [(0.3, diffrax.ConstantStepSize()), (None, step_to)]
    if ours is diffrax.ReversibleHeun:
        controllers.append((None, diffrax.PIDController(rtol=1e-2, atol=1e-2)))
    for dt0, controller in controllers:
        sol, expected = (
            _solve(
                cls(),
                dt0,
                saveat=saveat,
                stepsize_controller=controller,
                max_steps=64,
                **kwargs,
            )
            for cls in (ours, upstreams)
        )
        leaves = jtu.tree_leaves(eqx.filter(sol, eqx.is_array))
        expected_leaves = jtu.tree_leaves(eqx.filter(expected, eqx.is_array))
        assert len(leaves) == len(expected_leaves)
        for x, y in zip(leaves, expected_leaves):
            np.testing.assert_array_equal(x, y)


#
# `UReversible`
#


def _slope(errors, nums):
    return -np.polyfit(np.log(nums), np.log(errors), 1)[0]


_swirl = lambda t, y, args: jnp.sin(2 * y[::-1] + t) * jnp.array([1.0, -1.0])
_cosine = lambda t, y, args: jnp.cos(t + jnp.sin(y))
_slow_swing = lambda t, y, args: y * jnp.cos(t)
_fast_swing = lambda t, y, args: y * jnp.cos(3 * t)


@pytest.mark.parametrize(
    "cls, field, t1, nums",
    # The pair is nearly symmetric in time, so that on some problems the terms of odd
    # order nearly cancel, and methods of odd order look as if of one order more. Hence
    # problems, and numbers of steps, for which the error is above rounding and the
    # leading term is the largest one.
    (
        (diffrax.Euler, _swirl, 1.5, (20, 40, 80)),
        (diffrax.Heun, _swirl, 1.5, (50, 100, 200)),
        (diffrax.Midpoint, _swirl, 1.5, (50, 100, 200)),
        (diffrax.Ralston, _swirl, 1.5, (50, 100, 200)),
        (diffrax.Bosh3, _swirl, 1.5, (20, 40, 80)),
        (diffrax.Tsit5, _cosine, 2.0, (12, 18, 27)),
        (diffrax.Dopri5, _fast_swing, 1.0, (12, 18, 27)),
        (diffrax.Dopri8, _slow_swing, 2.0, (6, 8, 10)),
    ),
)
def test_order(cls, field, t1, nums):
    term = diffrax.ODETerm(field)
    y0 = jnp.array([0.3, 1.0])
    true_y1 = _solve(diffrax.Dopri8(), 1e-3, term, t1=t1, y0=y0).ys[-1]
    solver = diffrax.UReversible(cls())
    assert solver.order(term) == cls().order(term)

    @jax.jit
    def error(num):
        y1 = _solve(solver, t1 / num, term, t1=t1, y0=y0).ys[-1]
        return jnp.max(jnp.abs(y1 - true_y1))

    slope = _slope([error(float(num)) for num in nums], nums)
    assert abs(slope - solver.order(term)) < 0.2


@pytest.mark.parametrize(
    "cls", (diffrax.Heun, pytest.param(diffrax.Midpoint, marks=pytest.mark.slow))
)
def test_strong_order_sde(cls):
    # Geometric Brownian motion, in the Stratonovich sense. A single Brownian motion, so
    # that these methods have strong order 1.
    mu, sigma = 0.3, 0.5
    nums = (2**4, 2**5, 2**6)

    @jax.jit
    @jax.vmap
    def errors(key):
        path = diffrax.VirtualBrownianTree(0.0, 1.0, tol=2**-8, shape=(), key=key)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: mu * y),
            diffrax.ControlTerm(lambda t, y, args: sigma * y, path),
        )
        w1: Any = path.evaluate(0.0, 1.0)
        true_y1 = jnp.exp(mu + sigma * w1)
        solver = diffrax.UReversible(cls())
        y0 = jnp.array(1.0)
        ys = [
            _solve(solver, 1 / num, terms, t1=1.0, y0=y0, max_steps=num).ys[-1]
            for num in nums
        ]
        return jnp.stack([jnp.abs(y - true_y1) for y in ys])

    mean = jnp.mean(errors(jr.split(jr.key(0), 200)), axis=0)
    # The mean of 200 samples is known to about 5 percent.
    assert abs(_slope(mean, nums) - 1) < 0.2


@ft.cache
def _true_solution():
    sol = _solve(diffrax.Dopri8(), 1e-2, saveat=diffrax.SaveAt(dense=True))
    return jax.jit(jax.vmap(sol.evaluate))


@pytest.mark.parametrize("cls", _ALL_ERKS)
def test_interpolation(cls):
    # As accurate inside the steps as the wrapped method, over the same steps; and
    # through the ends of the steps.
    ts = jnp.linspace(0.0, 2.0, 101)
    subs = diffrax.SubSaveAt(ts=ts), diffrax.SubSaveAt(steps=True)
    saveat = diffrax.SaveAt(subs=subs, dense=True)
    sol, base = (
        _solve(solver, 0.2, saveat=saveat, max_steps=16)
        for solver in (diffrax.UReversible(cls()), cls())
    )
    ys, step_ys = sol.ys
    true_ys = _true_solution()(ts)
    error = jnp.max(jnp.abs(ys - true_ys))
    assert error < 2 * jnp.max(jnp.abs(base.ys[0] - true_ys))
    np.testing.assert_allclose(jax.vmap(sol.evaluate)(ts), ys, rtol=1e-14)

    ends = sol.ts[1][jnp.isfinite(sol.ts[1])]
    for left in (True, False):
        ys = jax.vmap(lambda t, left=left: sol.evaluate(t, left=left))(ends[:-1])
        np.testing.assert_allclose(ys, step_ys[: len(ends) - 1], rtol=1e-13)


def _count_evaluations(solver, terms_fn, **kwargs):
    """How often the vector field runs, in the compiled program."""
    count = 0

    def bump():
        nonlocal count
        count += 1

    def counted(t, y, args):
        jax.debug.callback(bump)
        return _pendulum(t, y, args)

    sol = _solve(solver, terms=terms_fn(counted), **kwargs)
    jax.block_until_ready(sol.ys)
    jax.effects_barrier()
    num_steps = int(sol.stats["num_steps"])
    return count, num_steps


@pytest.mark.parametrize("cls", _ALL_ERKS)
@pytest.mark.parametrize("is_adaptive", (False, True))
def test_evaluations(cls, is_adaptive):
    # Twice those of the wrapped method; for an FSAL method without its last stage. The
    # error estimate adds none. (`jax.debug.callback` is never optimised away, so that
    # this counts evaluations the value of which is not used, too.)
    num_stages = {diffrax.Euler: 1, diffrax.Dopri8: 13}.get(cls)
    if num_stages is None:
        num_stages = cls.tableau.num_stages - cls.tableau.fsal
    kwargs: dict[str, Any] = dict(dt0=0.1)
    if is_adaptive:
        kwargs["stepsize_controller"] = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    count, num_steps = _count_evaluations(
        diffrax.UReversible(cls()), diffrax.ODETerm, **kwargs
    )
    assert count == 2 * num_stages * num_steps


@pytest.mark.parametrize("coupling_parameter", (0.0, 1.0, -0.5, 1.5, float("nan")))
def test_coupling_parameter_is_validated(coupling_parameter):
    with pytest.raises(ValueError, match="Must have `0 < coupling_parameter < 1`"):
        diffrax.UReversible(diffrax.Heun(), coupling_parameter)


def test_coupling_parameter_must_be_known():
    with pytest.raises(ValueError, match="must be a Python number"):
        jax.jit(lambda x: diffrax.UReversible(diffrax.Heun(), x))(0.9)


@pytest.mark.parametrize("max_gap", (0.0, -1.0, float("nan")))
def test_max_gap_is_validated(max_gap):
    with pytest.raises(ValueError, match="Must have `max_gap > 0`"):
        diffrax.UReversible(diffrax.Heun(), max_gap=max_gap)


class _OwnStep(diffrax.Heun):
    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        return super().step(terms, t0, t1, y0, args, solver_state, made_jump)


@pytest.mark.parametrize(
    "solver, match",
    (
        (diffrax.HalfSolver(diffrax.Heun()), "not other wrappers"),
        (diffrax.UReversible(diffrax.Heun()), "not other wrappers"),
        (_OwnStep(), "not that of its Butcher tableau"),
        (diffrax.Kvaerno3(), "explicit Runge--Kutta"),
        (diffrax.ReversibleHeun(), "explicit Runge--Kutta"),
    ),
    ids=lambda x: type(x).__name__,
)
def test_solver_is_validated(solver, match):
    with pytest.raises(ValueError, match=match):
        diffrax.UReversible(solver)


def test_ito():
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (), jr.key(0))
    noise = diffrax.ControlTerm(lambda t, y, args: jnp.ones(2), path)
    with pytest.raises(ValueError, match="converges to the Itô solution"):
        _solve(diffrax.UReversible(diffrax.Euler()), 0.1, noise, t1=1.0)


#
# Its instability does not go unnoticed
#


def _decay(t, y, args):
    return -(y - jnp.cos(t))


@pytest.mark.parametrize("tol", (1e-3, 1e-6))
@pytest.mark.parametrize("cls", (diffrax.Bosh3, diffrax.Tsit5))
def test_adaptive_steps_stay_stable(cls, tol):
    # With a step size controller that does not see the gap, the result is 5e10.
    sol = _solve(
        diffrax.UReversible(cls()),
        None,
        diffrax.ODETerm(_decay),
        t1=40.0,
        y0=jnp.array([0.0]),
        stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
        max_steps=10**5,
    )
    true_y1 = 0.5 * (np.cos(40.0) + np.sin(40.0) - np.exp(-40.0))
    # The gap is kept to about 10 times the tolerance.
    assert jnp.abs(sol.ys[-1, 0] - true_y1) < 20 * tol
    # Most steps that were tried were taken.
    assert sol.stats["num_rejected_steps"] < 0.01 * sol.stats["num_accepted_steps"]


def test_adaptive_steps_run_out():
    sol = _solve(
        diffrax.UReversible(diffrax.Tsit5()),
        None,
        diffrax.ODETerm(_decay),
        t1=40.0,
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
        max_steps=4096,
        throw=False,
    )
    assert sol.result == diffrax.RESULTS.max_steps_reached


def _lorenz(t, y, args):
    x, y, z = y
    return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def _van_der_pol(t, y, args):
    x, v, _ = y  # As many dimensions as the Lorenz system, with which it shares a test.
    return jnp.stack([v, 5 * (1 - x**2) * v - x, jnp.zeros_like(x)])


# Vector field, initial value, end and step size.
_unstable = {
    "decay to cos": (_decay, [0.0, 0.0, 0.0], 40.0, 0.02),
    "decay": (lambda t, y, args: -y, [1.0, 1.0, 1.0], 40.0, 0.02),
    "Lorenz": (_lorenz, [1.0, 1.0, 1.0], 5.0, 0.005),
    "Van der Pol": (_van_der_pol, [2.0, 0.0, 0.0], 10.0, 0.01),
}


@pytest.mark.parametrize("cls", _ALL_ERKS)
def test_constant_steps_fail(cls):
    fields, *problems = zip(*_unstable.values())
    # One program for all of the problems, which is quicker to compile.
    term = diffrax.ODETerm(lambda t, y, i: jax.lax.switch(i, fields, t, y, None))
    solver = diffrax.UReversible(cls())

    @jax.jit
    def fails(i, y0, t1, dt0):
        sol = _solve(solver, dt0, term, t1=t1, y0=y0, args=i, throw=False)
        diverged = sol.result == diffrax.RESULTS.nonlinear_divergence
        return diverged | (sol.result == diffrax.RESULTS.nonfinite)

    for i, (name, y0, t1, dt0) in enumerate(zip(_unstable, *problems)):
        assert fails(i, jnp.array(y0), t1, dt0), name


@pytest.mark.parametrize("cls", (diffrax.Heun, diffrax.Bosh3, diffrax.Tsit5))
def test_no_step_size_is_wrong_in_silence(cls):
    # Up to where the wrapped method itself is no longer stable. With large steps the
    # error estimates grow along with the gap, and are no excuse for it.
    term = diffrax.ODETerm(_decay)

    @jax.jit
    @jax.vmap
    def errors(dt0):
        kwargs = dict(t1=60.0, y0=jnp.array([1.0]), throw=False)
        sol = _solve(diffrax.UReversible(cls()), dt0, term, **kwargs)
        base = _solve(cls(), dt0, term, **kwargs)
        is_successful = sol.result == diffrax.RESULTS.successful
        return jnp.where(is_successful, jnp.abs(sol.ys - base.ys), 0)

    assert jnp.max(errors(jnp.linspace(0.05, 1.9, 100))) < 0.1


def test_loose_tolerance():
    # Steps are rejected before they make the solve fail.
    def field(t, y, args):
        return jnp.stack([y[1], -jnp.sin(y[0]) - 0.5 * y[1]])

    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    kwargs: Any = dict(dt0=None, terms=diffrax.ODETerm(field), t1=40.0)
    kwargs["stepsize_controller"] = controller
    sol = _solve(diffrax.UReversible(diffrax.Tsit5()), **kwargs)
    base = _solve(diffrax.Tsit5(), **kwargs)
    assert jnp.max(jnp.abs(sol.ys - base.ys)) < 20e-3


def test_float32_decay_fails():
    # Of a true solution of 2e-9 this once returned 2.0.
    sol = _solve(
        diffrax.UReversible(diffrax.Tsit5()),
        jnp.float32(0.01),
        diffrax.ODETerm(lambda t, y, args: -y),
        t0=jnp.float32(0),
        t1=jnp.float32(20),
        y0=jnp.ones(1, jnp.float32),
        throw=False,
    )
    assert sol.result == diffrax.RESULTS.nonlinear_divergence


def test_nonfinite_fails():
    sol = _solve(
        diffrax.UReversible(diffrax.Tsit5()),
        0.1,
        diffrax.ODETerm(lambda t, y, args: jnp.sqrt(y - 1)),
        throw=False,
    )
    assert sol.result == diffrax.RESULTS.nonfinite


@pytest.mark.parametrize("cls", _ALL_ERKS)
def test_coarse_steps_do_not_fail(cls):
    # Inaccurate, as the wrapped method is with these steps, but not unstable.
    field = lambda t, y, args: (
        jnp.sin(3 * t) + jnp.sin(y[::-1]) * jnp.array([1.0, -1.0])
    )
    for dt0 in (0.1, 0.25):
        sol = _solve(diffrax.UReversible(cls()), dt0, diffrax.ODETerm(field), t1=5.0)
        assert sol.result == diffrax.RESULTS.successful


#
# Other adjoints, and `HalfSolver`
#


_U = diffrax.UReversible(diffrax.Heun())
_ALL = (
    diffrax.SemiImplicitEuler(),
    diffrax.LeapfrogMidpoint(),
    diffrax.ReversibleHeun(),
    _U,
    diffrax.HalfSolver(diffrax.ReversibleHeun()),
    diffrax.HalfSolver(_U),
)
# What is wrapped takes longest to compile.
_BY_COST = [*_ALL[:3], *(pytest.param(x, marks=pytest.mark.slow) for x in _ALL[3:])]
_name = lambda x: x if isinstance(x, str) else eqx.tree_pformat(x).split("(")[0]


def _loss(scale, solver, adjoint, **kwargs):
    term = diffrax.ODETerm(lambda t, y, args: args * jnp.sin(y) + jnp.cos(t))
    if isinstance(solver, diffrax.SemiImplicitEuler):
        terms, y0 = (term, term), (_y0, _y0[::-1])
    else:
        terms, y0 = term, _y0
    kwargs = dict(max_steps=16) | kwargs
    sol = _solve(
        solver, 0.2, terms, t1=1.0, y0=y0, args=scale, adjoint=adjoint, **kwargs
    )
    return sum(jnp.sum(y**2) for y in jtu.tree_leaves(sol.ys))


def _gradient(solver, adjoint, **kwargs):
    loss = lambda scale: _loss(scale, solver, adjoint, **kwargs)
    if isinstance(adjoint, diffrax.ForwardMode):
        _, grad = jax.jit(lambda s: jax.jvp(loss, (s,), (jnp.ones(()),)))(
            jnp.array(0.5)
        )
        return grad
    return jax.jit(jax.grad(loss))(jnp.array(0.5))


@ft.cache
def _true_gradient(solver):
    return _gradient(solver, diffrax.RecursiveCheckpointAdjoint())


@pytest.mark.parametrize("solver", _BY_COST, ids=_name)
@pytest.mark.parametrize(
    "adjoint", (diffrax.DirectAdjoint(), diffrax.ForwardMode()), ids=_name
)
def test_exact_adjoints(solver, adjoint):
    expected = _true_gradient(solver)
    np.testing.assert_allclose(_gradient(solver, adjoint), expected, rtol=1e-12)


@pytest.mark.parametrize("solver", _BY_COST[1:], ids=_name)
def test_backsolve(solver):
    if isinstance(solver, diffrax.LeapfrogMidpoint):
        # Its second step goes from before to after a jump that was made by the adjoint.
        tolerance = 1e-1
    else:
        # Of the continuous adjoint, with steps of 0.2 and methods of order 2 or more.
        tolerance = 2e-2
    expected = _true_gradient(solver)
    grad = _gradient(solver, diffrax.BacksolveAdjoint())
    np.testing.assert_allclose(grad, expected, rtol=tolerance)


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(solver, marks=() if i in (1, 2, 3) else pytest.mark.slow)
        for i, solver in enumerate(_ALL)
    ],
    ids=_name,
)
def test_no_max_steps(solver):
    adjoint = diffrax.RecursiveCheckpointAdjoint(checkpoints=4)
    unbounded = _gradient(solver, adjoint, max_steps=None)
    np.testing.assert_allclose(unbounded, _true_gradient(solver), rtol=1e-12)


#
# FixedPointReversible
#


@pytest.mark.slow
def test_fixed_point_reversible_implicit_euler():
    # With the tolerances of the step size controller.
    def loss(args, solver):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -args * y**3),
            solver,
            *(0.0, 1.0, 0.05, jnp.array([1.0, 0.5]), args),
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-6),
            adjoint=diffrax.ReversibleAdjoint(),
            max_steps=256,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys)

    gradient, expected = (
        jax.jit(jax.grad(lambda args, s=solver: loss(args, s)))(1.3)
        for solver in (
            diffrax.FixedPointReversible(diffrax.ImplicitEuler()),
            diffrax.ImplicitEuler(),
        )
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)
