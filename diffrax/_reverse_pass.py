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

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree, Real, Shaped

from ._closed_solve import as_arrays
from ._custom_types import BoolScalarLike, IntScalarLike, RealScalarLike
from ._invert_step import relative_distance, Search
from ._reverse_output import filter_inexact, stop_gradient, zeros_like
from ._reverse_step import Carried, known_size, Position, ReverseStep, where
from ._sketch import sketch, sketch_dtype
from ._step_trace import StepTrace
from ._stored_states import StoredStates


class Segment(eqx.Module):
    """How far going back over a segment has come.

    - `position`: where it is.
    - `search`: looking for the start of the step that ends there. `None` if that is not
        how steps are undone.
    - `carried`: what of the step that starts there serves for the one before.
    - `missed`: the certificate: how far this may be off, as a fraction of what is
        tolerated.
    - `lost`: the number of the step at which that first was too much for a gradient.
    - `corrections`: how many there were.
    - `tried`: whether the last step has been undone like any other; and if so, a
        sketch of the cotangents that that made.
    - `trace`: what each step took.
    - `meter`: the state of the progress meter.
    """

    position: Position
    search: Search | None
    carried: Carried
    missed: Real[Array, ""]
    lost: Int[Array, ""]
    corrections: Int[Array, ""]
    tried: Bool[Array, ""]
    sketch: Shaped[Array, " leaves"]
    trace: StepTrace
    meter: PyTree


class Worst(eqx.Module):
    """How well going backward went.

    - `missed`: the worst of by how much going back over a segment missed where it
        should have led, on the segments as they finally were undone, as a fraction of
        what is tolerated.
    - `lost`: the number of the step at which that first was too much for a gradient.
    """

    missed: Real[Array, ""]
    lost: Int[Array, ""]

    def add(self, segment: Segment, counts: BoolScalarLike) -> "Worst":
        """With a segment, if that `counts`."""
        is_worst = counts & (segment.missed > self.missed)
        return Worst(
            missed=jnp.where(is_worst, segment.missed, self.missed),
            lost=jnp.where(is_worst, segment.lost, self.lost),
        )


class Known(eqx.Module):
    """Which states are known while going back over a segment.

    - `near`, `state`: the number of a step, and the state that it starts from.
    - `all_`: whether the others are all known, too: those of `stored`, or `start`, that
        of the solve.
    """

    near: Int[Array, ""]
    state: PyTree
    all_: Bool[Array, ""]
    stored: StoredStates | None
    start: PyTree

    def read(self, index: IntScalarLike) -> PyTree:
        """The state that step `index` starts from, if that is known."""
        if self.stored is None:
            return self.state
        stored = self.stored
        is_near = index == self.near
        return lax.cond(
            eqxi.unvmap_all(is_near | jnp.invert(self.all_)),
            lambda: self.state,
            lambda: where(is_near, self.state, stored.read(index, self.start)),
        )


class Stretch(eqx.Module):
    """Which steps make up a segment, and what is known of it: all that is constant
    while going back over it.

    - `start`, `target`: the numbers of the steps between which it is, from the end.
    - `known`: which states are.
    - `exact`: whether those at the end of each step are known as well, so that there is
        nothing to be certified.
    - `try_last`: whether the last step is first to be undone like any other.
    - `size`: how large each entry of `y` is.
    """

    start: Int[Array, ""]
    target: Int[Array, ""]
    known: Known
    exact: Bool[Array, ""]
    try_last: Bool[Array, ""]
    size: PyTree[Array]


class ReversePass(eqx.Module):
    """Goes back over all steps, by `step`."""

    step: ReverseStep

    #
    # One segment
    #

    def segment(
        self,
        position: Position,
        target: IntScalarLike,
        known: Known,
        planned: IntScalarLike,
        trace: StepTrace,
        meter: PyTree,
    ) -> Segment:
        """Goes back to step `target`.

        Unless all is known, or there is no other step, the last one is first undone
        like any other, which shows what difference it makes to the cotangents that the
        state from which it started was known."""
        closed = self.step.closed
        start = position.index
        is_short = start - target <= 1
        try_last = jnp.array(False)
        if closed.certificate == "full" and closed.reversal.can_step_back:
            try_last = jnp.invert(is_short | known.all_)
        # But a report is to tell of every step.
        exact = known.all_ | is_short
        if closed.checkpoints == 0 or trace.rows is not None:
            exact = jnp.array(False)
        y0, _ = known.state
        size = lax.cond(
            eqxi.unvmap_all(exact),
            lambda: zeros_like(jtu.tree_map(jnp.abs, filter_inexact(y0))),
            lambda: known_size(y0, position.y),
        )
        stretch = Stretch(start, jnp.asarray(target), known, exact, try_last, size)

        def cond_fun(val: Segment):
            go_on = True
            if closed.checkpoints > 0:
                # Whoever corrects this much is better off making the segment again.
                most = 8 + 2 * (start - val.position.index)
                go_on = (val.missed <= 1) & (val.corrections <= most)
                # There is no more to be made again than this.
                go_on = go_on | known.all_
            return (val.position.index > target) & go_on

        return eqxi.while_loop(
            cond_fun,
            lambda val: self._go_back(val, stretch),
            self._start(position, exact, planned, trace, meter),
            buffers=lambda val: val.trace.buffers,
            kind="lax",
        )

    def _go_back(self, val: Segment, stretch: Stretch) -> Segment:
        """Goes back over one step, or one round of looking for its start."""
        index = val.position.index - 1
        is_last = index <= stretch.target
        try_ = is_last & stretch.try_last & ~val.tried
        is_known = (is_last | stretch.known.all_) & ~try_
        state0 = stretch.known.read(index)
        round_ = self.step(
            val.position,
            val.search,
            val.carried,
            is_known,
            stretch.exact,
            state0,
            stretch.size,
        )
        new, done = round_.position, round_.done
        sketch_, differs = self._compare(val, new, try_)
        # Of every step of the segment, it is only this one that tells.
        length = jnp.asarray(stretch.start - index, differs.dtype)
        differs = jnp.where(val.tried, length * differs, 0)
        signals = eqx.tree_at(lambda s: s.cotangents, round_.signals, differs)
        if self.step.closed.reversal.is_exact:
            # A single bit, somewhere on the way, may have become any error since.
            is_wrong = lax.cond(
                eqxi.unvmap_any(try_),
                lambda: try_ & jnp.invert(_has_same_bits((new.y, new.hint), state0)),
                lambda: jnp.array(False),
            )
            signals = eqx.tree_at(
                lambda s: s.rounding, signals, jnp.where(is_wrong, jnp.inf, 0)
            )
        signals = jtu.tree_map(lambda x: jnp.where(jnp.isnan(x), jnp.inf, x), signals)
        corrections, search = jnp.array(0), None
        if round_.search is not None:
            was_found = done & jnp.invert(is_known)
            corrections = jnp.where(was_found, round_.search.num_corrections, 0)
            search = round_.search.next(is_known)
        trace = val.trace.undone(
            index, round_.step, signals, is_known, val.tried, corrections, done
        )
        missed = signals.worst(is_known)
        if self.step.closed.certificate == "off":
            missed = jnp.zeros_like(missed)
        position = where(done & jnp.invert(try_), new, val.position)
        # A step that was tried is made once more.
        carried = eqx.tree_at(
            lambda c: c.is_there,
            round_.carried,
            round_.carried.is_there & jnp.invert(try_),
        )
        return Segment(
            position=position,
            search=search,
            carried=carried,
            missed=jnp.where(done, jnp.maximum(val.missed, missed), val.missed),
            lost=jnp.where(val.missed > self.step.too_much(), val.lost, index),
            corrections=val.corrections + corrections,
            tried=val.tried | (try_ & done),
            sketch=jnp.where(try_, sketch_, val.sketch),
            trace=trace,
            meter=self._show_progress(position.index, val.meter),
        )

    def _compare(
        self, val: Segment, new: Position, try_: BoolScalarLike
    ) -> tuple[Array, Real[Array, ""]]:
        """A sketch of the cotangents, where that is needed; and by how much it differs
        from the last one."""
        sketch_, norms = lax.cond(
            eqxi.unvmap_any(try_ | val.tried),
            lambda: sketch(stop_gradient(_cotangents(new))),
            lambda: (val.sketch, jnp.abs(val.sketch)),
        )
        differs = relative_distance(sketch_, val.sketch, norms, self.step.tolerance())
        return sketch_, differs

    def _start(
        self,
        position: Position,
        exact: BoolScalarLike,
        planned: IntScalarLike,
        trace: StepTrace,
        meter: PyTree,
    ) -> Segment:
        cotangents = _cotangents(position)
        probe = position.probe
        if probe is not None:
            # Here the state is known.
            probe = lax.cond(
                eqxi.unvmap_all(exact),
                lambda: probe,
                lambda: self.step.start_probe(
                    position.index, position.y, position.hint
                ),
            )
        search = None
        if self.step.closed.reversal.iterates:
            search = stop_gradient(Search.start(position.y, planned))
        return Segment(
            position=eqx.tree_at(
                lambda p: p.probe, position, probe, is_leaf=lambda x: x is None
            ),
            search=search,
            carried=self.step.start_carrying(),
            missed=jnp.zeros((), jnp.result_type(float)),
            lost=position.index,
            corrections=jnp.array(0),
            tried=jnp.array(False),
            sketch=jnp.zeros(
                len(jtu.tree_leaves(cotangents)), sketch_dtype(cotangents)
            ),
            trace=trace,
            meter=meter,
        )

    def _show_progress(self, index: IntScalarLike, meter: PyTree) -> PyTree:
        progress = 1 - index / jnp.maximum(self.step.num_steps, 1)
        # A meter calls Python, which cannot be differentiated.
        progress = lax.stop_gradient(progress)
        return self.step.closed.progress_meter.step(meter, progress)

    def replay(
        self,
        start: IntScalarLike,
        stop: IntScalarLike,
        pred: BoolScalarLike,
        state: PyTree,
        stored: StoredStates,
        trace: StepTrace,
    ) -> tuple[PyTree, StoredStates, StepTrace]:
        """If `pred`, makes the steps from `start`, which starts from `state`, up to and
        without `stop`, and stores states between. Returns the state at `stop`; if not
        `pred`, that at `start`."""
        closed = self.step.closed
        args, terms, _ = self.step.params
        has_state = closed.reversal.has_state
        y, solver_state = state
        if not has_state:
            first = self.step.solver_state0
            forgotten = closed.reversal.forget_state(first)
            solver_state = where(start == 0, first, forgotten)
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
            index, y, solver_state, stored, trace = carry
            step = self.step.record.read(index, self.step.num_steps)
            y, solver_state = as_arrays(
                closed.replay(terms, step, y, args, solver_state)
            )
            trace = trace.replayed(index)
            index = index + 1
            stored = stored.write(
                index,
                (y, solver_state if has_state else None),
                pred=((index - start) % stride == 0) & (index < stop),
            )
            return index, y, solver_state, stored, trace

        def buffers(carry):
            *_, stored, trace = carry
            return stored.buffers, trace.buffers

        _, y, solver_state, stored, trace = eqxi.while_loop(
            cond_fun,
            body_fun,
            (start, y, solver_state, stored, trace),
            buffers=buffers,
            kind="lax",
        )
        return (y, solver_state if has_state else None), stored, trace

    #
    # All of them
    #
    # A batch goes through this together: if one of its members has to make a segment
    # again, then so do all, as they would have to wait for it otherwise.

    def run(
        self, position: Position, stored: StoredStates, trace: StepTrace
    ) -> tuple[Position, Worst, StepTrace]:
        """Goes back to the start of the solve. Returns the position there, and how well
        that went."""
        closed = self.step.closed
        meter = closed.progress_meter.init()
        solver_state0 = self.step.solver_state0 if closed.reversal.has_state else None
        start = self.step.y0, solver_state0
        zero = jnp.array(0, position.index.dtype)
        if closed.checkpoints == 0:
            known = Known(zero, start, jnp.array(False), None, start)
            all_ = self.segment(position, zero, known, zero, trace, meter)
            closed.progress_meter.close(all_.meter)
            return all_.position, Worst(all_.missed, all_.lost), all_.trace
        stored = stored.extend(closed.checkpoints).drop(position.index)
        no_limit = jnp.array(jnp.iinfo(jnp.int32).max, position.index.dtype)

        def cond_fun(carry):
            position, *_ = carry
            return position.index > 0

        def body_fun(carry):
            position, worst, limit, rate, planned, stored, trace, meter = carry
            first = stored.last()
            length = position.index - first
            state = stored.read(first, start)
            again = (length > limit) | self._is_less_work(length, stored.num_free, rate)
            if not closed.reversal.can_step_back:
                again = jnp.array(True)
            again = eqxi.unvmap_any(again & (length > 1)) & (length > 1)
            near = jnp.where(again, position.index - 1, first)
            has_room = again & (length - 2 <= stored.num_free)
            state, stored, trace = self.replay(first, near, again, state, stored, trace)
            known = Known(near, state, has_room, stored, start)
            stop = jnp.where(has_room, first, near)
            new = self.segment(position, stop, known, planned, trace, meter)
            undone = position.index - new.position.index
            is_whole = (new.missed <= 1) & (new.position.index == stop)
            is_right = eqxi.unvmap_all(is_whole | (length <= 1) | again)
            counts = is_right & (length > 1) & jnp.invert(again)
            worst = worst.add(new, counts)
            # Try segments again that are as long as twice the longest one that has
            # been right since one was not.
            grown = jnp.where(again, limit, jnp.maximum(limit, 2 * length))
            grown = jnp.where(limit == no_limit, limit, grown)
            limit = jnp.where(is_right, grown, jnp.maximum(undone // 2, 1))
            rate = jnp.where(again, rate, new.corrections / jnp.maximum(undone, 1))
            position = lax.cond(is_right, lambda: new.position, lambda: position)
            stored = stored.drop(position.index)
            if new.search is not None:
                planned = new.search.planned
            return position, worst, limit, rate, planned, stored, new.trace, new.meter

        def buffers(carry):
            *_, stored, trace, _ = carry
            return stored.buffers, trace.buffers

        no_rate = jnp.zeros((), jnp.result_type(float))
        worst = Worst(no_rate, zero)
        position, worst, *_, trace, meter = eqxi.while_loop(
            cond_fun,
            body_fun,
            (position, worst, no_limit, no_rate, zero, stored, trace, meter),
            buffers=buffers,
            kind="lax",
        )
        closed.progress_meter.close(meter)
        return position, worst, trace

    def _is_less_work(
        self, length: IntScalarLike, num_free: IntScalarLike, rate: RealScalarLike
    ) -> BoolScalarLike:
        """Whether to make a segment again is less work than to undo it, if that takes
        `rate` corrections for each step.

        If there is room for all of its states then each step has to be made again once.
        That is about as much work as a guess of where it started; the full certificate
        is more in any case. If there is room for some of them, and then for all of
        those between, then each has to be made twice. A correction is as much work as
        that."""
        once = length - 2 <= num_free
        if self.step.closed.certificate != "full":
            once = once & (rate > 0.1)
        twice = length <= (num_free // 2 + 1) ** 2
        return once | (twice & (rate > 0.6))


def _cotangents(position: Position) -> PyTree[Array]:
    grad_times = position.grad_times
    return position.grad_y, position.grad_solver_state, position.grads, grad_times


def _has_same_bits(state: PyTree, other: PyTree) -> Bool[Array, ""]:
    """Whether `y` is the same; and the integers of the solver state. (If a step started
    with a jump then its vector fields may be others.)"""
    (y, solver_state), (other_y, other_solver_state) = state, other
    is_integer = lambda x: eqx.is_array(x) and not eqx.is_inexact_array(x)
    pairs = zip(
        jtu.tree_leaves((y, eqx.filter(solver_state, is_integer))),
        jtu.tree_leaves((other_y, eqx.filter(other_solver_state, is_integer))),
        strict=True,
    )
    return ft.reduce(
        jnp.logical_and, [jnp.all(a == b) for a, b in pairs], jnp.array(True)
    )
