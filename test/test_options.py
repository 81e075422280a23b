"""Whatever `diffeqsolve` can be asked for: the gradient is that of the default adjoint.

Each test is of many things at once, as compiling takes nearly all of the time. One by
one they are in `test_features.py`.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
import pytest


# Going back has to find its way over several steps at a time.
_reversible = diffrax.ReversibleAdjoint(checkpoints=1)
_default = diffrax.RecursiveCheckpointAdjoint()
_adaptive = diffrax.PIDController(rtol=1e-4, atol=1e-6)
_jumps = diffrax.ClipStepSizeController(_adaptive, jump_ts=[0.5], step_ts=[0.7])
_params = dict(
    y0=jnp.array([1.0, 0.5]),
    args=jnp.array(1.3),
    closed=jnp.array(0.7),
    t0=jnp.array(0.0),
    t1=jnp.array(1.0),
    dt0=jnp.array(0.06),
    ts=jnp.array([0.1, 0.11, 0.55, 0.9]),
)


def _field(t, y, args):
    return jnp.stack([0.1 * jnp.sin(3 * t) - args * y[1], y[0] - 0.1 * y[1] ** 2])


def _solve(params, adjoint, names=("y0", "args", "t0", "t1", "dt0"), **kwargs) -> Any:
    arguments: dict[str, Any] = dict(
        terms=diffrax.ODETerm(_field),
        solver=diffrax.Tsit5(),
        max_steps=64,
        **{name: params[name] for name in names},
    )
    return diffrax.diffeqsolve(**(arguments | kwargs), adjoint=adjoint)


def _weigh(*outputs):
    """A function of all that is finite of some outputs, with no symmetry."""
    leaves = filter(eqx.is_inexact_array, jtu.tree_leaves(outputs))
    finite = [jnp.where(jnp.isfinite(x), x, 0).ravel() for x in leaves]
    return sum(jnp.sum(jnp.cos(jnp.arange(x.size)) * x + x**2) for x in finite)


def _agree(loss, params, expected: Any = _default, transform=jax.grad, rtol=1e-11):
    grads = []
    for adjoint in (_reversible, expected):
        fn = transform(lambda p, a=adjoint: loss(p, a))
        grads.append(jax.jit(fn)(params))
    leaves = [np.asarray(x) for x in jtu.tree_leaves(grads[1])]
    largest = max(np.max(np.abs(x)) for x in leaves)
    assert largest > 0
    for x, true_x in zip(jtu.tree_leaves(grads[0]), leaves, strict=True):
        np.testing.assert_allclose(x, true_x, rtol=0, atol=rtol * largest)


# Steps are undone numerically; in closed form, twice; and not at all.
_each_way = pytest.mark.parametrize(
    "kwargs",
    (
        dict(),
        pytest.param(
            dict(
                solver=diffrax.ReversibleHeun(),
                stepsize_controller=_jumps,
                max_steps=256,
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(solver=diffrax.UReversible(diffrax.Heun())), marks=pytest.mark.slow
        ),
        pytest.param(
            dict(solver=diffrax.Kvaerno3(), stepsize_controller=_adaptive),
            marks=pytest.mark.slow,
        ),
    ),
    ids=(
        "Tsit5, constant",
        "ReversibleHeun, jumps",
        "UReversible, constant",
        "Kvaerno3, adaptive",
    ),
)


@_each_way
def test_output_and_times(kwargs):
    def loss(params, adjoint):
        def fn(t, y, args):
            return {"a": args * jnp.sum(y) * jnp.cos(t), "b": params["closed"] * y**2}

        at_ts = diffrax.SubSaveAt(ts=params["ts"], steps=3, t0=True, t1=True, fn=fn)
        at_steps = diffrax.SubSaveAt(steps=True)
        saveat = diffrax.SaveAt(
            subs={"ts": at_ts, "steps": [at_steps]}, dense=True, solver_state=True
        )
        sol = _solve(params, adjoint, saveat=saveat, **kwargs)
        inside = sol.evaluate(0.37), sol.derivative(0.62)
        return _weigh(sol.ts, sol.ys, inside, sol.solver_state)

    _agree(loss, _params)


@pytest.mark.slow
@pytest.mark.parametrize("is_stopped", (False, True))
def test_step_to(is_stopped):
    # If stopped, then the solve ends at one of the times in the middle.
    event = diffrax.Event(lambda t, y, args, **kwargs: is_stopped & (y[0] < 0.6))

    def loss(params, adjoint):
        ts = params["steps"]
        times: Any = dict(
            t0=ts[0],
            t1=ts[-1],
            dt0=None,
            stepsize_controller=diffrax.StepTo(ts=ts),
            event=event,
        )
        at_ts = diffrax.SubSaveAt(t1=True, ts=params["ts"], fn=lambda t, y, args: t * y)
        saveat = diffrax.SaveAt(subs=[at_ts, diffrax.SubSaveAt(steps=2)])
        sol = _solve(params, adjoint, ("y0", "args"), saveat=saveat, **times)
        return _weigh(sol.ts, sol.ys)

    params = _params | dict(steps=jnp.linspace(0, 1, 13) ** 1.5)
    num_steps = _solve(
        params | dict(dt0=None),
        _reversible,
        stepsize_controller=diffrax.StepTo(ts=params["steps"]),
        event=event,
    ).stats["num_steps"]
    assert (num_steps < 12) == is_stopped
    _agree(loss, params)


def test_arrays_in_the_controller_state():
    # The times of rejected steps: they depend on times, and have no gradient.
    controller = diffrax.ClipStepSizeController(_adaptive, store_rejected_steps=5)

    def loss(params):
        saveat = diffrax.SaveAt(t1=True, controller_state=True)
        kwargs: Any = dict(stepsize_controller=controller, dt0=1.0, saveat=saveat)
        sol = _solve(params, _reversible, **kwargs)
        return _weigh(sol.ys, sol.controller_state.reject_info)

    with pytest.raises(Exception, match="the arrays in `Solution.controller_state`"):
        jax.block_until_ready(eqx.filter_jit(jax.grad(loss))(_params))


def test_progress_meter_and_times(capfd):
    def loss(t1):
        meter = diffrax.TextProgressMeter(minimum_increase=0.5)
        params = _params | dict(t1=t1)
        return _weigh(_solve(params, _reversible, progress_meter=meter).ys)

    assert jnp.isfinite(jax.block_until_ready(jax.jit(jax.grad(loss))(_params["t1"])))
    jax.effects_barrier()
    assert "100.00%" in capfd.readouterr().out


@pytest.mark.parametrize(
    "kwargs",
    (
        dict(),
        pytest.param(dict(stepsize_controller=_adaptive), marks=pytest.mark.slow),
    ),
)
def test_times_and_a_custom_rule(kwargs):
    # Which cannot be differentiated in forward mode.
    sin = jax.custom_vjp(jnp.sin)
    sin.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    terms = diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -args * sin(y[0])]))

    def loss(params, adjoint):
        return _weigh(_solve(params, adjoint, terms=terms, **kwargs).ys)

    _agree(loss, _params)


@pytest.mark.slow
def test_restart():
    # A second solve that takes up what the first one has left.
    def loss(params, adjoint):
        kwargs = dict(adjoint=adjoint, stepsize_controller=_jumps)
        saveat = diffrax.SaveAt(
            t1=True, solver_state=True, controller_state=True, made_jump=True
        )
        sol = _solve(params, saveat=saveat, **kwargs)
        restart = params | dict(t0=params["t1"], t1=2.0, y0=sol.ys[-1])
        again = _solve(
            restart,
            solver_state=sol.solver_state,
            controller_state=sol.controller_state,
            made_jump=sol.made_jump,
            **kwargs,
        )
        return _weigh(again.ys, sol.solver_state)

    _agree(loss, _params)


#
# Without a bound on the number of steps
#


def _needs_no_bound(params, adjoint, **kwargs):
    saveat = diffrax.SaveAt(t1=True, ts=params["ts"])
    if isinstance(adjoint, diffrax.ReversibleAdjoint):
        kwargs = kwargs | dict(max_steps=None)
    sol = _solve(params, adjoint, saveat=saveat, **kwargs)
    return _weigh(sol.ys)


@pytest.mark.slow
@pytest.mark.parametrize("made_jump", (None, True))
def test_constant_steps_without_a_bound(made_jump):
    _agree(lambda *a: _needs_no_bound(*a, made_jump=made_jump), _params)


@pytest.mark.slow
def test_step_to_without_a_bound():
    ts = jnp.linspace(0, 1, 13) ** 1.5
    kwargs = dict(stepsize_controller=diffrax.StepTo(ts=ts), dt0=None)
    params = {k: _params[k] for k in ("y0", "args", "ts")}
    loss = lambda p, a: _needs_no_bound(p | dict(t0=0.0, t1=1.0), a, **kwargs)
    _agree(lambda p, a: loss(p | dict(dt0=None), a), params)


def _sde(path):
    noise = diffrax.ControlTerm(
        lambda t, y, args: lx.DiagonalLinearOperator(0.3 * args * jnp.cos(y)), path
    )
    return diffrax.MultiTerm(diffrax.ODETerm(_field), noise)


@pytest.mark.parametrize(
    "kwargs",
    (
        dict(stepsize_controller=_adaptive),
        dict(
            terms=_sde(diffrax.VirtualBrownianTree(0.0, 1.0, 0.02, (2,), jr.key(0))),
            solver=diffrax.Heun(),
        ),
        dict(solver=diffrax.LeapfrogMidpoint()),
    ),
    ids=("adaptive", "SDE", "LeapfrogMidpoint"),
)
def test_needs_a_bound(kwargs):
    loss = lambda y0: _needs_no_bound(_params | dict(y0=y0), _reversible, **kwargs)
    with pytest.raises(Exception, match="Put a bound on the maximum number of steps"):
        jax.grad(loss)(_params["y0"])


def test_no_end_needs_a_bound():
    def loss(y0):
        event = diffrax.Event(lambda t, y, args, **kwargs: y[0] < 0.9)
        kwargs: Any = dict(t1=jnp.inf, event=event, max_steps=None)
        return jnp.sum(_solve(_params | dict(y0=y0), _reversible, **kwargs).ys)

    with pytest.raises(Exception, match="Put a bound on the maximum number of steps"):
        jax.block_until_ready(eqx.filter_jit(jax.grad(loss))(_params["y0"]))


@pytest.mark.slow
def test_event_without_a_bound():
    # Of a batch: the times of the steps, which are not recorded, round differently when
    # they are computed again.
    def grads(adjoint, max_steps):
        def loss(stop):
            field = lambda t, y, args: args * jnp.cos(y)
            event = diffrax.Event(lambda t, y, args, **kwargs: t - stop, _newton)
            y0 = jnp.array([0.3, 0.7])
            sol = diffrax.diffeqsolve(
                *(diffrax.ODETerm(field), diffrax.Euler(), 0.1, 2.3, 0.037, y0, stop),
                event=event,
                max_steps=max_steps,
                adjoint=adjoint,
            )
            return _weigh(sol.ys, sol.ts)

        return jax.jit(jax.vmap(jax.grad(loss)))(jnp.linspace(0.15, 1.65, 100))

    expected = grads(_default, 64)
    np.testing.assert_allclose(grads(_reversible, None), expected, rtol=1e-11)


#
# Events
#


def _crosses(t, y, args, **kwargs):
    del t, kwargs
    return y[0] - 0.3 * args


def _never(t, y, args, **kwargs):
    del t, args, kwargs
    return y[0] + 10


def _is_below(t, y, args, **kwargs):
    del t, args, kwargs
    return y[0] < 0.3


def _at_once(t, y, args, **kwargs):
    del t, args, kwargs
    return y[0] < 3


_newton = optx.Newton(1e-10, 1e-10)


def _event_cases():
    for name, conditions in (
        ("continuous", _crosses),
        ("several", [_never, _is_below, _crosses]),
        ("at once", _at_once),
        ("never", _never),
    ):
        for root_finder in (None, _newton):
            yield pytest.param(
                conditions,
                root_finder,
                id=name if root_finder is None else f"{name}, root finder",
            )


@pytest.mark.slow
@pytest.mark.parametrize("conditions, root_finder", list(_event_cases()))
def test_events(conditions, root_finder):
    def loss(params, adjoint):
        event = diffrax.Event(conditions, root_finder)
        at_ts = diffrax.SubSaveAt(t1=True, ts=params["ts"])
        saveat = diffrax.SaveAt(subs=[at_ts, diffrax.SubSaveAt(steps=2)])
        sol = _solve(params, adjoint, saveat=saveat, event=event)
        return _weigh(sol.ys, sol.ts)

    _agree(loss, _params | dict(t1=jnp.array(3.0)))


@pytest.mark.slow
def test_event_closes_over_a_parameter():
    def loss(params, adjoint):
        condition = lambda t, y, args, **kwargs: y[0] - params["closed"]
        event = diffrax.Event(condition, _newton)
        sol = _solve(params | dict(t1=3.0), adjoint, event=event)
        return _weigh(sol.ys, sol.ts)

    _agree(loss, _params)


#
# Derivatives beyond the first
#


def _second(fn):
    return lambda p: jax.jvp(jax.grad(fn), (p,), (jtu.tree_map(jnp.cos, p),))[1]


@pytest.mark.slow
@_each_way
def test_hessian_vector_product(kwargs):
    def loss(params, adjoint):
        field = lambda t, y, args: params["closed"] * _field(t, y, args)
        fn = lambda t, y, args: args * jnp.sin(y)
        saveat = diffrax.SaveAt(ts=params["ts"], steps=3, fn=fn)
        term = diffrax.ODETerm(field)
        return _weigh(_solve(params, adjoint, terms=term, saveat=saveat, **kwargs).ys)

    _agree(loss, _params, diffrax.DirectAdjoint(), _second, rtol=1e-10)


@pytest.mark.slow
@_each_way
def test_third_derivative(kwargs):
    def third(adjoint):
        def loss(x):
            params = _params | dict(y0=x * _params["y0"], args=x)
            return _weigh(_solve(params, adjoint, **kwargs).ys)

        along = lambda fn: lambda x: jax.jvp(fn, (x,), (jnp.ones_like(x),))[1]
        return jax.jit(along(along(jax.grad(loss))))(jnp.array(1.3))

    expected = third(diffrax.DirectAdjoint())
    np.testing.assert_allclose(third(_reversible), expected, rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("outer, inner", (("args", "y0"), ("y0", "closed")))
def test_mixed_second_derivative(outer, inner):
    # Along something that the inner gradient knows nothing of.
    def mixed(adjoint):
        def loss(outside, inside):
            params = _params | {outer: outside, inner: inside}
            field = lambda t, y, args: params["closed"] * _field(t, y, args)
            terms = diffrax.ODETerm(field)
            return _weigh(_solve(params, adjoint, terms=terms).ys)

        derivative = jax.jacfwd(jax.grad(loss, argnums=1))
        return jax.jit(derivative)(_params[outer], _params[inner])

    expected = mixed(diffrax.DirectAdjoint())
    np.testing.assert_allclose(mixed(_reversible), expected, rtol=1e-11)


@pytest.mark.slow
def test_hessian_with_large_steps():
    # The derivative of undoing a step that takes many corrections.
    params = {k: _params[k] for k in ("y0", "args")}
    times = dict(t0=0.0, t1=2.0, dt0=0.4)
    loss = lambda p, a: _weigh(_solve(p | times, a).ys)
    _agree(loss, params, diffrax.DirectAdjoint(), jax.hessian, rtol=1e-10)


@pytest.mark.slow
def test_memory_of_hessian_vector_product():
    def temp_size(num_steps):
        def loss(y0):
            # Not undone, if they all could be stored.
            kwargs: Any = dict(dt0=1 / num_steps, max_steps=num_steps + 1, y0=y0)
            return _weigh(_solve(_params | kwargs, _reversible, **kwargs).ys)

        product = lambda y0: jax.jvp(jax.grad(loss), (y0,), (y0,))[1]
        compiled: Any = jax.jit(product).lower(jnp.ones((2, 1000))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # The record of the times, and its derivative.
    assert temp_size(1016) - temp_size(16) <= 2 * 8 * 1000 + 64


#
# `UnsafeBrownianPath`
#


@pytest.mark.parametrize(
    "solver, levy_area",
    (
        (diffrax.Heun(), diffrax.BrownianIncrement),
        pytest.param(
            diffrax.ReversibleHeun(),
            diffrax.BrownianIncrement,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            diffrax.SPaRK(), diffrax.SpaceTimeLevyArea, marks=pytest.mark.slow
        ),
    ),
    ids=("Heun", "ReversibleHeun", "SPaRK"),
)
def test_unsafe_brownian_path(solver, levy_area):
    # The same key, the same interval, the same increment. No other adjoint can do this
    # in reverse mode.
    path = diffrax.UnsafeBrownianPath((2,), jr.key(0), levy_area)
    params = {k: _params[k] for k in ("y0", "args")}

    def loss(params, adjoint):
        times = dict(t0=0.0, t1=-1.0, dt0=-0.03)
        saveat = diffrax.SaveAt(t1=True, ts=[-0.1, -0.5])
        kwargs: Any = dict(terms=_sde(path), solver=solver, saveat=saveat)
        return _weigh(_solve(params | times, adjoint, **kwargs).ys)

    grad = jax.jit(jax.grad(lambda p: loss(p, _reversible)))(params)
    expected = jax.jit(jax.jacfwd(lambda p: loss(p, diffrax.ForwardMode())))(params)
    for x, true_x in zip(jtu.tree_leaves(grad), jtu.tree_leaves(expected)):
        np.testing.assert_allclose(x, true_x, rtol=1e-11)
