"""Going back over a solve: what is stored, what is made again, and what it costs."""

import itertools as it
import re
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from diffrax._invert_step import invert_step
from diffrax._rounding_probe import _mix, advance
from diffrax._stored_states import StoredStates


#
# Stored states
#


@eqx.filter_jit
def _thin(slots, num_steps):
    stored = StoredStates.allocate(slots, jnp.array(0.0))

    def body(i, stored):
        return stored.thin_and_write(i, i.astype(float), pred=True)

    return jax.lax.fori_loop(jnp.array(1), num_steps + 1, body, stored)


@hypothesis.given(
    slots=st.sampled_from((1, 2, 3, 7, 16)), num_steps=st.integers(1, 5000)
)
@hypothesis.settings(deadline=None, max_examples=100, derandomize=True)
def test_thinning(slots, num_steps):
    stored = _thin(slots, jnp.array(num_steps))
    indices = np.sort(np.asarray(stored.indices))
    indices = indices[indices >= 0]
    assert len(set(indices)) == len(indices) <= slots
    # Each holds what it says it does.
    for index in indices:
        assert float(stored.read(jnp.array(index), jnp.array(-1.0))) == index
    assert float(stored.read(jnp.array(0), jnp.array(-1.0))) == -1
    # No gap is longer than two times the mean of those that there could be.
    gaps = np.diff([0, *indices, num_steps])
    assert np.max(gaps) <= max(1, 2 * (num_steps + 1) / (slots + 1))


#
# Problems that are hard to go back over
#


def _lorenz(t, y, args):
    x, y, z = y
    return jnp.stack([args[0] * (y - x), x * (args[1] - z) - y, x * y - args[2] * z])


def _van_der_pol(t, y, args):
    return jnp.stack([y[1], args[0] * (1 - y[0] ** 2) * y[1] - y[0]])


def _decay(t, y, args):
    return {"fast": -50 * args[0] * y["fast"], "slow": -y["slow"] * y["fast"]}


def _heat(t, y, args):
    y = jnp.concatenate([jnp.zeros(1, y.dtype), y, jnp.zeros(1, y.dtype)])
    return args * 33.0**2 * (y[2:] - 2 * y[1:-1] + y[:-2])


_van_der_pol_y0 = jnp.array([2.0, 0.0])
_decay_y0 = dict(fast=jnp.ones(2), slow=1e-8 * jnp.ones(2))
_problems = {
    "Lorenz": (_lorenz, 10.0, jnp.array([1.0, 1.0, 1.0]), jnp.array([10, 28, 8 / 3])),
    "Van der Pol": (_van_der_pol, 10.0, _van_der_pol_y0, jnp.array([5.0])),
    # Leaves of very different scales.
    "decay": (_decay, 1.0, _decay_y0, jnp.ones(1)),
    "heat": (_heat, 0.05, jnp.sin(jnp.linspace(0.0, 3.0, 32)), jnp.ones(1)),
}


def _value_and_grad(name, adjoint, solver, controller, dt0=None, batch=False):
    field, t1, y0, args = _problems[name]

    def loss(params):
        y0, args = params
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            t1,
            dt0,
            y0,
            args,
            adjoint=adjoint,
            stepsize_controller=controller,
            max_steps=2**14,
        )
        leaves = [jnp.sum(y[-1] ** 2) for y in jtu.tree_leaves(sol.ys)]
        # Each leaf counts, however small it is.
        return sum(x / jax.lax.stop_gradient(x) for x in leaves)

    params = y0, args
    if batch:
        params = jtu.tree_map(lambda x: jnp.stack([x, 0.9 * x]), params)
        return jax.jit(jax.vmap(jax.value_and_grad(loss)))(params)
    return jax.jit(jax.value_and_grad(loss))(params)


def _errors(out, expected):
    error = lambda x, y: float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)))
    return jtu.tree_leaves(jtu.tree_map(error, out, expected))


def _hard_problems():
    quick = {("Van der Pol", 1e-6, False), ("heat", 1e-6, False)}
    for case in it.product(_problems, (1e-3, 1e-6), (False, True)):
        yield pytest.param(*case, marks=() if case in quick else pytest.mark.slow)


@pytest.mark.parametrize("name, rtol, batch", list(_hard_problems()))
def test_hard_problems(name, rtol, batch):
    # Going back over all of it at once is not possible for any of these.
    controller = diffrax.PIDController(rtol=rtol, atol=rtol * 1e-3)
    solver = diffrax.Tsit5()
    out, expected = (
        _value_and_grad(name, adjoint, solver, controller, batch=batch)
        for adjoint in (
            diffrax.ReversibleAdjoint(checkpoints=4),
            diffrax.RecursiveCheckpointAdjoint(),
        )
    )
    assert max(_errors(out, expected)) <= 1e-9


@pytest.mark.parametrize(
    "solver, controller",
    (
        pytest.param(
            diffrax.UReversible(diffrax.Heun(), 0.5),
            diffrax.ConstantStepSize(),
            marks=pytest.mark.slow,
        ),
        # Cannot be undone at all.
        pytest.param(
            diffrax.Kvaerno3(),
            diffrax.PIDController(rtol=1e-4, atol=1e-6),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            diffrax.HalfSolver(diffrax.Bosh3()),
            diffrax.PIDController(rtol=1e-4, atol=1e-6),
            marks=pytest.mark.slow,
        ),
    ),
    ids=("UReversible", "Kvaerno3", "HalfSolver"),
)
def test_hard_solvers(solver, controller):
    dt0 = 0.002 if isinstance(controller, diffrax.ConstantStepSize) else None
    out, expected = (
        _value_and_grad("Lorenz", adjoint, solver, controller, dt0=dt0)
        for adjoint in (
            diffrax.ReversibleAdjoint(checkpoints=4),
            diffrax.RecursiveCheckpointAdjoint(),
        )
    )
    assert max(_errors(out, expected)) <= 1e-9


@pytest.mark.parametrize(
    "solver, tol",
    (
        (diffrax.Tsit5(), 1e-8),
        pytest.param(diffrax.ReversibleHeun(), 1e-3, marks=pytest.mark.slow),
    ),
)
def test_undone_before_a_jump(solver, tol):
    # Without anything stored: the vector field after a jump tells nothing of that
    # before it.
    def loss(args, adjoint):
        field = lambda t, y, args: jnp.where(t < 1.03, args, -3 * args) * jnp.cos(y)
        controller = diffrax.ClipStepSizeController(
            diffrax.PIDController(rtol=tol, atol=tol), jump_ts=jnp.array([1.03])
        )
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            2.0,
            None,
            jnp.array([0.3, 0.1]),
            args,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=256,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys)

    gradient, expected = (
        jax.jit(jax.grad(loss), static_argnums=1)(jnp.array(0.7), adjoint)
        for adjoint in (
            diffrax.ReversibleAdjoint(checkpoints=0),
            diffrax.RecursiveCheckpointAdjoint(),
        )
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-11)


def test_jump_that_cannot_be_undone():
    # Of a batch in which one member has the jump, and the other one steps so large that
    # undoing one as if there had been a jump is hopeless; and then the other way round.
    def loss(args, adjoint):
        def solve(rate, jump):
            def field(t, y, args):
                fast = (t > 1.5) & (t < 2.1)
                return args * jnp.where(fast, rate, 1.0) * jnp.sin(y[::-1])

            # All steps are of the same size.
            controller = diffrax.ClipStepSizeController(
                diffrax.PIDController(
                    rtol=1.0, atol=1.0, dtmin=0.1, dtmax=0.1, force_dtmin=True
                ),
                jump_ts=jump[None],
            )
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                diffrax.ReversibleHeun(),
                *(0.0, 4.0, 0.1, jnp.array([0.1, -0.05]), args),
                stepsize_controller=controller,
                adjoint=adjoint,
                max_steps=64,
            )
            assert sol.ys is not None
            return jnp.sum(sol.ys)

        rates = jnp.array([25.0, 1.0, 25.0])
        jumps = jnp.array([jnp.inf, 0.83, 1.83])
        return jnp.sum(jax.vmap(solve)(rates, jumps))

    gradient, expected = (
        jax.jit(jax.grad(loss), static_argnums=1)(jnp.array(1.0), adjoint)
        for adjoint in (
            diffrax.ReversibleAdjoint(checkpoints=1),
            diffrax.RecursiveCheckpointAdjoint(),
        )
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-10)


class _HasGain(diffrax.ODETerm):
    gain: float = 2.0


class _AsksForGain(diffrax.Euler):
    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        # `diffeqsolve` wraps every term once.
        vf = terms.term.gain * terms.vf(t0, y0, args)  # pyright: ignore
        y1 = y0 + terms.prod(vf, terms.contr(t0, t1))
        result = diffrax.RESULTS.successful
        return y1, None, dict(y0=y0, y1=y1), None, result


def test_solver_with_a_term_of_its_own():
    def loss(args, adjoint):
        sol = diffrax.diffeqsolve(
            _HasGain(lambda t, y, args: args * jnp.sin(y)),
            _AsksForGain(),
            0.0,
            1.0,
            0.1,
            jnp.array([0.3, 0.1]),
            args,
            adjoint=adjoint,
            max_steps=16,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys)

    gradient, expected = (
        jax.jit(jax.grad(loss), static_argnums=1)(jnp.array(0.7), adjoint)
        for adjoint in (
            diffrax.ReversibleAdjoint(checkpoints=1),
            diffrax.RecursiveCheckpointAdjoint(),
        )
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def test_checkpoints_of_numpy():
    assert diffrax.ReversibleAdjoint(np.int64(4)).checkpoints == 4  # pyright: ignore


@pytest.mark.parametrize(
    "name, value",
    (
        ("checkpoints", -1),
        ("checkpoints", 1.5),
        ("checkpoints", True),
        ("certificate", "on"),
        ("on_failure", "pass"),
    ),
)
def test_validation(name, value):
    with pytest.raises(ValueError, match=f"`{name}` in `ReversibleAdjoint"):
        diffrax.ReversibleAdjoint(**{name: value})


#
# The certificate
#


def test_error_of_a_step_back():
    # Up to second order, as the method is assumed to be, but for a difference quotient.
    matrix = jnp.array([[0.3, -1.0], [0.5, 0.2]])
    y, error = jnp.array([2.0, -1.0]), jnp.array([1e-16, 3e-16])
    advanced, share = advance(lambda y: matrix @ y, y, matrix @ y, error)
    expected = error - matrix @ error + 0.5 * matrix @ matrix @ error
    np.testing.assert_allclose(advanced, expected, rtol=1e-6)
    largest = jnp.max(jnp.abs(matrix @ error)) / jnp.max(jnp.abs(error))
    np.testing.assert_allclose(share, largest, rtol=1e-6)


@hypothesis.given(
    seed=st.integers(0, 2**31 - 1),
    step_size=st.floats(1e-3, 2.0),
    scale=st.sampled_from((1e-9, 1.0, 1e9)),
)
@hypothesis.settings(deadline=None, max_examples=50, derandomize=True)
def test_inverted_or_reported(seed, step_size, scale):
    y0, y1, inverted = _invert(jr.key(seed), jnp.array(step_size), jnp.array(scale))
    if inverted.error <= 16:
        # It is a start from which the step leads to the end; and the start, unless the
        # steps are so large that there may be others.
        if step_size <= 0.2:
            for x, found in zip(jtu.tree_leaves(y0), jtu.tree_leaves(inverted.y0)):
                np.testing.assert_allclose(
                    x, found, rtol=0, atol=1e-13 * float(jnp.max(x))
                )
    else:
        assert step_size > 0.2


@jax.jit
def _invert(key, step_size, scale):
    weights = jr.normal(key, (4, 4)) / 2
    y0 = {"a": 1 + jr.uniform(key, (4,)), "b": scale * (2 + jr.uniform(key, (2, 2)))}

    def field(y):
        both = jnp.tanh(weights @ (y["a"] + y["b"].reshape(4) / scale))
        return {"a": both, "b": scale * both.reshape(2, 2)}

    def euler(y, h):
        return jtu.tree_map(lambda x, f: x + h * f, y, field(y))

    y1 = euler(y0, step_size)
    step = lambda y: euler(y, step_size)
    step_back = lambda y: euler(y, -step_size)
    return y0, y1, invert_step(step, step_back, y1)


#
# Cost
#


def _count(adjoint, solver, num_steps, t1, scale):
    """How often the vector field is evaluated by itself, evaluated as part of being
    linearised, and transposed; for a batch of `scale`, for all of it at a time."""
    counts = [], [], []

    def count(i):
        # Several threads do this at a time.
        counts[i].append(None)

    @jax.custom_vjp
    def field(y, args):
        jax.debug.callback(count, 0)
        return args * jnp.sin(y)

    def fwd(y, args):
        jax.debug.callback(count, 1)
        return args * jnp.sin(y), (y, args)

    def bwd(residuals, grad):
        jax.debug.callback(count, 2)
        y, args = residuals
        return grad * args * jnp.cos(y), jnp.sum(grad * jnp.sin(y))

    field.defvjp(fwd, bwd)

    def solve(args):
        terms = diffrax.ODETerm(lambda t, y, args: field(y, args))
        y0 = jnp.array([1.0, 2.0])
        if isinstance(solver.term_structure, tuple):
            terms, y0 = (terms, terms), (y0, y0)
        sol = diffrax.diffeqsolve(
            terms,
            solver,
            0.0,
            t1,
            t1 / num_steps,
            y0,
            args,
            adjoint=adjoint,
            max_steps=num_steps + 1,
        )
        return sum(jnp.sum(y) for y in jtu.tree_leaves(sol.ys))

    scale = jnp.asarray(scale)
    loss = lambda args: jnp.sum(jnp.vectorize(solve)(args))
    jax.block_until_ready(jax.jit(jax.grad(loss))(scale))
    jax.effects_barrier()
    return map(len, counts)


def _num_carried(num_steps: int) -> int:
    """Over how many small steps the error is carried on: the first one, and about every
    fourth after that, as a hash of its number has it; but no later than the twelfth."""
    indices = jnp.arange(num_steps, 0, -1).astype(jnp.uint32)
    count, waiting = 0, None
    for is_turn in np.asarray(_mix(indices) % np.uint32(4) == 0):
        if waiting is None or is_turn or waiting >= 11:
            count, waiting = count + 1, 0
        else:
            waiting += 1
    return count


@pytest.mark.parametrize(
    "solver, num_stages, checkpoints, certificate",
    (
        (diffrax.Tsit5(), 6, 0, "cheap"),
        (diffrax.Tsit5(), 6, 0, "full"),
        (diffrax.Tsit5(), 6, 16, "cheap"),
        (diffrax.Heun(), 2, 16, "cheap"),
        pytest.param(diffrax.Dopri8(), 13, 0, "full", marks=pytest.mark.slow),
    ),
)
def test_least_cost(solver, num_stages, checkpoints, certificate):
    # Steps so small that the guess is right up to rounding.
    n = 100
    adjoint = diffrax.ReversibleAdjoint(checkpoints, certificate)
    primal, linearised, transposed = _count(adjoint, solver, n, 1e-3, 1.0)
    # The first stage of a step back is that of the step that started there. The step
    # that starts from a known state need not be undone. There is one evaluation for the
    # first step of the solve, if that is how it works, and one at its end.
    segments = checkpoints + 1
    expected = num_stages * n + (num_stages - 1) * (n - segments) + 2
    if certificate == "full":
        # Two wherever the error is carried on; and the last step of the only segment is
        # undone as well.
        expected += 2 * _num_carried(n) + num_stages - 1
        n += 1
    assert expected - 1 <= primal <= expected
    assert linearised == transposed == num_stages * n


@pytest.mark.parametrize(
    "solver, num_evaluations, certificate",
    (
        (diffrax.UReversible(diffrax.Heun()), 4, "cheap"),
        (diffrax.UReversible(diffrax.Heun()), 4, "full"),
        pytest.param(
            diffrax.UReversible(diffrax.Tsit5()), 12, "cheap", marks=pytest.mark.slow
        ),
        (diffrax.SemiImplicitEuler(), 2, "cheap"),
        pytest.param(diffrax.PositionVerlet(), 3, "cheap", marks=pytest.mark.slow),
        pytest.param(diffrax.ForestRuth(), 7, "cheap", marks=pytest.mark.slow),
        pytest.param(diffrax.LeapfrogMidpoint(), 1, "cheap", marks=pytest.mark.slow),
        pytest.param(
            diffrax.AsynchronousLeapfrog(), 1, "cheap", marks=pytest.mark.slow
        ),
    ),
)
def test_least_cost_in_closed_form(solver, num_evaluations, certificate):
    # Nothing but the forward pass, the linearisation and its transpose.
    n = 40 if certificate == "cheap" else 400
    checkpoints = 4 if certificate == "cheap" else 0
    adjoint = diffrax.ReversibleAdjoint(checkpoints, certificate)
    primal, linearised, transposed = _count(adjoint, solver, n, 1e-3, 1.0)
    if certificate == "full":
        # A step back wherever the error is carried on; and the last step of the only
        # segment is undone as well.
        primal -= num_evaluations * _num_carried(n)
    assert primal == num_evaluations * n
    if certificate == "full":
        n += 1
    assert linearised == transposed == num_evaluations * n


@pytest.mark.parametrize(
    "solver, num_stages, t1",
    (
        (diffrax.Heun(), 2, 0.1),
        pytest.param(diffrax.Bosh3(), 3, 0.5, marks=pytest.mark.slow),
        pytest.param(diffrax.Tsit5(), 6, 5.0, marks=pytest.mark.slow),
    ),
)
def test_cost_of_corrections(solver, num_stages, t1):
    n = 100
    adjoint = diffrax.ReversibleAdjoint(0, "cheap")

    def loss(adjoint, y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.sin(y)),
            solver,
            *(0.0, t1, t1 / n, y0),
            adjoint=adjoint,
            max_steps=n + 1,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys)

    report = eqx.filter_jit(diffrax.reversal_report)(
        loss, jnp.array([1.0, 2.0]), adjoint=adjoint
    )
    corrections = [int(x) for x in report.corrections[n - 1 : 0 : -1]]
    # Two solves of each step for each correction; and one that is wasted wherever more
    # are needed, linearised, or less, by itself, than by the step that came before.
    more = sum(max(b - a, 0) for a, b in zip([0, *corrections], corrections))
    less = sum(b < a for a, b in zip([0, *corrections], corrections))
    assert sum(corrections) >= n / 2
    primal, linearised, transposed = _count(adjoint, solver, n, t1, 1.0)
    both = num_stages * sum(corrections)
    # As in `test_least_cost`.
    expected = num_stages * n + (num_stages - 1) * (n - 1) + 2
    expected += both + (both - num_stages * more) + num_stages * less
    assert expected - 1 <= primal <= expected
    assert linearised == transposed == num_stages * (n + more)


@pytest.mark.parametrize(
    "checkpoints", (16, 64, pytest.param(100, marks=pytest.mark.slow))
)
def test_cost_of_making_again(checkpoints):
    # If there is room for all states of each segment then nothing is undone, and each
    # step that starts from no stored state is made again once.
    n, num_stages = 100, 6
    adjoint = diffrax.ReversibleAdjoint(checkpoints)
    primal, linearised, transposed = _count(adjoint, diffrax.Tsit5(), n, 1e-3, 1.0)
    # From a stored state, the first stage has to be evaluated, too.
    assert primal <= num_stages * n + (num_stages + 1) * (n - checkpoints) + 2
    assert linearised == transposed == num_stages * n


@pytest.mark.slow
def test_cost_of_a_batch():
    # Its members go back together, those that are easy to go back over and those of
    # which every step has to be made again. If each did so by itself, and had to wait
    # for all the others all the same, it would be a multiple of this.
    adjoint = diffrax.ReversibleAdjoint(checkpoints=4)
    count = lambda scale: sum(_count(adjoint, diffrax.Heun(), 300, 6.0, scale))
    scales = np.array([-0.1, -3.5, -12.0])
    assert count(scales) <= 1.2 * max(count(scale) for scale in scales)


#
# Solvers of one's own
#


class _Backward(diffrax.LeapfrogMidpoint):
    """Returns something else from `backward_step`."""

    change: Callable = eqx.field(static=True, default=lambda out: out)

    def backward_step(self, *args, **kwargs) -> Any:
        return self.change(super().backward_step(*args, **kwargs))


class _TwoHalves(diffrax.LeapfrogMidpoint):
    """The mean of two increments, at points that are not the same."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        tm1, ym1 = solver_state
        y1 = ym1 + self._mean(terms, t0, y0, args, terms.contr(tm1, t1))
        result = diffrax.RESULTS.successful
        return y1, None, dict(y0=y0, y1=y1), (t0, y0), result

    def backward_step(self, terms, t0, t1, y1, args, solver_state, made_jump):
        tm1, y0 = solver_state
        ym1 = y1 - self._mean(terms, t0, y0, args, terms.contr(tm1, t1))
        return y0, dict(y0=y0, y1=y1), (tm1, ym1)

    def _mean(self, terms, t, y, args, control):
        prods = [terms.vf_prod(t, x, args, control) for x in (y, 1.01 * y)]
        return 0.5 * sum(prods)


class _Shares(_TwoHalves):
    shared_evaluations = (0, 1)


class _SharesOne(_TwoHalves):
    shared_evaluations = (None, 1)


class _SharesWrong(_TwoHalves):
    shared_evaluations = (1, 0)


class _SharesAndCarries(_Shares):
    carried_evaluations = (0, 1)


class _CarriesWrong(_TwoHalves):
    carried_evaluations = (0, 1)


class _SharesNothing(_Shares):
    # Nobody has said so of this method.
    def backward_step(self, *args, **kwargs) -> Any:
        return super().backward_step(*args, **kwargs)


@pytest.mark.parametrize(
    "solver, primal, linearised",
    (
        pytest.param(_TwoHalves(), 2, 2, id="nothing", marks=pytest.mark.slow),
        pytest.param(_Shares(), 0, 2, id="all"),
        pytest.param(_SharesOne(), 1, 2, id="one", marks=pytest.mark.slow),
        pytest.param(_SharesAndCarries(), 0, 2, id="all, twice over"),
        pytest.param(_SharesNothing(), 2, 2, id="overridden"),
    ),
)
def test_cost_of_what_is_shared(solver, primal, linearised):
    n = 20
    adjoint = diffrax.ReversibleAdjoint(checkpoints=0, certificate="cheap")
    counts = list(_count(adjoint, solver, n, 1e-3, 1.0))
    assert counts == [2 * n + primal * (n - 1), linearised * n, linearised * n]


class _OtherStep(diffrax.ReversibleHeun):
    def step(self, *args, **kwargs) -> Any:
        return super().step(*args, **kwargs)


class _OtherStepBack(diffrax.ReversibleHeun):
    def backward_step(self, *args, **kwargs) -> Any:
        return super().backward_step(*args, **kwargs)


@pytest.mark.parametrize(
    "solver, checkpoints",
    (
        (diffrax.ReversibleHeun(), 0),
        (diffrax.ReversibleHeun(), 4),
        # Nobody has said so of these methods.
        pytest.param(_OtherStep(), 0, marks=pytest.mark.slow),
        (_OtherStepBack(), 0),
    ),
)
def test_cost_of_what_is_carried(solver, checkpoints):
    n, segments = 20, checkpoints + 1
    adjoint = diffrax.ReversibleAdjoint(checkpoints, certificate="cheap")
    primal, linearised, transposed = _count(adjoint, solver, n, 1e-3, 1.0)
    # The first step of each segment is from a known state. There is one evaluation for
    # the solver state at the start of the solve.
    undone = n - segments
    if type(solver) is diffrax.ReversibleHeun:
        # To start carrying, the last step of each segment is made once more.
        assert primal == n
        assert linearised == (segments + undone) + segments + 1
    else:
        assert primal == n + undone
        assert linearised == n + 1
    assert transposed == n + 1


def test_cost_of_what_is_carried_of_one_term():
    # To start carrying, a step is made, of which one evaluation is recorded. And there
    # is the solver state at the start of the solve, of the second term alone.
    n = 20
    adjoint = diffrax.ReversibleAdjoint(checkpoints=0, certificate="cheap")
    counts = list(_count(adjoint, diffrax.VelocityVerlet(), n, 1e-3, 1.0))
    assert counts == [2 * n + 1, 2 * n + 1 + 1, 2 * n + 1]


def _gradient_of_shared(solver, adjoint):
    def loss(args):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: args * jnp.sin(y[::-1])),
            solver,
            0.0,
            1.0,
            0.1,
            jnp.array([0.3, -0.2]),
            args,
            adjoint=adjoint,
            max_steps=16,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys[-1] ** 2)

    return eqx.filter_jit(jax.grad(loss))(jnp.array([0.7, 0.5]))


@pytest.mark.parametrize(
    "solver",
    (_SharesWrong(), pytest.param(_CarriesWrong(), marks=pytest.mark.slow)),
)
def test_shared_by_mistake(solver):
    expected = _gradient_of_shared(solver, diffrax.RecursiveCheckpointAdjoint())
    adjoint = diffrax.ReversibleAdjoint(checkpoints=1, certificate="cheap")
    gradient = _gradient_of_shared(solver, adjoint)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)
    # With nothing to make steps again from.
    adjoint = diffrax.ReversibleAdjoint(0, "cheap", on_failure="nan")
    gradient = _gradient_of_shared(solver, adjoint)
    assert np.all(np.isnan(gradient))


@pytest.mark.parametrize("attribute", ("shared_evaluations", "carried_evaluations"))
@pytest.mark.parametrize(
    "shared, match",
    (
        ((0,), "`step(...)` makes 2 evaluations"),
        ((0, 2), "`backward_step(...)` makes 2 evaluations"),
        ((0, 0.5), "must be a tuple of integers and `None`"),
        ([0, 1], "must be a tuple of integers and `None`"),
        ((0, (1,)), "must be a tuple of integers and `None`"),
        (((0,), (1,)), "is for a tuple of 2 terms"),
    ),
)
def test_shared_evaluations_are_checked(attribute, shared, match):
    class Shares(_TwoHalves):
        pass

    setattr(Shares, attribute, shared)
    match = match.replace("`step", "`Shares.step")
    match = re.escape(match.replace("`backward", "`Shares.backward"))
    match = rf"`Shares.{attribute}` .*{match}"
    with pytest.raises(ValueError, match=match):
        _gradient_of_shared(Shares(), diffrax.ReversibleAdjoint())


@pytest.mark.parametrize(
    "change, match",
    (
        (lambda out: out[:2], "must return a tuple"),
        (lambda out: [*out], "must return a tuple"),
        (lambda out: (out[0][None], *out[1:]), "`y0` as returned by `_Backward"),
        (
            lambda out: (*out[:2], (out[2][0], None)),
            "`solver_state` as returned by `_Backward",
        ),
    ),
    ids=("two values", "list", "shape", "structure"),
)
def test_backward_step_is_checked(change, match):
    with pytest.raises(ValueError, match=match):
        _count(diffrax.ReversibleAdjoint(), _Backward(change), 10, 1.0, 1.0)
