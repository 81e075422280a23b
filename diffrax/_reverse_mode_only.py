"""An identity function that refuses forward-mode autodifferentiation."""

import equinox as eqx
import jax.extend as jex
import jax.interpreters.ad as ad
import jax.interpreters.batching as batching
import jax.interpreters.mlir as mlir
import jax.tree_util as jtu
from jaxtyping import PyTree


# Reverse mode linearises a function and then transposes the result, without ever
# evaluating what it has linearised; forward mode evaluates it. So we need two
# primitives. The first stands in the function that is differentiated; the second in its
# linearisation, where it can be transposed, but neither evaluated nor compiled.
#
# (This is as far as the differentiation of a `jax.custom_vjp` gets by itself, but for
# an error that tells its users what to do instead.)
#
# The first is one for all of the values together. Then, of `jvp(grad(...))` with
# respect to different ones of them, each is seen for what it is.
_primal_p = jex.core.Primitive("reverse_mode_only")
_primal_p.multiple_results = True
_tangent_p = jex.core.Primitive("reverse_mode_only_tangent")


def _identities(*xs, msg):
    del msg
    return list(xs)


def _identity(x, *, msg):
    del msg
    return x


def _refuse(*args, msg):
    del args  # Of whatever rule of the primitive this is.
    raise NotImplementedError(msg)


def _primal_batch(args, axes, *, msg):
    return _primal_p.bind(*args, msg=msg), axes


def _primal_jvp(primals, tangents, *, msg):
    # Not marked again: that the derivative is differentiated further, is not for us to
    # judge.
    tangents = [
        t if isinstance(t, ad.Zero) else _tangent_p.bind(t, msg=msg) for t in tangents
    ]
    return list(primals), tangents


def _tangent_transpose(ct, x, *, msg):
    del x, msg
    return [ct]


_primal_p.def_impl(_identities)
_primal_p.def_abstract_eval(_identities)
ad.primitive_jvps[_primal_p] = _primal_jvp
batching.primitive_batchers[_primal_p] = _primal_batch
mlir.register_lowering(_primal_p, mlir.lower_fun(_identities, multiple_results=True))

_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(_identity)
ad.deflinear2(_tangent_p, _tangent_transpose)
# Reverse mode does not batch a linearisation before it has been transposed.
batching.primitive_batchers[_tangent_p] = _refuse
mlir.register_lowering(_tangent_p, _refuse)


def reverse_mode_only(x: PyTree, msg: str) -> PyTree:
    """Returns `x`. Raises a `NotImplementedError` with the message `msg` if it is
    differentiated in forward mode: at once, or when the derivative is compiled."""
    dynamic, static = eqx.partition(x, eqx.is_inexact_array)
    leaves, treedef = jtu.tree_flatten(dynamic)
    leaves = _primal_p.bind(*leaves, msg=msg)
    return eqx.combine(jtu.tree_unflatten(treedef, leaves), static)
