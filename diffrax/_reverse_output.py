"""Pulling back the cotangents of what a solve has saved.

Rows are saved in the order of the steps; for each step, first those of `ts`, and then
that of `steps`. So going backward they are met in reverse. (The rows of `t0` and `t1`
are saved outside of the loop, where JAX differentiates them.)
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree, Real

from ._custom_types import BoolScalarLike, DenseInfo, IntScalarLike, Y
from ._step_record import Step


def filter_inexact(tree: PyTree) -> PyTree:
    return eqx.filter(tree, eqx.is_inexact_array)


def stop_gradient(tree: PyTree) -> PyTree:
    """As `lax.stop_gradient`, of a PyTree of anything."""
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(lax.stop_gradient(arrays), rest)


def add(x: PyTree, y: PyTree) -> PyTree:
    return jtu.tree_map(jnp.add, x, y)


def zeros_like(tree: PyTree) -> PyTree:
    return jtu.tree_map(jnp.zeros_like, tree)


class Cursor(eqx.Module):
    """How far going backward has come in the output of one `SubSaveAt`.

    - `row`: how many rows are not after this.
    - `ts_index`: how many of its `ts` are not.
    - `grad_ts`: the cotangents of its `ts`, so far. `None` if it is not differentiated
        with respect to these.
    """

    row: Int[Array, ""]
    ts_index: Int[Array, ""]
    grad_ts: Real[Array, " times"] | None


class SavedOutput(eqx.Module):
    """The output of one `SubSaveAt`, and its cotangents.

    - `ts`, `every`: its `ts` and `steps`.
    - `grad_times`, `grad_ys`: the cotangents of the rows of `Solution.ts` and of
        `Solution.ys`. What is not differentiated is `None`.
    """

    ts: Real[Array, " times"] | None
    every: int = eqx.field(static=True)
    grad_times: Array | None
    grad_ys: PyTree[Array | None]

    @property
    def has_gradient(self) -> bool:
        return len(jtu.tree_leaves((self.grad_times, self.grad_ys))) > 0

    def is_inside(self, cursor: Cursor, step: Step) -> BoolScalarLike:
        """Whether the last of those `ts` that are left is in a step."""
        if self.ts is None or not self.has_gradient:
            return jnp.array(False)
        last = self.ts[jnp.maximum(cursor.ts_index - 1, 0)]
        return (cursor.ts_index > 0) & (last > step.previous_t1)

    def _row(self, row: IntScalarLike, value: PyTree) -> PyTree:
        """The cotangents of a row, of which the values are `value`."""

        def _get(x, grad):
            return jnp.zeros_like(x) if grad is None else grad[row].astype(x.dtype)

        return jtu.tree_map(_get, filter_inexact(value), self.grad_ys)

    def _time(self, row: IntScalarLike) -> Any:
        return 0.0 if self.grad_times is None else self.grad_times[row]

    def pull_back_end(
        self,
        cursor: Cursor,
        step: Step,
        index: IntScalarLike,
        y1: Y,
        evaluate: Callable,
        params: PyTree,
    ) -> tuple[Cursor, tuple[PyTree, PyTree, Any] | None]:
        """For what is saved at the end of the step at `index`. `evaluate` is a function
        of `(params, t, y)`. Returns the cotangents of `y1`, of `params`, and of the
        time; `None` if there are none."""
        if self.every == 0 or not self.has_gradient:
            return cursor, None
        is_saved = (index >= 0) & ((index + 1) % self.every == 0)
        row = jnp.where(is_saved, cursor.row - 1, cursor.row)
        diff_y1, rest = eqx.partition(y1, eqx.is_inexact_array)

        def _evaluate(_params, _t, _diff_y1):
            out = evaluate(_params, _t, eqx.combine(_diff_y1, rest))
            return filter_inexact(out)

        def _pull_back():
            out, pull_back = jax.vjp(_evaluate, params, step.next_t0, diff_y1)
            grads, grad_t, grad_y1 = pull_back(self._row(row, out))
            return grad_y1, grads, grad_t + jnp.asarray(self._time(row), grad_t.dtype)

        zeros = zeros_like((diff_y1, params, jnp.asarray(step.next_t0)))
        cts = lax.cond(eqxi.unvmap_any(is_saved), _pull_back, lambda: zeros)
        cts = jtu.tree_map(lambda x: jnp.where(is_saved, x, 0), cts)
        return Cursor(row, cursor.ts_index, cursor.grad_ts), cts

    def pull_back_ts(
        self,
        cursor: Cursor,
        step: Step,
        dense_info: DenseInfo,
        evaluate: Callable,
        params: PyTree,
        times: PyTree,
    ) -> tuple[Cursor, tuple[PyTree, PyTree, PyTree]]:
        """For what is saved inside of a step. `evaluate` is a function of `(params,
        times, t, dense_info)`. Returns the cotangents of `dense_info`, `params` and
        `times`."""
        ts = self.ts
        assert ts is not None
        diff, nondiff = eqx.partition(dense_info, eqx.is_inexact_array)
        # Not the time itself, if nobody asks for its gradient: the derivative of an
        # interpolation may not be finite.
        with_t = cursor.grad_ts is not None

        def cond_fun(carry):
            _cursor, _ = carry
            return self.is_inside(_cursor, step)

        def body_fun(carry):
            _cursor, cts = carry
            row, index = _cursor.row - 1, _cursor.ts_index - 1

            def _evaluate(_diff, _params, _times, _t):
                _t = ts[index] if _t is None else _t
                return filter_inexact(
                    evaluate(_params, _times, _t, eqx.combine(_diff, nondiff))
                )

            t = ts[index] if with_t else None
            out, pull_back = jax.vjp(_evaluate, diff, params, times, t)
            *new, grad_t = pull_back(self._row(row, out))
            grad_ts = _cursor.grad_ts
            if grad_ts is not None:
                grad_t = grad_t + jnp.asarray(self._time(row), grad_t.dtype)
                grad_ts = grad_ts.at[index].add(grad_t.astype(grad_ts.dtype))
            return Cursor(row, index, grad_ts), add(cts, tuple(new))

        zeros = zeros_like((diff, params, times))
        return lax.while_loop(cond_fun, body_fun, (cursor, zeros))


class DenseOutput(eqx.Module):
    """The cotangents of `SaveAt(dense=True)`, and of the last step that was made, in
    which there may have been an event. `None` where there are none.

    - `ts`, `infos`: those of the dense output.
    - `event_infos`, `event_tprev`, `event_tnext`: those of the last step.
    """

    ts: Array | None
    infos: PyTree[Array | None]
    event_infos: PyTree[Array | None]
    event_tprev: Array | None
    event_tnext: Array | None

    @property
    def has_infos(self) -> bool:
        return len(jtu.tree_leaves((self.infos, self.event_infos))) > 0

    def is_inside(
        self, index: IntScalarLike, num_steps: IntScalarLike
    ) -> BoolScalarLike:
        """Whether there is output of the step at `index`."""
        if len(jtu.tree_leaves(self.infos)) > 0:
            return jnp.array(True)
        if len(jtu.tree_leaves(self.event_infos)) > 0:
            return index == num_steps - 1
        return jnp.array(False)

    def dense_info(
        self, index: IntScalarLike, num_steps: IntScalarLike, dense_info: DenseInfo
    ) -> PyTree[Array]:
        """The cotangents of the `dense_info` of a step."""
        is_step = index >= 0
        is_last = is_step & (index == num_steps - 1)
        total = zeros_like(filter_inexact(dense_info))

        def _infos(x, grad):
            if grad is None:
                return x
            return x + jnp.where(is_step, grad[index], 0).astype(x.dtype)

        def _event(x, grad):
            if grad is None:
                return x
            return x + jnp.where(is_last, grad, 0).astype(x.dtype)

        if self.infos is not None:
            total = jtu.tree_map(_infos, total, self.infos)
        if self.event_infos is not None:
            total = jtu.tree_map(_event, total, self.event_infos)
        return total

    def times(
        self, index: IntScalarLike, num_steps: IntScalarLike
    ) -> tuple[Any, Any, Any]:
        """The cotangents of the start and the end of a step, and of the start of the
        next one."""
        is_last = (index >= 0) & (index == num_steps - 1)

        def _event(grad):
            return 0.0 if grad is None else jnp.where(is_last, grad, 0)

        next_t0 = 0.0
        if self.ts is not None:
            next_t0 = jnp.where(index >= 0, self.ts[index + 1], 0)
        return _event(self.event_tprev), _event(self.event_tnext), next_t0
