"""Vector fields that XLA is not to fuse with one another.

On a CPU, XLA fuses operations that it takes to be cheap into each of those that use
what they return, to be made again there. The stages of a step use each other, so that
with a vector field that has nothing but such operations (a stencil, say) the last stage
makes the first one many times over: of the periodic heat equation, written with
`jnp.roll`, all stages of `Tsit5` take 16 times as long as one by one, and are compiled
in three times as long. There is no fusing across the border of a branch.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.extend as jex
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ._custom_types import Args, RealScalarLike, Y
from ._known_controls import map_single_terms, TermWithControl
from ._term import AbstractTerm


# With fewer numbers than this, a branch takes longer than it saves.
_least_size = 64

# Operations that are not fused. There need not be a branch around them; and it would
# keep XLA from making again what is cheap, in place of holding it in memory.
_never_fused = {
    "conv_general_dilated",
    "dot_general",
    "fft",
    "ragged_dot",
    "scan",
    "while",
}


class _Fenced(TermWithControl):
    """A term, each evaluation of which is in a branch, that is always taken."""

    def contr(self, t0, t1, **kwargs):
        return self.wrapped.contr(t0, t1, **kwargs)

    def vf(self, t, y, args):
        return _in_branch(lambda: self.wrapped.vf(t, y, args), t)

    def vf_prod(self, t, y, args, control):
        return _in_branch(lambda: self.wrapped.vf_prod(t, y, args, control), t)


def _in_branch(fn: Callable[[], PyTree[Array]], t: RealScalarLike) -> PyTree[Array]:
    struct = eqx.filter_eval_shape(fn)
    if not all(isinstance(x, jax.ShapeDtypeStruct) for x in jtu.tree_leaves(struct)):
        return fn()
    zeros = lambda: jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), struct)
    return lax.cond(_true_on_cpu(t), fn, zeros)


def _true_on_cpu(t: RealScalarLike) -> Bool[Array, ""]:
    """`True`, of which on a CPU XLA does not know. (Elsewhere a branch may be dear, and
    fusing is done in another way.)"""
    t = lax.stop_gradient(jnp.asarray(t))
    return lax.platform_dependent(
        t,
        cpu=lambda t: eqxi.unvmap_any(t == t) | eqxi.unvmap_any(t != t),
        default=lambda t: jnp.array(True),
    )


def fence(
    terms: PyTree[AbstractTerm], t: RealScalarLike, y: Y, args: Args
) -> PyTree[AbstractTerm]:
    """The same terms, each with a fence around it if it needs one."""

    def _fence(term: Any) -> Any:
        return _Fenced(term) if _is_fused(lambda: term.vf(t, y, args)) else term

    size = sum(math.prod(jnp.shape(x)) for x in jtu.tree_leaves(y))
    return terms if size < _least_size else map_single_terms(_fence, terms)


def _is_fused(fn: Callable[[], PyTree]) -> bool:
    closed, _, _ = eqx.filter_make_jaxpr(fn)()
    return not _has_any(closed.jaxpr, _never_fused)


def _has_any(jaxpr: Any, names: set[str]) -> bool:
    for eqn in jaxpr.eqns:
        inner = jtu.tree_leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
        inner = [getattr(x, "jaxpr", x) for x in inner if _is_jaxpr(x)]
        if eqn.primitive.name in names or any(_has_any(x, names) for x in inner):
            return True
    return False


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, (jex.core.Jaxpr, jex.core.ClosedJaxpr))
