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

from ._custom_types import RealScalarLike, Y
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


# What `jax.checkpoint` says is to be made again, and not to be held: on a CPU, XLA
# would find that it is there already, if it were not in a branch.
_made_again = {"checkpoint", "remat", "remat2"}


class _Seen:
    """What is known of the evaluations of a term: for each method of it, and each
    structure of `y`, the structure of what it returns, or `None` if there is to be no
    branch around it."""

    def __init__(self):
        self.structs: dict[Any, PyTree[jax.ShapeDtypeStruct] | None] = {}

    # Terms are the same whatever is known of them.
    def __eq__(self, other):
        return isinstance(other, _Seen)

    def __hash__(self):
        return hash(_Seen)


class _Fenced(TermWithControl):
    """A term, the evaluations of which are in a branch, that is always taken."""

    seen: _Seen = eqx.field(static=True)

    def contr(self, t0, t1, **kwargs):
        return self.wrapped.contr(t0, t1, **kwargs)

    def vf(self, t, y, args):
        return self._evaluate("vf", lambda: self.wrapped.vf(t, y, args), t, y)

    def vf_prod(self, t, y, args, control):
        fn = lambda: self.wrapped.vf_prod(t, y, args, control)
        return self._evaluate("vf_prod", fn, t, y)

    def _evaluate(
        self, name: str, fn: Callable[[], PyTree[Array]], t: RealScalarLike, y: Y
    ) -> PyTree[Array]:
        # Not of the whole state, if there are several terms.
        if _size(y) < _least_size:
            return fn()
        leaves, treedef = jtu.tree_flatten(y)
        key = name, treedef, *((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        if key not in self.seen.structs:
            closed, struct, static = eqx.filter_make_jaxpr(fn)()
            is_simple = len(jtu.tree_leaves(static)) == 0
            is_fenced = is_simple and _needs_fence(closed.jaxpr)
            self.seen.structs[key] = struct if is_fenced else None
        struct = self.seen.structs[key]
        if struct is None:
            return fn()
        zeros = lambda: jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), struct)
        return lax.cond(_true_on_cpu(t), fn, zeros)


def _size(y: Y) -> int:
    return sum(math.prod(jnp.shape(x)) for x in jtu.tree_leaves(y))


def _true_on_cpu(t: RealScalarLike) -> Bool[Array, ""]:
    """`True`, of which on a CPU XLA does not know. (Elsewhere a branch may be dear, and
    fusing is done in another way.)"""
    t = lax.stop_gradient(jnp.asarray(t))
    return lax.platform_dependent(
        t,
        cpu=lambda t: eqxi.unvmap_any(t == t) | eqxi.unvmap_any(t != t),
        default=lambda t: jnp.array(True),
    )


def fence(terms: PyTree[AbstractTerm], y: Y) -> PyTree[AbstractTerm]:
    """The same terms, with a fence around each evaluation that needs one."""
    if _size(y) < _least_size:
        return terms
    return map_single_terms(_fence, terms)


def _fence(term: Any) -> Any:
    return term if isinstance(term, _Fenced) else _Fenced(term, _Seen())


def _needs_fence(jaxpr: Any) -> bool:
    return _has_any(jaxpr, _made_again) or not _has_any(jaxpr, _never_fused)


def _has_any(jaxpr: Any, names: set[str]) -> bool:
    for eqn in jaxpr.eqns:
        inner = jtu.tree_leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
        inner = [getattr(x, "jaxpr", x) for x in inner if _is_jaxpr(x)]
        if eqn.primitive.name in names or any(_has_any(x, names) for x in inner):
            return True
    return False


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, (jex.core.Jaxpr, jex.core.ClosedJaxpr))
