"""A differential equation solve in terms of functions that close over nothing.

The functions inside `args` and `terms` may close over values that are being
differentiated. A custom derivative rule cannot do so. So every function that is called
by the one of `ReversibleAdjoint` is first turned into one that holds such values as
part of its PyTree structure.
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._closed_function import close_function, ClosedFunction
from ._constant_record import ConstantRecord
from ._custom_types import Args, BoolScalarLike, IntScalarLike, RealScalarLike, Y
from ._event import Event
from ._fence import fence
from ._heuristics import is_unsafe_sde
from ._known_controls import (
    Asked,
    evaluate_controls,
    has_no_controls,
    know_controls,
    listen,
)
from ._progress_meter import AbstractProgressMeter
from ._reversal import AbstractReversal
from ._saveat import save_y, SaveAt, SubSaveAt
from ._shared_evaluations import SharedEvaluations
from ._solver import AbstractSolver
from ._step_record import may_jump, Step, StepRecord
from ._step_size_controller import (
    AbstractStepSizeController,
    ClipStepSizeController,
    ConstantStepSize,
    PIDController,
    StepTo,
)
from ._step_times import set_times, Times
from ._stored_states import StoredStates
from ._term import AbstractTerm
from ._upstream_adjoint import _inner_loop
from ._without_tangents import without_tangents


def as_arrays(tree: PyTree) -> PyTree:
    """Makes arrays, of a dtype that is not weak, of everything like an array."""

    def _as_array(x):
        if eqx.is_array_like(x):
            x = jnp.asarray(x)
            return lax.convert_element_type(x, x.dtype)
        return x

    return jtu.tree_map(_as_array, tree)


class LocalSolve(eqx.Module):
    """What is differentiated.

    All of these functions close over the same values, each of which is held once.

    - `step`: makes one step; a function of `(terms, step, y0, args, solver_state,
        has_output)` that returns `(y1, dense_info, solver_state, hint)`.
    - `record_back`: undoes one step, and records what it evaluates; a function of
        `(terms, step, y1, args, hint, carried, has_carried)` that returns `(y0,
        solver_state, records, carried)`, where `carried` is of what was recorded for
        the step before. `None` if evaluations are not shared.
    - `recall`: makes one step from that; a function of the arguments of `step` and
        `records` that returns what `step` does, and by how much the points are off at
        which these were recorded. `None` likewise.
    - `controls`: a function of `(terms, step)`, which is what `step.controls` is to be.
        `None` if that is to be `None`.
    - `vf`: a function of `(terms, t, y, args)`, which is the `hint` for a step that
        ends at `(t, y)` if that is not the solver state.
    - `fns`: for each `SubSaveAt`, what it saves of the solution; a function of `(t, y,
        args)`. `None` if that is `y` itself.
    """

    closed_over: list[Array]
    _step: "_Open"
    _record_back: "_Open | None"
    _recall: "_Open | None"
    _controls: "_Open | None"
    _vf: "_Open"
    _fns: "list[_Open | None]"

    def __init__(self, step, record_back, recall, controls, vf, fns):
        found: dict[int, Any] = {}
        for closed in (step, record_back, recall, controls, vf, *fns):
            if closed is not None:
                found |= {id(x): x for x in closed.consts}
        self.closed_over = list(found.values())
        places = {key: i for i, key in enumerate(found)}

        def _open(closed):
            return None if closed is None else _Open.of(closed, places)

        self._step = cast(_Open, _open(step))
        self._record_back = _open(record_back)
        self._recall = _open(recall)
        self._controls = _open(controls)
        self._vf = cast(_Open, _open(vf))
        self._fns = [_open(fn) for fn in fns]

    def _close(self, fn: "_Open | None") -> Any:
        return None if fn is None else fn.close(self.closed_over)

    @property
    def step(self) -> Callable:
        return self._close(self._step)

    @property
    def record_back(self) -> Callable | None:
        return self._close(self._record_back)

    @property
    def recall(self) -> Callable | None:
        return self._close(self._recall)

    @property
    def controls(self) -> Callable | None:
        return self._close(self._controls)

    @property
    def vf(self) -> Callable:
        return self._close(self._vf)

    @property
    def fns(self) -> list[Callable | None]:
        return [self._close(fn) for fn in self._fns]


class _Open(eqx.Module):
    """A function without the values that it closes over, and where to find them."""

    fn: Any
    places: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, closed: Any, places: dict[int, int]) -> "_Open":
        fn = eqx.tree_at(lambda c: c.consts, closed, [])
        return cls(fn, tuple(places[id(x)] for x in closed.consts))

    def close(self, values: list[Any]) -> Callable:
        consts = [values[i] for i in self.places]
        return eqx.tree_at(lambda c: c.consts, self.fn, consts)


class ClosedSolve(eqx.Module):
    """A solve, and the parts of it that are needed for going back over it.

    - `forward`: makes all steps; a function of `(y, solver_state, args, terms, times,
        token)` that returns `(final_state, record, stored)`. If `token` has a tangent
        then the derivative is that of the times of the steps alone.
    - `replay`: makes one step; a function of `(terms, step, y0, args, solver_state)`
        that returns `(y1, solver_state)`.
    - `step_back`: undoes one step, the controls of which are known; a function of
        `(terms, step, y1, args, hint)` that returns `(y0, solver_state)`. `None` if
        there is no such thing.
    - `increment`: a function of `(terms, step, args, hint)`, which is the product of
        `vf` and the control of a step, which is known. `None` if there is no such
        thing.
    - `carried`: the structure of what `LocalSolve.record_back` takes from the step that
        comes next.
    - `interpolate`: the solution inside of one step; a function of `(dense_info, step,
        t)`.
    - `reversal`: how steps are undone. (Not the instance, the methods of which are the
        above.)
    - `max_corrections`: how often to correct a guess of where a step started.
    - `checkpoints`, `certificate`: as passed to the adjoint.
    - `every`: for each `SubSaveAt`, its `steps`.
    - `first_time`: which of `StepTo(ts=...)` is the end of the first step but one.
    - `t0`, `t1`: as passed to `diffeqsolve`.
    - `on_failure`: what to do if there is no gradient to be had: `"raise"`, `"nan"` or
        `"ignore"`.
    - `progress_meter`: shows how far going back has come.
    - `name`: what to call the adjoint in error messages.
    """

    forward: Callable
    replay: Callable
    step_back: Callable | None
    increment: Callable | None
    carried: PyTree[jax.ShapeDtypeStruct]
    interpolate: Callable
    reversal: type[AbstractReversal] = eqx.field(static=True)
    max_corrections: int = eqx.field(static=True)
    checkpoints: int = eqx.field(static=True)
    certificate: str = eqx.field(static=True)
    every: tuple[int, ...] = eqx.field(static=True)
    first_time: IntScalarLike
    t0: RealScalarLike
    t1: RealScalarLike
    on_failure: str
    progress_meter: AbstractProgressMeter
    name: str


def set_y_and_solver_state(state: Any, y: Y, solver_state: PyTree) -> Any:
    return eqx.tree_at(
        lambda s: (s.y, s.solver_state),
        state,
        (y, solver_state),
        is_leaf=lambda x: x is None,
    )


def without_derivative(solver: AbstractSolver) -> AbstractSolver:
    """The same solver, for where its steps are not differentiated in reverse mode. (Its
    loop over stages need not be such that it can be, which takes more.)"""
    for field in dataclasses.fields(solver):
        value = getattr(solver, field.name)
        if isinstance(value, AbstractSolver):
            value = without_derivative(value)
        elif field.name == "scan_kind" and value is None:
            value = "lax"
        else:
            continue
        solver = eqx.tree_at(
            lambda s, name=field.name: getattr(s, name),
            solver,
            value,
            is_leaf=lambda x: x is None,
        )
    return solver


class _MeterWithoutGradient(eqx.Module):
    """Steps a progress meter, which calls Python, while times are differentiated."""

    meter: AbstractProgressMeter

    def step(self, state: PyTree, progress: RealScalarLike) -> PyTree:
        return self.meter.step(state, lax.stop_gradient(progress))


class _StepWithoutTimes(eqx.Module):
    """A solver, the steps of which are not differentiated by whoever differentiates
    their times alone: with `token`, see `without_tangents`."""

    solver: AbstractSolver
    token: Array

    def __getattr__(self, name):
        if name in ("solver", "token"):
            raise AttributeError(name)
        return getattr(self.solver, name)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        terms, t0, t1, y0, args, solver_state = without_tangents(
            self.token, (terms, t0, t1, y0, args, solver_state)
        )
        return self.solver.step(terms, t0, t1, y0, args, solver_state, made_jump)


def has_steps_without_gradient(controller: AbstractStepSizeController) -> bool:
    """Whether this is known to be a controller through the steps of which no gradient
    flows: those of Diffrax stop it."""
    if type(controller) is ClipStepSizeController:
        return has_steps_without_gradient(controller.controller)
    return type(controller) in (ConstantStepSize, StepTo, PIDController)


# In what follows, `solve` is a pair: how steps are undone, and which controls the
# solver asks for.
_Solve = tuple[AbstractReversal, Asked | None]


def _replay(solve: _Solve, terms, step, y0, args, solver_state):
    reversal, _ = solve
    reversal = eqx.tree_at(
        lambda r: r.solver, reversal, without_derivative(reversal.solver)
    )
    y1, _, solver_state = reversal.replay(terms, step, y0, args, solver_state)
    return as_arrays((y1, solver_state))


def _step(solve: _Solve, terms, step, y0, args, solver_state, has_output):
    reversal, _ = solve
    terms = fence(_with_controls(solve, terms, step), y0)
    return as_arrays(reversal.step(terms, step, y0, args, solver_state, has_output))


def _record_back(shared: SharedEvaluations, *args):
    y0, solver_state0, *records = shared.record_back(*args)
    return *as_arrays((y0, solver_state0)), *records


def _recall(shared: SharedEvaluations, *args):
    return as_arrays(shared.recall(*args))


def _step_back(solve: _Solve, terms, step, y1, args, hint):
    reversal, _ = solve
    terms = fence(_with_controls(solve, terms, step), y1)
    return as_arrays(reversal.step_back(terms, step, y1, args, hint))


def _vf(solve: _Solve, terms, t, y, args):
    reversal, _ = solve
    return as_arrays(reversal.vf(terms, t, y, args))


def _increment(solve: _Solve, terms, step, args, vf):
    reversal, _ = solve
    terms = _with_controls(solve, terms, step)
    return as_arrays(reversal.increment(terms, step, args, vf))


def _interpolate(solve: _Solve, dense_info, step, t):
    reversal, _ = solve
    interpolation_cls = reversal.solver.interpolation_cls
    return interpolation_cls(t0=step.t0, t1=step.t1, **dense_info).evaluate(t)


def _controls(solve: _Solve, terms, step):
    _, asked = solve
    assert asked is not None
    return as_arrays(evaluate_controls(asked, terms, step.t0, step.t1))


def _with_controls(solve: _Solve, terms, step):
    _, asked = solve
    if asked is None:
        return terms
    return know_controls(asked, terms, step.controls)


def _listen(
    reversal: AbstractReversal,
    name: str,
    terms: PyTree[AbstractTerm],
    step: Step,
    y: Y,
    args: Args,
    solver_state: PyTree,
) -> Asked | None:
    """Which controls making and undoing a step ask for. `None` if there is nothing to
    be gained by knowing them.

    An `UnsafeBrownianPath` has no values but those of its increments, which are the
    same for the same interval. So it is refused if any other is asked for than that of
    the whole step."""
    is_unsafe = is_unsafe_sde(terms)
    if not is_unsafe and (not reversal.knows_controls or has_no_controls(terms)):
        return None
    asked: list[Asked | None] = []

    def make_and_undo(terms, step, y, args, solver_state):
        def fn(terms):
            y1, _, _, hint = reversal.step(
                terms, step, y, args, solver_state, jnp.array(True)
            )
            if reversal.can_step_back:
                reversal.step_back(terms, step, y1, args, hint)

        asked.append(listen(fn, terms, step.t0, step.t1))

    eqx.filter_eval_shape(make_and_undo, terms, step, y, args, solver_state)
    [out] = asked
    if is_unsafe and out is None:
        raise ValueError(
            f"Cannot use `adjoint={name}()` with `UnsafeBrownianPath` and `solver="
            f"{type(reversal.solver).__name__}(...)`, which asks for other increments "
            "than those of whole steps. Consider using `VirtualBrownianTree` instead."
        )
    if not reversal.knows_controls:
        return None
    return out if out is not None and any(out) else None


def close_solve(
    loop: Callable,
    y: Y,
    solver_state: PyTree,
    args: Args,
    terms: PyTree[AbstractTerm],
    times: Times,
    *,
    name: str,
    reversal: AbstractReversal,
    checkpoints: int,
    certificate: str,
    on_failure: str,
    backward_meter: AbstractProgressMeter,
    **kwargs: Any,
) -> tuple[LocalSolve, ClosedSolve]:
    """Prepares a solve for `reversible_loop`.

    `loop` is the integration loop, the arguments of which are these and `kwargs`.
    `times` is what the times of the steps depend on, `reversal` is how to undo the
    steps of its solver, `checkpoints`, `certificate`, `on_failure` and `backward_meter`
    (its `progress_meter`) are those of the adjoint, and `name` is what to call that in
    error messages.

    Returns what is differentiated, and the solve.
    """
    init_state, controller = kwargs["init_state"], kwargs["stepsize_controller"]
    subs = flatten_subs(kwargs["saveat"])
    empty_record = ft.partial(
        _empty_record, reversal, controller, kwargs["max_steps"], init_state.made_jump
    )
    step = eqx.filter_eval_shape(lambda s: empty_record(s).read(0, 1), init_state)
    local, parts = _close_parts(
        reversal, name, terms, subs, step, y, args, solver_state
    )
    elsewhere = _gradient_elsewhere(reversal, times, y, args, terms, **kwargs)
    forward = ft.partial(_forward, loop, reversal, checkpoints, empty_record, kwargs)
    closed_forward = close_function(
        forward, y, solver_state, args, terms, times, jnp.array(0.0)
    )
    has_gradient = _ids(local.closed_over) | _ids(elsewhere)
    return local, ClosedSolve(
        forward=_without_gradient(closed_forward, has_gradient, name),
        **parts,
        reversal=type(reversal),
        max_corrections=reversal.max_corrections,
        checkpoints=checkpoints,
        certificate=certificate,
        every=tuple(sub.steps for sub in subs),
        first_time=init_state.controller_state if type(controller) is StepTo else 0,
        t0=kwargs["t0"],
        t1=times.t1,
        on_failure=on_failure,
        progress_meter=backward_meter,
        name=name,
    )


def _empty_record(
    reversal: AbstractReversal,
    controller: AbstractStepSizeController,
    max_steps: int | None,
    made_jump: BoolScalarLike,
    state: Any,
) -> StepRecord | ConstantRecord:
    """For a solve from `state`."""
    if max_steps is None and type(controller) is StepTo:
        max_steps = len(controller.ts) - 1
    if max_steps is None:
        return ConstantRecord.allocate(state)
    jumps = made_jump is not False or may_jump(controller)
    recorded = reversal.record_state(state.solver_state)
    return StepRecord.allocate(state.tprev, max_steps, jumps, recorded)


def _forward(
    loop: Callable,
    reversal: AbstractReversal,
    checkpoints: int,
    empty_record: Callable,
    kwargs: dict[str, Any],
    y: Y,
    solver_state: PyTree,
    args: Args,
    terms: PyTree[AbstractTerm],
    times: Times,
    token: Array,
) -> tuple[Any, StepRecord | ConstantRecord, StoredStates]:
    """Makes all steps."""
    controller = kwargs["stepsize_controller"]
    init_state = set_y_and_solver_state(kwargs["init_state"], y, solver_state)
    new_controller, init_state = set_times(times, controller, init_state)
    record = empty_record(init_state)
    # Upstream's loop takes a `True` that is known when tracing to hold for every step,
    # if the controller keeps all steps.
    keeps_all = type(controller) in (ConstantStepSize, StepTo)
    always_jumps = init_state.made_jump is True and keeps_all
    if init_state.made_jump is True and not keeps_all:
        init_state = eqx.tree_at(lambda s: s.made_jump, init_state, jnp.asarray(True))
    event = kwargs["event"]
    if event is not None:
        # The root of its condition is looked for after the loop.
        event = Event(event.cond_fn, None, event.direction)
    solver: Any = without_derivative(reversal.solver)
    if has_steps_without_gradient(controller):
        solver = _StepWithoutTimes(solver, token)
    changed = dict(
        args=args,
        terms=terms,
        solver=solver,
        init_state=init_state,
        stepsize_controller=new_controller,
        event=event,
        t1=times.t1,
        progress_meter=_MeterWithoutGradient(kwargs["progress_meter"]),
    )
    kept = y, solver_state if reversal.has_state else None
    stored = StoredStates.allocate(checkpoints, kept)
    closed_loop = ft.partial(loop, **(kwargs | changed))
    return _loop_and_record(closed_loop, reversal, record, stored, always_jumps)


def _gradient_elsewhere(
    reversal: AbstractReversal,
    times: Times,
    y: Y,
    args: Args,
    terms: PyTree[AbstractTerm],
    *,
    init_state: Any,
    event: Event | None,
    progress_meter: AbstractProgressMeter,
    **kwargs: Any,
) -> list[Any]:
    """The values that the steps depend on without being differentiated with respect to
    them: their gradient, if any, comes of something else."""
    del progress_meter
    ts = [sub.ts for sub in flatten_subs(kwargs["saveat"])]
    states = init_state.event_values, init_state.event_tprev, init_state.event_tnext
    found = jtu.tree_leaves((kwargs["t0"], kwargs["dt0"], ts, states))
    if event is None:
        return found

    def conditions(_t, _y, _args, _terms):
        fns = jtu.tree_leaves(event.cond_fn, is_leaf=callable)
        given = dict(kwargs, terms=_terms, solver=reversal.solver, t1=times.t1)
        return [fn(_t, _y, _args, **given) for fn in fns]

    return found + close_function(conditions, times.tprev, y, args, terms).consts


def flatten_subs(saveat: SaveAt) -> list[SubSaveAt]:
    """All of `SaveAt(subs=...)`."""
    is_sub = lambda x: isinstance(x, SubSaveAt)
    return jtu.tree_leaves(saveat.subs, is_leaf=is_sub)


def _close_parts(
    reversal: AbstractReversal,
    name: str,
    terms: PyTree[AbstractTerm],
    subs: list[SubSaveAt],
    step: Step,
    y: Y,
    args: Args,
    solver_state: PyTree,
) -> tuple[LocalSolve, dict[str, Any]]:
    """Returns `local`, and the other functions of a single step."""
    solve = reversal, _listen(reversal, name, terms, step, y, args, solver_state)

    def convert(fn, *args):
        return close_function(ft.partial(fn, solve), *args)

    def close(fn, *args):
        closed = convert(fn, *args)
        return _without_gradient(closed, _ids(local.closed_over), name)

    controls, with_controls = None, step
    if solve[1] is not None:
        controls = convert(_controls, terms, step)
        with_controls = eqx.tree_at(
            lambda s: s.controls,
            step,
            eqx.filter_eval_shape(controls, terms, step),
            is_leaf=lambda x: x is None,
        )
    step_args = terms, with_controls, y, args, solver_state
    has_output = jnp.array(True)
    closed_step = convert(_step, *step_args, has_output)
    out = eqx.filter_eval_shape(closed_step, *step_args, has_output)
    _, dense_info, _, hint = out
    record_back, recall, carried = _close_shared(solve, hint, *step_args, has_output)
    local = LocalSolve(
        closed_step,
        record_back,
        recall,
        controls,
        convert(_vf, terms, step.t1, y, args),
        [_close_fn(sub.fn, step.t1, y, args) for sub in subs],
    )
    step_back = increment = None
    if reversal.can_step_back:
        step_back = close(_step_back, terms, with_controls, y, args, hint)
    if not reversal.has_state and hint is not None:
        increment = close(_increment, terms, with_controls, args, hint)
    interpolate = convert(_interpolate, dense_info, with_controls, step.t0)
    return local, dict(
        replay=close(_replay, terms, step, y, args, solver_state),
        step_back=step_back,
        increment=increment,
        carried=carried,
        interpolate=_without_gradient(interpolate, set(), name),
    )


def _close_shared(
    solve: _Solve, hint: PyTree, *step_args: Any
) -> tuple[ClosedFunction | None, ClosedFunction | None, PyTree]:
    """`LocalSolve.record_back`, `LocalSolve.recall` and `ClosedSolve.carried`."""
    reversal, _ = solve
    terms, step, y, args, solver_state, _ = step_args

    def prepare(terms, step, y):
        return fence(_with_controls(solve, terms, step), y)

    shared = SharedEvaluations.of(reversal, prepare, terms, step, y, args, solver_state)
    if shared is None:
        return None, None, None
    carried = eqx.filter_eval_shape(
        shared.record_end, terms, step, y, args, solver_state
    )
    back_args = terms, step, y, args, hint, carried, jnp.array(True)
    record_back = close_function(ft.partial(_record_back, shared), *back_args)
    _, _, records, _ = eqx.filter_eval_shape(record_back, *back_args)
    recall = close_function(ft.partial(_recall, shared), *step_args, records)
    return record_back, recall, carried


def _close_fn(fn: Callable, t: Any, y: Y, args: Args) -> Callable | None:
    if fn is save_y:
        return None
    return close_function(lambda *a: as_arrays(fn(*a)), t, y, args)


def _ids(values: list[Any]) -> set[int]:
    return {id(x) for x in values}


def _without_gradient(closed: Any, has_gradient: set[int], name: str) -> Any:
    """`has_gradient` are the values, by `id`, the gradient with respect to which is
    passed on elsewhere."""
    msg = (
        f"Cannot differentiate, when using `adjoint={name}()`, with respect to a value "
        "that only the step size controller, its state, or the solver's interpolation "
        "depend on. Consider using `adjoint=RecursiveCheckpointAdjoint()`, or wrapping "
        "the value in `jax.lax.stop_gradient`."
    )
    consts = [
        x if id(x) in has_gradient else eqxi.nondifferentiable(x, msg=msg)
        for x in closed.consts
    ]
    return eqx.tree_at(lambda c: c.consts, closed, consts)


def _loop_and_record(
    loop: Callable,
    reversal: AbstractReversal,
    record: StepRecord | ConstantRecord,
    stored: StoredStates,
    always_jumps: bool,
) -> tuple[Any, StepRecord | ConstantRecord, StoredStates]:
    """Runs `loop`, recording every accepted step and storing some states."""
    final: Any = None

    def outer_while_loop(cond_fun, body_fun, init_val, *, max_steps, buffers):
        def _cond_fun(val):
            state, *_ = val
            return cond_fun(state)

        def _body_fun(val):
            state, _record, _stored = val
            new_state = body_fun(state)
            accepted = new_state.num_accepted_steps > state.num_accepted_steps
            _record = _record.write(
                state.num_accepted_steps,
                state.tprev,
                state.tnext,
                True if always_jumps else state.made_jump,
                reversal.record_state(state.solver_state),
                pred=accepted,
            )
            _stored = _stored.thin_and_write(
                new_state.num_accepted_steps,
                (new_state.y, new_state.solver_state if reversal.has_state else None),
                pred=accepted,
            )
            return new_state, _record, _stored

        def _buffers(val):
            state, _record, _stored = val
            return buffers(state), _record.buffers, _stored.buffers

        nonlocal final
        final = eqxi.while_loop(
            _cond_fun,
            _body_fun,
            (init_val, record, stored),
            max_steps=max_steps,
            buffers=_buffers,
            kind="lax",
        )
        final_state, *_ = final
        return final_state

    # What comes after the loop is made, and differentiated, elsewhere.
    loop(
        inner_while_loop=ft.partial(_inner_loop, kind="lax"),
        outer_while_loop=outer_while_loop,
    )
    assert final is not None
    final_state, record, stored = final
    record = eqx.tree_at(lambda r: r.end, record, final_state.tprev)
    return final_state, record, stored
