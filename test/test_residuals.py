"""What is recorded of an evaluation, for its derivative to be had again."""

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest
from diffrax._residuals import Residuals


size = 100
weights = jr.normal(jr.key(0), (2, size, size)) / size**0.5
offset = jr.normal(jr.key(1), (size,))


@jax.jit
def _jitted(x):
    return jnp.where(x > 0, x, x * jnp.exp(x)) * offset


def _layers(activation):
    return lambda x: activation(weights[1] @ activation(weights[0] @ x))


# With how many arrays of the size of `x` have to be recorded: `x` is there anyway, and
# so is what is returned.
functions = {
    # The hidden layer.
    "tanh": (_layers(jnp.tanh), 1),
    # Of each layer, what goes into the activation, and the logistic function of that.
    "silu": (_layers(jax.nn.silu), 4),
    # Of each layer, what goes into the activation.
    "relu": (_layers(jax.nn.relu), 2),
    "polynomial": (lambda x: (1 - x) * x**3 - x, 0),
    # The exponential, in each.
    "the same call twice": (lambda x: _jitted(_jitted(x)), 2),
    "a call with a constant": (lambda x: _jitted(x) * offset, 1),
    "linear": (lambda x: 2 * x, 0),
    "constant": (lambda x: jnp.ones_like(x), 0),
}


@pytest.mark.parametrize("name", functions)
def test_residuals(name, getkey):
    fn, count = functions[name]

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
    assert sum(y.size == size for y in recorded) == count
    found = residuals.all([x, outputs[0], *recorded])
    # To the bit.
    for y, true in zip(found, outputs[1:], strict=True):
        assert jnp.array_equal(y, true)
    (grad,) = jtu.tree_unflatten(treedefs[0], found)(grad_out)
    _, pull_back = jax.vjp(fn, x)
    assert jnp.array_equal(grad, pull_back(grad_out)[0])
