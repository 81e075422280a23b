"""Going back over a solve, from its last step to its first.

The states between which a solve is known (those that were stored, and its start and its
end) divide it into segments. A segment is undone step by step, each step being
linearised where it is found to have started, and the cotangents being pulled back
through it. The last step to be undone starts from a known state: how far it then ends
from where it should tells how far going back over the segment has drifted. If that is
too far then all of this is undone, the segment is made again from its known start,
storing states that are nearer to each other, and it starts over. Segments of one step
are right as they are.
"""

import functools as ft
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree, Real

from ._closed_solve import as_arrays, ClosedSolve
from ._custom_types import BoolScalarLike, DenseInfo, IntScalarLike, Y
from ._invert_step import invert_step, max_abs, relative_distance
from ._step_record import Step, StepRecord
from ._stored_states import StoredStates


filter_inexact = ft.partial(eqx.filter, filter_spec=eqx.is_inexact_array)

# With more corrections than this per step, it is less work to make a segment again than
# to undo it: once, if there is room for all of its states, or else twice. A correction
# is as much work as making two steps.
_max_correction_rates = (0.1, 0.6)


def add(x: PyTree, y: PyTree) -> PyTree:
    return jtu.tree_map(jnp.add, x, y)


def zeros_like(tree: PyTree) -> PyTree:
    return jtu.tree_map(jnp.zeros_like, tree)


def _where(pred: BoolScalarLike, x: PyTree, y: PyTree) -> PyTree:
    return jtu.tree_map(lambda a, b: jnp.where(pred, a, b), x, y)


class Position(eqx.Module):
    """How far going backward has come.

    - `index`: the number of the step that starts here.
    - `ts_index`: how many of `SaveAt(ts=...)` are not after this.
    - `y`, `hint`: the state here, and what undoing the step before needs in addition.
    - `grad_y`, `grad_solver_state`: the cotangents of the state.
    - `grads`: those of the parameters, so far.
    - `size`: how large each leaf of `y` has been so far.
    """

    index: Int[Array, ""]
    ts_index: IntScalarLike
    y: Y
    hint: PyTree
    grad_y: PyTree[Array]
    grad_solver_state: PyTree[Array]
    grads: PyTree[Array]
    size: PyTree[Array]


class Work(eqx.Module):
    """What going backward took.

    - `num_undone`: how many steps were undone or linearised.
    - `num_corrections`: how many times a guess of where a step started was corrected.
    - `num_replayed`: how many steps were made again.
    - `missed`: the worst of by how much going back over a segment missed where it
        should have led, on the segments as they finally were undone, as a fraction of
        what is tolerated.
    """

    num_undone: Int[Array, ""]
    num_corrections: Int[Array, ""]
    num_replayed: Int[Array, ""]
    missed: Real[Array, ""]


class ReversePass(eqx.Module):
    """All that is constant while going backward.

    - `y0`, `solver_state0`: the state at the start of the solve.
    - `diff_params`, `nondiff_params`: `[args, terms, local]`, and which of that to
        differentiate.
    - `grad_ys`: the cotangents of what was saved, each one or more rows of: `[t0,
        ts[0], ..., ts[-1], t1]`, of which each may be missing.
    """

    closed: ClosedSolve
    record: StepRecord
    num_steps: IntScalarLike
    y0: Y
    solver_state0: PyTree
    diff_params: PyTree
    nondiff_params: PyTree
    grad_ys: PyTree[Array]

    @property
    def params(self) -> PyTree:
        return eqx.combine(self.diff_params, self.nondiff_params)

    def tolerance(self) -> float:
        """Two thirds of the digits of the least precise leaf of the state."""
        return _coarsest_eps(self.y0) ** (2 / 3)

    #
    # One step
    #

    def step(
        self, position: Position, known: BoolScalarLike, state0: PyTree
    ) -> tuple[Position, Real[Array, ""], Int[Array, ""]]:
        """Goes back over one step: from `state0`, if `known`, or else by undoing it.

        Returns the new position, by how much the step misses where it was to end as a
        fraction of what is tolerated, and the number of corrections that were made."""
        closed = self.closed
        args, terms, _ = self.params
        index = position.index - 1
        step = self.record.read(index, self.num_steps)
        known_y0, known_solver_state0 = state0
        has_output = self._has_output(position, step)
        linearise = ft.partial(self._linearise, step, has_output)
        corrections = jnp.array(0)

        if not closed.reversal.can_step_back:
            y0, solver_state0 = state0
            y1, aux = linearise(y0, solver_state0)
        elif closed.reversal.iterates:
            forgotten = closed.reversal.forget_state(self.solver_state0)
            solver_state0 = _where(index == 0, self.solver_state0, forgotten)
            inverted = invert_step(
                lambda y: _keep_y(linearise(y, solver_state0)),
                lambda y, is_y1: self._guess(step, y, position.hint, is_y1),
                position.y,
                known,
                known_y0,
            )
            y0, corrections = inverted.y0, inverted.num_corrections
            y1, aux = inverted.aux
        else:
            struct = known_y0, known_solver_state0
            y0, solver_state0 = lax.cond(
                eqxi.unvmap_all(known),
                lambda: struct,
                lambda: _where(
                    known,
                    struct,
                    closed.step_back(terms, step, position.y, args, position.hint),
                ),
            )
            y1, aux = linearise(y0, solver_state0)

        size = jtu.tree_map(jnp.maximum, position.size, max_abs(filter_inexact(y0)))
        missed = relative_distance(
            filter_inexact(y1), filter_inexact(position.y), size, self.tolerance()
        )
        position = self._pull_back(position, step, y0, size, aux)
        return position, missed, corrections

    def _guess(self, step: Step, y: Y, hint: PyTree, is_y1: BoolScalarLike) -> Y:
        closed = self.closed
        args, terms, _ = self.params
        if hint is not None:
            # The first evaluation of a step back from `y1` has been made already.
            hint = lax.cond(
                eqxi.unvmap_all(is_y1),
                lambda: hint,
                lambda: _where(is_y1, hint, closed.vf(terms, step.t1, y, args)),
            )
        y0, _ = closed.step_back(terms, step, y, args, hint)
        return y0

    def _linearise(
        self, step: Step, has_output: BoolScalarLike, y0: Y, solver_state0: PyTree
    ) -> tuple[Y, PyTree]:
        """Makes a step. Returns `y1`, and all that is needed in order to pull back
        cotangents through it."""
        diff_state, nondiff_state = eqx.partition(
            (y0, solver_state0), eqx.is_inexact_array
        )
        no_output = self.closed.saveat.subs.ts is None

        def _local(_diff_state, _params):
            _y0, _solver_state0 = eqx.combine(_diff_state, nondiff_state)
            _args, _terms, _closed = eqx.combine(_params, self.nondiff_params)
            y1, dense_info, solver_state1, hint0 = _closed(
                _terms, step, _y0, _args, _solver_state0, has_output
            )
            if no_output:
                dense_info = None
            out = filter_inexact((y1, solver_state1, dense_info))
            return out, (y1, dense_info, hint0)

        _, pull_back, (y1, dense_info, hint0) = jax.vjp(
            _local, diff_state, self.diff_params, has_aux=True
        )
        return y1, (dense_info, hint0, pull_back)

    def _pull_back(
        self, position: Position, step: Step, y0: Y, size: PyTree, aux: PyTree
    ) -> Position:
        dense_info, hint0, pull_back = aux
        ts_index = position.ts_index
        grad_dense_info = None
        if self.closed.saveat.subs.ts is not None:
            ts_index, grad_dense_info = self._pull_back_ts(ts_index, step, dense_info)
        grad_solver_state1 = None
        if self.closed.reversal.has_state:
            grad_solver_state1 = position.grad_solver_state
        cotangents = position.grad_y, grad_solver_state1, grad_dense_info
        (grad_y0, grad_solver_state0), grads = pull_back(cotangents)
        return Position(
            index=position.index - 1,
            ts_index=ts_index,
            y=y0,
            hint=hint0,
            grad_y=grad_y0,
            grad_solver_state=grad_solver_state0,
            grads=add(position.grads, grads),
            size=size,
        )

    def _has_output(self, position: Position, step: Step) -> BoolScalarLike:
        ts = self.closed.saveat.subs.ts
        if ts is None or len(ts) == 0:
            return jnp.array(False)
        index = position.ts_index
        return (index > 0) & (ts[jnp.maximum(index - 1, 0)] > step.previous_t1)

    def _pull_back_ts(
        self, ts_index: IntScalarLike, step: Step, dense_info: DenseInfo
    ) -> tuple[IntScalarLike, PyTree[Array]]:
        """Pulls the cotangents of the output that was saved during this step back
        through the interpolation, onto `dense_info`."""
        saveat = self.closed.saveat
        ts: Any = saveat.subs.ts
        offset = 1 if saveat.subs.t0 else 0
        diff, nondiff = eqx.partition(dense_info, eqx.is_inexact_array)

        def cond_fun(carry):
            index, _ = carry
            return (index > 0) & (ts[jnp.maximum(index - 1, 0)] > step.previous_t1)

        def body_fun(carry):
            index, grad_dense_info = carry
            index = index - 1

            def _evaluate(_diff):
                return self.closed.interpolate(
                    eqx.combine(_diff, nondiff), step, ts[index]
                )

            y, pull_back = jax.vjp(_evaluate, diff)
            grad_y = jtu.tree_map(
                lambda g, _y: g[offset + index].astype(_y.dtype), self.grad_ys, y
            )
            (grad,) = pull_back(grad_y)
            return index, add(grad_dense_info, grad)

        return lax.while_loop(cond_fun, body_fun, (ts_index, zeros_like(diff)))

    #
    # One segment
    #

    def segment(
        self, position: Position, target: IntScalarLike, state: PyTree
    ) -> tuple[Position, Real[Array, ""], Int[Array, ""]]:
        """Goes back to step `target`, which starts from `state`. Returns the new
        position, the worst of what `step` reported, and the number of corrections."""

        start = position.index

        def cond_fun(carry):
            position, missed, corrections = carry
            go_on = True
            if self.closed.checkpoints > 0:
                # Whoever corrects this much is better off making the segment again.
                too_much = corrections > 8 + 2 * (start - position.index)
                go_on = (missed <= 1) & jnp.invert(too_much)
            return (position.index > target) & go_on

        def body_fun(carry):
            position, missed, corrections = carry
            known = position.index - 1 <= target
            position, new_missed, new_corrections = self.step(position, known, state)
            # NaN is larger than anything.
            new_missed = jnp.where(jnp.isnan(new_missed), jnp.inf, new_missed)
            missed = jnp.maximum(missed, new_missed)
            return position, missed, corrections + new_corrections

        zero = jnp.zeros((), jnp.result_type(float))
        return eqxi.while_loop(
            cond_fun, body_fun, (position, zero, jnp.array(0)), kind="lax"
        )

    def replay(
        self,
        start: IntScalarLike,
        stop: IntScalarLike,
        pred: BoolScalarLike,
        state: PyTree,
        stored: StoredStates,
    ) -> tuple[PyTree, StoredStates]:
        """If `pred`, makes the steps from `start`, which starts from `state`, up to and
        without `stop`, and stores states between. Returns the state at `stop`; if not
        `pred`, that at `start`."""
        args, terms, _ = self.params
        has_state = self.closed.reversal.has_state
        y, solver_state = state
        if not has_state:
            forgotten = self.closed.reversal.forget_state(self.solver_state0)
            solver_state = _where(start == 0, self.solver_state0, forgotten)
        # All of them, if there is room. Otherwise half of it, so that these segments
        # can be divided further.
        between = stop - start - 1
        room = stored.num_free
        slots = jnp.maximum((room + 1) // 2, 1)
        stride = jnp.where(between <= room, 1, (between + slots) // (slots + 1) + 1)

        def cond_fun(carry):
            index, *_ = carry
            return pred & (index < stop)

        def body_fun(carry):
            index, y, solver_state, stored = carry
            step = self.record.read(index, self.num_steps)
            y, solver_state = as_arrays(
                self.closed.replay(terms, step, y, args, solver_state)
            )
            index = index + 1
            stored = stored.write(
                index,
                (y, solver_state if has_state else None),
                pred=((index - start) % stride == 0) & (index < stop),
            )
            return index, y, solver_state, stored

        def buffers(carry):
            *_, stored = carry
            return stored.buffers

        _, y, solver_state, stored = eqxi.while_loop(
            cond_fun,
            body_fun,
            (start, y, solver_state, stored),
            buffers=buffers,
            kind="lax",
        )
        return (y, solver_state if has_state else None), stored

    #
    # All of them
    #

    def run(self, position: Position, stored: StoredStates) -> tuple[Position, Work]:
        """Goes back to the start of the solve. Returns the position there, and what it
        took."""
        start = self.y0, self.solver_state0 if self.closed.reversal.has_state else None
        if self.closed.checkpoints == 0:
            zero = jnp.array(0)
            back, missed, corrections = self.segment(position, zero, start)
            return back, Work(position.index, corrections, zero, missed)
        stored = stored.extend(self.closed.checkpoints).drop(position.index)
        no_limit = jnp.array(jnp.iinfo(jnp.int32).max, position.index.dtype)

        def cond_fun(carry):
            position, *_ = carry
            return position.index > 0

        def body_fun(carry):
            position, work, limit, rate, stored = carry
            first = stored.last()
            length = position.index - first
            state = stored.read(first, start)
            has_room = length - 2 <= stored.num_free
            again = (length > limit) | (
                rate > jnp.where(has_room, *_max_correction_rates)
            )
            if not self.closed.reversal.can_step_back:
                again = jnp.array(True)
            again = again & (length > 1)
            stop = jnp.where(again, position.index - 1, first)
            state, stored = self.replay(first, stop, again, state, stored)
            back, missed, corrections = self.segment(position, stop, state)
            undone = position.index - back.index
            is_right = ((missed <= 1) & (back.index == stop)) | (length == 1) | again
            position = _where(is_right, back, position)
            kept_missed = jnp.where(is_right & (length > 1) & ~again, missed, 0)
            work = Work(
                num_undone=work.num_undone + undone,
                num_corrections=work.num_corrections + corrections,
                num_replayed=work.num_replayed + jnp.where(again, stop - first, 0),
                missed=jnp.maximum(work.missed, kept_missed),
            )
            # Try segments again that are as long as twice the longest one that has
            # been right since one was not.
            grown = jnp.where(again, limit, jnp.maximum(limit, 2 * length))
            grown = jnp.where(limit == no_limit, limit, grown)
            limit = jnp.where(is_right, grown, jnp.maximum(undone // 2, 1))
            rate = jnp.where(again, rate, corrections / jnp.maximum(undone, 1))
            stored = stored.drop(position.index)
            return position, work, limit, rate, stored

        def buffers(carry):
            *_, stored = carry
            return stored.buffers

        zero = jnp.array(0, position.index.dtype)
        no_rate = jnp.zeros((), jnp.result_type(float))
        work = Work(zero, zero, zero, no_rate)
        position, work, *_ = eqxi.while_loop(
            cond_fun,
            body_fun,
            (position, work, no_limit, no_rate, stored),
            buffers=buffers,
            kind="lax",
        )
        return position, work


def _keep_y(out: tuple[Y, PyTree]) -> tuple[Y, PyTree]:
    return out[0], out


def _coarsest_eps(y: Y) -> float:
    eps = [float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(filter_inexact(y))]
    return max(eps, default=0.0)
