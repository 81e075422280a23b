"""`ReversibleAdjoint`: its memory, what it refuses, and what has no gradient."""

import functools as ft
import warnings
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest


_y0 = jnp.array([1.0, 0.5])
_solver = diffrax.UReversible(diffrax.Heun())
_adaptive = diffrax.PIDController(rtol=1e-3, atol=1e-3)


def _field(t, y, args):
    return args * jnp.sin(y[::-1]) + jnp.cos(t)


def _solve(args: Any = 1.0, **kwargs: Any) -> Any:
    arguments: dict[str, Any] = dict(
        terms=diffrax.ODETerm(_field),
        solver=_solver,
        t0=0.0,
        t1=1.0,
        dt0=0.2,
        y0=_y0,
        args=args,
        adjoint=diffrax.ReversibleAdjoint(),
        max_steps=16,
    )
    return diffrax.diffeqsolve(**(arguments | kwargs))


def _loss(args, **kwargs):
    return jnp.sum(_solve(args, **kwargs).ys ** 2)


#
# Memory
#


def _temp_size(solver, controller, num_steps):
    def loss(args, y0):
        dt0 = 1.0 / num_steps
        kwargs = dict(solver=solver, stepsize_controller=controller, y0=y0)
        return _loss(args, dt0=dt0, max_steps=num_steps, **kwargs)

    # Large enough for a second copy of anything to be seen.
    y0 = jnp.linspace(0.0, 1.0, 1000)
    compiled: Any = jax.jit(jax.grad(loss)).lower(jnp.array(1.0), y0).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "solver, controller, record_size",
    (
        (_solver, diffrax.ConstantStepSize(), 8),
        pytest.param(
            diffrax.UReversible(diffrax.Tsit5()),
            diffrax.ConstantStepSize(),
            8,
            marks=pytest.mark.slow,
        ),
        pytest.param(diffrax.ReversibleHeun(), _adaptive, 8, marks=pytest.mark.slow),
        # The start of the step before the last one.
        pytest.param(
            diffrax.LeapfrogMidpoint(),
            diffrax.ConstantStepSize(),
            16,
            marks=pytest.mark.slow,
        ),
        # Both ends of each step, and whether there was a jump.
        (
            _solver,
            diffrax.ClipStepSizeController(_adaptive, jump_ts=[0.5]),
            17,
        ),
    ),
    ids=("UReversible(Heun)", "UReversible(Tsit5)", "adaptive", "leapfrog", "jumps"),
)
def test_memory(solver, controller, record_size):
    few, many = (_temp_size(solver, controller, n) for n in (100, 100_000))
    growth = many - few - record_size * (100_000 - 100)
    # Each buffer is aligned to 64 bytes.
    assert growth <= 3 * 64


@pytest.mark.slow
def test_memory_of_many_states():
    # What is stored does not grow with the number of steps; the memory of
    # `DirectAdjoint`, say, does, which shows that such growth would be seen.
    y0 = jnp.ones(1000)

    def temp_size(adjoint, num_steps):
        loss = lambda args: _loss(args, y0=y0, adjoint=adjoint, max_steps=num_steps)
        compiled: Any = jax.jit(jax.grad(loss)).lower(jnp.array(1.0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for adjoint, grows in (
        (diffrax.ReversibleAdjoint(), False),
        (diffrax.DirectAdjoint(), True),
    ):
        growth = temp_size(adjoint, 1024) - temp_size(adjoint, 16)
        assert (growth > 10 * y0.nbytes) == grows


#
# Refused, before anything runs
#


def _brownian(path):
    return diffrax.ControlTerm(lambda t, y, args: jnp.ones((2, 1)), path)


_unsafe = diffrax.UnsafeBrownianPath(shape=(1,), key=jr.key(0))


@pytest.mark.parametrize(
    "kwargs, error, match",
    (
        (
            dict(
                solver=diffrax.HalfSolver(diffrax.Bosh3()),
                adjoint=diffrax.ReversibleAdjoint(checkpoints=0),
            ),
            ValueError,
            r"`solver=HalfSolver\(\.\.\.\)`",
        ),
        (
            dict(
                terms=_brownian(_unsafe),
                solver=diffrax.HalfSolver(diffrax.Heun()),
            ),
            ValueError,
            "VirtualBrownianTree",
        ),
        (
            dict(terms=_brownian(_unsafe), solver=diffrax.LeapfrogMidpoint()),
            ValueError,
            "VirtualBrownianTree",
        ),
    ),
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_refused(kwargs, error, match):
    evaluations = 0

    def count():
        nonlocal evaluations
        evaluations += 1

    def counted(t, y, args):
        jax.debug.callback(count)
        return _field(t, y, args)

    kwargs = dict(terms=diffrax.ODETerm(counted)) | kwargs
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is not marked as converging")
        with pytest.raises(error, match=match) as info:
            _solve(**kwargs)
    # Every message says what was wrong, and what to do.
    assert "Cannot use" in str(info.value)
    assert "Consider using" in str(info.value)
    jax.effects_barrier()
    assert evaluations == 0


_forward = {
    "jvp": lambda fn: jax.jvp(fn, (jnp.array(1.0),), (jnp.array(1.0),)),
    "jacfwd": lambda fn: jax.jacfwd(fn)(jnp.array(1.0)),
    "jit of jvp": lambda fn: jax.jit(
        lambda: jax.jvp(fn, (jnp.array(1.0),), (jnp.array(1.0),))
    )(),
    "jvp of vmap": lambda fn: jax.jvp(jax.vmap(fn), (jnp.ones(2),), (jnp.ones(2),)),
    "linearize": lambda fn: jax.linearize(fn, jnp.array(1.0))[1](jnp.array(1.0)),
}


def _closed_over_loss(args):
    term = diffrax.ODETerm(lambda t, y, _: args * jnp.sin(y))
    return _loss(None, terms=term)


def _unbounded_loss(args):
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    return _loss(args, stepsize_controller=controller, max_steps=None)


@pytest.mark.parametrize(
    "loss",
    (_loss, _closed_over_loss, _unbounded_loss),
    ids=("args", "closed", "unbounded"),
)
@pytest.mark.parametrize("mode", _forward)
def test_forward_mode(mode, loss):
    with pytest.raises(NotImplementedError, match="Consider using .*ForwardMode"):
        jax.block_until_ready(_forward[mode](loss))


_twice = {
    "grad of grad": lambda fn: jax.grad(jax.grad(fn))(jnp.array(1.0)),
    "jit": lambda fn: jax.jit(jax.grad(jax.grad(fn)))(jnp.array(1.0)),
    "jacrev of jacrev": lambda fn: jax.jacrev(jax.jacrev(fn))(jnp.array(1.0)),
    "vmap": lambda fn: jax.grad(lambda x: jnp.sum(jax.vmap(jax.grad(fn))(x)))(
        jnp.ones(2)
    ),
}


@pytest.mark.parametrize("mode", _twice)
def test_second_derivative(mode):
    with pytest.raises(Exception, match="Cannot differentiate twice.*DirectAdjoint"):
        jax.block_until_ready(_twice[mode](_loss))


def test_second_derivative_remedy():
    # The one that the error names.
    loss = lambda args: _loss(args, adjoint=diffrax.DirectAdjoint())
    eps = 1e-4
    grad = jax.jit(jax.grad(loss))
    difference = (grad(jnp.array(1 + eps)) - grad(jnp.array(1 - eps))) / (2 * eps)
    second = jax.jit(jax.grad(jax.grad(loss)))(jnp.array(1.0))
    np.testing.assert_allclose(second, difference, rtol=1e-6)


class _OwnController(diffrax.AbstractStepSizeController):
    """Steps that depend on the solution."""

    stop: bool

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return t0 + dt0, None

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        step = 0.1 + 0.05 * jnp.tanh(jnp.sum(y1_candidate))
        if self.stop:
            step = jax.lax.stop_gradient(step)
        return True, t1, t1 + step, False, None, diffrax.RESULTS.successful


@pytest.mark.parametrize("jit", (lambda fn: fn, jax.jit), ids=("", "jit"))
def test_own_controller(jit):
    def grad(controller, adjoint):
        loss = lambda args: _loss(args, stepsize_controller=controller, adjoint=adjoint)
        return jit(jax.grad(loss))(jnp.array(1.0))

    stopped = _OwnController(True)
    np.testing.assert_allclose(
        grad(stopped, diffrax.ReversibleAdjoint()),
        grad(stopped, diffrax.RecursiveCheckpointAdjoint()),
        rtol=1e-12,
    )
    with pytest.raises(Exception, match="the steps of `stepsize_controller=_OwnCon"):
        grad(_OwnController(False), diffrax.ReversibleAdjoint())


#
# Not to be trusted
#


@pytest.mark.parametrize(
    "coupling_parameter, num_steps, t1",
    # Rounding is multiplied by `coupling_parameter**-num_steps`.
    (
        (0.5, 60, 5.0),
        pytest.param(0.5, 2000, 5.0, marks=pytest.mark.slow),
        pytest.param(0.9, 400, 5.0, marks=pytest.mark.slow),
    ),
)
def test_drift(coupling_parameter, num_steps, t1):
    solver = diffrax.UReversible(diffrax.Heun(), coupling_parameter)

    def grad(checkpoints, throw):
        adjoint = diffrax.ReversibleAdjoint(checkpoints=checkpoints)
        loss = lambda args: _loss(
            args,
            adjoint=adjoint,
            terms=diffrax.ODETerm(
                lambda t, y, p: jnp.stack([y[1], -p * jnp.sin(y[0])])
            ),
            solver=solver,
            t1=t1,
            dt0=t1 / num_steps,
            max_steps=4096,
            throw=throw,
        )
        return eqx.filter_jit(jax.value_and_grad(loss))(jnp.array(1.0))

    value, gradient = grad(checkpoints=0, throw=False)
    assert jnp.isfinite(value)
    assert jnp.isnan(gradient)
    # How large it is, and when.
    with pytest.raises(
        Exception, match=r"(relative error of \S+|infinity on the way), \d+% of the way"
    ):
        jax.block_until_ready(grad(checkpoints=0, throw=True))


@pytest.mark.parametrize("on_failure", ("nan", "ignore"))
def test_drift_of_members_of_a_batch(on_failure):
    # Going back expands errors by a factor of `exp(rate)`: nothing is left for one of
    # the two.
    def loss(rate):
        adjoint = diffrax.ReversibleAdjoint(checkpoints=0, on_failure=on_failure)
        terms = diffrax.ODETerm(lambda t, y, args: args * (jnp.sin(t) - y))
        kwargs: Any = dict(terms=terms, solver=diffrax.Heun(), adjoint=adjoint)
        return _loss(rate, dt0=0.01, max_steps=128, **kwargs)

    rates = jnp.array([1.0, 50.0])
    benign, hopeless = jax.jit(jax.vmap(jax.grad(loss)))(rates)
    assert jnp.isfinite(benign)
    assert jnp.isnan(hopeless) == (on_failure == "nan")


def test_batch_members_that_are_done():
    # They wait for the others without ever leaving the interval of their solve.
    def field(t, y, args):
        t = eqx.error_if(t, (t < 0.5) | (t > 1.3 + 1e-12), "outside of the interval")
        return _field(t, y, args)

    @eqx.filter_jit
    @jax.vmap
    def grad(t1):
        kwargs: Any = dict(terms=diffrax.ODETerm(field), t0=0.5)
        return jax.grad(lambda args: _loss(args, t1=t1, **kwargs))(jnp.array(1.0))

    assert jnp.all(jnp.isfinite(grad(jnp.array([0.7, 1.3, 0.5]))))


#
# Without a gradient
#


@pytest.mark.parametrize(
    "value, controller",
    (
        (1e-3, lambda x: diffrax.PIDController(rtol=x, atol=x)),
        (0.5, lambda x: diffrax.ClipStepSizeController(_adaptive, step_ts=[x])),
        (0.5, lambda x: diffrax.ClipStepSizeController(_adaptive, jump_ts=[x])),
    ),
    ids=("rtol", "step_ts", "jump_ts"),
)
def test_nondifferentiable_input(value, controller):
    loss = lambda x: _loss(1.0, stepsize_controller=controller(x), max_steps=64)
    match = "Cannot differentiate with respect to `stepsize_controller`"
    for transform in (jax.grad, lambda fn: jax.jit(jax.grad(fn))):
        with pytest.raises(Exception, match=match):
            transform(loss)(jnp.array(value))
    with pytest.raises(Exception, match="forward-mode|`stepsize_controller`"):
        jax.jacfwd(loss)(jnp.array(value))


def test_nondifferentiable_closure():
    # A value that only the step size controller closes over.
    def loss(x):
        norm = lambda y: jnp.sqrt(jnp.sum(y**2)) * x
        return _loss(
            1.0,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3, norm=norm),
        )

    with pytest.raises(Exception, match="only the step size controller"):
        jax.grad(loss)(jnp.array(1.0))


#
# In use
#


@pytest.mark.parametrize(
    "derivative",
    (
        jax.grad,
        # With respect to times, too.
        pytest.param(
            ft.partial(jax.grad, argnums=(0, 1, 2, 3)), marks=pytest.mark.slow
        ),
        pytest.param(lambda loss: jax.jacfwd(jax.grad(loss)), marks=pytest.mark.slow),
    ),
    ids=("gradient", "times", "second derivative"),
)
def test_one_trace(derivative):
    # One for each shape, and none for new values.
    num_traces = 0

    def loss(args, y0, t1, ts):
        saveat = diffrax.SaveAt(t1=True, ts=ts)
        return _loss(args, y0=y0, t1=t1, saveat=saveat)

    @jax.jit
    def grad(args, *others):
        nonlocal num_traces
        num_traces += 1
        return derivative(loss)(args, *others)

    ts = jnp.array([0.1, 0.2])
    for scale in (1.0, 2.0, 3.0):
        grad(jnp.array(scale), scale * _y0, jnp.array(scale / 3), ts / scale)
    assert num_traces == 1
    grad(jnp.array(1.0), jnp.ones(3), jnp.array(1.0), ts)
    assert num_traces == 2


_ts = jnp.array([0.1, 0.5])


def test_values_are_those_of_other_adjoints():
    saveat = diffrax.SaveAt(t0=True, t1=True, ts=_ts, solver_state=True)
    kwargs = dict(saveat=saveat, stepsize_controller=_adaptive, max_steps=64)
    sol = _solve(**kwargs)
    expected = _solve(adjoint=diffrax.RecursiveCheckpointAdjoint(), **kwargs)
    leaves, expected_leaves = (
        jtu.tree_leaves(eqx.filter(x, eqx.is_array)) for x in (sol, expected)
    )
    assert len(leaves) == len(expected_leaves)
    for x, y in zip(leaves, expected_leaves):
        np.testing.assert_array_equal(x, y)


class _Explicit(diffrax.AbstractReversibleSolver):
    """A user's own solver, with parameters of its own: a kick for each of two halves of
    the state, which is symplectic Euler's method for a single term."""

    scale: jax.Array
    term_structure = diffrax.ODETerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 1

    def init(self, terms, t0, t1, y0, args):
        return None

    def _kick(self, terms, t0, t1, y, args):
        control = self.scale * terms.contr(t0, t1)
        return terms.vf_prod(t0, y, args, control)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        a, b = y0
        a = a + self._kick(terms, t0, t1, (a, b), args)[0]
        b = b + self._kick(terms, t0, t1, (a, b), args)[1]
        y1 = (a, b)
        successful = diffrax.RESULTS.successful
        return y1, None, dict(y0=y0, y1=y1), None, successful

    def backward_step(self, terms, t0, t1, y1, args, solver_state, made_jump):
        a, b = y1
        b = b - self._kick(terms, t0, t1, (a, b), args)[1]
        a = a - self._kick(terms, t0, t1, (a, b), args)[0]
        y0 = (a, b)
        return y0, dict(y0=y0, y1=y1), None

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


def test_own_solver():
    # Also one with parameters, with respect to which there is a gradient.
    def vf(t, y, args):
        a, b = y
        return args * jnp.sin(b) + t, -jnp.cos(a)

    def loss(params, adjoint):
        scale, args, y0 = params
        ys = _solve(
            args,
            terms=diffrax.ODETerm(vf),
            solver=_Explicit(scale),
            y0=(y0, 2 * y0),
            saveat=diffrax.SaveAt(ts=_ts, t1=True),
            adjoint=adjoint,
        ).ys
        return jnp.sum(ys[0] ** 2) + jnp.sum(jnp.sin(ys[1]))

    params = (jnp.array(0.9), jnp.array(1.3), _y0)
    grad, expected = (
        jax.jit(jax.grad(loss), static_argnums=1)(params, adjoint)
        for adjoint in (
            diffrax.ReversibleAdjoint(),
            diffrax.RecursiveCheckpointAdjoint(),
        )
    )
    for x, y in zip(jtu.tree_leaves(grad), jtu.tree_leaves(expected)):
        assert jnp.all(y != 0)
        np.testing.assert_allclose(x, y, rtol=1e-12)


def test_training_and_progress_meter():
    # As a user would: optax, a progress meter, a network, and noisy data.
    model = eqx.nn.MLP(2, 2, 8, 1, key=jr.key(0))
    optimiser = optax.adam(3e-2)
    ts = jnp.linspace(0.0, 1.0, 5)
    rotation = lambda t, y, args: jnp.stack([-y[1], y[0]])
    saveat = diffrax.SaveAt(ts=ts)
    data = _solve(terms=diffrax.ODETerm(rotation), saveat=saveat).ys

    @eqx.filter_jit
    def step(model, opt_state):
        def loss(model):
            term = diffrax.ODETerm(lambda t, y, args: args(y))
            meter = diffrax.TextProgressMeter()
            ys = _solve(model, terms=term, saveat=saveat, progress_meter=meter).ys
            return jnp.mean((ys - data) ** 2)

        value, grad = eqx.filter_value_and_grad(loss)(model)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimiser.update(grad, opt_state)
        return value, eqx.apply_updates(model, updates), opt_state

    opt_state = optimiser.init(eqx.filter(model, eqx.is_array))
    values = []
    for _ in range(40):
        value, model, opt_state = step(model, opt_state)
        values.append(value)
    assert values[-1] < 0.1 * values[0]


def test_citation(capsys):
    diffrax.citation(solver=_solver, adjoint=diffrax.ReversibleAdjoint())
    out = capsys.readouterr().out
    assert "mccallum2024efficient" in out
    assert "UReversible" in out
    assert "ReversibleAdjoint" in out
    # A solver that wraps another one cites that, too.
    for wrapper in (
        diffrax.UReversible,
        diffrax.FixedPointReversible,
        lambda solver: diffrax.BitExact(solver, size=1.0),
    ):
        diffrax.citation(solver=wrapper(diffrax.Tsit5()))
        assert "tsitouras2011runge" in capsys.readouterr().out
    for solver, key in (
        (diffrax.AsynchronousLeapfrog(), "zhuang2021mali"),
        (diffrax.EES25(), "shmelev2025explicit"),
        (diffrax.GaussLegendre4(), "hairer2006geometric"),
        (diffrax.UReversible(diffrax.EES27()), "shmelev2025explicit"),
        (diffrax.BitExact(diffrax.PEFRL(), size=1.0), "rein2018janus"),
        (
            diffrax.BitExact(diffrax.UReversible(diffrax.Heun()), size=1.0),
            "mccallum2024",
        ),
        (diffrax.BitExact(diffrax.Tsit5(), size=1.0), "mccallum2024"),
    ):
        diffrax.citation(solver=solver)
        assert key in capsys.readouterr().out
