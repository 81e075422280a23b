"""A few numbers by which to tell two PyTrees apart, without holding on to either."""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree


def _pattern(size: int, dtype: Any) -> Array:
    """Of no symmetry, so that it is not orthogonal to anything in particular."""
    index = jnp.arange(size, dtype=jnp.finfo(dtype).dtype)
    return jnp.cos(1.0 + 2.4 * index).astype(dtype)


def _times_pattern(x: Array) -> Array:
    """The product with a pattern of rank one, which is not made, as it would be as
    large as `x`."""
    matrix = x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)
    rows, columns = (_pattern(size, x.dtype) for size in matrix.shape)
    return rows @ (matrix @ columns)


def sketch(tree: PyTree[Array]) -> tuple[Array, Array]:
    """For each leaf, its product with a fixed pattern, by which two of them can be told
    apart; and its norm."""
    leaves = jtu.tree_leaves(tree)
    dtype = sketch_dtype(tree)
    products = [_times_pattern(x).astype(dtype) for x in leaves]
    squares = [jnp.sum(jnp.real(x * jnp.conj(x))) for x in leaves]
    real = jnp.finfo(dtype).dtype
    squares = [x.astype(real) for x in squares]
    stack = lambda xs, dtype: jnp.stack(xs) if len(xs) > 0 else jnp.zeros(0, dtype)
    return stack(products, dtype), jnp.sqrt(stack(squares, real))


def sketch_dtype(tree: PyTree[Array]) -> Any:
    """That of the products: one that holds those of each leaf."""
    dtypes = [x.dtype for x in jtu.tree_leaves(tree)]
    is_complex = any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes)
    bits = max([32, *(jnp.finfo(dtype).bits for dtype in dtypes)])
    return jnp.dtype(f"complex{2 * bits}" if is_complex else f"float{bits}")
