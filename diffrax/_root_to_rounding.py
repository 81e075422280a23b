"""Solving the equations of an implicit step up to rounding."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, PyTree, Real

from ._custom_types import Y
from ._invert_step import max_abs, relative_distance


# In units of rounding: how large the last correction may be; and below what it may be
# noise, if it is no smaller than the one before.
_enough = 4.0
_noise = 1e4

_State = tuple[Any, Real[Array, ""], Real[Array, ""]]


class RootToRounding(optx.AbstractRootFinder):
    """The chord method (Newton's, with the Jacobian of the first guess) until no
    correction makes a difference.

    A symmetric method is one, and conserves what it is to conserve, if its equations
    are solved up to rounding, whatever the tolerance of the steps.

    `options["size"]` is how large each leaf is, relative to which rounding counts.
    """

    rtol: float = 0.0
    atol: float = 0.0
    norm: Callable[[PyTree], Real[Array, ""]] = optx.max_norm

    @property
    def _chord(self) -> optx.Chord:
        # Tolerances that are not used.
        return optx.Chord(rtol=1.0, atol=1.0)

    def init(self, fn, y, args, options, f_struct, aux_struct, tags) -> _State:
        del options
        state = self._chord.init(fn, y, args, {}, f_struct, aux_struct, tags)
        infinity = jnp.array(jnp.inf, jnp.result_type(float))
        return state, infinity, infinity

    def step(self, fn, y, args, options, state, tags) -> tuple[Y, _State, Any]:
        chord_state, last, _ = state
        new_y, chord_state, aux = self._chord.step(fn, y, args, {}, chord_state, tags)
        change = relative_distance(new_y, y, options["size"])
        return new_y, (chord_state, change, last), aux

    def terminate(
        self, fn, y, args, options, state, tags
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        del fn, y, args, options, tags
        chord_state, change, last = state
        shrinks = change < last
        is_root = (change <= _enough) | (jnp.invert(shrinks) & (change <= _noise))
        diverges = jnp.isnan(change) | (change > 2 * last)
        result = optx.RESULTS.where(
            diverges & jnp.invert(is_root),
            optx.RESULTS.nonlinear_divergence,
            optx.RESULTS.successful,
        )
        failed = chord_state.result != optx.RESULTS.successful
        result = optx.RESULTS.where(failed, chord_state.result, result)
        return is_root | diverges | failed, result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        del fn, args, options, state, tags, result
        return y, aux, {}


def leaf_sizes(y: Y, other: Y) -> PyTree[Array]:
    """How large each leaf is, of the larger of two."""

    def _size(x, x2):
        size = jnp.maximum(x, x2)
        return jnp.where(size == 0, 1, size)

    return jtu.tree_map(_size, max_abs(y), max_abs(other))
