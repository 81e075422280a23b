"""Going back over one step of a solve: finding where it started, linearising it there,
and pulling the cotangents back through it."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.extend as jex
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree, Real

from ._closed_solve import ClosedSolve
from ._constant_record import ConstantRecord
from ._custom_types import (
    BoolScalarLike,
    DenseInfo,
    IntScalarLike,
    RealScalarLike,
    Y,
)
from ._evaluate_where import evaluate_where
from ._invert_step import relative_distance, root, Search
from ._known_controls import has_no_controls
from ._reverse_output import (
    add,
    Cursor,
    DenseOutput,
    filter_inexact,
    SavedOutput,
    stop_gradient,
    zeros_like,
)
from ._rounding_probe import advance, derivative, Probe, rounding, share_of
from ._step_record import Step, StepRecord
from ._step_times import TimeCotangents, TimeGradient
from ._step_trace import Signals


def where(pred: BoolScalarLike, x: PyTree, y: PyTree) -> PyTree:
    return jtu.tree_map(lambda a, b: jnp.where(pred, a, b), x, y)


class Position(eqx.Module):
    """How far going backward has come.

    - `index`: the number of the step that starts here.
    - `cursors`: where it is in the output of each `SubSaveAt`.
    - `y`, `hint`: the state here, and what undoing the step before needs in addition.
    - `grad_y`, `grad_solver_state`: the cotangents of the state.
    - `grads`: those of the parameters, so far.
    - `grad_times`: those of what the times of the steps depend on, so far. `None` if
        nobody asks for these.
    - `probe`: what rounding may have led to since the last state that was known. `None`
        if nobody asks for that.
    """

    index: Int[Array, ""]
    cursors: list[Cursor]
    y: Y
    hint: PyTree
    grad_y: PyTree[Array]
    grad_solver_state: PyTree[Array]
    grads: PyTree[Array]
    grad_times: TimeGradient | None
    probe: Probe | None


class Carried(eqx.Module):
    """What was evaluated in undoing a step, and serves for linearising the one before
    that: `records`, if `is_there`."""

    records: PyTree[Array]
    is_there: Bool[Array, ""]


class Round(eqx.Module):
    """What came of going back over one step, or of one round of looking for its start.

    - `position`: the new position, if `done`.
    - `search`: for the next round. `None` if that is not how steps are undone.
    - `carried`: for the step before.
    - `done`: whether the step has been undone.
    - `signals`: how far this may be off, without what is told by cotangents.
    - `step`: the step.
    """

    position: Position
    search: Search | None
    carried: Carried
    done: Bool[Array, ""]
    signals: Signals
    step: Step


class ReverseStep(eqx.Module):
    """All that is constant while going backward.

    - `y0`, `solver_state0`: the state at the start of the solve.
    - `diff_params`, `nondiff_params`: `[args, terms, local]`, and which of that to
        differentiate.
    - `outputs`, `dense`: the cotangents of what was saved.
    - `moved`: the derivative of the record in each direction in which the times may
        change. `None` if there are none.
    - `first_time`: which of `StepTo(ts=...)` is the end of the first step but one.
    """

    closed: ClosedSolve
    record: StepRecord | ConstantRecord
    num_steps: IntScalarLike
    y0: Y
    solver_state0: PyTree
    diff_params: PyTree
    nondiff_params: PyTree
    outputs: list[SavedOutput]
    dense: DenseOutput
    moved: StepRecord | ConstantRecord | None
    first_time: IntScalarLike

    @property
    def params(self) -> PyTree:
        return eqx.combine(self.diff_params, self.nondiff_params)

    def tolerance(self) -> float:
        return tolerance_for(self.y0)

    def too_much(self) -> float:
        """For which certificate, as a fraction of `tolerance`, there is no gradient:
        fewer than half of the digits are right."""
        return self.tolerance() ** -0.25

    def __call__(
        self,
        position: Position,
        search: Search | None,
        carried: Carried,
        known: BoolScalarLike,
        exact: BoolScalarLike,
        state0: PyTree,
        size: PyTree[Array],
    ) -> "Round":
        """Goes back over one step: from `state0`, if `known`, or else by undoing it. If
        `exact` then so is where it ends, and there is nothing to be certified. `size`
        is how large each entry of `y` is.

        If undoing a step takes iteration then this is one round of `search`."""
        closed = self.closed
        index = position.index - 1
        step = self.record.read(index, self.num_steps)
        position = self._pull_back_end(position, step)
        step, pull_back_controls = self._know_controls(step)
        has_output = self._has_output(position, step)
        position = self._before_jump(position, step)
        linearise = ft.partial(
            self._linearise, step, has_output, pull_back_controls is not None
        )
        undone, off = state0, 0.0
        if self.params[2].recall is not None:
            y0, undone, y1, off, carried, new = self._share(
                step, position, carried, known, state0, linearise, pull_back_controls
            )
        else:
            if not closed.reversal.can_step_back:
                y0, solver_state0 = state0
            elif closed.reversal.iterates:
                assert search is not None
                search, y0, solver_state0 = self._look(
                    search, position, step, known, state0
                )
                undone = search.target, None
            else:
                undone = self._undo(step, position, known, state0)
                y0, solver_state0 = where(known, state0, undone)
            y1, aux = linearise(y0, solver_state0)
            # Also if the search goes on: a branch between the linearisation and this
            # would hold all values in memory that it could recompute instead.
            new = self._pull_back(position, step, y0, aux, pull_back_controls)
        frozen: Any = stop_gradient((self, position, search, step, y0, undone, y1, off))
        search, probe, signals = lax.cond(
            eqxi.unvmap_all(exact),
            lambda: frozen[0]._do_not_certify(*frozen[1:3]),
            lambda: frozen[0]._certify(*frozen[1:], known, size),
        )
        position = eqx.tree_at(
            lambda p: p.probe, new, probe, is_leaf=lambda x: x is None
        )
        done = jnp.array(True) if search is None else search.done
        return Round(position, search, carried, done, signals, step)

    def _look(
        self,
        search: Search,
        position: Position,
        step: Step,
        known: BoolScalarLike,
        state0: PyTree,
    ) -> tuple[Search, Y, PyTree]:
        """Where to start from next."""
        is_first = position.index == 1
        forgotten = self.closed.reversal.forget_state(self.solver_state0)
        solver_state0 = where(is_first, self.solver_state0, forgotten)
        start, _ = state0
        frozen: Any = stop_gradient((self, position, step, solver_state0, start))
        fixed, fixed_position, fixed_step, fixed_state0, fixed_start = frozen

        def look():
            return search.look(
                jtu.Partial(_end, fixed.params, fixed_step, fixed_state0),
                lambda y, is_y1: fixed._guess(
                    fixed_step, y, fixed_position.hint, is_y1
                ),
                fixed_position.y,
                known,
                fixed_start,
                self.closed.max_corrections,
            )

        search = lax.cond(
            eqxi.unvmap_all(known), lambda: search.know(fixed_start), look
        )
        y0 = root(
            search.y0,
            position.y,
            jnp.asarray(known),
            start,
            jtu.Partial(_end, self.params, step, solver_state0),
            jtu.Partial(_back, self.params, self.closed.step_back, step, position.hint),
        )
        return search, y0, solver_state0

    #
    # The certificate, no part of which is differentiated
    #

    def _do_not_certify(
        self, position: Position, search: Search | None
    ) -> tuple[Search | None, Probe | None, Signals]:
        zero = jnp.zeros((), jnp.result_type(float))
        search = None if search is None else search.accept()
        return search, position.probe, Signals(zero, zero, zero, zero)

    def _certify(
        self,
        position: Position,
        search: Search | None,
        step: Step,
        y0: Y,
        undone: PyTree,
        y1: Y,
        off: RealScalarLike,
        known: BoolScalarLike,
        size: PyTree[Array],
    ) -> tuple[Search | None, Probe | None, Signals]:
        """Whether the search is over; `position.probe` at the start of the step; and
        how far this may be off, without what is told by cotangents."""
        end, known_end = filter_inexact((y1, position.y))
        keep = known
        if search is not None:
            search = search.judge(end, known_end, known, self.closed.max_corrections)
            keep = known | jnp.invert(search.done)
        missed = relative_distance(end, known_end, size, self.tolerance())
        missed = jnp.maximum(missed, off / self.tolerance())
        zero = jnp.zeros_like(missed)
        probe, rounding = position.probe, zero
        if probe is not None:
            probe, rounding = lax.cond(
                eqxi.unvmap_all(keep),
                lambda: (probe, zero),
                lambda: self._advance_probe(position, step, y0, undone, size),
            )
        # Which of the two it is, depends on whether the start was known.
        signals = Signals(
            drift=missed, residual=missed, rounding=rounding, cotangents=zero
        )
        return search, probe, signals

    def _know_controls(self, step: Step) -> tuple[Step, Callable | None]:
        """The step with its controls; and what pulls back their cotangents onto the
        parameters and the times of the step, if they depend on any."""

        def fn(_diff):
            _diff_params, _times = _diff
            _, _terms, _local = eqx.combine(_diff_params, self.nondiff_params)
            return _local.controls(_terms, _with_times(step, _times))

        *_, local = self.params
        if local.controls is None:
            return step, None
        diff = self.diff_params, self._times(step)
        if _depends(fn, diff):
            controls, pull_back = eqx.filter_vjp(fn, diff)
        else:
            controls, pull_back = fn(diff), None
        step = eqx.tree_at(
            lambda s: s.controls, step, controls, is_leaf=lambda x: x is None
        )
        return step, pull_back

    def _times(self, step: Step) -> PyTree[Array]:
        """The times of a step, if it is to be differentiated with respect to them."""
        return None if self.moved is None else (step.t0, step.t1)

    def _before_jump(self, position: Position, step: Step) -> Position:
        """The vector field before a jump is not that of the step that starts there."""
        closed = self.closed
        if closed.increment is None:
            return position
        args, terms, local = self.params
        hint = evaluate_where(
            step.next_made_jump,
            lambda: local.vf(terms, step.t1, position.y, args),
            position.hint,
        )
        return eqx.tree_at(lambda p: p.hint, position, hint)

    def _step_back(self, step: Step, y1: Y, hint: PyTree) -> tuple[Y, PyTree]:
        args, terms, _ = self.params
        assert self.closed.step_back is not None
        return self.closed.step_back(terms, step, y1, args, hint)

    def _undo(
        self, step: Step, position: Position, known: BoolScalarLike, state0: PyTree
    ) -> tuple[Y, PyTree]:
        """Undoes a step, unless it is `known` to start from `state0`."""
        return lax.cond(
            eqxi.unvmap_all(known),
            lambda: state0,
            lambda: self._step_back(step, position.y, position.hint),
        )

    def _share(
        self,
        step: Step,
        position: Position,
        carried: Carried,
        known: BoolScalarLike,
        state0: PyTree,
        linearise: Callable,
        pull_back_controls: Callable | None,
    ) -> tuple[Y, PyTree, Y, Real[Array, ""], Carried, Position]:
        """Goes back over a step, the evaluations for undoing which serve for
        linearising it as well. Returns where it started; where undoing it led; where it
        ends; by how much the evaluations are off; what is carried to the step before;
        and the new position."""
        args, terms, local = self.params
        # What is as large as the parameters is added to where it is.
        start = eqx.tree_at(lambda p: p.grads, position, zeros_like(position.grads))

        def plain():
            undone = self._undo(step, position, known, state0)
            y0, solver_state0 = where(known, state0, undone)
            y1, aux = linearise(y0, solver_state0)
            new = self._pull_back(start, step, y0, aux, pull_back_controls)
            off = jnp.zeros((), jnp.result_type(float))
            return y0, undone, y1, off, Carried(carried.records, jnp.array(False)), new

        def shared():
            # The step that comes next may have started with another vector field.
            is_there = carried.is_there & jnp.invert(step.next_made_jump)
            y0, solver_state0, records, records0 = local.record_back(
                terms,
                step,
                position.y,
                args,
                position.hint,
                carried.records,
                is_there,
            )
            y1, aux = linearise(y0, solver_state0, records)
            new = self._pull_back(start, step, y0, aux, pull_back_controls)
            *_, off = aux
            undone = y0, solver_state0
            return y0, undone, y1, off, Carried(records0, jnp.array(True)), new

        # A step from a known state is not undone. If it is one of a batch then neither
        # is anything shared by the others.
        *out, new = lax.cond(eqxi.unvmap_any(known), plain, shared)
        grads = add(position.grads, new.grads)
        return *out, eqx.tree_at(lambda p: p.grads, new, grads)

    def start_carrying(self) -> Carried:
        """Where the state is known, and nothing is carried."""
        records = jtu.tree_map(
            lambda x: jnp.zeros(x.shape, x.dtype), self.closed.carried
        )
        return Carried(records, jnp.array(False))

    def start_probe(self, index: IntScalarLike, y: Y, hint: PyTree) -> Probe | None:
        """What to set `Position.probe` to, where the state is known."""
        closed = self.closed
        if closed.certificate != "full" or not closed.reversal.can_step_back:
            return None
        if closed.reversal.is_exact:
            # Nothing is rounded. Whether that is so, is seen at the next known state.
            return None
        return Probe.start(self._rounding(index, y, hint, None))

    def _rounding(
        self, index: IntScalarLike, y: Y, hint: PyTree, share: PyTree[Array] | None
    ) -> PyTree[Array]:
        probed, _ = self._split_probed(y, hint)
        return rounding(stop_gradient(probed), index, share)

    def _split_probed(self, y: Y, hint: PyTree) -> tuple[PyTree, PyTree]:
        """What is in error of a state; and the rest of it. That of a solver state is
        what `y` may come to depend on, going back."""
        if not self.closed.reversal.has_state:
            return eqx.partition((y, None), eqx.is_inexact_array)
        step_back: Any = self.closed.step_back
        (leaves_y, _), (leaves, treedef) = map(jtu.tree_flatten, (y, hint))
        of_hint = [False] * len(leaves)
        while True:
            wanted = [True] * len(leaves_y) + of_hint
            found = step_back.depends_on(wanted)
            # The hint is the last of its arguments.
            found = found[len(found) - len(leaves) :]
            found = [a or b for a, b in zip(of_hint, found, strict=True)]
            if found == of_hint:
                break
            of_hint = found
        inexact = [
            eqx.is_inexact_array(x) and is_in
            for x, is_in in zip(leaves, found, strict=True)
        ]
        mask = jtu.tree_unflatten(treedef, inexact)
        is_inexact_y = jtu.tree_map(eqx.is_inexact_array, y)
        return eqx.partition((y, hint), (is_inexact_y, mask))

    def _advance_probe(
        self,
        position: Position,
        step: Step,
        y0: Y,
        undone: PyTree,
        size: PyTree[Array],
    ) -> tuple[Probe, Real[Array, ""]]:
        """Carries `position.probe` over a step that was undone. Returns it, and how
        large its error is."""
        probe = position.probe
        assert probe is not None
        new, span, can_wait = probe.next(position.index, step.t0, step.t1)
        _, terms, _ = self.params
        if not has_no_controls(terms):
            # That of a longer step is not known, and one step tells nothing of another.
            can_wait = False
        if self.closed.increment is None:
            carry = ft.partial(self._undo_error, undone)
        else:
            carry = self._carry_error
        probe, share = lax.cond(
            eqxi.unvmap_all(can_wait),
            lambda: new.wait(step.t0, step.t1),
            lambda: carry(position, step, new, span),
        )
        error = add(probe.error, self._rounding(position.index, y0, undone[1], share))
        of_y, _ = error
        distance = relative_distance(of_y, zeros_like(of_y), size, self.tolerance())
        return eqx.tree_at(lambda p: p.error, probe, error), distance

    def _undo_error(
        self,
        undone: PyTree,
        position: Position,
        step: Step,
        probe: Probe,
        span: Real[Array, ""],
    ) -> tuple[Probe, PyTree[Array]]:
        """The probe, carried as a step back has it; and its `share_of`. What that step
        changes is taken to be what each has changed since it was last carried."""
        diff, nondiff = self._split_probed(position.y, position.hint)

        def _undo(diff):
            y, hint = eqx.combine(diff, nondiff)
            hint = hint if self.closed.reversal.has_state else position.hint
            probed, _ = self._split_probed(*self._step_back(step, y, hint))
            return probed

        length = jnp.abs(step.t1 - step.t0).astype(span.dtype)
        # If this step is shorter than all of the others, not all of these count.
        num_steps = jnp.where(length > 0, jnp.minimum(span / length, 24), 1)
        old = probe.error
        value, _ = self._split_probed(*undone)
        new = derivative(_undo, diff, value, old)
        change = jtu.tree_map(
            lambda a, b: num_steps.astype(a.dtype) * (a - b), new, old
        )
        share = share_of(change, old)
        return probe.carried(add(old, change), step.t0, share, span), share

    def _carry_error(
        self, position: Position, step: Step, probe: Probe, span: Real[Array, ""]
    ) -> tuple[Probe, PyTree[Array]]:
        """The same for a method of at least second order that is undone numerically,
        by a step from where it was last carried to."""
        args, terms, local = self.params
        closed = self.closed
        assert closed.increment is not None
        since = probe.since.astype(jnp.result_type(step.t1))
        longer = eqx.tree_at(lambda s: s.t1, step, since)

        def _increment(y):
            vf = local.vf(terms, step.t1, y, args)
            return closed.increment(terms, longer, args, vf)  # pyright: ignore

        value = closed.increment(terms, longer, args, position.hint)
        error, _ = probe.error
        error, share = advance(_increment, position.y, value, error)
        share = share, None
        return probe.carried((error, None), step.t0, share, span), share

    def _guess(self, step: Step, y: Y, hint: PyTree, is_y1: BoolScalarLike) -> Y:
        args, terms, _ = self.params
        if hint is not None:
            # The first evaluation of a step back from `y1` has been made already.
            hint = lax.cond(
                eqxi.unvmap_all(is_y1),
                lambda: hint,
                lambda: where(is_y1, hint, self.params[2].vf(terms, step.t1, y, args)),
            )
        y0, _ = self._step_back(step, y, hint)
        return y0

    def _linearise(
        self,
        step: Step,
        has_output: BoolScalarLike,
        has_grad_controls: bool,
        y0: Y,
        solver_state0: PyTree,
        records: PyTree = None,
    ) -> tuple[Y, PyTree]:
        """Makes a step, from `records` if there are any. Returns `y1`, and all that is
        needed in order to pull back cotangents through it."""
        diff_state, nondiff_state = eqx.partition(
            (y0, solver_state0), eqx.is_inexact_array
        )
        no_output = not self._may_have_output()
        controls = filter_inexact(step.controls) if has_grad_controls else None

        def _local(_diff_state, _params, _controls, _times):
            _y0, _solver_state0 = eqx.combine(_diff_state, nondiff_state)
            _args, _terms, _closed = eqx.combine(_params, self.nondiff_params)
            _step = eqx.tree_at(
                lambda s: s.controls,
                step,
                eqx.combine(_controls, step.controls),
                is_leaf=lambda x: x is None,
            )
            make = _closed.step
            if records is not None:
                make = lambda *args: _closed.recall(*args, records)
            y1, dense_info, solver_state1, hint0, *off = make(
                _terms,
                _with_times(_step, _times),
                _y0,
                _args,
                _solver_state0,
                has_output,
            )
            if no_output:
                dense_info = None
            out = filter_inexact((y1, solver_state1, dense_info))
            return out, (y1, dense_info, hint0, off)

        _, pull_back, (y1, dense_info, hint0, off) = jax.vjp(
            _local,
            diff_state,
            self.diff_params,
            controls,
            self._times(step),
            has_aux=True,
        )
        return y1, (dense_info, hint0, pull_back, *off)

    def _pull_back(
        self,
        position: Position,
        step: Step,
        y0: Y,
        aux: PyTree,
        pull_back_controls: Callable | None,
    ) -> Position:
        dense_info, hint0, pull_back, *_ = aux
        index = position.index - 1
        grad_dense_info = None
        grad_times = zeros_like(self._times(step))
        grads = position.grads
        cursors = position.cursors
        if self._may_have_output():
            grad_dense_info = self.dense.dense_info(index, self.num_steps, dense_info)
            cursors = []
            for i, cursor in enumerate(position.cursors):
                cursor, cts = self._pull_back_ts(i, cursor, step, dense_info)
                cursors.append(cursor)
                if cts is not None:
                    of_info, of_params, of_times = cts
                    grad_dense_info = add(grad_dense_info, of_info)
                    grads = _add_some(grads, of_params)
                    grad_times = add(grad_times, of_times)
        grad_solver_state1 = None
        if self.closed.reversal.has_state:
            grad_solver_state1 = position.grad_solver_state
        cotangents = position.grad_y, grad_solver_state1, grad_dense_info
        grad_state0, of_params, grad_controls, of_times = pull_back(cotangents)
        grads, grad_times = add((grads, grad_times), (of_params, of_times))
        if pull_back_controls is not None:
            (of_controls,) = pull_back_controls(grad_controls)
            grads, grad_times = add((grads, grad_times), of_controls)
        grad_y0, grad_solver_state0 = grad_state0
        return Position(
            index=index,
            cursors=cursors,
            y=y0,
            hint=hint0,
            grad_y=grad_y0,
            grad_solver_state=grad_solver_state0,
            grads=grads,
            grad_times=self._add_times(position.grad_times, index, grad_times),
            probe=position.probe,
        )

    def _add_times(
        self,
        total: TimeGradient | None,
        index: IntScalarLike,
        grad_times: PyTree[Array],
    ) -> TimeGradient | None:
        if total is None or self.moved is None:
            return None
        of_t0, of_t1, of_next = self.dense.times(index, self.num_steps)
        t0, t1 = grad_times
        cts = TimeCotangents(t0 + of_t0, t1 + of_t1, of_next)
        return total.add(index, cts, self.moved, self.num_steps, self.first_time)

    def _may_have_output(self) -> bool:
        """Whether there are any cotangents of output from inside of a step."""
        has_ts = any(x.ts is not None and x.has_gradient for x in self.outputs)
        return has_ts or self.dense.has_infos

    def _has_output(self, position: Position, step: Step) -> BoolScalarLike:
        has_output = self.dense.is_inside(position.index - 1, self.num_steps)
        for output, cursor in zip(self.outputs, position.cursors, strict=True):
            has_output = has_output | output.is_inside(cursor, step)
        return has_output

    def _output_params(self, i: int) -> PyTree[Array]:
        """Those of the parameters on which `SubSaveAt(fn=...)` may depend."""
        args, _, local = self.diff_params
        *_, _local = self.params
        return None if _local.fns[i] is None else [args, None, local]

    def _evaluate(self, i: int, params: PyTree, t: Any, y: Y) -> PyTree:
        """`SubSaveAt(fn=...)`."""
        if params is None:
            return y
        nondiff_args, _, nondiff_local = self.nondiff_params
        nondiff = [nondiff_args, None, nondiff_local]
        args, _, local = eqx.combine(params, nondiff)
        return local.fns[i](t, y, args)

    def _pull_back_end(self, position: Position, step: Step) -> Position:
        """Adds the cotangents of what was saved at the end of a step."""
        index = position.index - 1
        grad_y, grads = position.grad_y, position.grads
        grad_times = position.grad_times
        cursors = []
        for i, cursor in enumerate(position.cursors):
            cursor, cts = self.outputs[i].pull_back_end(
                cursor,
                step,
                index,
                position.y,
                ft.partial(self._evaluate, i),
                self._output_params(i),
            )
            cursors.append(cursor)
            if cts is not None:
                of_y, of_params, of_t = cts
                grad_y = add(grad_y, of_y)
                grads = _add_some(grads, of_params)
                if grad_times is not None and self.moved is not None:
                    times = TimeCotangents(0.0, 0.0, of_t)
                    grad_times = grad_times.add(
                        index, times, self.moved, self.num_steps, self.first_time
                    )
        return eqx.tree_at(
            lambda p: (p.cursors, p.grad_y, p.grads, p.grad_times),
            position,
            (cursors, grad_y, grads, grad_times),
            is_leaf=lambda x: x is None,
        )

    def _pull_back_ts(
        self, i: int, cursor: Cursor, step: Step, dense_info: DenseInfo
    ) -> tuple[Cursor, PyTree]:
        output = self.outputs[i]
        if output.ts is None or not output.has_gradient:
            return cursor, None

        def _evaluate(params, times, t, _dense_info):
            y = self.closed.interpolate(_dense_info, _with_times(step, times), t)
            return self._evaluate(i, params, t, y)

        return output.pull_back_ts(
            cursor,
            step,
            dense_info,
            _evaluate,
            self._output_params(i),
            self._times(step),
        )


def _with_times(step: Step, times: PyTree[Array]) -> Step:
    if times is None:
        return step
    return eqx.tree_at(lambda s: (s.t0, s.t1), step, times)


def _add_some(grads: PyTree[Array], some: PyTree[Array]) -> PyTree[Array]:
    """Adds gradients with respect to `args` and to what is closed over, if any."""
    if some is None:
        return grads
    args, terms, local = grads
    of_args, _, of_local = some
    return [add(args, of_args), terms, add(local, of_local)]


def _end(params: PyTree, step: Step, solver_state0: PyTree, y0: Y) -> Y:
    """Where a step from `y0` ends."""
    args, terms, local = params
    no_output = jnp.array(False)
    y1, *_ = local.step(terms, step, y0, args, solver_state0, no_output)
    return y1


def _back(params: PyTree, step_back: Callable, step: Step, hint: PyTree, y1: Y) -> Y:
    """Where a step back from `y1` leads to. `hint` is for another `y1`, if there is
    one."""
    args, terms, local = params
    if hint is not None:
        hint = local.vf(terms, step.t1, y1, args)
    y0, _ = step_back(terms, step, y1, args, hint)
    return y0


def _depends(fn: Callable[[PyTree], PyTree], x: PyTree) -> bool:
    """Whether any value of `fn` depends on `x`."""
    jaxpr = jax.make_jaxpr(lambda x: eqx.filter(fn(x), eqx.is_array))(x).jaxpr
    found = set(jaxpr.invars)
    is_found = lambda v: not isinstance(v, jex.core.Literal) and v in found
    for eqn in jaxpr.eqns:
        if any(map(is_found, eqn.invars)):
            found.update(eqn.outvars)
    return any(map(is_found, jaxpr.outvars))


def known_size(y: Y, other: Y) -> PyTree[Array]:
    """How large each entry of `y` is between two states that are known. (By what going
    back comes by it could not be told: that may have drifted to any size.)

    Entries that are much smaller than the largest one of their leaf cannot be had to
    more than the rounding errors of that: 16 units of these are within what is
    tolerated."""

    def _size(x, x2):
        size = jnp.maximum(jnp.abs(x), jnp.abs(x2))
        least = 16 * float(jnp.finfo(x.dtype).eps) ** (1 / 3)
        return jnp.maximum(size, least * jnp.max(size, initial=0))

    y, other = stop_gradient((filter_inexact(y), filter_inexact(other)))
    return jtu.tree_map(_size, y, other)


def tolerance_for(y: Y) -> float:
    """What is tolerated of each part of the certificate: two thirds of the digits of
    the least precise leaf."""
    eps = [float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(filter_inexact(y))]
    return max(eps, default=1.0) ** (2 / 3)
