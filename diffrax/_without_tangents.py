"""An identity function that stops the tangents of one differentiation, and not those of
others around it, as `jax.lax.stop_gradient` would."""

from typing import Any

import equinox as eqx
import jax
import jax.extend as jex
import jax.interpreters.ad as ad
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Real


# JAX has had the first of these since 0.6, and the second one until then.
get_aval: Any = getattr(jax, "typeof", None) or jax.core.get_aval  # pyright: ignore
_p = jex.core.Primitive("without_tangents")
_p.multiple_results = True


def _identity(token, *xs):
    del token
    return list(xs)


def _jvp(primals, tangents):
    token, *xs = primals
    t_token, *ts = tangents
    if isinstance(t_token, ad.Zero):
        return _p.bind(token, *xs), ts
    return xs, [ad.Zero(get_aval(x)) for x in xs]


def _batch(args, axes):
    _, *axes_out = axes
    return _p.bind(*args), axes_out


_p.def_impl(_identity)
_p.def_abstract_eval(_identity)
ad.primitive_jvps[_p] = _jvp
batching.primitive_batchers[_p] = _batch
mlir.register_lowering(_p, mlir.lower_fun(_identity, multiple_results=True))


def without_tangents(token: Real[Array, ""], x: PyTree) -> PyTree:
    """Returns `x`, without its tangents in that forward-mode differentiation, if any,
    in which `token` has one."""
    dynamic, static = eqx.partition(x, eqx.is_inexact_array)
    leaves, treedef = jtu.tree_flatten(dynamic)
    leaves = _p.bind(token, *leaves)
    return eqx.combine(jtu.tree_unflatten(treedef, leaves), static)
