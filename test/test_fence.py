"""That XLA does not fuse the stages of a step into each other."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest


def _stencil(t, y, args):
    neighbours = [jnp.roll(y, shift, axis) for shift in (1, -1) for axis in (0, 1)]
    return args * (sum(neighbours) - 4 * y)


def _flops(fn, *args):
    cost = jax.jit(fn).lower(*args).compile().cost_analysis()
    assert cost is not None
    return cost["flops"]


@pytest.mark.parametrize(
    "solver", (diffrax.Tsit5(), diffrax.UReversible(diffrax.Heun()))
)
@pytest.mark.parametrize("batch", (False, True))
def test_cost_of_a_stencil(solver, batch):
    def loss(y0, args, adjoint):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(_stencil),
            solver,
            *(0.0, 1.0, 0.1, y0, args),
            adjoint=adjoint,
            max_steps=16,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys**2)

    y0, args = jr.normal(jr.key(0), (16, 16)), jnp.array(0.3)
    adjoints = diffrax.ReversibleAdjoint(0), diffrax.RecursiveCheckpointAdjoint()
    ours, expected = (
        jax.grad(lambda *x, adjoint=adjoint: loss(*x, adjoint), (0, 1))
        for adjoint in adjoints
    )
    field = lambda y, args: _stencil(0.0, y, args)
    if batch:
        y0, args = jnp.stack([y0, 2 * y0]), jnp.stack([args, 2 * args])
        ours, expected, field = map(jax.vmap, (ours, expected, field))
    for x, y in zip(jax.jit(ours)(y0, args), jax.jit(expected)(y0, args)):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)
    # Of one step each of all loops. With Tsit5 there are about 30 evaluations; fused
    # into one another, they were several hundred.
    assert _flops(ours, y0, args) < 200 * _flops(field, y0, args)
