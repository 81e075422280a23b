"""That XLA does not fuse the stages of a step into each other."""

import functools as ft

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
    "solver, batch",
    (
        pytest.param(diffrax.Tsit5(), False, id="Tsit5"),
        pytest.param(diffrax.Tsit5(), True, id="batch", marks=pytest.mark.slow),
        pytest.param(
            diffrax.UReversible(diffrax.Heun()),
            True,
            id="UReversible, batch",
            marks=pytest.mark.slow,
        ),
    ),
)
def test_cost_of_a_stencil(solver, batch):
    def loss(adjoint, y0, args):
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
        jax.grad(ft.partial(loss, adjoint), (0, 1)) for adjoint in adjoints
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


@pytest.mark.parametrize("size", (40, pytest.param(100, marks=pytest.mark.slow)))
def test_terms_of_parts_of_the_state(size):
    # Each of them is evaluated at a part of it: 40 numbers are not enough for a fence,
    # though the whole state is.
    def loss(adjoint, y0, args):
        # Neither can be evaluated at the whole state, which is a pair.
        velocity = lambda t, p, args: p[:] + args
        force = lambda t, q, args: -args * jnp.sin(q)
        sol = diffrax.diffeqsolve(
            (diffrax.ODETerm(velocity), diffrax.ODETerm(force)),
            diffrax.SemiImplicitEuler(),
            *(0.0, 1.0, 0.1, y0, args),
            adjoint=adjoint,
            max_steps=16,
        )
        assert sol.ys is not None
        q, p = sol.ys
        return jnp.sum(q**2) + jnp.sum(p)

    y0 = jr.normal(jr.key(0), (size,)), jr.normal(jr.key(1), (size,))
    ours, expected = (
        jax.jit(jax.grad(ft.partial(loss, adjoint), (0, 1)))(y0, jnp.array(0.3))
        for adjoint in (diffrax.ReversibleAdjoint(), diffrax.DirectAdjoint())
    )
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "solver",
    (
        diffrax.Tsit5(),
        pytest.param(diffrax.UReversible(diffrax.Heun()), marks=pytest.mark.slow),
    ),
)
def test_rematerialisation(solver):
    # What differentiating a wide layer needs is held for one stage at a time, not for
    # all of them.
    def field(t, y, args):
        w0, w1 = args
        return jnp.tanh(y @ w0) @ w1

    def compiled(field):
        def loss(args, y0):
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                solver,
                *(0.0, 1.0, 0.1, y0, args),
                adjoint=diffrax.ReversibleAdjoint(0, certificate="cheap"),
                max_steps=16,
            )
            assert sol.ys is not None
            return jnp.sum(sol.ys**2)

        return jax.jit(jax.grad(loss)).lower(args, y0).compile()

    y0 = jr.normal(jr.key(0), (256, 2))
    args = jr.normal(jr.key(1), (2, 128)), jr.normal(jr.key(2), (128, 2)) / 128
    plain, remat = compiled(field), compiled(jax.checkpoint(field))
    for x, y in zip(remat(args, y0), plain(args, y0)):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-14)
    analyses = [x.memory_analysis() for x in (remat, plain)]
    small, large = (0 if x is None else x.temp_size_in_bytes for x in analyses)
    assert 0 < small < 0.6 * large
