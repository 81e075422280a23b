"""The certificate: whether it tells the truth, and whether it is told."""

import functools as ft
import importlib.util
import pathlib
import sys
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
from diffrax import _rounding_probe
from diffrax._rounding_probe import rounding
from diffrax._sketch import sketch


def _load_benchmark() -> Any:
    path = pathlib.Path(__file__).parents[1] / "benchmarks" / "certificate.py"
    spec = importlib.util.spec_from_file_location("certificate", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_benchmark = _load_benchmark()


def _measure(problem, *steps, **kwargs):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return list(_benchmark.measure(_benchmark.Case(problem, steps, **kwargs)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem, num_steps",
    (("hump", 300), ("wiggle", 300)),
)
def test_misleading_problems(problem, num_steps):
    # The drift is within what is tolerated, and the gradient is not.
    (row,) = _measure(problem, num_steps, checkpoints=0, certificate="cheap")
    assert _benchmark.is_trusted(row) and not _benchmark.is_right(row)
    # The rest of the certificate tells.
    (row,) = _measure(problem, num_steps, checkpoints=0)
    assert not _benchmark.is_trusted(row)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", (0, 16))
@pytest.mark.parametrize("dtype", ("float64", "float32"))
@pytest.mark.parametrize("problem", ("decay", "heat", "hump", "wiggle", "small_leaf"))
def test_trusted_is_right(problem, dtype, checkpoints):
    with jax.enable_x64(dtype == "float64"):
        rows = _measure(problem, 100, 1000, dtype=dtype, checkpoints=checkpoints)
    for row in rows:
        assert not row["failed"]
        assert checkpoints == 0 or _benchmark.is_trusted(row)
        assert _benchmark.is_right(row) or not _benchmark.is_trusted(row)


#
# Whatever the vector field
#


@ft.partial(jax.jit, static_argnames="layout")
def _random_errors(key, rate, dt0, layout):
    """The relative errors of gradients, for an equation with values of very different
    scales that contracts at some rate. These are in different leaves; or in one; or
    become large only after a while."""
    weights = jr.normal(key, (4, 4)) / 2
    scale = jnp.array([1.0, 1.0, 1e-9, 1e-9])
    if layout == "leaves":
        split, join = (
            lambda y: {"a": y[:2], "b": y[2:]},
            lambda y: jnp.concatenate([y["a"], y["b"]]),
        )
    else:
        split = join = lambda y: y

    def field(t, y, weights):
        y = join(y)
        both = y / scale
        out = scale * (jnp.sin(t) + jnp.tanh(weights @ both) - rate * both)
        if layout == "growing":
            out = jnp.where(t < 0.5, out, 40 * y)
        return split(out)

    def grad(adjoint):
        def loss(params):
            y0, weights = params
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                diffrax.Heun(),
                0.0,
                1.0,
                dt0,
                y0,
                weights,
                adjoint=adjoint,
                max_steps=1024,
                throw=False,
            )
            assert sol.ys is not None
            return jnp.sum((join(jtu.tree_map(lambda y: y[-1], sol.ys)) / scale) ** 2)

        y0 = split(scale * jnp.array([1.0, -1.0, 1.0, 2.0]))
        grad_y0, grad_weights = jax.grad(loss)((y0, weights))
        return join(grad_y0) * scale, grad_weights

    def error(adjoint):
        pairs = zip(jtu.tree_leaves(grad(adjoint)), jtu.tree_leaves(expected))
        norm = jnp.linalg.norm
        return jnp.max(jnp.stack([norm(x - y) / norm(y) for x, y in pairs]))

    expected = grad(diffrax.RecursiveCheckpointAdjoint())
    adjoint = diffrax.ReversibleAdjoint
    # With nothing made again, so that what is stored is all the difference.
    without, with_ = error(adjoint(0, "off", "ignore")), error(adjoint(8, "off"))
    return without, with_, error(adjoint(3)), error(adjoint(0, on_failure="nan"))


@pytest.mark.parametrize(
    "layout",
    (
        "leaves",
        pytest.param("stacked", marks=pytest.mark.slow),
        pytest.param("growing", marks=pytest.mark.slow),
    ),
)
@hypothesis.given(
    seed=st.integers(0, 2**31 - 1),
    rate=st.floats(0.0, 60.0),
    num_steps=st.integers(1, 1000),
)
@hypothesis.settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)
def test_right_or_refused(layout, seed, rate, num_steps):
    # For some of these the steps are so large that the solve itself is unstable.
    without, with_, refined, certified = _random_errors(
        jr.key(seed), jnp.array(rate), jnp.array(1 / num_steps), layout
    )
    # Refinement ends, and what comes of it is right.
    assert refined <= 1e-10
    # Without stored states: right, or refused.
    assert certified <= 1e-7 or jnp.isnan(certified)
    # Returning to states that were stored does no harm.
    assert with_ <= 2 * without or with_ <= 1e-12 or jnp.isnan(without)


def _grows(t, y, args):
    # It contracts so much that going back over it is not possible, and then grows.
    return jnp.where(t < 2, -args * (y**3 - jnp.cos(3 * t) - 1.2), 10 * y)


def _has_a_large_entry(t, y, args):
    return jnp.stack([1e8 * jnp.cos(t), -args * (y[1] ** 3 - jnp.cos(3 * t) - 1.2)])


@pytest.mark.parametrize(
    "num_steps, checkpoints",
    (pytest.param(100, 16, marks=pytest.mark.slow), (400, 4)),
)
@pytest.mark.parametrize(
    "field, y0, args",
    (
        pytest.param(_grows, [1.0], 3.0, marks=pytest.mark.slow),
        (_has_a_large_entry, [1e8, 1.0], 5.0),
    ),
    ids=("later", "in the same leaf"),
)
def test_large_values_hide_nothing(field, y0, args, num_steps, checkpoints):
    def loss(args, adjoint):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            0.0,
            5.0,
            5.0 / num_steps,
            jnp.array(y0),
            args,
            adjoint=adjoint,
            max_steps=512,
        )
        assert sol.ys is not None
        return jnp.log(jnp.abs(sol.ys[-1, -1]))

    value, expected = (
        jax.jit(jax.grad(loss), static_argnums=1)(jnp.array(args), adjoint)
        for adjoint in (
            diffrax.ReversibleAdjoint(checkpoints),
            diffrax.RecursiveCheckpointAdjoint(),
        )
    )
    np.testing.assert_allclose(value, expected, rtol=1e-10)


#
# The report
#


def _loss(adjoint, y0, args, **kwargs):
    arguments: dict[str, Any] = dict(
        terms=diffrax.ODETerm(lambda t, y, args: args * jnp.sin(y) * jnp.cos(t)),
        solver=diffrax.Heun(),
        t0=1.0,
        t1=2.0,
        dt0=0.02,
        y0=y0,
        args=args,
        adjoint=adjoint,
        max_steps=64,
    )
    sol = diffrax.diffeqsolve(**(arguments | kwargs))
    assert sol.ys is not None
    return jnp.sum(sol.ys**2)


_y0 = jnp.array([1.0, 2.0])


@pytest.mark.parametrize(
    "checkpoints, t1",
    (
        pytest.param(0, 2.0, marks=pytest.mark.slow),
        (3, 2.0),
        pytest.param(3, 0.0, marks=pytest.mark.slow),
    ),
)
def test_report(checkpoints, t1):
    adjoint = diffrax.ReversibleAdjoint(checkpoints)
    dt0 = 0.02 * np.sign(t1 - 1.0)
    loss = lambda *args: _loss(*args, t1=t1, dt0=dt0)
    report = eqx.filter_jit(diffrax.reversal_report)(
        loss, _y0, jnp.array(1.5), adjoint=adjoint
    )
    fn = jax.value_and_grad(loss, argnums=(1, 2))
    value, grads = jax.jit(lambda *args: fn(adjoint, *args))(_y0, jnp.array(1.5))
    np.testing.assert_allclose(report.value, value, rtol=1e-15)
    for x, y in zip(report.grads, grads, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-13)

    n = 50
    assert report.num_steps == n
    assert report.tolerance == np.finfo(np.float64).eps ** (2 / 3)
    assert 0 < report.certificate <= report.tolerance
    steps = jtu.tree_map(lambda x: x[:n], eqx.filter(report, lambda x: jnp.ndim(x) > 0))
    np.testing.assert_allclose(steps.t0, 1 + dt0 * np.arange(n), rtol=1e-14)
    np.testing.assert_allclose(steps.t1[:-1], steps.t0[1:], rtol=0)
    assert steps.t1[-1] == t1
    # Each step starts from a known state or is found to start somewhere, or both: the
    # last one of a segment that was undone.
    known, undone = ~jnp.isnan(steps.drift), ~jnp.isnan(steps.residual)
    assert jnp.all(known | undone)
    assert bool(known[0])
    compared = ~jnp.isnan(steps.cotangents)
    assert jnp.all(compared == (known & undone)) and jnp.any(compared)
    assert jnp.all(undone == ~jnp.isnan(steps.rounding))
    if checkpoints == 0:
        assert jnp.sum(known) == 1
        assert jnp.sum(steps.replays) == 0
    # What is beyond the last step is empty.
    assert jnp.all(jnp.isnan(report.t0[n:]) & jnp.isnan(report.drift[n:]))
    assert not jnp.any(report.corrections[n:]) and not jnp.any(report.replays[n:])


@pytest.mark.slow
def test_report_of_a_batch():
    adjoint = diffrax.ReversibleAdjoint(3)
    report = lambda y0: diffrax.reversal_report(
        lambda adjoint, y0: _loss(adjoint, y0, jnp.array(1.5)), y0, adjoint=adjoint
    )
    batch = jax.jit(jax.vmap(report))(jnp.stack([_y0, 2 * _y0]))
    one = jax.jit(report)(2 * _y0)
    np.testing.assert_allclose(batch.grads[0][1], one.grads[0], rtol=1e-13)
    np.testing.assert_array_equal(batch.num_steps, 50)
    np.testing.assert_allclose(batch.t0[1], one.t0)
    np.testing.assert_array_equal(batch.replays[1] > 0, one.replays > 0)
    assert batch.certificate.shape == (2,)
    # Which are rounding errors themselves.
    np.testing.assert_allclose(batch.certificate[1], one.certificate, rtol=0.1)


@pytest.mark.parametrize("shape", ((), (0,), (7,), (3, 4), (2, 3, 4)))
@pytest.mark.parametrize("dtype", (float, complex))
def test_sketch(shape, dtype):
    # Tells two arrays apart that differ in any single entry.
    x = jr.normal(jr.key(0), shape, dtype)
    products, norms = sketch((x, 2 * x))
    assert products.shape == norms.shape == (2,)
    np.testing.assert_allclose(norms[0], jnp.linalg.norm(x.ravel()), rtol=1e-13)
    np.testing.assert_allclose(2 * products[0], products[1], rtol=1e-13)
    for i in range(x.size):
        other, _ = sketch((x.ravel().at[i].add(1).reshape(x.shape), x))
        assert abs(other[0] - products[0]) > 1e-3


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16, jnp.float32, float))
def test_rounding(dtype):
    # Errors of one unit of each entry at most, which add up as independent ones do.
    x = jnp.linspace(-1, 1, 1000).astype(dtype)
    eps = float(jnp.finfo(dtype).eps)
    errors = jax.vmap(lambda i: rounding(x, i))(jnp.arange(400)).astype(float)
    assert np.all(np.abs(errors) <= 1.01 * eps * np.abs(x.astype(float)))
    total = jnp.sqrt(jnp.mean(jnp.sum(errors, axis=0) ** 2))
    each = jnp.sqrt(jnp.mean(errors**2))
    np.testing.assert_allclose(total, 20 * each, rtol=0.1)
    # And of the largest entry, as much as it has a share in what is added.
    more = rounding(jnp.array([0, 1], dtype), 1, jnp.array(0.5))
    assert 0 < jnp.abs(more[0]) <= 0.5 * eps


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver, rtol",
    # It grows by a factor of 20, and in closed form to first order in each of 25 times.
    (
        (diffrax.Heun(), 0.1),
        (diffrax.UReversible(diffrax.Heun()), 0.25),
    ),
)
def test_rounding_over_several_steps(solver, rtol, monkeypatch):
    # Where steps are small, the error is carried over about four of them at a time: as
    # far as over one by one.
    decay = diffrax.ODETerm(lambda t, y, args: -3 * y)

    def report():
        jax.clear_caches()
        return eqx.filter_jit(diffrax.reversal_report)(
            lambda adjoint, y0: _loss(
                adjoint,
                y0,
                None,
                terms=decay,
                solver=solver,
                dt0=0.01,
                max_steps=128,
            ),
            _y0,
            adjoint=diffrax.ReversibleAdjoint(0),
        ).rounding[0]

    several = report()
    monkeypatch.setattr(_rounding_probe, "_longest_wait", 0)
    one = report()
    assert several != one
    np.testing.assert_allclose(several, one, rtol=rtol)


def test_no_period_hides():
    # As `hump` of the benchmark, but with pulses: there is nothing to be seen in two of
    # four steps, nor in the first ones of the solve.
    num_steps, t1 = 300, 2.6

    def field(t, y, args):
        near, other = y
        away = near - jnp.cos(t)
        phase = jnp.round(t * num_steps / t1).astype(int) % 4
        pulse = jnp.where((phase == 1) | (phase == 2), 2.0, 0.0)
        seen = jnp.where(t > 0.3, 1e3 * away, 0.0)
        change = 14 * (1 - t) * pulse * away - jnp.sin(t)
        return change, args * other * jnp.sin(1 + seen)

    def loss(adjoint, args):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Heun(),
            *(0.0, t1, t1 / num_steps, (jnp.array(1.0), jnp.array(1.0)), args),
            adjoint=adjoint,
            max_steps=num_steps,
        )
        assert sol.ys is not None
        return sol.ys[1][-1]

    adjoint = diffrax.ReversibleAdjoint(0, on_failure="ignore")
    report = eqx.filter_jit(diffrax.reversal_report)(
        loss, jnp.array(0.0), adjoint=adjoint
    )
    expected = jax.jit(jax.grad(ft.partial(loss, diffrax.RecursiveCheckpointAdjoint())))
    (gradient,) = report.grads
    assert abs(gradient / expected(0.0) - 1) > report.tolerance
    assert np.nanmax(report.rounding) > report.tolerance


@pytest.mark.parametrize("max_corrections", (0, 1))
def test_corrections_are_bounded(max_corrections):
    solver = diffrax.FixedPointReversible(diffrax.Heun(), max_corrections)
    report = eqx.filter_jit(diffrax.reversal_report)(
        # Steps so large that more would be needed.
        lambda adjoint, y0: _loss(adjoint, y0, 1.5, solver=solver, dt0=0.1),
        _y0,
        adjoint=diffrax.ReversibleAdjoint(0),
    )
    assert jnp.max(report.corrections) == max_corrections


@pytest.mark.parametrize(
    "loss, match",
    (
        (lambda adjoint: jnp.array(1.0), "0 times"),
        (lambda adjoint: sum(_loss(adjoint, _y0, x) for x in (1.0, 2.0)), "2 times"),
        (lambda adjoint: _loss(adjoint, _y0, 1.0, max_steps=None), "max_steps=None"),
    ),
)
def test_report_is_refused(loss, match):
    with pytest.raises(ValueError, match=match):
        diffrax.reversal_report(loss)


def test_report_of_nothing_is_refused():
    with pytest.raises(ValueError, match="pass floating-point arrays"):
        diffrax.reversal_report(lambda adjoint, x: _loss(adjoint, _y0, x), 1)


def test_report_of_a_batch_within_is_refused():
    def loss(adjoint):
        y0s = jnp.stack([_y0, _y0])
        return jnp.sum(jax.vmap(lambda y0: _loss(adjoint, y0, 1.0))(y0s))

    with pytest.raises(Exception, match="inside of `jax.vmap`"):
        eqx.filter_jit(diffrax.reversal_report)(loss)
