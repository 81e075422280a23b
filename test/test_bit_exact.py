"""`BitExact`: every bit comes back, of long chaotic solves as of others."""

import functools as ft
import random
from typing import Any

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from diffrax._damped_gap import Damping, max_power, period
from diffrax._lattice import Part
from diffrax._same_bits import SameBits


@pytest.fixture(autouse=True, scope="module")
def _compile_as_users_do():
    # Otherwise LLVM optimises some of a program and not the rest, so that a vector
    # field is not rounded alike wherever it is evaluated. (The certificate tells.)
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


#
# The system of Henon and Heiles, which is chaotic, and others.
#


def _velocity(t, v, scale):
    return v


def _force(t, q, scale):
    x, y = q
    return -scale * jnp.stack([x + 2 * x * y, y + x * x - y * y])


def _both(t, y, scale):
    q, v = y
    return _velocity(t, v, scale), _force(t, q, scale)


def _pendulum(t, y, scale):
    q, v = y
    return v, -scale * jnp.sin(q)


def _damped(t, y, scale):
    q, v = y
    return v, jnp.cos(t).astype(q.dtype) - scale * jnp.sin(q) - v / 4


# By the problem that they are for.
_CHAOTIC = {
    "SemiImplicitEuler": diffrax.SemiImplicitEuler(),
    "VelocityVerlet": diffrax.VelocityVerlet(),
    "PEFRL": diffrax.PEFRL(),
    "KahanLi8": diffrax.KahanLi8(),
    "LeapfrogMidpoint": diffrax.LeapfrogMidpoint(),
    "ReversibleHeun": diffrax.ReversibleHeun(),
    "UReversible(Tsit5, 0.99)": diffrax.UReversible(diffrax.Tsit5(), 0.99),
}
_REGULAR = {
    "AsynchronousLeapfrog": diffrax.AsynchronousLeapfrog(),
    "Euler": diffrax.Euler(),
    "Tsit5": diffrax.Tsit5(),
}
_DAMPED = {
    "AsynchronousLeapfrog(0.9)": diffrax.AsynchronousLeapfrog(0.9),
    "AsynchronousLeapfrog(0.2)": diffrax.AsynchronousLeapfrog(0.2),
    "UReversible(Heun, 0.9)": diffrax.UReversible(diffrax.Heun(), 0.9),
}
_SOLVERS = _CHAOTIC | _REGULAR | _DAMPED


def _exact(name, max_steps) -> Any:
    return diffrax.BitExact(_SOLVERS[name], size=1.0, max_steps=max_steps)


def _terms(name) -> Any:
    if isinstance(_SOLVERS[name].term_structure, tuple):
        return diffrax.ODETerm(_velocity), diffrax.ODETerm(_force)
    fields = (_CHAOTIC, _both), (_REGULAR, _pendulum), (_DAMPED, _damped)
    [field] = [field for solvers, field in fields if name in solvers]
    return diffrax.ODETerm(field)


def _start(dtype, num=None):
    """As many of them, if given, with less and less energy."""
    start = jnp.array([0.0, 0.1], dtype), jnp.array([0.55, 0.08], dtype)
    if num is None:
        return start
    return tuple(
        x[:, None] * jnp.linspace(1, 0.5, num, dtype=dtype)[None] for x in start
    )


@eqx.filter_jit
def _there_and_back(solver, terms, num_steps, y0):
    """Makes steps, and undoes them all. Returns the start, and what came back of it."""
    dtype = jtu.tree_leaves(y0)[0].dtype
    scale = jnp.array(1.0, dtype)
    # Of about the same size, no two the same; and none is a round number.
    ts = jnp.asarray(0.1 + 0.0137 * np.arange(num_steps + 1), dtype)
    state0 = solver.init(terms, ts[0], ts[1], y0, scale)

    def step(i, carry):
        y, state, failed = carry
        y, _, _, state, result = solver.step(
            terms, ts[i], ts[i + 1], y, scale, state, False
        )
        return y, state, failed | (result != diffrax.RESULTS.successful)

    def back(j, carry):
        y, state = carry
        i = num_steps - 1 - j
        # What `record_state` would have recorded, if anything.
        recorded = ts[jnp.maximum(i - 1, 0)]
        state = solver.restore_state(terms, ts[i + 1], y, scale, state, recorded, False)
        y, _, state = solver.backward_step(
            terms, ts[i], ts[i + 1], y, scale, state, False
        )
        return y, state

    start = y0, state0, jnp.array(False)
    y1, state1, failed = jax.lax.fori_loop(0, num_steps, step, start)
    return (y0, state0), jax.lax.fori_loop(0, num_steps, back, (y1, state1)), failed


def _bits(tree):
    return [np.asarray(x).tobytes() for x in jtu.tree_leaves(tree)]


@pytest.mark.parametrize(
    "dtype, num_steps, num",
    (
        (jnp.float32, 5_000, 300),
        pytest.param(jnp.float64, 5_000, 300, marks=pytest.mark.slow),
        pytest.param(jnp.float32, 1_000_000, None, marks=pytest.mark.slow),
        pytest.param(jnp.float64, 1_000_000, None, marks=pytest.mark.slow),
    ),
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=()
            if name in ("VelocityVerlet", "LeapfrogMidpoint")
            else pytest.mark.slow,
        )
        for name in _SOLVERS
    ],
)
def test_every_bit_comes_back(name, dtype, num_steps, num):
    solver = _exact(name, max_steps=num_steps)
    start, back, failed = _there_and_back(
        solver, _terms(name), num_steps, _start(dtype, num)
    )
    assert not failed
    # The solver state as well.
    assert _bits(back) == _bits(start)


@pytest.mark.slow
@pytest.mark.parametrize("compile_", (jax.jit, lambda fn: fn), ids=("jit", "eager"))
@pytest.mark.parametrize(
    "solver",
    (diffrax.LeapfrogMidpoint(), diffrax.ReversibleHeun(), diffrax.Bosh3()),
)
def test_programs_of_their_own(solver, compile_, getkey):
    exact: Any = diffrax.BitExact(solver, size=1.0)
    term = diffrax.ODETerm(
        lambda t, y, a: a * y + y**3 / 7 - jnp.sin(3 * y) * y + a * jnp.exp(-y * y)
    )
    args = jnp.float32(0.8)

    @compile_
    def step(y, state, t0, t1):
        y, _, _, state, _ = exact.step(term, t0, t1, y, args, state, False)
        return y, state

    @compile_
    def back(y, state, t0, t1, recorded):
        state = exact.restore_state(term, t1, y, args, state, recorded, False)
        y, _, state = exact.backward_step(term, t0, t1, y, args, state, False)
        return y, state

    ts = jnp.asarray(0.1 + 0.0137 * np.arange(11), jnp.float32)
    y0 = jr.normal(getkey(), (5000,), jnp.float32) / 3
    y, state = y0, exact.init(term, ts[0], ts[1], y0, args)
    recorded = []
    for t0, t1 in zip(ts, ts[1:]):
        recorded.append(exact.record_state(state))
        y, state = step(y, state, t0, t1)
    assert jnp.any(y != y0)
    for t0, t1, r in list(zip(ts, ts[1:], recorded))[::-1]:
        y, state = back(y, state, t0, t1, r)
    assert _bits(y) == _bits(y0)


@pytest.mark.parametrize("solver", (diffrax.ReversibleHeun(), diffrax.VelocityVerlet()))
def test_first_evaluation(solver):
    # XLA folds what is computed of constants, and may round it in another way.
    exact: Any = diffrax.BitExact(solver, size=8.0)
    term = diffrax.ODETerm(
        lambda t, y, a: a * y + y**3 / 7 - jnp.sin(3 * y) * y + jnp.exp(-y * y) * a
    )
    terms, args = term, jnp.float32(1.7)
    y0: Any = np.linspace(-3, 3, 100_000, dtype=np.float32)
    if isinstance(solver, diffrax.VelocityVerlet):
        terms, y0 = (diffrax.ODETerm(_velocity), term), (y0, y0[::-1])

    @jax.jit
    def there_and_back():
        t0, t1 = jnp.float32(0.0), jnp.float32(0.13)
        start = jtu.tree_map(jnp.asarray, y0)
        state = exact.init(terms, t0, t1, start, args)
        y, _, _, state, _ = exact.step(terms, t0, t1, start, args, state, False)
        state = exact.restore_state(terms, t1, y, args, state, None, False)
        return exact.backward_step(terms, t0, t1, y, args, state, False)[0]

    assert _bits(there_and_back()) == _bits(y0)


def test_nothing_else_is_perturbed():
    # Such as what a solve in the vector field decides by, which has no derivative.
    def fn(x):
        product = lambda x, n: x * eqxi.nondifferentiable(n)
        return SameBits(x)(product, x, jnp.array(2.0))

    assert jax.grad(fn)(jnp.array(3.0)) == 2


def test_not_without_it():
    # Rounding errors of 1e-7 are all that is wrong.
    solver: Any = diffrax.SemiImplicitEuler()
    start, back, _ = _there_and_back(
        solver, _terms("SemiImplicitEuler"), 100_000, _start(jnp.float32)
    )
    (y0, _), (y, _) = start, back
    assert float(jnp.max(jnp.abs(y[0] - y0[0]))) > 0.1


#
# By the adjoint
#


def _report(loss, *args, checkpoints=0):
    adjoint = diffrax.ReversibleAdjoint(checkpoints)
    return eqx.filter_jit(ft.partial(diffrax.reversal_report, loss, adjoint=adjoint))(
        *args
    )


def _assert_exact(report):
    # Of the first step, to which all others are gone back over: infinite, if as much as
    # one bit is another one.
    assert jnp.all(report.num_steps > 1)
    assert jnp.all(report.rounding[..., 0] == 0)


def _long_loss(name, num_steps, adjoint, y0, scale):
    solver = _exact(name, max_steps=num_steps)
    terms = _terms(name)
    if isinstance(terms, tuple):
        terms = terms[0], diffrax.ODETerm(_force)
    dtype = scale.dtype
    sol = diffrax.diffeqsolve(
        terms,
        solver,
        jnp.array(0.0, dtype),
        jnp.array(num_steps / 64, dtype),
        jnp.array(1 / 64, dtype),
        y0,
        scale,
        adjoint=adjoint,
        max_steps=num_steps,
    )
    ys: Any = sol.ys
    return jnp.sum(ys[0]) + jnp.sum(ys[1] ** 2)


@pytest.mark.parametrize(
    "name, dtype, num_steps",
    [
        pytest.param(
            name,
            dtype,
            3_000 if name == "SemiImplicitEuler" else 30_000,
            marks=()
            if (name, dtype) == ("SemiImplicitEuler", jnp.float64)
            else pytest.mark.slow,
        )
        for name in _SOLVERS
        for dtype in (jnp.float64, jnp.float32)
    ],
)
def test_gradient_of_a_long_solve(name, dtype, num_steps):
    if dtype == jnp.float32:
        num_steps = 3_000  # For the gradient not to be too large a number.
    args = _start(dtype), jnp.array(1.0, dtype)
    loss = ft.partial(_long_loss, name, num_steps)
    report = _report(loss, *args)
    _assert_exact(report)
    assert report.certificate <= report.tolerance
    # If they were not made at the very same states then gradients of chaotic solves
    # would have nothing in common.
    grads = eqx.filter_jit(jax.grad(ft.partial(loss, _default), (0, 1)))(*args)
    rtol = 1e-10 if dtype == jnp.float64 else 1e-3
    for x, y in zip(*map(jtu.tree_leaves, (report.grads, grads)), strict=True):
        size = float(jnp.max(jnp.abs(y)))
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * size)


_default = diffrax.RecursiveCheckpointAdjoint()
_brownian = diffrax.VirtualBrownianTree(0.0, 2.0, 1e-3, (2,), jr.key(0))
_unsafe = diffrax.UnsafeBrownianPath((2,), jr.key(0))


def _noise(t, y, scale):
    return jnp.stack([jnp.cos(y), scale * jnp.ones_like(y)])


def _stochastic(path) -> Any:
    drift = diffrax.ODETerm(lambda t, y, scale: -scale * jnp.sin(y))
    return diffrax.MultiTerm(drift, diffrax.ControlTerm(_noise, path))


def _jumping(t, y, scale):
    return jnp.where(t < 0.7, 1.0, 2.0) * scale * jnp.cos(y) + jnp.sin(3 * t)


_heun = diffrax.BitExact(diffrax.ReversibleHeun(), size=1.0)
_coupled = diffrax.BitExact(diffrax.UReversible(diffrax.Heun(), 0.9), size=1.0)
_pid = diffrax.PIDController(rtol=1e-4, atol=1e-4)
_clip = diffrax.ClipStepSizeController(_pid, jump_ts=jnp.array([0.7]))
_cases = {
    "adaptive": (_heun, dict(stepsize_controller=_pid)),
    "adaptive, coupled": (_coupled, dict(stepsize_controller=_pid)),
    "jump": (_heun, dict(stepsize_controller=_clip)),
    "jump, coupled": (_coupled, dict(stepsize_controller=_clip)),
    "backwards": (_heun, dict(t0=2.0, t1=0.0, dt0=-0.01)),
    "StepTo": (
        diffrax.BitExact(diffrax.LeapfrogMidpoint(), size=1.0),
        dict(
            dt0=None,
            stepsize_controller=diffrax.StepTo(
                2 * jnp.linspace(0.0, 1.0, 100) ** 2  # No two are of the same size.
            ),
        ),
    ),
    "SDE": (_heun, dict(terms=_stochastic(_brownian))),
    "SDE, coupled": (_coupled, dict(terms=_stochastic(_brownian))),
    "UnsafeBrownianPath": (_heun, dict(terms=_stochastic(_unsafe))),
}


def _short_loss(case, adjoint, y0, scale):
    solver, kwargs = _cases[case]
    arguments: dict[str, Any] = dict(
        terms=diffrax.ODETerm(_jumping), t0=0.0, t1=2.0, dt0=0.01, max_steps=1000
    )
    arguments |= kwargs
    sol = diffrax.diffeqsolve(
        solver=solver, y0=y0, args=scale, adjoint=adjoint, **arguments
    )
    ys: Any = sol.ys
    return jnp.sum(ys**2)


# Diffrax looks into one wrapper, and not into the second one.
@pytest.mark.filterwarnings("ignore:`BitExact` is not marked as converging")
@pytest.mark.slow
@pytest.mark.parametrize("is_batch", (False, True))
@pytest.mark.parametrize("case", _cases)
def test_gradient_of_other_solves(case, is_batch):
    y0, scale = jnp.array([0.3, -0.4]), jnp.array(0.8)
    loss = ft.partial(_short_loss, case)
    find: Any = ft.partial(_report, loss)
    grad = jax.jit(jax.grad(ft.partial(loss, _default), (0, 1)))
    if is_batch:
        y0 = jnp.stack([y0, 2 * y0, -y0])
        find, grad = (jax.vmap(fn, (0, None)) for fn in (find, grad))
    report = find(y0, scale)
    _assert_exact(report)
    if case == "UnsafeBrownianPath":
        return  # No other adjoint differentiates that in reverse mode.
    for x, y in zip(report.grads, grad(y0, scale), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10)


def _random_field(rng, depth, size) -> Any:
    """A function of `t`, `y` and parameters."""
    if depth == 0:
        i = rng.randrange(4)
        leaves = (
            lambda t, y, p: y,
            lambda t, y, p: y * p[i],
            lambda t, y, p: y + t,
            lambda t, y, p: jnp.roll(y, 1),
            lambda t, y, p: y - jnp.mean(y),
        )
        return rng.choice(leaves)
    f, g = (_random_field(rng, depth - 1, size) for _ in range(2))
    i, c = rng.randrange(4), rng.uniform(0.3, 3)
    nodes = (
        lambda t, y, p: f(t, y, p) + c * g(t, y, p),
        lambda t, y, p: f(t, y, p) - g(t, y, p) / c,
        lambda t, y, p: jnp.sin(f(t, y, p)) * g(t, y, p),
        lambda t, y, p: jnp.tanh(p[i] * f(t, y, p)),
        lambda t, y, p: f(t, y, p) / (1 + g(t, y, p) ** 2),
        lambda t, y, p: jnp.exp(-(f(t, y, p) ** 2)) * p[i],
        lambda t, y, p: f(t, y, p) * p[i] + g(t, y, p) ** 3 / 7,
        lambda t, y, p: p[4] @ f(t, y, p) + g(t, y, p),
        lambda t, y, p: jax.nn.softmax(f(t, y, p)) * size,
        lambda t, y, p: jnp.log1p(jnp.abs(f(t, y, p))) + jnp.cos(g(t, y, p)) * t,
    )
    return rng.choice(nodes)


# Of the fifth, bits are lost if it is not evaluated in a branch.
@pytest.mark.parametrize(
    "seed",
    [pytest.param(i, marks=() if i == 5 else pytest.mark.slow) for i in range(24)],
)
def test_random_vector_fields(seed):
    rng = random.Random(seed)
    size, depth = rng.choice((1, 3, 33, 70)), rng.randrange(1, 5)
    dtype = rng.choice((jnp.float32, jnp.float64))
    field = _random_field(rng, depth, size)
    key = jr.key(seed)
    matrix = jr.normal(key, (size, size), dtype) / size**0.5
    params = [*jr.uniform(key, (4,), dtype, 0.7, 1.3), matrix]
    is_constant, is_batch = rng.random() < 0.5, rng.random() < 0.3
    solver = diffrax.BitExact(
        rng.choice(
            (
                diffrax.LeapfrogMidpoint(),
                diffrax.ReversibleHeun(),
                diffrax.AsynchronousLeapfrog(),
                diffrax.Bosh3(),
                diffrax.UReversible(diffrax.Heun(), 0.9),
            )
        ),
        size=4.0,
    )

    def bounded(t, y, args):
        # Of what the one program may see a constant, and the other one an argument.
        p = params if is_constant else args
        return jnp.tanh(field(t.astype(dtype), y, p)) - y / 3

    def loss(adjoint, y0, args):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(bounded),
            solver,
            t0=dtype(0.0),
            t1=dtype(2.0),
            dt0=dtype(0.02),
            y0=y0,
            args=args,
            adjoint=adjoint,
        )
        ys: Any = sol.ys
        return jnp.sum(ys**2)

    y0 = jr.normal(jr.fold_in(key, 1), (size,), dtype)
    find = ft.partial(_report, loss)
    if is_batch:
        y0, find = jnp.stack([y0, y0 / 2, y0 / 4]), jax.vmap(find, (0, None))
    _assert_exact(find(y0, params))


class _DependsOnItself(diffrax.SemiImplicitEuler):
    """What it adds to a half depends on that half: so it is not added to it again."""

    def shears(self, terms, t0, t1, args):
        (_, first), second = super().shears(terms, t0, t1, args)
        return [(0, lambda y: first(y) + y[0] * 1e-9), second]


@pytest.mark.parametrize("checkpoints", (0, pytest.param(2, marks=pytest.mark.slow)))
def test_bits_are_compared(checkpoints):
    # Some bits of 256 steps are enough.
    def loss(adjoint, y0, scale):
        sol = diffrax.diffeqsolve(
            (diffrax.ODETerm(_velocity), diffrax.ODETerm(_force)),
            diffrax.BitExact(_DependsOnItself(), size=1.0),
            *(0.0, 4.0, 1 / 64, y0, scale),
            adjoint=adjoint,
        )
        ys: Any = sol.ys
        return jnp.sum(ys[0])

    args = _start(jnp.float64), jnp.array(1.0)
    report = _report(loss, *args, checkpoints=checkpoints)
    grad = lambda adjoint: jax.jit(jax.grad(ft.partial(loss, adjoint), (0, 1)))(*args)
    if checkpoints == 0:
        # There is no gradient, then.
        assert report.rounding[0] == jnp.inf
        assert report.certificate == jnp.inf
        with pytest.raises(RuntimeError, match="the very bits"):
            grad(diffrax.ReversibleAdjoint(checkpoints=0))
        return
    # Steps are made again.
    assert report.replays.sum() > 0
    grads = grad(_default)
    for x, y in zip(*map(jtu.tree_leaves, (report.grads, grads)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10)


#
# What it is made of
#


@pytest.mark.parametrize(
    "power, size",
    [
        pytest.param(power, size, marks=() if quick else pytest.mark.slow)
        for power, size, quick in (
            (1, 20, True),
            (3, 10, False),
            (10, 4, True),
            (max_power(32), 15, False),
        )
    ],
)
def test_damping(power, size, getkey):
    # For part of what is stored to be moved out of the way more than once, if that does
    # not take too many steps.
    num_steps = min(2 * period(32, power, 20_000) + 3, 20_000)
    damping = Damping(power, num_steps)

    # The two may be apart by twice as much: in the last case, by all that there is room
    # for.
    def part(key):
        count = jr.randint(key, (100,), -(2**size), 2**size, jnp.int32)
        at = Part.at(jnp.zeros(100, jnp.float32), (2.0**-20,))
        return at.of(count, at.value)

    @jax.jit
    def there_and_back(start, other):
        def damp(_, carry):
            part, stacks, worst = carry
            new, stacks = damping.damp(part, other, stacks)
            gap0 = (part.count - other.count).astype(float)
            gap1 = (new.count - other.count).astype(float)
            off = jnp.max(jnp.abs(gap1 - damping.factor * gap0))
            return new, stacks, jnp.maximum(worst, off)

        def undo(_, carry):
            part, stacks = carry
            return damping.undo(part, other, stacks)

        carry = *start, jnp.array(0.0)
        *end, worst = jax.lax.fori_loop(0, num_steps, damp, carry)
        one_more, _ = damping.damp(end[0], other, end[1])
        back = jax.lax.fori_loop(0, num_steps, undo, tuple(end))
        return end[0], back, worst, one_more

    start = part(getkey())
    start = start, damping.start(start.count)
    end, back, worst, one_more = there_and_back(start, part(getkey()))
    assert _bits(back) == _bits(start)
    # The digit that is made up is one below the spacing of the lattice.
    assert worst < 1
    assert jnp.all(jnp.isfinite(end.value))
    # There is no room for more than that.
    assert jnp.all(jnp.isnan(one_more.value))


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.complex128))
def test_point_of_a_lattice(dtype, getkey):
    value = jnp.array([-0.0, 1e-30, 3.0, -1e10], dtype)
    start = Part.at(value, (2.0**-10,))
    assert _bits(start.of(start.count, value).value) == _bits(value)
    increment = jr.normal(getkey(), (4,), dtype)
    moved = start.move(increment, 1)
    error = jnp.abs(moved.value - (value + increment))
    # Half of the spacing, in each direction, and the rounding of the largest value.
    assert jnp.all(error <= 2.0**-10 + 1e10 * jnp.finfo(dtype).eps)
    assert _bits(moved.move(increment, -1)) == _bits(start)
    tangent = jnp.ones_like(value)
    squared = lambda x: Part.at(x, (2.0**-10,)).move(x * x / 1e15, 1).value
    _, derivative = jax.jvp(squared, (value,), (tangent,))
    np.testing.assert_allclose(derivative, 1 + 2 * value / 1e15, rtol=1e-5)
    for bad in (jnp.nan, jnp.inf, 1e300 if dtype == jnp.complex128 else 1e30):
        lost = start.move(jnp.full_like(value, bad), 1)
        assert jnp.all(jnp.isnan(lost.value))
        # Whatever comes after that.
        assert jnp.all(jnp.isnan(lost.move(increment, 1).value))


def test_real_increment_of_complex_numbers():
    start = Part.at(jnp.zeros(2, jnp.complex64), (2.0**-10,))
    moved = start.move(jnp.array([1.0, 2.0], jnp.float32), 1)
    np.testing.assert_array_equal(moved.value, np.array([1, 2], np.complex64))


def test_many_moves_do_not_overflow():
    # Each of them has room. All together, they come around to where it started.
    start = Part.at(jnp.zeros((), jnp.float32), (2.0**-20,))
    moved = start
    for _ in range(16):
        moved = moved.move(jnp.float32(2.0**8), 1)
    assert jnp.isnan(moved.value)


@pytest.mark.parametrize(
    "solver",
    (
        diffrax.AsynchronousLeapfrog(),
        diffrax.ReversibleHeun(),
        diffrax.Heun(),
        diffrax.UReversible(diffrax.Heun(), 0.9),
    ),
)
def test_failures(solver):
    solver = diffrax.BitExact(solver, size=1.0)
    # Of a step or two, and of no other ones.
    window = lambda t, first: jnp.abs(t - first) < 0.06
    terms = diffrax.ODETerm(
        lambda t, y, first: jnp.where(window(t, first), jnp.nan, -y)
    )
    y0 = jnp.array([1.0, 2.0])
    saveat = diffrax.SaveAt(t1=True, solver_state=True)

    @eqx.filter_jit
    def solve(y0, first, state=None) -> Any:
        return diffrax.diffeqsolve(
            terms,
            solver,
            *(0.0, 1.0, 0.1, y0, first),
            solver_state=state,
            saveat=saveat,
            throw=False,
        )

    good = solve(y0, jnp.array(2.0))
    assert good.result == diffrax.RESULTS.successful
    bad = solve(y0, jnp.array(0.55))
    assert bad.result == diffrax.RESULTS.nonfinite
    assert jnp.all(jnp.isnan(bad.ys))
    # A state that is not that of `y0`.
    assert solve(good.ys[-1], jnp.array(2.0), good.solver_state).result == good.result
    bad = solve(good.ys[-1] + 0.1, jnp.array(2.0), good.solver_state)
    assert bad.result == diffrax.RESULTS.nonfinite
    assert jnp.all(jnp.isnan(bad.ys))


def test_wrong_state_with_adaptive_steps():
    @eqx.filter_jit
    def solve(y0, state=None):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            _heun,
            *(0.0, 1.0, 0.1, y0),
            stepsize_controller=_pid,
            solver_state=state,
            saveat=diffrax.SaveAt(t1=True, solver_state=True),
            throw=False,
            max_steps=256,
        )

    good = solve(jnp.array(1.0))
    assert good.result == diffrax.RESULTS.successful
    bad = solve(jnp.array(2.0), good.solver_state)
    assert bad.result == diffrax.RESULTS.nonfinite


def test_nothing_to_solve():
    solver: Any = diffrax.BitExact(diffrax.UReversible(diffrax.Heun(), 0.9), size=1.0)
    term = diffrax.ODETerm(lambda t, y, args: y)
    state = solver.init(term, 0.0, 1.0, (), None)
    y1, _, _, state, result = solver.step(term, 0.0, 1.0, (), None, state, False)
    assert y1 == ()
    assert result == diffrax.RESULTS.successful


@pytest.mark.parametrize("controller", (diffrax.ConstantStepSize(), _pid))
def test_no_more_room(controller):
    solver = diffrax.BitExact(
        diffrax.UReversible(diffrax.Heun(), 0.9), size=1.0, max_steps=20
    )
    term = diffrax.ODETerm(lambda t, y, args: -y)

    @eqx.filter_jit
    def solve(t1):
        return diffrax.diffeqsolve(
            term,
            solver,
            *(0.0, t1, 0.01, jnp.array([1.0, 2.0])),
            stepsize_controller=controller,
            throw=False,
        )

    assert solve(0.15).result == diffrax.RESULTS.successful
    assert solve(10.0).result == diffrax.RESULTS.nonfinite


def test_out_of_range():
    # At 2^28 spacings of 2^-22.
    term = diffrax.ODETerm(lambda t, y, args: jnp.ones_like(y))
    solver = diffrax.BitExact(diffrax.LeapfrogMidpoint(), size=2.0)

    @jax.jit
    def solve(t1):
        zero, one = jnp.float32(0.0), jnp.float32(1.0)
        sol = diffrax.diffeqsolve(term, solver, zero, t1, one, zero, throw=False)
        return sol.ys, sol.result == diffrax.RESULTS.successful

    for t1 in (1.0, 64.0, 65.0):
        ys, is_good = solve(jnp.float32(t1))
        assert is_good == (t1 <= 64)
        assert ys == t1 or not is_good


@pytest.mark.parametrize("size", ({"b": 1.0}, [1.0, 1.0], {"a": None}, ()))
def test_size_of_another_structure(size):
    with pytest.raises(ValueError, match="`size`"):
        diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: y),
            diffrax.BitExact(diffrax.ReversibleHeun(), size),
            *(0.0, 1.0, 0.1, {"a": jnp.array(1.0)}),
        )


class _OwnStep(diffrax.VelocityVerlet):
    pass


class _OwnEuler(diffrax.Euler):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


@pytest.mark.parametrize(
    "make, match",
    (
        (lambda: diffrax.BitExact(diffrax.Kvaerno3(), size=1.0), "explicit"),
        (lambda: diffrax.BitExact(diffrax.Heun(), size=0.0), "`size`"),
        (lambda: diffrax.BitExact(diffrax.Heun(), size=jnp.array(1.0)), "`size`"),
        (
            lambda: diffrax.BitExact(diffrax.Heun(), size=1.0, max_steps=0),
            "`max_steps`",
        ),
        (lambda: diffrax.BitExact(diffrax.Heun(), size=None), "`size`"),
        (lambda: diffrax.BitExact(diffrax.Heun(), size=True), "`size`"),
        (lambda: diffrax.BitExact(diffrax.Heun(), size=10**400), "`size`"),
        (
            lambda: diffrax.BitExact(diffrax.Heun(), size=1.0, max_steps=True),
            "`max_steps`",
        ),
        (lambda: diffrax.BitExact(_OwnStep(), size=1.0), "defines `shears`"),
        (lambda: diffrax.BitExact(_OwnEuler(), size=1.0), "defines `shears`"),
        (
            lambda: diffrax.BitExact(
                diffrax.UReversible(diffrax.Heun(), 0.4), size=1.0
            ),
            "one half",
        ),
        (
            lambda: diffrax.BitExact(diffrax.AsynchronousLeapfrog(0.6), size=1.0),
            "one half",
        ),
    ),
)
def test_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    "solver, match",
    (
        (diffrax.AsynchronousLeapfrog(), "vector field is not like `y0`"),
        (diffrax.Euler(), "converges to the Itô solution"),
    ),
)
def test_refused_for_sdes(solver, match):
    with pytest.raises(ValueError, match=match):
        diffrax.diffeqsolve(
            _stochastic(_brownian),
            diffrax.BitExact(solver, size=1.0),
            *(0.0, 2.0, 0.1, jnp.array([0.3, -0.4]), jnp.array(0.8)),
        )


def test_refused_precision():
    term = diffrax.ODETerm(lambda t, y, args: -y)
    solver = diffrax.BitExact(diffrax.ReversibleHeun(), size=1.0)
    with pytest.raises(ValueError, match="32 or 64 bits"):
        solver.init(term, 0.0, 1.0, jnp.ones(2, jnp.float16), None)


@pytest.mark.parametrize("size", (1e-40, 1e37))
def test_refused_size(size):
    term = diffrax.ODETerm(lambda t, y, args: -y)
    solver = diffrax.BitExact(diffrax.ReversibleHeun(), size)
    with pytest.raises(ValueError, match="size <= "):
        solver.init(term, 0.0, 1.0, jnp.ones(2, jnp.float32), None)


def test_bound_on_steps_is_needed():
    # The times of the steps are sensitive to rounding.
    @jax.grad
    def grad(y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.BitExact(diffrax.ReversibleHeun(), size=1.0),
            *(0.0, 1.0, 0.1, y0),
            max_steps=None,
            adjoint=diffrax.ReversibleAdjoint(),
        )
        assert sol.ys is not None
        return sol.ys[-1]

    with pytest.raises(RuntimeError, match="max_steps=None"):
        grad(jnp.array(1.0))


def test_second_derivative_is_refused():
    # Damping multiplies the rounding errors of derivatives, and nothing would tell.
    def loss(y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y * jnp.sin(y)),
            _coupled,
            *(0.0, 1.0, 0.01, y0),
            adjoint=diffrax.ReversibleAdjoint(0),
        )
        assert sol.ys is not None
        return sol.ys[-1]

    with pytest.raises(NotImplementedError, match="not of its derivative"):
        jax.jvp(jax.grad(loss), (jnp.array(1.0),), (jnp.array(1.0),))
