"""What is recorded of an evaluation, for its derivative to be had again."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from diffrax._residuals import Residuals


size = 100
weights = [jr.normal(jr.key(i), (size, size)) / size**0.5 for i in (0, 1)]
offset = jr.normal(jr.key(2), (size,))


@jax.jit
def _jitted(x):
    return jnp.where(x > 0, x, x * jnp.exp(x)) * offset


def _layers(activation):
    return lambda x: activation(weights[1] @ activation(weights[0] @ x))


def _many_products(x):
    for _ in range(10):
        x = x * (1 + x)
    return x


# How many bytes have to be recorded for each number of `x`: `x` is there anyway, and so
# is what is returned.
functions = {
    # The hidden layer.
    "tanh": (_layers(jnp.tanh), 8),
    # Of each layer, what goes into the activation, and the logistic function of that.
    "silu": (_layers(jax.nn.silu), 32),
    # Which numbers of each layer are positive. (The weights are constants.)
    "relu": (_layers(jax.nn.relu), 2),
    "polynomial": (lambda x: (1 - x) * x**3 - x, 0),
    # Some of the ten: otherwise all would be made again for each.
    "many products": (_many_products, 32),
    # The exponential in each, and the predicate.
    "the same call twice": (lambda x: _jitted(_jitted(x)), 18),
    "a call with a constant": (lambda x: _jitted(x) * offset, 9),
    "linear": (lambda x: 2 * x, 0),
    "constant": (lambda x: jnp.ones_like(x), 0),
    # The product, and which one it is: that is not to be looked for among numbers that
    # are off by rounding.
    "the largest": (lambda x: (weights[0] @ x) * jnp.max(x), 16),
    "normalised": (lambda x: (weights[0] @ x) / jnp.max(jnp.abs(x)), 17),
    # The second factor, and which of its numbers are negative.
    "less precise": (lambda x: x * abs(x.astype(jnp.float16)).astype(x.dtype), 9),
    "rounded": (lambda x: x**2 * (8 * x).astype(int).astype(x.dtype), 8),
}


@pytest.mark.parametrize("name", functions)
def test_residuals(name, getkey):
    fn, num_bytes = functions[name]

    def linearise(x):
        out, pull_back = jax.vjp(fn, x)
        leaves, treedef = jtu.tree_flatten(pull_back)
        treedefs.append(treedef)
        return [out, *leaves]

    treedefs = []
    x, grad_out = jr.normal(getkey(), (2, size))
    closed = jax.make_jaxpr(linearise)(x)
    residuals = Residuals(closed, 1)
    outputs = linearise(x)
    recorded = residuals.recorded(outputs)
    of_arrays = sum(y.nbytes for y in recorded if y.size > 1)
    assert of_arrays / size == num_bytes
    # To the bit, and if the operand is off by rounding.
    for operand, rtol in ((x, 0), (jnp.nextafter(x, jnp.inf), 1e-12)):
        found = residuals.restore([operand, outputs[0], *recorded])
        for y, true in zip(found, outputs[1:], strict=True):
            np.testing.assert_allclose(y, true, rtol=rtol, atol=rtol)
        (grad,) = jtu.tree_unflatten(treedefs[0], found)(grad_out)
        _, pull_back = jax.vjp(fn, x)
        np.testing.assert_allclose(grad, pull_back(grad_out)[0], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("make", (np.ones, jnp.ones))
def test_constant_vector_field(make):
    @jax.grad
    def grad(y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: make(2)),
            diffrax.ReversibleHeun(),
            *(0.0, 1.0, 0.25, y0),
            adjoint=diffrax.ReversibleAdjoint(checkpoints=0),
            max_steps=8,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys)

    assert jnp.array_equal(grad(jnp.zeros(2)), jnp.ones(2))


@pytest.mark.parametrize(
    "name, adjoint",
    [
        pytest.param(
            name,
            adjoint,
            marks=()
            if name == "the largest" and adjoint.checkpoints == 0
            else pytest.mark.slow,
        )
        for name in functions
        # Of the products, too large numbers come.
        if name not in ("constant", "rounded", "many products")
        for adjoint in (diffrax.ReversibleAdjoint(0), diffrax.ReversibleAdjoint())
    ],
)
def test_gradient(name, adjoint, getkey):
    fn, _ = functions[name]

    def loss(adjoint, y0__scale):
        y0, scale = y0__scale
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, scale: jnp.tanh(scale * fn(y)) - y),
            diffrax.ReversibleHeun(),
            *(0.0, 1.0, 0.025, y0, scale),
            adjoint=adjoint,
            max_steps=64,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys**2)

    y0__scale = jr.normal(getkey(), (size,)), jnp.array(0.3)
    adjoints = adjoint, diffrax.RecursiveCheckpointAdjoint()
    ours, expected = (
        jax.jit(jax.grad(ft.partial(loss, x)))(y0__scale) for x in adjoints
    )
    for x, y in zip(ours, expected, strict=True):
        assert jnp.max(jnp.abs(x - y)) < 1e-12 * jnp.max(jnp.abs(y))
