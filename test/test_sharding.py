"""A solve divided among devices: the gradient is that on one device, and no device is
sent the state of another.

The functions `check_*` need eight devices, which JAX has to know before it starts. So
`test_on_eight_devices` has them run in a process of their own, by

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m pytest --numprocesses=0 \
        -o python_functions='check_*' test/test_sharding.py
"""

import functools as ft
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P


_root = pathlib.Path(__file__).parents[1]
_reversible = diffrax.ReversibleAdjoint()
_default = diffrax.RecursiveCheckpointAdjoint()
_ts = jnp.array([0.1, 0.5, 0.9])
_at_ts = diffrax.SaveAt(ts=_ts)


def _run(*command: str, env: dict[str, str]) -> str:
    out = subprocess.run(
        [sys.executable, *command],
        cwd=_root,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert out.returncode == 0, out.stdout
    return out.stdout


@pytest.mark.parametrize(
    "marked", ("not slow", pytest.param("slow", marks=pytest.mark.slow))
)
def test_on_eight_devices(marked):
    _run(
        *("-m", "pytest", "--numprocesses=0", "-p", "no:cacheprovider"),
        *("-m", marked),
        *("-o", "python_functions=check_*", __file__),
        env={"JAX_NUM_CPU_DEVICES": "8"},
    )


@pytest.mark.slow
def test_two_processes():
    pytest.importorskip("sklearn", reason="Needs `pip install '.[examples]'`.")
    # It compares the gradient with that on one device.
    out = _run("examples/data_parallel.py", "--processes=2", "--smoke", env={})
    assert "8 devices, 2 process(es)" in out and "accuracy" in out


#
# What is compared
#


def _mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def _put(spec, x):
    return jax.device_put(x, NamedSharding(_mesh(), spec))


def _compile(fn, *args) -> Any:
    return jax.jit(fn).lower(*args).compile()


def _assert_agree(grads, true_grads):
    leaves = zip(jtu.tree_leaves(grads), jtu.tree_leaves(true_grads), strict=True)
    for x, true_x in leaves:
        scale = np.max(np.abs(true_x))
        assert scale > 0
        np.testing.assert_allclose(x, true_x, rtol=0, atol=1e-11 * scale)


def _collectives(program) -> list[tuple[str, bool, int]]:
    """What devices exchange: the name of each operation, whether it is inside of a
    loop, and the number of entries of the largest array, on one device."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.as_text().splitlines():
        start = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if start:
            lines = bodies.setdefault(start[1], [])
        lines.append(line)

    def called(lines):
        names = {x for line in lines for x in re.findall(r"%([\w.-]+)", line)}
        return names & set(bodies)

    in_loops: set[str] = set()
    new = {
        name
        for lines in bodies.values()
        for line in lines
        for name in re.findall(r"(?:body|condition)=%?([\w.-]+)", line)
    }
    while new:
        in_loops |= new
        new = {x for name in new for x in called(bodies[name])} - in_loops

    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = []
    for body, lines in bodies.items():
        for line in lines:
            match = re.search(rf" = (.*?) ({names})(?:-start)?\(", line)
            if match:
                shapes = re.findall(r"[a-z]\w*\[([\d,]*)\]", match[1])
                sizes = [math.prod(int(n) for n in x.split(",") if n) for x in shapes]
                found.append((match[2], body in in_loops, max(sizes)))
    return found


def _weigh(ys):
    """A function of all output, with no symmetry, and of which nothing is moved."""
    weights = jnp.cos(jnp.arange(float(len(ys)))).reshape(-1, *(1,) * (ys.ndim - 1))
    return jnp.sum(weights * ys + ys**2)


def _solve(y0, args, adjoint, **kwargs) -> Any:
    arguments: dict[str, Any] = dict(
        terms=diffrax.ODETerm(_field),
        solver=diffrax.Tsit5(),
        t0=0.0,
        t1=1.0,
        dt0=0.1,
        y0=y0,
        args=args,
        stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-6),
        saveat=_at_ts,
        max_steps=64,
        adjoint=adjoint,
    )
    return diffrax.diffeqsolve(**(arguments | kwargs))


def _field(t, y, args):
    return jnp.stack(
        [0.1 * jnp.sin(3 * t) - args[0] * y[1], y[0] - args[1] * y[1] ** 2]
    )


#
# A batch, each member of which is a solve of its own
#


_members = np.random.default_rng(0).normal(size=(16, 2))
_args = np.array([1.3, 0.1])


def _grad_of_batch(adjoint, output=lambda sol: _weigh(sol.ys), **kwargs):
    def loss(args, y0s):
        solve = lambda y0: output(_solve(y0, args, adjoint, **kwargs))
        return jnp.sum(jax.vmap(solve)(y0s))

    return jax.grad(loss, argnums=(0, 1))


def _grad_on_each_device(**kwargs):
    grad = _grad_of_batch(_reversible, **kwargs)

    def fn(args, y0s):
        grad_args, grad_y0s = grad(args, y0s)
        return lax.psum(grad_args, "x"), grad_y0s

    return fn


def _revolves(t, y, args, **kwargs):
    del t, kwargs
    return y[0] - 0.3 * args[0]


def _ends_and_between(sol):
    return _weigh(sol.ys) + _weigh(jax.vmap(sol.evaluate)(jnp.array([0.02, 0.07])))


_batches: dict[str, dict[str, Any]] = {
    "Tsit5": dict(),
    "ReversibleHeun": dict(solver=diffrax.ReversibleHeun(), max_steps=256),
    # No root finder: Optimistix's do not run in `jax.shard_map`, whatever the adjoint,
    # and without any gradient.
    "event, dense": dict(
        event=diffrax.Event(_revolves),
        saveat=diffrax.SaveAt(t1=True, dense=True),
        output=_ends_and_between,
        max_steps=16,
    ),
}


@ft.cache
def _expected_of_batch(name):
    return jax.jit(_grad_of_batch(_default, **_batches[name]))(_args, _members)


@pytest.mark.parametrize(
    "name",
    (
        "Tsit5",
        pytest.param("ReversibleHeun", marks=pytest.mark.slow),
        pytest.param("event, dense", marks=pytest.mark.slow),
    ),
)
def check_shard_map(name):
    divided = _put(P(), _args), _put(P("x"), _members)
    parallel = jax.shard_map(
        _grad_on_each_device(**_batches[name]),
        mesh=_mesh(),
        in_specs=(P(), P("x")),
        out_specs=(P(), P("x")),
        check_vma=False,
    )
    program = _compile(parallel, *divided)
    _assert_agree(program(*divided), _expected_of_batch(name))
    # The sum of the gradient of the parameters, and that is all.
    assert set(_collectives(program)) == {("all-reduce", False, _args.size)}


@pytest.mark.slow
def check_pmap():
    if not hasattr(jax, "pmap"):
        pytest.skip("JAX has no `pmap` any more.")
    name = "ReversibleHeun"
    fn = _grad_on_each_device(**_batches[name])
    parallel = jax.pmap(fn, axis_name="x", in_axes=(None, 0), out_axes=(None, 0))
    grad_args, grad_y0s = parallel(_args, _members.reshape(8, 2, 2))
    _assert_agree((grad_args, grad_y0s.reshape(16, 2)), _expected_of_batch(name))


#
# One solve, the state of which is divided
#


def _grad_of_state(field, adjoint, **kwargs):
    def loss(args, y0):
        sol = _solve(y0, args, adjoint, terms=diffrax.ODETerm(field), **kwargs)
        return _weigh(sol.ys)

    return jax.grad(loss, argnums=(0, 1))


def _field_of_batch(t, y, args):
    return jax.vmap(lambda y: _field(t, y, args))(y)


def check_batch_as_state():
    y0 = np.random.default_rng(0).normal(size=(512, 2))
    divided = _put(P(), _args), _put(P("x"), y0)
    grad = _grad_of_state(_field_of_batch, _reversible, throw=False)
    program = _compile(grad, *divided)
    expected = jax.jit(_grad_of_state(_field_of_batch, _default))(_args, y0)
    _assert_agree(program(*divided), expected)
    for name, _, size in _collectives(program):
        # Scalars, and the gradient of the parameters.
        assert name == "all-reduce" and size <= len(_ts)


# Of a rod that is heated, in contact with the next one and the one before.
def _heat(y, before, after, conductivity):
    return conductivity * (before - 2 * y + after) - 0.1 * y**3


def _roll(t, y, args):
    return _heat(y, jnp.roll(y, 1), jnp.roll(y, -1), args)


def _exchange(t, y, args):
    def on_each_device(y, args):
        ring = [(i, (i + 1) % 8) for i in range(8)]
        before = lax.ppermute(y[-1:], "x", ring)
        after = lax.ppermute(y[:1], "x", [(j, i) for i, j in ring])
        padded = jnp.concatenate([before, y, after])
        return _heat(y, padded[:-2], padded[2:], args)

    return jax.shard_map(
        on_each_device, mesh=_mesh(), in_specs=(P("x"), P("x")), out_specs=P("x")
    )(y, args)


_rng = np.random.default_rng(0)
_rod = _rng.uniform(0.5, 1.5, size=512), _rng.normal(size=512)


_heun: dict[str, Any] = dict(solver=diffrax.Heun(), max_steps=1024)


@ft.cache
def _expected_of_rod():
    return jax.jit(_grad_of_state(_roll, _default, **_heun))(*_rod)


@pytest.mark.parametrize(
    "field",
    (pytest.param(_roll, marks=pytest.mark.slow), _exchange),
    ids=("by XLA", "by ppermute"),
)
def check_state_that_is_divided(field):
    divided = _put(P("x"), _rod)
    grad = _grad_of_state(field, _reversible, throw=False, **_heun)
    program = _compile(grad, *divided)
    grads = program(*divided)
    _assert_agree(grads, _expected_of_rod())
    assert all(not x.sharding.is_fully_replicated for x in grads)
    exchanged = _collectives(program)
    # What is exchanged are the ends of each part, in each evaluation of the field, and
    # scalars.
    assert ("collective-permute", True, 1) in exchanged
    for name, _, size in exchanged:
        assert name in ("all-reduce", "collective-permute") and size <= len(_ts)


def check_that_gathering_is_seen():
    # To look for errors on the host, JAX gathers the result.
    def solve(args, y0, throw):
        term = diffrax.ODETerm(_field_of_batch)
        return _solve(y0, args, _default, terms=term, throw=throw).ys

    y0 = np.random.default_rng(0).normal(size=(512, 2))
    divided = _put(P(), _args), _put(P("x"), y0)
    for throw in (True, False):
        fn = ft.partial(solve, throw=throw)
        sizes = [size for _, _, size in _collectives(_compile(fn, *divided))]
        assert (max(sizes) >= y0.size) == throw
