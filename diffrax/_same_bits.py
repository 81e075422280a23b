"""Computations that come to the same bits wherever they are made.

XLA fuses what it compiles with whatever is around it, and then contracts products and
sums, reorders operands, or takes a factor out of one expression into another. So one
and the same expression may round in another way in a program that makes a step and in
one that undoes it: of `p * a + p**3 / 7` it was seen to contract the first product in
the one, and the second one in the other.

There is nothing of the kind across the border of a branch. The one exception is a loop
that is so small that on a CPU XLA compiles all of it as a single function, branches
included. It does not do so if there is a `sort` in it.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ._closed_function import close_function
from ._custom_types import RealScalarLike


class SameBits(eqx.Module):
    """Calls functions such that they return the same bits for the same arguments,
    wherever else that is done.

    This holds if all of the arrays that a function returns are made use of, or none:
    what is not, XLA does not compute, and compiles another program."""

    always: Bool[Array, ""]

    def __init__(self, t: RealScalarLike):
        """`t` is any number: it does not matter which."""
        t = lax.optimization_barrier(lax.stop_gradient(jnp.asarray(t)))
        # `True`, also for NaN. XLA does not know that.
        smaller, larger = lax.sort(jnp.stack([t, t]))
        self.always = jnp.invert(eqxi.unvmap_any(smaller > larger))

    def __call__(self, fn: Callable[..., Any], *args: PyTree) -> Any:
        closed = close_function(fn, *args)
        dynamic, static = eqx.partition((closed, args), eqx.is_array)
        struct = eqx.filter_eval_shape(closed, *args)
        struct, rest = eqx.partition(struct, _is_struct)

        def call(_dynamic):
            # Of what is a constant elsewhere, XLA would make it one in here.
            # (One by one: together, all would seem to be perturbed if one is.)
            _dynamic = jtu.tree_map(lax.optimization_barrier, _dynamic)
            _closed, _args = eqx.combine(_dynamic, static)
            return eqx.filter(_closed(*_args), eqx.is_array)

        def never(_dynamic):
            return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), struct)

        return eqx.combine(lax.cond(self.always, call, never, dynamic), rest)


def _is_struct(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")
