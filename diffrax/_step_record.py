"""What going backwards over a solve has to know about each of its steps."""

from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, Real, Shaped

from ._custom_types import BoolScalarLike, IntScalarLike, RealScalarLike
from ._step_size_controller import (
    AbstractStepSizeController,
    ClipStepSizeController,
    ConstantStepSize,
    PIDController,
    StepTo,
)


def may_jump(controller: AbstractStepSizeController) -> bool:
    """Whether a step may start elsewhere than where the step before it ended, or with
    `made_jump=True`. Not so for those of Diffrax's own step size controllers that know
    of no jumps; of others nothing is assumed."""
    if type(controller) in (ConstantStepSize, StepTo, PIDController):
        return False
    if type(controller) is ClipStepSizeController:
        return controller.jump_ts is not None or may_jump(controller.controller)
    return True


class Step(eqx.Module):
    """One accepted step, exactly as it was made.

    - `t0`, `t1`: its start and its end.
    - `previous_t1`: the end of the step before it; `-inf` if it is the first.
    - `next_t0`: the start of the step after it; the end of the solve if it is the last.
        (Not `t1`, if there is a jump.)
    - `made_jump`: whether there was a jump at `t0`. `False` if this is known when
        tracing.
    - `next_made_jump`: the same for the step that came next.
    - `solver_state`: what [`diffrax.AbstractReversibleSolver.record_state`][] recorded
        at `t0`.
    - `controls`: what `evaluate_controls` returned for this step. `None` if nothing is
        known of its controls.
    """

    t0: RealScalarLike
    t1: RealScalarLike
    previous_t1: RealScalarLike
    next_t0: RealScalarLike
    made_jump: BoolScalarLike
    next_made_jump: BoolScalarLike
    solver_state: PyTree[Array]
    controls: PyTree = None


class StepRecord(eqx.Module):
    """The accepted steps of a solve, in order. Rejected steps leave no trace.

    The memory needed is that of one time for each of `max_steps` steps, and of what the
    solver records of its state; if there may be jumps then of two times and a boolean.
    """

    start: RealScalarLike
    end: RealScalarLike
    # The union is inside, as beartype mistakes two unions with a `MaybeBuffer` in them
    # for the same one.
    t0s: eqxi.MaybeBuffer[Real[Array, " steps"] | None]
    t1s: eqxi.MaybeBuffer[Real[Array, " steps"]]
    made_jumps: eqxi.MaybeBuffer[Bool[Array, " steps"] | None]
    solver_states: PyTree[eqxi.MaybeBuffer[Shaped[Array, "steps ..."]]]

    @classmethod
    def allocate(
        cls,
        start: RealScalarLike,
        max_steps: int,
        jumps: bool,
        solver_state: PyTree[Array],
    ) -> "StepRecord":
        """An empty record for a solve from `start`, of at most `max_steps` steps."""

        def _buffer(x):
            return jnp.zeros((max(max_steps, 1), *jnp.shape(x)), jnp.result_type(x))

        return cls(
            start=start,
            end=start,
            t0s=_buffer(start) if jumps else None,
            t1s=_buffer(start),
            made_jumps=_buffer(False) if jumps else None,
            solver_states=jtu.tree_map(_buffer, solver_state),
        )

    @property
    def buffers(self) -> PyTree:
        """Everything that is written to while the steps are made."""
        return self.t0s, self.t1s, self.made_jumps, self.solver_states

    def write(
        self,
        index: IntScalarLike,
        t0: RealScalarLike,
        t1: RealScalarLike,
        made_jump: BoolScalarLike,
        solver_state: PyTree[Array],
        pred: BoolScalarLike,
    ) -> "StepRecord":
        """The record with a step written at `index`, if `pred`."""

        def _set(buffer: Any, x: Any) -> Any:
            if buffer is None:
                return None
            return eqxi.buffer_at_set(buffer, index, x, pred=pred)  # pyright: ignore

        return StepRecord(
            start=self.start,
            end=self.end,
            t0s=_set(self.t0s, t0),
            t1s=_set(self.t1s, t1),
            made_jumps=_set(self.made_jumps, made_jump),
            solver_states=jtu.tree_map(
                lambda x, buffer: _set(buffer, x), solver_state, self.solver_states
            ),
        )

    def times_only(self) -> "StepRecord":
        """Without what does not change if the times do."""
        return eqx.tree_at(
            lambda r: (r.made_jumps, r.solver_states),
            self,
            (None, None),
            is_leaf=lambda x: x is None,
        )

    def check(self, name: str) -> "StepRecord":
        """There is nothing to be checked."""
        del name
        return self

    def read_all(self, index: IntScalarLike, num_steps: IntScalarLike) -> Step:
        """What `read` returns for each of several records, which are along a leading
        axis."""
        return jax.vmap(lambda record: record.read(index, num_steps))(self)

    def read(self, index: IntScalarLike, num_steps: IntScalarLike) -> Step:
        """The step at `index`, of `num_steps` that were written. At -1 there is a step
        of zero length at the start, which changes nothing: for those members of a batch
        that are done."""
        is_done = index < 0
        index = jnp.maximum(index, 0)
        is_first = index == 0
        is_last = index == num_steps - 1
        before = self.t1s[jnp.maximum(index - 1, 0)]
        if self.t0s is None:
            t0 = jnp.where(is_first, self.start, before)
        else:
            t0 = jnp.where(is_done, self.start, self.t0s[index])
        if self.t0s is None:
            next_t0 = self.t1s[index]
        else:
            next_t0 = self.t0s[jnp.minimum(index + 1, num_steps - 1)]
        next_t0 = jnp.where(is_last, self.end, next_t0)
        if self.made_jumps is None:
            made_jump = next_made_jump = False
        else:
            made_jump = self.made_jumps[index]
            after = self.made_jumps[jnp.minimum(index + 1, num_steps - 1)]
            next_made_jump = after & jnp.invert(is_last)
        return Step(
            t0=t0,
            t1=jnp.where(is_done, self.start, self.t1s[index]),
            previous_t1=jnp.where(is_first, -jnp.inf, before),
            next_t0=jnp.where(is_done, self.start, next_t0),
            made_jump=made_jump,
            next_made_jump=next_made_jump,
            solver_state=jtu.tree_map(lambda x: x[index], self.solver_states),
        )
