"""The symplectic and composition methods: their coefficients, and what follows."""

import functools as ft
import itertools as it
import math
import re
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest


_SPLITTINGS = (
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
_ALL = (diffrax.VelocityVerlet, *_SPLITTINGS)
_name = lambda x: getattr(x, "__name__", str(x))
# Without those that are like others but for their coefficients.
_few = diffrax.ForestRuth, diffrax.VelocityVerlet


def _order(cls):
    return cls().order(None)


#
# Coefficients: in the algebra of words in two letters which do not commute, a step is a
# product of exponentials, and the flow is the exponential of the sum.
#


def _coefficients_of_words(coefficients, degree):
    """Of the step, for all words of up to `degree` letters."""
    out: dict[tuple[int, ...], Any] = {(): np.longdouble(1)}
    for i, size in enumerate(coefficients):
        new: dict[tuple[int, ...], Any] = {}
        for word, value in out.items():
            for num in range(degree - len(word) + 1):
                longer = word + (i % 2,) * num
                new[longer] = new.get(longer, 0) + value
                value = value * np.longdouble(size) / (num + 1)
        out = new
    return out


def _bracket(x, y):
    return np.subtract(np.multiply.outer(x, y), np.multiply.outer(y, x))


def _vanishing(degree):
    """The words of this degree that have the bracket `[b, [b, [b, a]]]` as a factor. It
    is zero for an equation of second order, of which `a` is linear in the velocity."""
    a, b = np.eye(2)
    bracket = _bracket(b, _bracket(b, _bracket(b, a)))
    for before in range(degree - 3):
        for word in it.product((a, b), repeat=degree - 4):
            left, right = word[:before], word[before:]
            yield ft.reduce(np.multiply.outer, (*left, bracket, *right)).ravel()


def _residual(cls, coefficients, degree):
    """By how much the order conditions of this degree fail to hold."""
    words = _coefficients_of_words(coefficients, degree)
    exact = 1 / np.longdouble(math.factorial(degree))
    of_degree = it.product((0, 1), repeat=degree)
    out = np.array([words.get(word, 0) - exact for word in of_degree], float)
    if cls is diffrax.BlanesMoanRKN6 and degree >= 4:
        vanishing = np.stack(list(_vanishing(degree)), axis=1)
        out = out - vanishing @ np.linalg.lstsq(vanishing, out)[0]
    return np.max(np.abs(out))


@pytest.mark.parametrize("cls", _SPLITTINGS, ids=_name)
def test_order_conditions(cls):
    order = _order(cls)
    for degree in range(1, order + 1):
        assert _residual(cls, cls.coefficients, degree) < 5e-16
    assert _residual(cls, cls.coefficients, order + 1) > 1e-9


def test_rkn_is_of_order_four_in_general():
    coefficients = diffrax.BlanesMoanRKN6.coefficients
    for degree in range(1, 5):
        assert _residual(diffrax.AbstractSplitting, coefficients, degree) < 5e-16
    assert _residual(diffrax.AbstractSplitting, coefficients, 5) > 1e-6


@pytest.mark.parametrize("cls", _SPLITTINGS[1:], ids=_name)
def test_any_wrong_digit_is_noticed(cls):
    # Also if both of two that are equal are wrong, and others make up for it in the
    # sum: so that it does not take this for the test above to fail.
    coefficients, degrees = cls.coefficients, range(1, _order(cls) + 1)
    for half in (0, 1):
        indices = [i for i in range(half, len(coefficients), 2) if coefficients[i]]
        middle = indices[len(indices) // 2]
        for i in indices[: len(indices) // 2]:
            digit = np.zeros(len(coefficients))
            digit[i], digit[middle] = 1e-13, -1e-13
            if coefficients == coefficients[::-1]:
                digit += digit[::-1]
            if np.any(digit):
                wrong = tuple(np.array(coefficients) + digit)
                assert max(_residual(cls, wrong, degree) for degree in degrees) > 5e-16


@pytest.mark.parametrize("cls", _SPLITTINGS, ids=_name)
def test_palindrome(cls):
    is_symmetric = cls.coefficients == cls.coefficients[::-1]
    assert is_symmetric == (cls is not diffrax.Ruth3)


class _Unfinished(diffrax.AbstractSplitting):
    coefficients = (1 / 2, 1, 1 / 4)

    def order(self, terms):
        return 0


def test_coefficients_are_validated():
    with pytest.raises(ValueError, match="first half of `y` to be moved by the whole"):
        _Unfinished()


#
# Steps
#

_u, _w = np.array([1.0, 2.0]), np.array([2.0, -1.0])
_y0 = jnp.array([0.6, -0.3, 0.2, 0.5])


def _drift(t, v, c):
    forced = 0.2 * c["rate"] * t + 0 * v
    return v + forced + 0.3 * c["drift"] * jnp.cos(_u @ v + c["rate"] * t) * _u


def _kick(t, q, c):
    return -q - 0.3 * c["kick"] * jnp.cos(_w @ q - 2 * c["rate"] * t) * _w


def _energy(y, c):
    q, v = y[:2], y[2:]
    nonlinear = c["drift"] * jnp.sin(_u @ v) + c["kick"] * jnp.sin(_w @ q)
    return (q @ q + v @ v) / 2 + 0.3 * nonlinear


_terms = diffrax.ODETerm(_drift), diffrax.ODETerm(_kick)
_oscillator = dict(drift=0.0, kick=0.0, rate=0.0)
_autonomous = dict(drift=1.0, kick=1.0, rate=0.0)
_driven = dict(drift=1.0, kick=1.0, rate=1.0)
# An equation of second order, but for what drives it.
_driven_second_order = dict(drift=0.0, kick=1.0, rate=1.0)


@ft.cache
def _run(cls):
    """A function of `(c, t0, h, n, y0)`: `n` steps of size `h`. Returns where they end,
    and the Jacobian of that."""
    solver = cls()

    def make_step(c, t0, t1, y):
        y0 = y[:2], y[2:]
        solver_state = solver.init(_terms, t0, t1, y0, c)
        y1, *_ = solver.step(_terms, t0, t1, y0, c, solver_state, False)
        return jnp.concatenate(y1)

    @jax.jit
    def run(c, t0, h, n, y0):
        def body(i, carry):
            y, jacobian = carry
            t = t0 + i * h
            y, derivative = jax.linearize(ft.partial(make_step, c, t, t + h), y)
            return y, jax.vmap(derivative, in_axes=1, out_axes=1)(jacobian)

        return lax.fori_loop(0, n, body, (y0, jnp.eye(4)))

    return run


@ft.cache
def _true_solution(is_second_order):
    problem = _driven_second_order if is_second_order else _driven
    y, _ = _run(diffrax.KahanLi8)(problem, 0.3, 1.5 / 128, 128, _y0)
    return y


@pytest.mark.parametrize("cls", _ALL, ids=_name)
def test_order(cls):
    # Nonlinear, and both halves of it depend on time.
    is_second_order = cls is diffrax.BlanesMoanRKN6
    problem = _driven_second_order if is_second_order else _driven
    # Errors between where the next order matters, and rounding.
    nums = {2: (32, 64), 3: (32, 64), 4: (24, 48), 6: (12, 18), 8: (12, 16)}[
        _order(cls)
    ]
    errors = []
    for n in nums:
        y, _ = _run(cls)(problem, 0.3, 1.5 / n, n, _y0)
        errors.append(np.max(np.abs(y - _true_solution(is_second_order))))
    slope = np.log(errors[0] / errors[1]) / np.log(nums[1] / nums[0])
    assert abs(slope - _order(cls)) < 0.2


@pytest.mark.parametrize("cls", _ALL, ids=_name)
def test_symplectic(cls):
    _, jacobian = _run(cls)(_driven, 0.3, 0.3, 3, _y0)
    omega = np.kron([[0, 1], [-1, 0]], np.eye(2))
    np.testing.assert_allclose(jacobian.T @ omega @ jacobian, omega, atol=1e-13)
    assert np.max(np.abs(jacobian - np.eye(4))) > 0.1


@pytest.mark.parametrize("cls", _ALL, ids=_name)
def test_symmetric(cls):
    y1, _ = _run(cls)(_driven, 0.3, 0.4, 1, _y0)
    y0, _ = _run(cls)(_driven, 0.7, -0.4, 1, y1)
    error = np.max(np.abs(y0 - _y0))
    if cls is diffrax.Ruth3:
        assert error > 1e-6
    else:
        assert error < 1e-14


@pytest.mark.parametrize("cls", _ALL, ids=_name)
def test_energy_does_not_drift(cls):
    # Over a hundred periods. If it drifted then its error in the last third would be
    # three times that in the first one.
    run, errors, y = _run(cls), [], _y0
    for _ in range(300):
        y, _ = run(_autonomous, 0.0, 0.2, 10, y)
        errors.append(_energy(y, _autonomous) - _energy(_y0, _autonomous))
    first, _, last = np.max(np.abs(errors).reshape(3, 100), axis=1)
    assert last < 2 * first


@pytest.mark.parametrize("cls", _ALL, ids=_name)
def test_stability(cls):
    # As the docstring says.
    (limit,) = re.findall(r"Stable for \$h \\omega < (\d\.\d{3})\$", cls.__doc__)
    y0 = jnp.zeros(4)

    def half_trace(h):
        _, jacobian = _run(cls)(_oscillator, 0.0, h, 1, y0)
        return np.abs(jacobian[0, 0] + jacobian[2, 2]) / 2

    below = np.linspace(0.01, float(limit), 80)
    assert max(map(half_trace, below)) < 1 + 1e-12
    assert half_trace(float(limit) + 1.1e-3) > 1 + 1e-9


@pytest.mark.parametrize("cls", _ALL, ids=_name)
def test_evaluations(cls):
    # As the docstring says, and as undoing a step takes.
    if cls is diffrax.VelocityVerlet:
        expected = [1, 1]
    else:
        coefficients = cls.coefficients
        expected = [sum(x != 0 for x in coefficients[i::2]) for i in (0, 1)]
    counts = [0, 0]

    def count(half, t, y, args):
        counts[half] += 1
        return y

    first, second = (diffrax.ODETerm(ft.partial(count, half)) for half in (0, 1))
    terms = first, second
    solver, y0 = cls(), (_y0[:2], _y0[2:])

    def step(y0):
        solver_state = solver.init(terms, 0.0, 0.1, y0, None)
        counts[:] = [0, 0]
        return solver.step(terms, 0.0, 0.1, y0, None, solver_state, False)

    def backward_step(y1, solver_state):
        counts[:] = [0, 0]
        return solver.backward_step(terms, 0.0, 0.1, y1, None, solver_state, False)

    y1, _, _, solver_state, _ = eqx.filter_eval_shape(step, y0)
    assert counts == expected
    eqx.filter_eval_shape(backward_step, y1, solver_state)
    assert counts == expected


@pytest.mark.parametrize("dtype", (jnp.complex64, jnp.complex128))
@pytest.mark.parametrize("cls", _few, ids=_name)
def test_complex(cls, dtype):
    # A step and then the step back is the identity, as in `test_law.py` for reals.
    real = jnp.finfo(dtype).dtype
    swirl = lambda t, x: 1j * jnp.sin(x) + t.astype(x.dtype)
    field = lambda t, y, args: jtu.tree_map(lambda x: swirl(t, x), y)
    terms = (diffrax.ODETerm(field),) * 2
    t0, t1 = jnp.array(0.1, real), jnp.array(0.4, real)
    half = {"a": jnp.array([1.0, 0.5 + 1j], dtype), "b": jnp.array(0.3j, dtype)}
    y0 = half, jtu.tree_map(lambda x: 1 - x, half)

    @jax.jit
    def there_and_back(y0):
        solver, state0 = cls(), cls().init(terms, t0, t1, y0, None)
        y1, _, _, state1, _ = solver.step(terms, t0, t1, y0, None, state0, False)
        return solver.backward_step(terms, t0, t1, y1, None, state1, False)[0], y1

    back, y1 = there_and_back(y0)
    assert eqx.tree_equal(back, y0, rtol=0, atol=20 * float(jnp.finfo(dtype).eps))
    assert not eqx.tree_equal(y1, y0, atol=0.1)


#
# Solves
#


def _solve(solver, y0, adjoint, terms=_terms, c=_autonomous, **kwargs) -> Any:
    arguments: Any = dict(t0=0.3, t1=2.0, dt0=0.1, max_steps=32) | kwargs
    arguments |= dict(y0=(y0[:2], y0[2:]), args=c, adjoint=adjoint)
    sol = diffrax.diffeqsolve(terms, solver, **arguments)
    assert sol.ys is not None
    return jnp.concatenate([y[-1] for y in sol.ys])


@pytest.mark.slow
@pytest.mark.parametrize("cls", _few, ids=_name)
def test_controls(cls):
    # That of a path which is a straight line is a multiple of time. One of the halves
    # consists of several terms.
    drift, kick = (term.vector_field for term in _terms)
    path = diffrax.LinearInterpolation(jnp.array([0.0, 3.0]), jnp.array([0.0, 6.0]))
    half_kick = lambda t, q, c: 0.5 * kick(t, q, c)
    controlled = (
        diffrax.ControlTerm(drift, path),
        diffrax.MultiTerm(diffrax.ODETerm(kick), diffrax.ControlTerm(half_kick, path)),
    )
    doubled = tuple(
        diffrax.ODETerm(lambda t, y, c, f=f: 2 * f(t, y, c)) for f in (drift, kick)
    )
    weights = jnp.arange(1.0, 5.0)

    def value_and_grad(adjoint, terms):
        loss = lambda y0: weights @ _solve(cls(), y0, adjoint, terms, _driven)
        return jax.jit(jax.value_and_grad(loss))(_y0)

    # Quick to compile.
    reversible = diffrax.ReversibleAdjoint(checkpoints=0, certificate="cheap")
    y, grad = value_and_grad(reversible, controlled)
    recursive = diffrax.RecursiveCheckpointAdjoint()
    expected_y, expected_grad = value_and_grad(recursive, doubled)
    np.testing.assert_allclose(y, expected_y, rtol=1e-13)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("cls", _few, ids=_name)
def test_sde(cls):
    # Langevin's equation.
    path = diffrax.VirtualBrownianTree(0.0, 3.0, 1e-3, (2,), jr.key(0))
    noise = diffrax.ControlTerm(lambda t, q, c: jnp.diag(jnp.cos(q)), path)
    terms = _terms[0], diffrax.MultiTerm(_terms[1], noise)
    weights = jnp.arange(1.0, 5.0)

    def gradient(adjoint):
        loss = lambda y0: weights @ _solve(cls(), y0, adjoint, terms)
        return jax.jit(jax.grad(loss))(_y0)

    with pytest.warns(match="not marked as converging"):
        expected = gradient(diffrax.RecursiveCheckpointAdjoint())
        grad = gradient(diffrax.ReversibleAdjoint())
    np.testing.assert_allclose(grad, expected, rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("cls", _few, ids=_name)
def test_a_million_steps(cls):
    # In memory that does not depend on how many there are. Of a linear equation the
    # gradient is known: it is a power of the matrix of a step.
    weights = jnp.arange(1.0, 5.0)
    adjoint = diffrax.ReversibleAdjoint(checkpoints=0, certificate="cheap")

    @jax.jit
    def gradient(y0, num_steps):
        def loss(y0):
            kwargs: Any = dict(t0=0.0, t1=0.1 * num_steps, dt0=0.1, max_steps=None)
            return weights @ _solve(cls(), y0, adjoint, c=_oscillator, **kwargs)

        return jax.grad(loss)(y0)

    n = 10**6
    _, step = _run(cls)(_oscillator, 0.0, 0.1, 1, _y0)
    expected = weights @ np.linalg.matrix_power(np.asarray(step), n)
    grad = gradient(_y0, jnp.array(n))
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-8)
    # Of any `n`, by one and the same program.
    memory: Any = gradient.lower(_y0, jnp.array(n)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**15


@pytest.mark.parametrize("cls", _ALL, ids=_name)
def test_citation(cls, capsys):
    diffrax.citation(solver=cls())
    out = capsys.readouterr().out
    (key, *_) = re.findall(r"@article\{(\w+),", cls.__doc__)
    assert key in out and cls.__name__ in out
