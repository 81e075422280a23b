"""Functions that hold what they close over as part of their PyTree structure."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.extend as jex
import jax.tree_util as jtu
from jaxtyping import PyTree


class ClosedFunction(eqx.Module):
    """What `close_function` returns."""

    consts: list[Any]
    # A leaf, and not static, for JAX to be able to look inside.
    _jaxpr: Any
    _out_tree: Any = eqx.field(static=True)
    _out_static: PyTree

    def __call__(self, *args: PyTree) -> PyTree:
        leaves = jtu.tree_leaves(eqx.filter(args, eqx.is_array))
        closed = jex.core.ClosedJaxpr(self._jaxpr, self.consts)
        out = jex.core.jaxpr_as_fun(closed)(*leaves)
        return eqx.combine(self._out_tree.unflatten(out), self._out_static)

    def depends_on(self, wanted: list[bool]) -> list[bool]:
        """Which arrays of the arguments those of the result that are `wanted` depend
        on."""
        is_variable = lambda v: not isinstance(v, jex.core.Literal)
        pairs = zip(self._jaxpr.outvars, wanted, strict=True)
        out = [v for v, is_wanted in pairs if is_wanted]
        found = set(filter(is_variable, out))
        for eqn in reversed(self._jaxpr.eqns):
            if any(v in found for v in eqn.outvars):
                found.update(filter(is_variable, eqn.invars))
        return [v in found for v in self._jaxpr.invars]


def close_function(fn: Callable, *args: PyTree) -> ClosedFunction:
    """`fn`, as a function of arguments like `args`, with all arrays that it closes over
    in `consts`: a tracer by whose means something is being differentiated is there as
    it is.

    This is `eqx.filter_closure_convert` without its check that the arguments are the
    same: inside of `jax.shard_map`, to JAX they are not.
    """
    closed, out_struct, out_static = eqx.filter_make_jaxpr(fn)(*args)
    out_tree = jtu.tree_structure(out_struct)
    return ClosedFunction(list(closed.consts), closed.jaxpr, out_tree, out_static)
