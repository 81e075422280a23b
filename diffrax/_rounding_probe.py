"""How rounding errors grow while going back over a solve.

Where going back expands errors, and contracts them again later, there is nothing to be
seen of it once it comes to a state that is known; but the gradient has been taken at
states that were wrong. So an error of the size of rounding is carried along the
reconstruction: an estimate of how far it may be off.
"""

import functools as ft
from collections.abc import Callable

import jax.numpy as jnp
import jax.tree_util as jtu
from equinox.internal import ω
from jaxtyping import Array, PyTree, Real

from ._invert_step import max_abs


def _pattern(x: Array) -> Array:
    """Of no symmetry, so that it is not orthogonal to anything in particular."""
    index = jnp.arange(x.size, dtype=jnp.finfo(x.dtype).dtype)
    return jnp.cos(1.0 + 2.4 * index).reshape(x.shape)


def _times_pattern(x: Array) -> Array:
    """`jnp.sum(_pattern(x) * x)`, without the pattern, which is as large as `x`."""
    if x.size == 0:
        return jnp.zeros((), x.dtype)
    dtype = jnp.finfo(x.dtype).dtype
    matrix = x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)
    num_rows, num_columns = matrix.shape
    rows = 1.0 + 2.4 * num_columns * jnp.arange(num_rows, dtype=dtype)
    columns = 2.4 * jnp.arange(num_columns, dtype=dtype)
    # The cosine of a sum.
    cos, sin = (
        fn(rows).astype(x.dtype) @ (matrix @ fn(columns).astype(x.dtype))
        for fn in (jnp.cos, jnp.sin)
    )
    return cos - sin


def rounding(tree: PyTree[Array]) -> PyTree[Array]:
    """An error such as rounding makes, for each leaf relative to its largest value, and
    in no special direction."""

    def _rounding(x, max_x):
        eps = float(jnp.finfo(x.dtype).eps)
        return (eps * max_x * _pattern(x)).astype(x.dtype)

    return jtu.tree_map(_rounding, tree, max_abs(tree))


def sketch(tree: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
    """For each leaf, its product with a fixed pattern, by which two of them can be told
    apart; and its norm. Both are scalars."""
    products = jtu.tree_map(_times_pattern, tree)
    norms = jtu.tree_map(lambda x: jnp.sqrt(jnp.sum(jnp.abs(x) ** 2)), tree)
    return products, norms


def derivative(
    fn: Callable[[PyTree], PyTree],
    x: PyTree[Array],
    value: PyTree[Array],
    direction: PyTree[Array],
) -> PyTree[Array]:
    """The derivative of `fn` at `x`, where it is `value`, in a direction: to half of
    the digits, for one evaluation, and also if `fn` has no rule for forward-mode
    autodifferentiation. All leaves are floating-point arrays."""

    def _ratio(_x, _direction):
        eps = float(jnp.finfo(_x.dtype).eps)
        max_x = jnp.max(jnp.abs(_x), initial=0)
        max_direction = jnp.max(jnp.abs(_direction), initial=0)
        # Not larger than a part of `sqrt(eps)` of this leaf.
        ratio = jnp.where(max_direction > 0, eps**0.5 * max_x / max_direction, jnp.inf)
        return jnp.where(max_x > 0, ratio, jnp.inf).astype(jnp.result_type(float))

    ratios = jtu.tree_leaves(jtu.tree_map(_ratio, x, direction))
    ratio: Real[Array, ""] = ft.reduce(jnp.minimum, ratios, jnp.array(jnp.inf))
    ratio = jnp.where(jnp.isfinite(ratio), ratio, 1)

    def _move(_x, _direction):
        return _x + ratio.astype(_x.dtype) * _direction

    def _quotient(new, old):
        return (new - old) / ratio.astype(old.dtype)

    moved = fn(jtu.tree_map(_move, x, direction))
    return jtu.tree_map(_quotient, moved, value)


def advance(
    increment: Callable[[PyTree], PyTree],
    y1: PyTree[Array],
    value: PyTree[Array],
    error: PyTree[Array],
) -> PyTree[Array]:
    """Carries an error over a step back of a method of at least second order, for two
    evaluations. `increment` is the product of the vector field, as a function of `y1`,
    and the control; `value` is what it is at `y1`."""
    first = derivative(increment, y1, value, error)
    second = derivative(increment, y1, value, first)
    return (error**ω - first**ω + 0.5 * second**ω).ω
