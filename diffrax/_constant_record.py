"""The steps of a solve with a constant step size, of which nothing has to be stored."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._custom_types import BoolScalarLike, IntScalarLike, RealScalarLike
from ._global_interpolation import AbstractGlobalInterpolation
from ._path import AbstractPath
from ._step_record import Step
from ._step_size_controller import AbstractStepSizeController, ConstantStepSize
from ._term import _CallableToPath, AbstractTerm


class ConstantRecord(eqx.Module):
    """Does what `StepRecord` does, in no memory: the times of the steps are computed
    from their number.

    That may round differently than it did when the steps were made. So this is not for
    what is sensitive to a rounding error of the time, as a Brownian motion is.
    """

    start: RealScalarLike
    end: RealScalarLike
    first_end: RealScalarLike
    made_jump: BoolScalarLike
    jumps: bool = eqx.field(static=True)
    always_jumps: bool = eqx.field(static=True)
    # Of the controller: how many steps there will be at the end of the first one; how
    # many in all; and between which times.
    first: IntScalarLike
    total: IntScalarLike
    t0: RealScalarLike
    t1: RealScalarLike

    @classmethod
    def allocate(cls, state: Any) -> "ConstantRecord":
        """For a solve that is at `state`."""
        first, total, t0, t1 = state.controller_state
        return cls(
            start=state.tprev,
            end=state.tprev,
            first_end=state.tnext,
            made_jump=state.made_jump,
            jumps=state.made_jump is not False,
            always_jumps=state.made_jump is True,
            first=first,
            total=total,
            t0=t0,
            t1=t1,
        )

    @property
    def buffers(self) -> PyTree:
        """There are none."""
        return None

    def write(self, *args: Any, **kwargs: Any) -> "ConstantRecord":
        """Nothing is written."""
        del args, kwargs
        return self

    def times_only(self) -> "ConstantRecord":
        """As `StepRecord.times_only`."""
        return dataclasses.replace(self, jumps=False)

    def check(self, name: str) -> "ConstantRecord":
        """Raises an error at run time if there is no computing the times."""
        total = eqx.error_if(
            self.total,
            jnp.asarray(self.total) < 0,
            "Cannot differentiate `diffeqsolve(..., t1=inf, max_steps=None, adjoint="
            f"{name}())`. Put a bound on the maximum number of steps.",
        )
        return eqx.tree_at(lambda r: r.total, self, total)

    def read_all(self, index: IntScalarLike, num_steps: IntScalarLike) -> Step:
        """As `StepRecord.read_all`."""
        axes = jtu.tree_map(lambda x: 0 if eqx.is_inexact_array(x) else None, self)
        return jax.vmap(lambda r: r.read(index, num_steps), in_axes=(axes,))(self)

    def _end_of(self, index: IntScalarLike, num_steps: IntScalarLike) -> Any:
        dtype = jnp.result_type(self.t0, self.t1)
        count = jnp.astype(self.first, dtype) + jnp.astype(index, dtype)
        fraction = count / jnp.astype(self.total, dtype)
        end = self.t0 + (self.t1 - self.t0) * fraction
        end = jnp.where(index == 0, self.first_end, end)
        end = jnp.where(index == num_steps - 1, self.end, end)
        return jnp.where(index < 0, self.start, end)

    def read(self, index: IntScalarLike, num_steps: IntScalarLike) -> Step:
        """As `StepRecord.read`."""
        is_done = index < 0
        before = self._end_of(jnp.maximum(index, 0) - 1, num_steps)
        end = self._end_of(index, num_steps)
        if not self.jumps:
            made_jump = next_made_jump = False
        else:
            made_jump = jnp.asarray(self.made_jump) & (index <= 0)
            made_jump = made_jump | self.always_jumps
            is_last = index >= num_steps - 1
            next_made_jump = jnp.asarray(self.always_jumps) & jnp.invert(is_last)
        return Step(
            t0=jnp.where(is_done, self.start, before),
            t1=end,
            previous_t1=jnp.where(index <= 0, -jnp.inf, before),
            next_t0=end,
            made_jump=made_jump,
            next_made_jump=next_made_jump,
            solver_state=None,
        )


def can_compute_times(
    terms: PyTree[AbstractTerm], controller: AbstractStepSizeController
) -> bool:
    """Whether the times of the steps can be computed from their number, and be off by a
    rounding error."""

    def is_path(x):
        return isinstance(x, AbstractPath)

    paths = filter(is_path, jtu.tree_leaves(terms, is_leaf=is_path))
    smooth = AbstractGlobalInterpolation, _CallableToPath
    is_smooth = all(isinstance(path, smooth) for path in paths)
    return is_smooth and type(controller) is ConstantStepSize
