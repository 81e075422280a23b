"""The law of reversible solvers: a step, and then the step back, is the identity."""

from typing import Any

import diffrax
import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest
from diffrax._solver.reversible_half_solver import ReversibleHalfSolver


_COMPOSITIONS = (
    diffrax.PositionVerlet,
    diffrax.Ruth3,
    diffrax.ForestRuth,
    diffrax.Suzuki4,
    diffrax.PEFRL,
    diffrax.BlanesMoan4,
    diffrax.BlanesMoan6,
    diffrax.BlanesMoanRKN6,
    diffrax.KahanLi6,
    diffrax.KahanLi8,
)
_SOLVERS = {
    "SemiImplicitEuler": diffrax.SemiImplicitEuler(),
    "VelocityVerlet": diffrax.VelocityVerlet(),
    **{cls.__name__: cls() for cls in _COMPOSITIONS},
    "LeapfrogMidpoint": diffrax.LeapfrogMidpoint(),
    "AsynchronousLeapfrog": diffrax.AsynchronousLeapfrog(),
    "AsynchronousLeapfrog(0.9)": diffrax.AsynchronousLeapfrog(0.9),
    "ReversibleHeun": diffrax.ReversibleHeun(),
    "ImplicitMidpoint": diffrax.ImplicitMidpoint(),
    "GaussLegendre4": diffrax.GaussLegendre4(),
    "BitExact(SemiImplicitEuler)": diffrax.BitExact(diffrax.SemiImplicitEuler(), 100.0),
    "BitExact(ReversibleHeun)": diffrax.BitExact(diffrax.ReversibleHeun(), 100.0),
    "HalfSolver(ReversibleHeun)": ReversibleHalfSolver(diffrax.ReversibleHeun()),
    "HalfSolver(UReversible(Bosh3))": ReversibleHalfSolver(
        diffrax.UReversible(diffrax.Bosh3())
    ),
    "UReversible(Bosh3, 0.5)": diffrax.UReversible(diffrax.Bosh3(), 0.5),
    **{
        f"UReversible({cls.__name__})": diffrax.UReversible(cls())
        for cls in (
            diffrax.Euler,
            diffrax.Heun,
            diffrax.Midpoint,
            diffrax.Ralston,
            diffrax.Bosh3,
            diffrax.Tsit5,
            diffrax.Dopri5,
            diffrax.Dopri8,
        )
    },
    **{
        f"FixedPointReversible({cls.__name__})": diffrax.FixedPointReversible(cls())
        for cls in (diffrax.Euler, diffrax.Tsit5)
    },
}


def test_every_reversible_solver_is_tested():
    exported = {
        cls
        for cls in vars(diffrax).values()
        if isinstance(cls, type) and issubclass(cls, diffrax.AbstractReversibleSolver)
    }
    tested = {type(solver) for solver in _SOLVERS.values()}
    abstract = {diffrax.AbstractReversibleSolver, diffrax.AbstractSplitting}
    assert exported - tested == abstract


def _takes_pair(solver):
    return isinstance(solver.term_structure, tuple)


def _structure(dtype):
    # Leaves of different shapes and scales.
    x = lambda *shape: jnp.ones(shape, dtype)
    return {"a": x(), "b": (100 * x(2, 2), None), "c": [0.01 * x(4), x(0)]}


def _field(t, y, scale):
    # Smooth, nonlinear, not autonomous, of Lipschitz constant 2, and each leaf depends
    # on all the others.
    leaves, treedef = jtu.tree_flatten(y)
    scale_leaves = jtu.tree_leaves(scale)
    means = [jnp.sum(y_i / s) for y_i, s in zip(leaves, scale_leaves)]
    mean = jnp.sum(jnp.stack(means))
    t = t.astype(mean.dtype)
    out = [s * jnp.sin(y_i / s + mean / 5 + t) for y_i, s in zip(leaves, scale_leaves)]
    return jtu.tree_unflatten(treedef, out)


def _normal_like(key, tree):
    leaves, treedef = jtu.tree_flatten(tree)
    keys = jr.split(key, len(leaves))
    out = [x * jr.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
    return jtu.tree_unflatten(treedef, out)


@eqx.filter_jit
def _forward_and_backward(solver, structure, key, steps, made_jump):
    """Makes two steps, and undoes the second of them. Returns what the solver had
    before it, and what it has again."""
    scale = jtu.tree_map(lambda x: jnp.max(x, initial=1e-8), structure)
    y = _normal_like(key, structure)
    terms: Any = diffrax.ODETerm(_field)
    if _takes_pair(solver):
        terms = (terms, terms)
        y = (y, _normal_like(jr.fold_in(key, 1), structure))
    ts = jnp.cumsum(steps)
    solver_state = solver.init(terms, ts[0], ts[1], y, scale)
    y, _, _, solver_state, _ = solver.step(
        terms, ts[0], ts[1], y, scale, solver_state, False
    )
    t0, t1 = ts[1], ts[2]
    y1, _, dense_info, solver_state1, _ = solver.step(
        terms, t0, t1, y, scale, solver_state, made_jump
    )
    solver_state1 = solver.restore_state(
        terms, t1, y1, scale, solver_state1, solver.record_state(solver_state), False
    )
    out = solver.backward_step(terms, t0, t1, y1, scale, solver_state1, made_jump)
    if isinstance(solver, diffrax.AsynchronousLeapfrog):
        # At a jump it starts anew. What it had before that, `step` made no use of.
        fresh = solver.init(terms, t0, t1, y, scale)
        solver_state = jtu.tree_map(
            lambda a, b: jnp.where(made_jump, a, b), fresh, solver_state
        )
    return (y, dense_info, solver_state), out, y1


def _names_and_dtypes():
    # Methods that are the same as others but for their coefficients.
    slow = {f"UReversible({name})" for name in ("Midpoint", "Ralston", "Dopri5")}
    slow |= {"UReversible(Dopri8)", "ImplicitMidpoint"}
    slow_float32 = {"UReversible(Bosh3)", "UReversible(Tsit5)", "GaussLegendre4"}
    slow |= {cls.__name__ for cls in _COMPOSITIONS if cls is not diffrax.PositionVerlet}
    slow_float32 |= {"HalfSolver(UReversible(Bosh3))", "UReversible(Bosh3, 0.5)"}
    slow_float32 |= {"PositionVerlet"}
    for name in _SOLVERS:
        for dtype in (jnp.float64, jnp.float32):
            is_slow = name in slow
            is_slow |= name in slow_float32 and dtype == jnp.float32
            marks = pytest.mark.slow if is_slow else ()
            yield pytest.param(name, dtype, marks=marks)


@pytest.mark.parametrize("name, dtype", list(_names_and_dtypes()))
@hypothesis.given(
    seed=st.integers(0, 2**31 - 1),
    start=st.floats(-5, 5),
    steps=st.lists(st.floats(1e-3, 0.5), min_size=2, max_size=2),
    made_jump=st.booleans(),
)
@hypothesis.settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    # Not `shrink`, which compiles for minutes.
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)
def test_step_then_backward_step(name, dtype, seed, start, steps, made_jump):
    solver = _SOLVERS[name]
    if isinstance(solver, diffrax.FixedPointReversible):
        # For the iteration to converge.
        steps = [0.2 * x for x in steps]
    steps = jnp.array([start, *steps])
    before, after, y1 = _forward_and_backward(
        solver,
        _structure(dtype),
        jr.key(seed),
        steps.astype(dtype),
        jnp.asarray(made_jump),
    )
    assert jtu.tree_structure(before) == jtu.tree_structure(after)
    # Each of up to about 100 operations rounds numbers up to the size of the largest
    # that occurs. Dividing by the coupling parameter multiplies what they add up to.
    divisor = getattr(solver, "coupling_parameter", 1.0)
    if isinstance(solver, diffrax.AsynchronousLeapfrog):
        divisor = 2 * solver.eta - 1
    tolerance = 200 * float(jnp.finfo(dtype).eps) / divisor
    y, *_ = before
    scale = _structure(dtype)
    if _takes_pair(solver):
        scale = (scale, scale)
    sizes = {
        jtu.keystr(path): max(map(_max_abs, leaves))
        for path, *leaves in _leaves_with_path(y, y1, scale)
    }
    for path, x, found in _leaves_with_path(before, after):
        assert jnp.shape(x) == jnp.shape(found)
        assert jnp.result_type(x) == jnp.result_type(found)
        if jnp.result_type(x) == jnp.bool_:
            assert x == found
            continue
        # Relative to the size of that leaf of `y` which it is a part of or, if it is
        # larger (for example a sum over all of the steps), of itself.
        keys = (jtu.keystr(path[i:]) for i in range(len(path)))
        size = max(_max_abs(x), *(sizes.get(key, 0.0) for key in keys))
        assert float(jnp.max(jnp.abs(x - found), initial=0)) <= tolerance * size


def _max_abs(x):
    return float(jnp.max(jnp.abs(x), initial=0))


def _leaves_with_path(tree, *others):
    others = [jtu.tree_leaves(other) for other in others]
    leaves, _ = jtu.tree_flatten_with_path(tree)
    for (path, leaf), *rest in zip(leaves, *others):
        yield path, leaf, *rest


def test_jump_with_too_large_a_step():
    # `y0 = y1 - 0.5 * h * (f(y0) + f1)` has a solution, but with `h * L = 6` the
    # iteration does not converge to it.
    solver = diffrax.ReversibleHeun()
    term = diffrax.ODETerm(lambda t, y, args: 6 * y)
    y0 = jnp.array([0.5, 3.0])
    yhat0 = y0 + 0.1
    state = (yhat0, 6 * yhat0)
    y1, _, _, state, _ = solver.step(term, 0.0, 1.0, y0, None, state, True)
    back, *_ = eqx.filter_jit(solver.backward_step)(
        term, 0.0, 1.0, y1, None, state, jnp.array(True)
    )
    assert jnp.all(jnp.isnan(back))
