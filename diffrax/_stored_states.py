"""A bounded number of states of a solve, stored by the number of the step that starts
there."""

from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree, Shaped

from ._custom_types import BoolScalarLike, IntScalarLike


class StoredStates(eqx.Module):
    """Slots for `(y, solver_state)`, and the index of the step that starts at each. An
    index of -1 is that of an empty slot.

    The state at the start of the solve is always known, and is not among these.
    """

    # In one array, of which nothing else depends: so XLA leaves it out of a solve that
    # is not differentiated.
    indices_and_stride: Int[Array, " slots_and_one"]
    states: PyTree[eqxi.MaybeBuffer[Shaped[Array, "slots ..."]]]

    @classmethod
    def allocate(cls, slots: int, state: PyTree[Array]) -> "StoredStates":
        """Empty slots, for states like `state`."""

        def _buffer(x):
            return jnp.zeros((slots, *jnp.shape(x)), jnp.result_type(x))

        states = jtu.tree_map(_buffer, state)
        return cls.of(jnp.full(slots, -1), states, jnp.array(1))

    @classmethod
    def of(
        cls, indices: Int[Array, " slots"], states: PyTree, stride: Int[Array, ""]
    ) -> "StoredStates":
        return cls(jnp.concatenate([indices, stride[None]]), states)

    @property
    def indices(self) -> Int[Array, " slots"]:
        return self.indices_and_stride[:-1]

    @property
    def stride(self) -> Int[Array, ""]:
        return self.indices_and_stride[-1]

    @property
    def buffers(self) -> PyTree:
        """Everything of the size of states that is written to."""
        return self.states

    def _write(self, slot, index, state, stride, pred) -> "StoredStates":
        set_: Any = eqxi.buffer_at_set
        return StoredStates.of(
            indices=self.indices.at[slot].set(
                jnp.where(pred, index, self.indices[slot])
            ),
            states=jtu.tree_map(
                lambda x, buffer: set_(buffer, slot, x, pred=pred), state, self.states
            ),
            stride=stride,
        )

    def thin_and_write(
        self, index: IntScalarLike, state: PyTree[Array], pred: BoolScalarLike
    ) -> "StoredStates":
        """The states with that at the start of step `index` added, if `pred` and if it
        is its turn.

        For a solve of unknown length: those states are stored whose index is a multiple
        of the stride. Once there is no slot left for the next one of these, the stride
        is doubled, and every other slot becomes free. So nothing is ever moved, and no
        gap is more than two strides long.
        """
        if len(self.indices) == 0:
            return self

        def free(stride):
            return (self.indices < 0) | (lax.rem(self.indices, stride) != 0)

        is_full = ~jnp.any(free(self.stride)) & (lax.rem(index, self.stride) == 0)
        stride = jnp.where(pred & is_full, 2 * self.stride, self.stride)
        is_free = free(stride)
        pred = pred & (lax.rem(index, stride) == 0) & jnp.any(is_free)
        return self._write(jnp.argmax(is_free), index, state, stride, pred)

    def write(
        self, index: IntScalarLike, state: PyTree[Array], pred: BoolScalarLike
    ) -> "StoredStates":
        """The states with that at the start of step `index` added, if `pred` and if
        there is room."""
        is_free = self.indices < 0
        pred = pred & jnp.any(is_free)
        return self._write(jnp.argmax(is_free), index, state, self.stride, pred)

    def extend(self, slots: int) -> "StoredStates":
        """The same, with this many empty slots more."""

        def _extend(x, fill):
            return jnp.concatenate([x, jnp.full((slots, *x.shape[1:]), fill, x.dtype)])

        return StoredStates.of(
            indices=_extend(self.indices, -1),
            states=jtu.tree_map(lambda x: _extend(x, 0), self.states),
            stride=self.stride,
        )

    def drop(self, index: IntScalarLike) -> "StoredStates":
        """The states without those at `index` and beyond."""
        indices = jnp.where(self.indices >= index, -1, self.indices)
        return StoredStates.of(indices, self.states, self.stride)

    @property
    def num_free(self) -> Int[Array, ""]:
        return jnp.sum(self.indices < 0)

    def last(self) -> Int[Array, ""]:
        """The index of the last state. Zero, the start of the solve, if there is
        none."""
        return jnp.maximum(jnp.max(self.indices, initial=0), 0)

    def read(self, index: IntScalarLike, start: PyTree) -> PyTree[Array]:
        """The state at `index`, which is that of the start of the solve if it is
        zero."""
        if len(self.indices) == 0:
            return start
        slot = jnp.argmax(self.indices == index)
        return jtu.tree_map(
            lambda x, buffer: jnp.where(index == 0, x, buffer[slot]),
            start,
            self.states,
        )
