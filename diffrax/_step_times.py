"""What the times of the steps of a solve depend on, and its gradient."""

from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Real

from ._constant_record import ConstantRecord
from ._custom_types import IntScalarLike, RealScalarLike
from ._step_record import StepRecord
from ._step_size_controller import (
    AbstractStepSizeController,
    ClipStepSizeController,
    PIDController,
    StepTo,
)


class Times(eqx.Module):
    """All that the times of the steps depend on, other than through what Diffrax's step
    size controllers stop the gradient of.

    - `tprev`, `tnext`: the start and the end of the first step.
    - `controller_state`: the scalars of the state of the step size controller, at the
        first step.
    - `t1`: the end of the solve.
    - `step_to`: `StepTo(ts=...)`, if that is the step size controller.
    """

    tprev: RealScalarLike
    tnext: RealScalarLike
    controller_state: PyTree[Real[Array, ""]]
    t1: RealScalarLike
    step_to: Real[Array, " times"] | None


def _is_time(x: Any) -> bool:
    return eqx.is_inexact_array(x) and jnp.ndim(x) == 0


def _scalars(controller: AbstractStepSizeController, state: PyTree) -> PyTree:
    """Those of its state. No gradient flows through that of a `PIDController`."""
    if type(controller) is PIDController:
        return lax.stop_gradient(eqx.filter(state, _is_time))
    if type(controller) is ClipStepSizeController:
        scalars = eqx.filter(state, _is_time)
        inner = _scalars(controller.controller, state.inner_state)
        return eqx.tree_at(
            lambda s: s.inner_state, scalars, inner, is_leaf=lambda x: x is None
        )
    return eqx.filter(state, _is_time)


def get_times(
    controller: AbstractStepSizeController, state: Any, t1: RealScalarLike
) -> Times:
    """The times of a solve that is at `state`."""
    step_to = controller.ts if type(controller) is StepTo else None
    scalars = _scalars(controller, state.controller_state)
    return Times(state.tprev, state.tnext, scalars, t1, step_to)


def set_times(
    times: Times, controller: AbstractStepSizeController, state: Any
) -> tuple[AbstractStepSizeController, Any]:
    """The inverse of `get_times`, but for `t1`."""
    if times.step_to is not None:
        controller = eqx.tree_at(lambda c: c.ts, controller, times.step_to)
    rest = eqx.filter(state.controller_state, _is_time, inverse=True)
    state = eqx.tree_at(
        lambda s: (s.tprev, s.tnext, s.controller_state),
        state,
        (times.tprev, times.tnext, eqx.combine(times.controller_state, rest)),
        is_leaf=lambda x: x is None,
    )
    return controller, state


def directions(times: Times) -> Times:
    """A direction for each leaf of `times`, along a new leading axis: that in which the
    leaf changes. (All of `StepTo(ts=...)` together: each time of a step depends on one
    of them.)"""
    leaves, treedef = jtu.tree_flatten(times)
    unit = jnp.eye(len(leaves))

    def _direction(i, x):
        column = unit[:, i].astype(x.dtype).reshape(-1, *(1 for _ in x.shape))
        return jnp.broadcast_to(column, (len(leaves), *x.shape))

    return treedef.unflatten([_direction(i, x) for i, x in enumerate(leaves)])


class TimeCotangents(eqx.Module):
    """Cotangents of the times of one step.

    - `t0`, `t1`: of its ends.
    - `next_t0`: of the start of the step after it, or of the end of the solve.
    """

    t0: RealScalarLike
    t1: RealScalarLike
    next_t0: RealScalarLike


class TimeGradient(eqx.Module):
    """The gradient with respect to `times`, so far.

    - `scalars`: for each of its leaves; but that for `StepTo(ts=...)` is the sum of
    - `step_to`: which has an entry for each of these times. `None` if there is none.
    """

    scalars: Real[Array, " leaves"]
    step_to: Real[Array, " times"] | None

    @classmethod
    def zeros(cls, times: Times) -> "TimeGradient":
        leaves = jtu.tree_leaves(times)
        dtype = jnp.result_type(*leaves)
        step_to = None if times.step_to is None else jnp.zeros_like(times.step_to)
        return cls(jnp.zeros(len(leaves), dtype), step_to)

    def add(
        self,
        index: IntScalarLike,
        ct: TimeCotangents,
        moved: StepRecord | ConstantRecord,
        num_steps: IntScalarLike,
        first: IntScalarLike,
    ) -> "TimeGradient":
        """With the cotangents of the step at `index` added. `moved` is the derivative
        of the record in each of the `directions`; the end of the first step but one is
        `StepTo(ts=...)[first]`."""
        step = moved.read_all(index, num_steps)
        is_step = index >= 0
        parts: list[Any] = [
            jnp.where(is_step, x, 0) * jnp.where(is_step, dx, 0)
            for x, dx in (
                (ct.t0, step.t0),
                (ct.t1, step.t1),
                (ct.next_t0, step.next_t0),
            )
        ]
        total = parts[0] + parts[1] + parts[2]
        scalars = self.scalars + total.astype(self.scalars.dtype)
        step_to = self.step_to
        if step_to is not None:
            of_t0, of_t1, of_next = (x[-1].astype(step_to.dtype) for x in parts)
            end = first + index - 1
            step_to = step_to.at[end - 1].add(of_t0, mode="drop")
            step_to = step_to.at[end].add(of_t1 + of_next, mode="drop")
        return TimeGradient(scalars, step_to)

    def add_end(
        self,
        ct: RealScalarLike | None,
        moved: Real[Array, " leaves"] | None,
        num_steps: IntScalarLike,
        first: IntScalarLike,
    ) -> "TimeGradient":
        """With the cotangent of a time at the end of the solve added. `moved` is its
        derivative in each of the `directions`."""
        if ct is None or moved is None:
            return self
        part = (ct * moved).astype(self.scalars.dtype)
        step_to = self.step_to
        if step_to is not None:
            last = part[-1].astype(step_to.dtype)
            step_to = step_to.at[first + num_steps - 2].add(last, mode="drop")
        return TimeGradient(self.scalars + part, step_to)

    def pull_back(self, times: Times) -> Times:
        """In the structure of `times`."""
        leaves, treedef = jtu.tree_flatten(times)
        grads: list[Any] = [g.astype(x.dtype) for g, x in zip(self.scalars, leaves)]
        if self.step_to is not None:
            grads[-1] = self.step_to
        return treedef.unflatten(grads)
