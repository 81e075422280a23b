"""Reversible solvers from the literature: what each of them claims to be."""

import warnings
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
    kwargs = dict(t1=2.0, y0=_y0, max_steps=1024) | kwargs
    dt0 = kwargs["t1"] / num_steps
    return diffrax.diffeqsolve(terms, solver, t0=0.0, dt0=dt0, **kwargs)


def _slope(errors: Any, nums: Any) -> float:
    return float(-np.polyfit(np.log(nums), np.log(np.asarray(errors)), 1)[0])


def _name(x: Any) -> str | None:
    if isinstance(x, diffrax.AbstractImplicitSolver):
        return type(x).__name__
    return repr(x)


@pytest.fixture(scope="module")
def exact():
    """The solution between 0 and 2."""
    sol = _solve(diffrax.Dopri8(), 200.0, saveat=diffrax.SaveAt(dense=True))
    return jax.jit(jax.vmap(sol.evaluate))


#
# Accuracy
#


@pytest.mark.parametrize(
    "solver",
    (
        diffrax.AsynchronousLeapfrog(),
        diffrax.AsynchronousLeapfrog(0.9),
        diffrax.EES25(),
        diffrax.EES27(),
        diffrax.ImplicitMidpoint(),
        diffrax.GaussLegendre4(),
    ),
    ids=_name,
)
def test_order(solver, exact):
    @jax.jit
    def solve(num_steps):
        return _solve(solver, num_steps).ys[-1]

    nums = (24, 48, 96)
    (true_y1,) = exact(jnp.array([2.0]))
    errors = [jnp.max(jnp.abs(solve(float(n)) - true_y1)) for n in nums]
    assert abs(_slope(errors, nums) - solver.order(_term)) < 0.1


@pytest.mark.parametrize(
    "solver, order",
    (
        (diffrax.AsynchronousLeapfrog(), 3),
        (diffrax.EES25(), 3),
        (diffrax.EES27(), 3),
        (diffrax.ImplicitMidpoint(), 2),
        (diffrax.GaussLegendre4(), 4),
    ),
    ids=_name,
)
def test_interpolation(solver, order, exact):
    """By how much the error within a step is larger than at its ends. (That of a linear
    interpolation is of second order.)"""

    @jax.jit
    @jax.vmap
    def second_step(h):
        # The first one starts from a solver state that is exact.
        y0, state = _y0, solver.init(_term, 0.0, h, _y0, None)
        y1, _, _, state, _ = solver.step(_term, 0.0, h, y0, None, state, False)
        _, _, dense_info, _, _ = solver.step(_term, h, 2 * h, y1, None, state, False)
        out = solver.interpolation_cls(t0=h, t1=2 * h, **dense_info)
        ts = h * jnp.array([1.0, 1.25, 1.75, 2.0])
        return ts, jax.vmap(out.evaluate)(ts)

    nums = np.array([10.0, 20.0, 40.0])
    ts, ys = second_step(1 / jnp.asarray(nums))
    start, *inside, end = np.moveaxis(ys - jax.vmap(exact)(ts), 1, 0)
    linear = [0.75 * start + 0.25 * end, 0.25 * start + 0.75 * end]
    added = np.array(inside) - np.array(linear)
    assert abs(_slope(np.max(np.abs(added), axis=(0, 2)), nums) - order) < 0.3


#
# Asynchronous leapfrog
#


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
    solver: Any = diffrax.AsynchronousLeapfrog()
    true_ys = exact(jnp.array([2.0]))
    for tol in (1e-3, 1e-5):
        controller = diffrax.PIDController(rtol=tol, atol=tol)
        sol = _solve(solver, 2.0, stepsize_controller=controller)
        assert jnp.max(jnp.abs(sol.ys - true_ys)) < 20 * tol
    state = solver.init(_term, 0.0, 1.0, _y0, None)
    nums = (10.0, 20.0, 40.0)
    error = lambda h: solver.step(_term, 0.0, h, _y0, None, state, False)[1]
    errors = jnp.max(jnp.abs(jax.vmap(error)(1 / jnp.array(nums))), axis=1)
    assert abs(_slope(errors, nums) - solver.error_order(_term)) < 0.1


#
# Explicit and effectively symmetric methods
#


_ees = pytest.mark.parametrize(
    "solver, antisymmetric_order, limit",
    # The last one is that of the real interval of stability.
    (
        (diffrax.EES25(), 5, -3.087),
        (diffrax.EES25(0.3), 5, -3.087),
        (diffrax.EES27(), 7, -3.915),
    ),
    ids=_name,
)


def _stability_function(tableau: diffrax.ButcherTableau) -> np.ndarray:
    """The coefficients of the polynomial by which a step multiplies, for `y' = a y`."""
    num = tableau.num_stages
    a = np.zeros((num, num))
    for i, a_i in enumerate(tableau.a_lower):
        a[i + 1, : i + 1] = a_i
    powers = [np.ones(num)]
    for _ in range(num - 1):
        powers.append(a @ powers[-1])
    return np.array([1.0, *(tableau.b_sol @ x for x in powers)])


@_ees
def test_ees_linear(solver, antisymmetric_order, limit):
    """Butcher's conditions of second order, the linear ones of the antisymmetric order,
    and the limits of stability."""
    r = _stability_function(solver.tableau)
    np.testing.assert_allclose(r[:3], [1, 1, 1 / 2], atol=1e-15)
    round_trip = np.polynomial.polynomial.polymul(r, r * (-1.0) ** np.arange(len(r)))
    exactly = np.zeros(len(round_trip))
    top = -1 / 64 if antisymmetric_order == 5 else (3 - 2 * 2**0.5) ** 2 / 64
    exactly[0], exactly[antisymmetric_order + 1] = 1, top
    np.testing.assert_allclose(round_trip, exactly, atol=2e-15)
    growth = lambda z: np.abs(np.polynomial.polynomial.polyval(z, r))
    assert np.all(growth(np.linspace(limit, 0, 1000)) <= 1)
    assert growth(limit - 1e-3) > 1
    percent = 0.78 if antisymmetric_order == 5 else 0.023
    assert abs(100 * (growth(1j) - 1) / percent - 1) < 0.01


@_ees
def test_ees_antisymmetric_order(solver, antisymmetric_order, limit):
    """On a problem that is neither linear nor autonomous: what a wrong digit in any
    coefficient would break."""
    del limit

    @jax.jit
    @jax.vmap
    def miss(h):
        t0 = 0.3
        y1, *_ = solver.step(_term, t0, t0 + h, _y0, None, None, False)
        y0, *_ = solver.step(_term, t0 + h, t0, y1, None, None, False)
        return jnp.max(jnp.abs(y0 - _y0))

    nums = np.array([4.0, 6.0, 9.0])
    slope = _slope(miss(1 / jnp.asarray(nums)), nums)
    assert abs(slope - (antisymmetric_order + 1)) < 0.3


@pytest.mark.parametrize("x", (-0.5, 0.5, 1.0, float("nan"), float("inf")))
def test_ees_parameter_is_validated(x):
    with pytest.raises(ValueError, match=r"Cannot use `EES25\(x="):
        diffrax.EES25(x)


def test_ees_parameter_must_be_known():
    with pytest.raises(ValueError, match="must be a Python number"):
        jax.jit(diffrax.EES25)(0.2)


@pytest.mark.slow
def test_ees_as_its_authors_use_it():
    """Without corrections, the gradient is off by about `h^6` for each step: the
    certificate tells, by default the steps are made again, and without stored states
    there is no gradient unless that is asked for."""
    solver = diffrax.FixedPointReversible(diffrax.EES25(), max_corrections=0)
    term = diffrax.ODETerm(lambda t, y, a: jnp.stack([y[1], -a * jnp.sin(y[0])]))

    def loss(adjoint, a):
        return jnp.sum(_solve(solver, 20, term, args=a, adjoint=adjoint).ys)

    def gradient(adjoint):
        fn = eqx.filter_jit(eqx.filter_grad(lambda a: loss(adjoint, a)))
        return fn(jnp.array(1.3))

    expected = gradient(diffrax.RecursiveCheckpointAdjoint())
    error = lambda grad: float(jnp.abs(grad / expected - 1))
    assert error(gradient(diffrax.ReversibleAdjoint())) < 1e-12
    report = diffrax.reversal_report(
        loss, jnp.array(1.3), adjoint=diffrax.ReversibleAdjoint(checkpoints=0)
    )
    assert report.certificate > report.tolerance
    (authors,) = report.grads
    assert 1e-10 < error(authors) < 1e-6
    with pytest.raises(eqx.EquinoxRuntimeError, match="did not lead to where"):
        gradient(diffrax.ReversibleAdjoint(checkpoints=0))
    ignoring = diffrax.ReversibleAdjoint(checkpoints=0, on_failure="ignore")
    np.testing.assert_allclose(gradient(ignoring), authors, rtol=1e-13)


#
# Symmetric implicit methods
#


_midpoint, _gauss4 = diffrax.ImplicitMidpoint(), diffrax.GaussLegendre4()


def _gauss(quick: diffrax.AbstractSolver) -> Any:
    """For both, in turns: they share all of their code."""
    other = _gauss4 if quick is _midpoint else _midpoint
    slow = pytest.param(other, marks=pytest.mark.slow)
    return pytest.mark.parametrize("solver", (quick, slow), ids=_name)


def _hamiltonian(y):
    # Not separable.
    q, p = y
    return 0.5 * p**2 * (1 + q**2) + jnp.cos(q)


def _hamiltonian_field(t, y, args):
    of_q, of_p = jax.grad(_hamiltonian)(y)
    return jnp.stack([of_p, -of_q])


@_gauss(_midpoint)
def test_gauss_symplectic(solver):
    term = diffrax.ODETerm(_hamiltonian_field)
    step = lambda y: solver.step(term, 0.0, 0.3, y, None, None, False)[0]
    jacobian = jax.jit(jax.jacrev(step))(_y0)
    form = np.array([[0.0, 1.0], [-1.0, 0.0]])
    np.testing.assert_allclose(jacobian.T @ form @ jacobian, form, atol=1e-14)


@_gauss(_gauss4)
def test_gauss_energy_does_not_drift(solver):
    """The error of the energy in the second half of a thousand large steps is that in
    the first."""
    saveat = diffrax.SaveAt(steps=True)
    term = diffrax.ODETerm(_hamiltonian_field)
    sol = _solve(solver, 1000, term, saveat=saveat, t1=200.0, max_steps=1000)
    errors = jnp.abs(jax.vmap(_hamiltonian)(sol.ys) - _hamiltonian(_y0))
    first, second = jnp.max(errors.reshape(2, -1), axis=1)
    assert 0 < second < 1.05 * first < 0.1


@_gauss(_midpoint)
def test_gauss_quadratic_invariant(solver):
    """The norm is kept up to rounding, over any number of steps of any size."""

    def field(t, y, args):
        x, z = y
        return jnp.stack([-z, x]) * (1 + x * z + jnp.cos(t))

    sol = _solve(solver, 100, diffrax.ODETerm(field), t1=20.0, max_steps=100)
    error = jnp.linalg.norm(sol.ys[0]) / jnp.linalg.norm(_y0) - 1
    assert jnp.abs(error) < 100 * np.finfo(float).eps


@_gauss(_gauss4)
def test_gauss_stability(solver):
    """A-stable, and neutral on the imaginary axis."""
    term = diffrax.ODETerm(lambda t, y, a: a * y)

    @jax.jit
    @jax.vmap
    def growth(z):
        y0 = jnp.ones((), z.dtype)
        y1, *_ = solver.step(term, 0.0, 1.0, y0, z, None, False)
        return y1

    z = np.array([1j, 10j, -0.1 + 3j, -2, -1000])
    if isinstance(solver, diffrax.ImplicitMidpoint):
        expected = (1 + z / 2) / (1 - z / 2)
    else:
        expected = (1 + z / 2 + z**2 / 12) / (1 - z / 2 + z**2 / 12)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Complex dtype support")
        found = growth(jnp.asarray(z))
    np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_gauss_fails_if_its_equations_have_no_solution():
    term = diffrax.ODETerm(lambda t, y, args: 1 + y**2)
    sol = _solve(diffrax.ImplicitMidpoint(), 1, term, throw=False)
    assert sol.result in (
        diffrax.RESULTS.nonlinear_divergence,
        diffrax.RESULTS.nonlinear_max_steps_reached,
    )


#
# Stochastic differential equations
#


@pytest.mark.parametrize(
    "solver",
    (
        diffrax.AsynchronousLeapfrog(),
        pytest.param(diffrax.EES25(), marks=pytest.mark.slow),
        pytest.param(diffrax.EES27(), marks=pytest.mark.slow),
        pytest.param(diffrax.ImplicitMidpoint(), marks=pytest.mark.slow),
        pytest.param(diffrax.GaussLegendre4(), marks=pytest.mark.slow),
    ),
    ids=_name,
)
def test_strong_order(solver):
    """To the Stratonovich solution. As the drift commutes with the noise, this is an
    ODE in `a t + b W(t)`, of which a step is as large as the square root of the step
    size: so the strong order is half that for ODEs. (`benchmarks/sde_orders.py` has
    those on other equations.)"""
    a, b, start = 0.5, 0.3, 0.3
    gudermannian = lambda x: 2 * jnp.arctan(jnp.tanh(x / 2))
    nums = (32, 64, 128)

    @jax.jit
    @jax.vmap
    def errors(num_steps, key):
        path = diffrax.VirtualBrownianTree(0.0, 1.0, 2**-9, (), key)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: a * jnp.cos(y)),
            diffrax.ControlTerm(lambda t, y, args: b * jnp.cos(y), path),
        )
        y0 = gudermannian(jnp.array(start))
        y1 = _solve(solver, num_steps, terms, y0=y0, t1=1.0).ys[-1]
        w: Any = path.evaluate(0.0, 1.0)
        return jnp.abs(y1 - gudermannian(start + a + b * w))

    keys = jr.split(jr.key(0), 500)
    mean = [jnp.mean(errors(jnp.full(500, float(n)), keys)) for n in nums]
    # The mean of 500 samples is known to about 4 percent, and steps are not so small
    # that the fourth order is seen in full.
    assert abs(_slope(mean, nums) - solver.order(_term) / 2) < 0.2
