"""What going back over a solve took, and how well it went, step by step."""

from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Real

from ._custom_types import BoolScalarLike, IntScalarLike
from ._step_record import Step


# The numbers of each step: whether there is one; its start and its end; what
# `Signals` holds; how many corrections there were; and how often it was made again.
columns = (
    "count",
    "t0",
    "t1",
    "drift",
    "residual",
    "rounding",
    "cotangents",
    "corrections",
    "replays",
)


class Signals(eqx.Module):
    """What tells of a single step how far going back may be off, each as a fraction of
    what is tolerated. (Of a NaN nothing is known, so it is to count as infinite.)

    - `drift`: how far a step from a known state ends from where going back had come by.
    - `residual`: how far a step ends from where it should that starts from where it was
        found to start.
    - `rounding`: how large an error has become there that was carried along. Where
        nothing is said to be rounded: infinite at a step that did not lead back to
        every bit of a known state.
    - `cotangents`: by how much those that come of a known state differ from those that
        come of the state which going back would have led to, times the number of steps
        of the segment.
    """

    drift: Real[Array, ""]
    residual: Real[Array, ""]
    rounding: Real[Array, ""]
    cotangents: Real[Array, ""]

    def worst(self, known: BoolScalarLike) -> Real[Array, ""]:
        """The largest of those that apply."""
        at_known = jnp.maximum(self.drift, self.cotangents)
        elsewhere = jnp.maximum(self.residual, self.rounding)
        return jnp.where(known, at_known, elsewhere)


class StepTrace(eqx.Module):
    """A row of `columns` for each step, or nothing at all: if nobody asks for it."""

    rows: PyTree[eqxi.MaybeBuffer[Real[Array, "steps columns"]]]

    @property
    def buffers(self) -> PyTree:
        return self.rows

    def _write(
        self, index: IntScalarLike, pred: BoolScalarLike = True, **values: Any
    ) -> "StepTrace":
        if self.rows is None:
            return self
        row = self.rows[index]
        for name, value in values.items():
            row = row.at[columns.index(name)].set(jnp.asarray(value, row.dtype))
        set_: Any = eqxi.buffer_at_set
        return StepTrace(set_(self.rows, index, row, pred=pred))

    def _read(self, index: IntScalarLike, name: str) -> Any:
        return 0 if self.rows is None else self.rows[index, columns.index(name)]

    def replayed(self, index: IntScalarLike) -> "StepTrace":
        """With a step counted that was made again."""
        return self._write(index, replays=self._read(index, "replays") + 1)

    def undone(
        self,
        index: IntScalarLike,
        step: Step,
        signals: Signals,
        known: BoolScalarLike,
        tried: BoolScalarLike,
        corrections: IntScalarLike,
        pred: BoolScalarLike,
    ) -> "StepTrace":
        """If `pred`: with what became of a step that was undone, or that started from a
        known state (and if `tried`, after it had been undone). NaN is written for what
        does not apply."""
        if self.rows is None:
            return self

        def elsewhere(name, value):
            kept = jnp.where(tried, self._read(index, name), jnp.nan)
            return jnp.where(known, kept, value)

        return self._write(
            index,
            pred,
            count=1,
            t0=step.t0,
            t1=step.t1,
            drift=jnp.where(known, signals.drift, jnp.nan),
            cotangents=jnp.where(known & tried, signals.cotangents, jnp.nan),
            residual=elsewhere("residual", signals.residual),
            rounding=elsewhere("rounding", signals.rounding),
            corrections=self._read(index, "corrections") + corrections,
        )
