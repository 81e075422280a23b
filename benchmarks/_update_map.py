"""The map that one step of a solver makes, on a linear equation, as a matrix."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def update_matrices(solver: Any, rates: Any, is_pair: bool = False) -> np.ndarray:
    """For each complex number `x` of `rates`, the matrix of a step of size 1 on `y' = x
    y`, a complex number as a pair of real ones: of `y`, and of what the solver carries
    along from step to step. Its shape is `(len(rates), n, n)`. For a solver of two
    equations (`is_pair`), the step is one on `q' = |x| p, p' = -|x| q`."""

    def field(t, y, x):
        real, imag = x
        return jnp.stack([real * y[0] - imag * y[1], imag * y[0] + real * y[1]])

    terms: Any = diffrax.ODETerm(field)
    y0: Any = jnp.array([0.6, 0.8])
    if is_pair:
        size = lambda x: jnp.hypot(*x)
        terms = (
            diffrax.ODETerm(lambda t, p, x: size(x) * p),
            diffrax.ODETerm(lambda t, q, x: -size(x) * q),
        )
        y0 = jnp.array([0.6]), jnp.array([0.8])

    def matrix(x):
        # No jump, which is not known when tracing.
        no_jump = jnp.array(False)
        state0 = solver.init(terms, 0.0, 1.0, y0, x)
        # A multistep method needs the time of the step before.
        _, _, _, state0, _ = solver.step(terms, 0.0, 1.0, y0, x, state0, no_jump)
        dynamic, static = eqx.partition((y0, state0), eqx.is_inexact_array)
        flat, unravel = ravel_pytree(dynamic)

        def step(flat):
            y, state = eqx.combine(unravel(flat), static)
            y, _, _, state, _ = solver.step(terms, 1.0, 2.0, y, x, state, no_jump)
            return ravel_pytree(eqx.filter((y, state), eqx.is_inexact_array))[0]

        return jax.jacrev(step)(flat)

    rates = np.atleast_1d(rates)
    parts = jnp.stack([jnp.asarray(rates.real), jnp.asarray(rates.imag)], axis=-1)
    return np.asarray(jax.jit(jax.vmap(matrix))(parts))


def growth(solver: Any, rates: Any, is_pair: bool = False) -> np.ndarray:
    """By how much a step may grow, in the long run: the spectral radius. At most 1 where
    the solver is stable."""
    return np.max(np.abs(np.linalg.eigvals(update_matrices(solver, rates, is_pair))), -1)


def interval(solver: Any, direction: complex, is_pair: bool = False) -> float:
    """Up to which size the solver is stable for all rates in a direction, i.e. grows by
    no more than 1e-9 a step: to three digits or so. Infinite if it is so up to 100."""
    slack = 1e-9
    coarse = np.concatenate([np.geomspace(1e-4, 0.02, 20), np.arange(0.03, 12, 0.01)])
    sizes = np.concatenate([coarse, np.arange(12, 100, 0.25)])
    bad = growth(solver, direction * sizes, is_pair) > 1 + slack
    if not bad.any():
        return float("inf")
    first = int(np.argmax(bad))
    if first == 0:
        return 0.0
    fine = np.linspace(sizes[first - 1], sizes[first], 21)
    bad = growth(solver, direction * fine, is_pair) > 1 + slack
    return float(fine[max(int(np.argmax(bad)) - 1, 0)])
