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
from ._custom_types import (
    BoolScalarLike,
    DenseInfo,
    IntScalarLike,
    RealScalarLike,
    Y,
)
from ._invert_step import invert_step, max_abs, relative_distance
from ._rounding_probe import advance, derivative, rounding
from ._step_record import Step, StepRecord
from ._stored_states import StoredStates


filter_inexact = ft.partial(eqx.filter, filter_spec=eqx.is_inexact_array)

# From this many steps on, a segment is long.
_long = 10


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
    - `error`: what rounding may have led to since the last state that was known: of
        `y`, and of the solver state if that is the hint.
    """

    index: Int[Array, ""]
    ts_index: IntScalarLike
    y: Y
    hint: PyTree
    grad_y: PyTree[Array]
    grad_solver_state: PyTree[Array]
    grads: PyTree[Array]
    size: PyTree[Array]
    error: PyTree[Array]


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

        Returns the new position, the certificate (how far this may be off, as a
        fraction of what is tolerated), and the number of corrections that were made."""
        closed = self.closed
        index = position.index - 1
        step = self.record.read(index, self.num_steps)
        has_output = self._has_output(position, step)
        linearise = ft.partial(self._linearise, step, has_output)
        undone = state0
        corrections = jnp.array(0)

        if not closed.reversal.can_step_back:
            y0, _ = state0
            y1, aux = linearise(*state0)
        elif closed.reversal.iterates:
            forgotten = closed.reversal.forget_state(self.solver_state0)
            solver_state0 = _where(index == 0, self.solver_state0, forgotten)
            known_y0, _ = state0
            inverted = invert_step(
                lambda y: _keep_y(linearise(y, solver_state0)),
                lambda y, is_y1: self._guess(step, y, position.hint, is_y1),
                position.y,
                known,
                known_y0,
            )
            y0, corrections = inverted.y0, inverted.num_corrections
            y1, aux = inverted.aux
            undone = inverted.guess, None
        else:
            undone = lax.cond(
                eqxi.unvmap_all(known),
                lambda: state0,
                lambda: self._step_back(step, position.y, position.hint),
            )
            y0, solver_state0 = _where(known, state0, undone)
            y1, aux = linearise(y0, solver_state0)

        size = jtu.tree_map(jnp.maximum, position.size, max_abs(filter_inexact(y0)))
        missed = relative_distance(
            filter_inexact(y1), filter_inexact(position.y), size, self.tolerance()
        )
        error = position.error
        if error is not None:
            error = lax.cond(
                eqxi.unvmap_all(known),
                lambda: error,
                lambda: self._advance_error(position, step, y0, undone),
            )
            grown = relative_distance(
                error[0], zeros_like(error[0]), size, self.tolerance()
            )
            missed = jnp.where(known, missed, jnp.maximum(missed, grown))
        position = self._pull_back(position, step, y0, aux)
        position = eqx.tree_at(
            lambda p: (p.size, p.error),
            position,
            (size, error),
            is_leaf=lambda x: x is None,
        )
        return position, missed, corrections

    def _step_back(self, step: Step, y1: Y, hint: PyTree) -> tuple[Y, PyTree]:
        args, terms, _ = self.params
        assert self.closed.step_back is not None
        return self.closed.step_back(terms, step, y1, args, hint)

    def start_error(self, y: Y, hint: PyTree) -> PyTree[Array]:
        """What to set `Position.error` to, where the state is known."""
        closed = self.closed
        if closed.certificate != "full" or not closed.reversal.can_step_back:
            return None
        tree = filter_inexact((y, hint if closed.reversal.has_state else None))
        return rounding(tree)

    def _advance_error(
        self, position: Position, step: Step, y0: Y, undone: PyTree
    ) -> PyTree[Array]:
        """Carries `position.error` over a step that was undone."""
        args, terms, _ = self.params
        closed = self.closed
        if closed.increment is None:
            # Some of the hint may not be floating point.
            hint = position.hint if closed.reversal.has_state else None
            state1 = position.y, hint
            diff, nondiff = eqx.partition(state1, eqx.is_inexact_array)

            def _undo(diff):
                y, _hint = eqx.combine(diff, nondiff)
                _hint = _hint if closed.reversal.has_state else position.hint
                return filter_inexact(self._step_back(step, y, _hint))

            error = derivative(_undo, diff, filter_inexact(undone), position.error)
        else:

            def _increment(y):
                vf = closed.vf(terms, step.t1, y, args)
                return closed.increment(terms, step, args, vf)  # pyright: ignore

            value = closed.increment(terms, step, args, position.hint)
            error, _ = position.error
            error = advance(_increment, position.y, value, error), None
        return add(error, self.start_error(y0, undone[1]))

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
        y0, _ = self._step_back(step, y, hint)
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
        self, position: Position, step: Step, y0: Y, aux: PyTree
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
            size=position.size,
            error=position.error,
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
        position, the certificate, and the number of corrections.

        If the segment is long then the last step is first undone like any other, which
        shows what difference it makes to the cotangents that the state from which it
        started was known."""
        start = position.index
        is_long = jnp.array(False)
        if self.closed.certificate == "full" and self.closed.reversal.can_step_back:
            is_long = start - target >= _long

        def cond_fun(carry):
            position, missed, corrections, *_ = carry
            go_on = True
            if self.closed.checkpoints > 0:
                # Whoever corrects this much is better off making the segment again.
                too_much = corrections > 8 + 2 * (start - position.index)
                go_on = (missed <= 1) & jnp.invert(too_much)
            return (position.index > target) & go_on

        def body_fun(carry):
            position, missed, corrections, tried, tried_grad_y = carry
            is_last = position.index - 1 <= target
            try_ = is_last & is_long & ~tried
            known = is_last & ~try_
            new, new_missed, new_corrections = self.step(position, known, state)
            size = max_abs(new.grad_y)
            differs = relative_distance(
                new.grad_y, tried_grad_y, size, self.tolerance()
            )
            differs = jnp.where(known & tried, differs, 0)
            new_missed = jnp.maximum(new_missed, differs)
            if self.closed.certificate == "off":
                new_missed = jnp.zeros_like(new_missed)
            # NaN is larger than anything.
            new_missed = jnp.where(jnp.isnan(new_missed), jnp.inf, new_missed)
            missed = jnp.maximum(missed, new_missed)
            position, tried_grad_y = lax.cond(
                eqxi.unvmap_any(try_),
                lambda: (
                    _where(try_, position, new),
                    _where(try_, new.grad_y, tried_grad_y),
                ),
                lambda: (new, tried_grad_y),
            )
            corrections = corrections + new_corrections
            return position, missed, corrections, tried | try_, tried_grad_y

        position = eqx.tree_at(
            lambda p: p.error,
            position,
            self.start_error(position.y, position.hint),
            is_leaf=lambda x: x is None,
        )
        position, missed, corrections, *_ = eqxi.while_loop(
            cond_fun,
            body_fun,
            (
                position,
                jnp.zeros((), jnp.result_type(float)),
                jnp.array(0),
                jnp.array(False),
                position.grad_y,
            ),
            kind="lax",
        )
        return position, missed, corrections

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
            max_rate = _max_correction_rate(length, stored.num_free)
            again = (length > limit) | (rate > max_rate)
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


def _max_correction_rate(
    length: IntScalarLike, num_free: IntScalarLike
) -> RealScalarLike:
    """With how many corrections per step it is less work to make a segment again than
    to undo it. A correction is as much work as making two steps. Each step has to be
    made again once if there is room for all of the states, and twice if there is for
    some of them, and for all of those between."""
    twice = jnp.where(length <= (num_free // 2 + 1) ** 2, 0.6, jnp.inf)
    return jnp.where(length - 2 <= num_free, 0.1, twice)


def _keep_y(out: tuple[Y, PyTree]) -> tuple[Y, PyTree]:
    return out[0], out


def _coarsest_eps(y: Y) -> float:
    eps = [float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(filter_inexact(y))]
    return max(eps, default=1.0)
