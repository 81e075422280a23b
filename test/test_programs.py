"""Programs as the users of Diffrax write them: only `adjoint=...` is another.

Of the five kinds that Diffrax has examples for, and one with an event: value and
gradient, with respect to all parameters, are those of the default adjoint. Then what
else there may be around a solve.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest


_default = diffrax.RecursiveCheckpointAdjoint()
_reversible = diffrax.ReversibleAdjoint()
# Has to find its way over several steps at a time.
_one_state = diffrax.ReversibleAdjoint(checkpoints=1)


def _diffeqsolve(*args: Any, **kwargs: Any) -> Any:
    # Type checkers are to believe that there is something in `Solution.ys`.
    return diffrax.diffeqsolve(*args, **kwargs)


def _mlp(in_size, out_size, key, **kwargs) -> eqx.nn.MLP:
    return eqx.nn.MLP(in_size, out_size, 4, 1, jnp.tanh, key=key, **kwargs)


#
# The programs. With so many steps that they cannot all be stored.
#


class Program(NamedTuple):
    """Its parameters, given a random key; and a function of them and of an adjoint."""

    params: Callable[[jax.Array], Any]
    loss: Callable[[Any, diffrax.AbstractAdjoint], jax.Array]


class _Func(eqx.Module):
    """The vector field of a neural ODE, or of a latent one."""

    scale: jax.Array
    mlp: eqx.nn.MLP

    def __init__(self, size, key):
        self.scale = jnp.array(1.3)
        self.mlp = _mlp(size, size, key)

    def __call__(self, t, y, args):
        return self.scale * self.mlp(y) - 0.1 * jnp.sin(t) * y


def _neural_ode():
    ts = jnp.linspace(0.0, 20.0, 20)
    data = jnp.stack([jnp.sin(ts), jnp.cos(ts)], axis=-1)
    data = jnp.stack([data, 0.7 * data])

    def solve(func, y0, adjoint):
        sol = _diffeqsolve(
            diffrax.ODETerm(func),
            diffrax.Tsit5(),
            t0=ts[0],
            t1=ts[-1],
            dt0=ts[1] - ts[0],
            y0=y0,
            stepsize_controller=diffrax.PIDController(rtol=1e-7, atol=1e-7),
            saveat=diffrax.SaveAt(ts=ts),
            adjoint=adjoint,
        )
        return sol.ys

    def loss(func, adjoint):
        ys = jax.vmap(lambda y0: solve(func, y0, adjoint))(data[:, 0])
        return jnp.mean((ys - data) ** 2)

    return Program(lambda key: _Func(2, key), loss)


class _LatentODE(eqx.Module):
    func: _Func
    rnn_cell: eqx.nn.GRUCell
    hidden_to_latent: eqx.nn.Linear
    latent_to_hidden: eqx.nn.MLP
    hidden_to_data: eqx.nn.Linear

    def __init__(self, key, data_size=2, hidden_size=3, latent_size=2):
        keys = jr.split(key, 5)
        self.func = _Func(hidden_size, keys[0])
        self.rnn_cell = eqx.nn.GRUCell(data_size + 1, hidden_size, key=keys[1])
        self.hidden_to_latent = eqx.nn.Linear(hidden_size, 2 * latent_size, key=keys[2])
        self.latent_to_hidden = _mlp(latent_size, hidden_size, keys[3])
        self.hidden_to_data = eqx.nn.Linear(hidden_size, data_size, key=keys[4])

    def encode(self, ts, ys, key):
        def step(hidden, data):
            return self.rnn_cell(data, hidden), None

        data = jnp.concatenate([ts[:, None], ys], axis=1)
        hidden = jnp.zeros(self.rnn_cell.hidden_size)
        hidden, _ = jax.lax.scan(step, hidden, data, reverse=True)
        mean, logstd = jnp.split(self.hidden_to_latent(hidden), 2)
        std = jnp.exp(logstd)
        return mean + jr.normal(key, mean.shape) * std, mean, std

    def decode(self, ts, latent, adjoint):
        sol = _diffeqsolve(
            diffrax.ODETerm(self.func),
            diffrax.Tsit5(),
            ts[0],
            ts[-1],
            dt0=0.005,
            y0=self.latent_to_hidden(latent),
            saveat=diffrax.SaveAt(ts=ts),
            adjoint=adjoint,
        )
        return jax.vmap(self.hidden_to_data)(sol.ys)

    def negative_elbo(self, ts, ys, key, adjoint):
        latent, mean, std = self.encode(ts, ys, key)
        reconstruction = 0.5 * jnp.sum((ys - self.decode(ts, latent, adjoint)) ** 2)
        divergence = 0.5 * jnp.sum(mean**2 + std**2 - 2 * jnp.log(std) - 1)
        return reconstruction + divergence


def _latent_ode():
    # At times of its own for each of the samples.
    keys = jr.split(jr.key(1), 2)
    ts = jnp.sort(jr.uniform(jr.key(0), (2, 4), maxval=3.0), axis=1)
    ys = jnp.stack([jnp.sin(ts), jnp.cos(2 * ts)], axis=-1)

    def loss(model, adjoint):
        one = lambda ts, ys, key: model.negative_elbo(ts, ys, key, adjoint)
        return jnp.mean(jax.vmap(one)(ts, ys, keys))

    return Program(_LatentODE, loss)


class _CDEFunc(eqx.Module):
    mlp: eqx.nn.MLP
    data_size: int
    hidden_size: int

    def __init__(self, data_size, hidden_size, key):
        self.data_size = data_size
        self.hidden_size = hidden_size
        self.mlp = _mlp(
            hidden_size, hidden_size * data_size, key, final_activation=jnp.tanh
        )

    def __call__(self, t, y, args):
        return self.mlp(y).reshape(self.hidden_size, self.data_size)


class _NeuralCDE(eqx.Module):
    initial: eqx.nn.MLP
    func: _CDEFunc
    linear: eqx.nn.Linear

    def __init__(self, data_size, hidden_size, key):
        keys = jr.split(key, 3)
        self.initial = _mlp(data_size, hidden_size, keys[0])
        self.func = _CDEFunc(data_size, hidden_size, keys[1])
        self.linear = eqx.nn.Linear(hidden_size, 1, key=keys[2])

    def __call__(self, ts, coeffs, adjoint):
        control = diffrax.CubicInterpolation(ts, coeffs)
        sol = _diffeqsolve(
            diffrax.ControlTerm(self.func, control).to_ode(),
            diffrax.Tsit5(),
            ts[0],
            ts[-1],
            dt0=None,
            y0=self.initial(control.evaluate(ts[0])),
            # At `ts` the second derivative of the control jumps. Unless steps end
            # there, rounding errors decide where they do (with any adjoint).
            stepsize_controller=diffrax.ClipStepSizeController(
                diffrax.PIDController(rtol=1e-6, atol=1e-6), step_ts=ts
            ),
            adjoint=adjoint,
        )
        (prediction,) = jax.nn.sigmoid(self.linear(sol.ys[-1]))
        return prediction


def _neural_cde():
    nan = jnp.nan
    ts = jnp.array([0.0, 0.2, 0.9, 1.0, 1.7, 2.0])
    observed = jnp.array([[0.3, nan, 1.0, 0.7, nan, -0.2], [1, 0.5, nan, nan, 0.2, 0]])
    # Time is another channel, and so is how many observations there have been.
    counts = jnp.cumsum(jnp.any(~jnp.isnan(observed), axis=0)) / 6
    ys = jnp.stack([ts, counts, *observed], axis=-1)
    coeffs = diffrax.backward_hermite_coefficients(ts, ys)

    def loss(params, adjoint):
        model, coeffs = params
        return -jnp.log(model(ts, coeffs, adjoint))

    return Program(lambda key: (_NeuralCDE(4, 2, key), coeffs), loss)


class _NeuralSDE(eqx.Module):
    initial: eqx.nn.MLP
    drift: eqx.nn.MLP
    diffusion: eqx.nn.MLP
    scale: jax.Array
    readout: eqx.nn.Linear
    hidden_size: int = 2
    noise_size: int = 3

    def __init__(self, key):
        keys = jr.split(key, 4)
        size = self.hidden_size
        self.initial = _mlp(2, size, keys[0])
        self.drift = _mlp(1 + size, size, keys[1])
        self.diffusion = _mlp(1 + size, size * self.noise_size, keys[2])
        self.scale = jnp.array(0.4)
        self.readout = eqx.nn.Linear(size, 1, key=keys[3])

    def sample(self, ts, key, solver, adjoint):
        def drift(t, y, args):
            return self.drift(jnp.append(y, t))

        def diffusion(t, y, args):
            matrix = self.diffusion(jnp.append(y, t))
            return self.scale * matrix.reshape(self.hidden_size, self.noise_size)

        initial_key, path_key = jr.split(key)
        path = diffrax.VirtualBrownianTree(
            ts[0], ts[-1], tol=1e-3, shape=(self.noise_size,), key=path_key
        )
        sol = _diffeqsolve(
            diffrax.MultiTerm(
                diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path)
            ),
            solver,
            ts[0],
            ts[-1],
            dt0=0.002,
            y0=self.initial(jr.normal(initial_key, (2,))),
            saveat=diffrax.SaveAt(ts=ts),
            adjoint=adjoint,
        )
        return jax.vmap(self.readout)(sol.ys)


def _neural_sde(solver):
    ts = jnp.linspace(0.0, 1.0, 4)
    keys = jr.split(jr.key(2), 2)

    def loss(model, adjoint):
        one = lambda key: model.sample(ts, key, solver, adjoint)
        samples = jax.vmap(one)(keys)
        return jnp.mean(samples**2) + jnp.mean(jnp.diff(samples, axis=1) ** 2)

    return Program(_NeuralSDE, loss)


def _exact_logp(t, y, args):
    y, _ = y
    _, func = args
    f, vjp_fn = jax.vjp(lambda y: func(t, y, None), y)
    (jacobian,) = jax.vmap(vjp_fn)(jnp.eye(y.size))
    return f, jnp.trace(jacobian)


def _approximate_logp(t, y, args):
    # Hutchinson's estimate.
    y, _ = y
    eps, func = args
    f, jvp = jax.jvp(lambda y: func(t, y, None), (y,), (eps,))
    return f, jnp.sum(jvp * eps)


def _normalising_flow(logp):
    data = jr.normal(jr.key(3), (3, 2))
    noise = jr.rademacher(jr.key(4), (3, 2), data.dtype)

    def log_likelihood(y, eps, func, adjoint):
        sol = _diffeqsolve(
            diffrax.ODETerm(logp),
            diffrax.Tsit5(),
            t0=0.5,
            t1=0.0,
            dt0=-0.001,
            y0=(y, jnp.array(0.0)),
            args=(eps, func),
            adjoint=adjoint,
        )
        (y,), (delta_log_likelihood,) = sol.ys
        return delta_log_likelihood - 0.5 * jnp.sum(y**2)

    def loss(func, adjoint):
        one = lambda y, eps: log_likelihood(y, eps, func, adjoint)
        return -jnp.mean(jax.vmap(one)(data, noise))

    return Program(lambda key: _Func(2, key), loss)


class _NeuralEvent(eqx.Module):
    """Both where there is a wall, and what happens before, are learnt."""

    dynamics: eqx.nn.MLP
    wall: eqx.nn.MLP
    start: jax.Array

    def __init__(self, key):
        keys = jr.split(key, 2)
        self.dynamics = _mlp(2, 1, keys[0])
        self.wall = _mlp(1, 1, keys[1])
        self.start = jnp.array([1.0, 0.2])

    def collide(self, adjoint):
        def field(t, y, args):
            force = 0.3 * self.dynamics(y)
            return jnp.concatenate([y[1:], force - 2])

        def above_wall(t, y, args, **kwargs):
            return y[0] - 0.2 * self.wall(t[None])[0]

        event = diffrax.Event(above_wall, optx.Newton(1e-10, 1e-10))
        sol = _diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            t0=0.0,
            t1=10.0,
            dt0=0.002,
            y0=self.start,
            event=event,
            adjoint=adjoint,
        )
        return sol.ts[-1], sol.ys[-1]


def _neural_event():
    def loss(model, adjoint):
        time, (_, velocity) = model.collide(adjoint)
        return (time - 0.7) ** 2 + 0.1 * (velocity + 2.5) ** 2

    return Program(_NeuralEvent, loss)


_programs = {
    "neural ODE": _neural_ode(),
    "latent ODE": _latent_ode(),
    "neural CDE": _neural_cde(),
    "neural SDE, ReversibleHeun": _neural_sde(diffrax.ReversibleHeun()),
    "neural SDE, Heun": _neural_sde(diffrax.Heun()),
    "normalising flow, exact": _normalising_flow(_exact_logp),
    "normalising flow, Hutchinson": _normalising_flow(_approximate_logp),
    "neural event ODE": _neural_event(),
}


_quick = ("neural ODE",)
_value_and_grad: Any = eqx.filter_jit(
    lambda name, params, adjoint: eqx.filter_value_and_grad(_programs[name].loss)(
        params, adjoint
    )
)


@ft.cache
def _expected(name):
    params = _programs[name].params(jr.key(0))
    return params, _value_and_grad(name, params, _default)


def _assert_close(x, true_x, rtol):
    leaves, true_leaves = (
        list(map(np.asarray, jtu.tree_leaves(t))) for t in (x, true_x)
    )
    largest = max(np.max(np.abs(x)) for x in true_leaves)
    for x, true_x in zip(leaves, true_leaves, strict=True):
        np.testing.assert_allclose(x, true_x, rtol=0, atol=rtol * largest)


@pytest.mark.parametrize(
    "name, adjoint",
    [
        pytest.param(
            name,
            adjoint,
            id=name + suffix,
            marks=() if name in _quick and suffix == "" else pytest.mark.slow,
        )
        for suffix, adjoint in (("", _reversible), (", one state", _one_state))
        for name in _programs
    ],
)
def test_program(name, adjoint):
    params, (true_value, true_grad) = _expected(name)
    # No parameter goes unused.
    for x in jtu.tree_leaves(true_grad):
        assert np.max(np.abs(x)) > 0
    value, grad = _value_and_grad(name, params, adjoint)
    _assert_close(value, true_value, rtol=1e-14)
    _assert_close(grad, true_grad, rtol=1e-10)


#
# What else there may be around a solve, or in it.
#


_params = dict(y0=jnp.array([1.0, 0.5]), args=jnp.array(1.3))


def _pendulum(t, y, args):
    return jnp.stack([y[1], -args * jnp.sin(y[0])])


def _solve(params, adjoint, field: Callable = _pendulum, **kwargs: Any) -> Any:
    sol = _diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Heun(),
        t0=0.0,
        t1=1.0,
        dt0=0.02,
        y0=params["y0"],
        args=params["args"],
        adjoint=adjoint,
        **kwargs,
    )
    return sol.ys[-1]


def _loss(params, adjoint, **kwargs):
    return jnp.sum(_solve(params, adjoint, **kwargs) ** 2)


def _grad(loss):
    return lambda params, adjoint: jax.grad(loss)(params, adjoint)


def _in_scan(params, adjoint):
    def body(y0, args):
        y = _solve(dict(y0=y0, args=args), adjoint)
        return y, jnp.sum(y**2)

    args = params["args"] * jnp.linspace(0.8, 1.2, 3)
    _, losses = jax.lax.scan(body, params["y0"], args)
    return jnp.sum(losses)


def _in_while_loop(params, adjoint):
    # Which itself cannot be differentiated: the gradient is taken inside.
    def cond_fun(carry):
        i, _, value = carry
        return (i < 5) & (value > 0.01)

    def body_fun(carry):
        i, params, _ = carry
        value, grad = jax.value_and_grad(_loss)(params, adjoint)
        return i + 1, jtu.tree_map(lambda x, g: x - 0.1 * g, params, grad), value

    return jax.lax.while_loop(cond_fun, body_fun, (0, params, jnp.inf))


def _in_checkpoint(params, adjoint):
    return jax.checkpoint(lambda params: _loss(params, adjoint))(params)


def _in_custom_vjp(params, adjoint):
    def fwd(params):
        return jax.vjp(lambda params: _solve(params, adjoint), params)

    def bwd(pull_back, grad_y):
        return pull_back(jnp.clip(grad_y, -1, 1))

    solve = jax.custom_vjp(lambda params: _solve(params, adjoint))
    solve.defvjp(fwd, bwd)
    y = solve(params)
    assert y.shape == (2,)
    return jnp.sum(y**2)


def _around_custom_vjp(params, adjoint):
    # One that is not even linear in the cotangents.
    sin = jax.custom_vjp(jnp.sin)
    sin.defvjp(
        lambda x: (jnp.sin(x), x),
        lambda x, g: (jnp.clip(g * jnp.cos(x), -0.005, 0.005),),
    )
    field = lambda t, y, args: jnp.stack([y[1], -args * sin(y[0])])
    return _loss(params, adjoint, field=field)


def _bfgs(params, adjoint, target: Any = 0.3, **kwargs: Any):
    loss = lambda params, target: (
        jnp.sum((_solve(params, adjoint) - target) ** 2)
        + jnp.sum(params["y0"] ** 2)
        + params["args"] ** 2
    )
    solver = optx.BFGS(rtol=1e-8, atol=1e-8)
    return optx.minimise(loss, solver, params, args=target, **kwargs).value


def _levenberg_marquardt(params, adjoint, **options):
    def residuals(params, args):
        target = jnp.array([0.3, -0.8, 0.5])
        return jnp.append(_solve(params, adjoint), params["args"]) - target

    solver = optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
    return optx.least_squares(residuals, solver, params, options=options).value


@pytest.mark.parametrize(
    "fn",
    (
        _grad(_in_scan),
        pytest.param(_in_while_loop, marks=pytest.mark.slow),
        _grad(_in_checkpoint),
        pytest.param(_grad(_in_custom_vjp), marks=pytest.mark.slow),
        _grad(_around_custom_vjp),
        # A minimum is determined only up to the square root of rounding errors, but not
        # so the way there.
        ft.partial(_bfgs, max_steps=8, throw=False),
        pytest.param(
            ft.partial(_levenberg_marquardt, jac="bwd"), marks=pytest.mark.slow
        ),
    ),
    ids=(
        "in scan",
        "in while_loop",
        "in checkpoint",
        "in custom_vjp",
        "around custom_vjp",
        "BFGS",
        "Levenberg-Marquardt",
    ),
)
def test_surroundings(fn):
    result, expected = (
        jax.jit(fn, static_argnums=1)(_params, adjoint)
        for adjoint in (_one_state, _default)
    )
    _assert_close(result, expected, rtol=1e-10)


def test_needs_forward_mode():
    # As it does by default.
    with pytest.raises(NotImplementedError, match="Consider using .*ForwardMode"):
        _levenberg_marquardt(_params, _one_state)


@pytest.mark.slow
def test_derivative_of_a_minimum():
    # By the implicit function theorem, which takes second derivatives.
    def derivative(adjoint):
        minimum = lambda target: _bfgs(_params, adjoint, target)
        return jax.jit(jax.jacfwd(minimum))(jnp.array([0.3, -0.8]))

    expected = derivative(diffrax.DirectAdjoint())
    _assert_close(derivative(_one_state), expected, rtol=1e-8)


def test_ahead_of_time_with_donated_arguments():
    def step(params):
        value, grad = jax.value_and_grad(_loss)(params, _one_state)
        return value, jtu.tree_map(lambda x, g: x - 0.1 * g, params, grad)

    expected = jax.jit(step)(_params)
    params = jtu.tree_map(jnp.copy, _params)
    compiled: Any = jax.jit(step, donate_argnums=0).lower(params).compile()
    _assert_close(compiled(params), expected, rtol=1e-14)
    assert all(x.is_deleted() for x in jtu.tree_leaves(params))


def _percentages(shown: str) -> list[float]:
    lines = shown.replace("\r", "\n").split("\n")
    # `tqdm` may draw one of them again, if it takes long.
    return list(
        dict.fromkeys(float(line.split("%")[0]) for line in lines if "%" in line)
    )


def test_tqdm_progress_meter(capfd):
    meter = diffrax.TqdmProgressMeter(refresh_steps=10)

    def grad(**kwargs):
        loss = lambda params: _loss(params, _one_state, **kwargs)
        return jax.jit(jax.grad(loss))(_params)

    _assert_close(grad(progress_meter=meter), grad(), rtol=1e-14)
    jax.effects_barrier()
    # Once, on the way forward.
    assert _percentages(capfd.readouterr().err) == [0, 2, 22, 42, 62, 82, 100]


def _goes_from_start_to_end(percentages: list[float], between: int) -> bool:
    # A segment that is made again may add a step to those in between.
    return (
        percentages[0] == 0
        and percentages[-1] == 100
        and percentages == sorted(percentages)
        and between <= len(percentages) - 2 <= between + 1
    )


@pytest.mark.parametrize(
    "meter, checkpoints, between",
    (
        # Of 50 steps, and one that is tried.
        pytest.param(
            diffrax.TqdmProgressMeter(refresh_steps=20), 1, 2, marks=pytest.mark.slow
        ),
        (diffrax.TextProgressMeter(minimum_increase=0.3), 0, 3),
    ),
    ids=("tqdm", "text"),
)
def test_progress_meter_on_the_way_back(meter, checkpoints, between, capfd):
    def grad(**kwargs):
        adjoint = diffrax.ReversibleAdjoint(checkpoints=checkpoints, **kwargs)
        return jax.jit(jax.grad(_loss), static_argnums=1)(_params, adjoint)

    _assert_close(grad(progress_meter=meter), grad(), rtol=1e-14)
    jax.effects_barrier()
    captured = capfd.readouterr()
    percentages = _percentages(captured.err + captured.out)
    assert _goes_from_start_to_end(percentages, between)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ("vmap", "jvp"))
def test_transformed_progress_meter_on_the_way_back(transform, capfd):
    # Shown once for a whole batch.
    def transformed(**kwargs):
        adjoint = diffrax.ReversibleAdjoint(checkpoints=1, **kwargs)
        grad = lambda x: jax.grad(_loss)(_params | dict(args=x), adjoint)
        if transform == "vmap":
            return jax.jit(jax.vmap(grad))(jnp.array([1.0, 2.0]))
        return jax.jvp(grad, (jnp.array(1.0),), (jnp.array(1.0),))

    meter = diffrax.TextProgressMeter(minimum_increase=0.3)
    _assert_close(transformed(progress_meter=meter), transformed(), rtol=1e-14)
    jax.effects_barrier()
    assert _goes_from_start_to_end(_percentages(capfd.readouterr().out), between=3)


def test_not_a_progress_meter():
    # (In this suite it is the type checker who says so.)
    meter: Any = "tqdm"
    with pytest.raises(Exception, match="progress_meter"):
        diffrax.ReversibleAdjoint(progress_meter=meter)
