"""Reversible solvers from the literature: what each of them claims to be."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest


def _pendulum(t, y, args):
    # Driven; neither damped nor at rest.
    x, v = y
    return jnp.stack([v, jnp.cos(t) - jnp.sin(x)])


_y0 = jnp.array([1.0, 0.5])
_term = diffrax.ODETerm(_pendulum)


def _solve(solver: Any, num_steps: Any, terms: Any = _term, **kwargs: Any) -> Any:
    """Constant steps from 0 to 2."""
    kwargs = dict(y0=_y0, max_steps=1024) | kwargs
    return diffrax.diffeqsolve(terms, solver, 0.0, 2.0, 2.0 / num_steps, **kwargs)


def _slope(errors: Any, nums: Any) -> float:
    return float(-np.polyfit(np.log(nums), np.log(np.asarray(errors)), 1)[0])


@pytest.fixture(scope="module")
def exact():
    """The solution between 0 and 2."""
    sol = _solve(diffrax.Dopri8(), 200.0, saveat=diffrax.SaveAt(dense=True))
    return jax.jit(jax.vmap(sol.evaluate))


#
# Asynchronous leapfrog
#


@pytest.mark.parametrize(
    "solver",
    (
        diffrax.AsynchronousLeapfrog(),
        diffrax.AsynchronousLeapfrog(0.9),
    ),
    ids=repr,
)
def test_order(solver, exact):
    @jax.jit
    def solve(num_steps):
        return _solve(solver, num_steps).ys[-1]

    nums = (50, 100, 200)
    (true_y1,) = exact(jnp.array([2.0]))
    errors = [jnp.max(jnp.abs(solve(float(n)) - true_y1)) for n in nums]
    assert abs(_slope(errors, nums) - solver.order(_term)) < 0.1


def test_interpolation(exact):
    """The interpolation of third order adds to the error of the steps at their ends one
    that is of third order, where a linear one would add one of second order."""
    nums = (20, 40, 80)
    added = []
    for num in nums:
        ts = jnp.linspace(0.0, 2.0, 2 * num + 1)
        sol = _solve(diffrax.AsynchronousLeapfrog(), num, saveat=diffrax.SaveAt(ts=ts))
        error = sol.ys - exact(ts)
        added.append(jnp.max(jnp.abs(error[1::2] - (error[:-1:2] + error[2::2]) / 2)))
    assert _slope(added, nums) > 2.8


@pytest.mark.parametrize("eta", (1.0, 0.9, 0.75, 0.3))
def test_leapfrog_stability(eta):
    """The region of stability is the ellipse that the docstring has."""
    solver = diffrax.AsynchronousLeapfrog(eta)
    term = diffrax.ODETerm(lambda t, y, a: a * y)

    @jax.jit
    @jax.vmap
    def matrix(z):
        def step(state):
            y0, v0 = state
            y1, _, _, v1, _ = solver.step(term, 0.0, 1.0, y0, z, v0, False)
            return jnp.stack([y1, v1])

        return jax.vmap(step, out_axes=1)(jnp.eye(2, dtype=z.dtype))

    def growth(z):
        return np.max(np.abs(np.linalg.eigvals(matrix(jnp.asarray(z)))), axis=-1)

    angle = np.linspace(0.05, 2 * np.pi - 0.05, 60)
    half_axis = (1 - eta) / eta
    boundary = lambda r: half_axis * (r * np.cos(angle) - 1) + 1j * r * np.sin(angle)
    assert np.all(growth(boundary(0.98)) < 1 + 1e-12)
    if eta == 1:
        # There is nothing else than the segment of a line.
        assert np.all(growth(np.array([-1e-3, 1e-3, -1e-3 + 0.5j])) > 1)
    else:
        assert np.all(growth(boundary(1.02)) > 1)


@pytest.mark.parametrize("eta", (0.0, 0.5, -1.0, 1.1, float("nan")))
def test_eta_is_validated(eta):
    with pytest.raises(ValueError, match="Must have `0 < eta <= 1` and not"):
        diffrax.AsynchronousLeapfrog(eta)


def test_eta_must_be_known():
    with pytest.raises(ValueError, match="must be a Python number"):
        jax.jit(diffrax.AsynchronousLeapfrog)(0.9)


def test_damping_is_refused_for_sdes():
    path = diffrax.VirtualBrownianTree(0.0, 2.0, 1e-2, (2,), jr.key(0))
    noise = diffrax.ControlTerm(lambda t, y, args: jnp.diag(y), path)
    with pytest.raises(ValueError, match="with damping it does not converge"):
        _solve(diffrax.AsynchronousLeapfrog(0.9), 10, diffrax.MultiTerm(_term, noise))


def test_leapfrog_at_a_jump(getkey):
    """As at the start of a solve, whatever its state was: so no step after that shows
    the jump in its error estimate."""
    solver = diffrax.AsynchronousLeapfrog(0.7)
    step = eqx.filter_jit(
        lambda v, made_jump: solver.step(_term, 0.3, 0.5, _y0, None, v, made_jump)
    )
    fresh = step(solver.init(_term, 0.3, 0.5, _y0, None), jnp.array(False))
    stale = jr.normal(getkey(), (2,))
    assert eqx.tree_equal(step(stale, jnp.array(True)), fresh)
    assert not eqx.tree_equal(step(stale, jnp.array(False)), fresh)


def test_leapfrog_adaptive_steps(exact):
    """The error of a solve is near the tolerance; that of the error estimate is 2."""
    solver = diffrax.AsynchronousLeapfrog()
    true_ys = exact(jnp.array([2.0]))
    for tol in (1e-3, 1e-5):
        controller = diffrax.PIDController(rtol=tol, atol=tol)
        sol = _solve(solver, 2.0, stepsize_controller=controller)
        assert jnp.max(jnp.abs(sol.ys - true_ys)) < 20 * tol
    state = solver.init(_term, 0.0, 1.0, _y0, None)
    nums = (10, 20, 40)
    errors = [
        jnp.max(jnp.abs(solver.step(_term, 0.0, 1 / n, _y0, None, state, False)[1]))
        for n in nums
    ]
    assert abs(_slope(errors, nums) - solver.error_order(_term)) < 0.1
