"""A differential equation solve in terms of functions that close over nothing.

The functions inside `args` and `terms` may close over values that are being
differentiated. A custom derivative rule cannot do so. So every function that is called
by the one of `ReversibleAdjoint` is first turned into one that holds such values as
part of its PyTree structure.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._custom_types import Args, RealScalarLike, Y
from ._known_controls import Asked, evaluate_controls, know_controls, listen
from ._reversal import AbstractReversal
from ._saveat import SaveAt
from ._step_record import may_jump, Step, StepRecord
from ._step_size_controller import ConstantStepSize, StepTo
from ._stored_states import StoredStates
from ._term import AbstractTerm
from ._upstream_adjoint import _inner_loop


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

    - `step`: makes one step; a function of `(terms, step, y0, args, solver_state,
        has_output)` that returns `(y1, dense_info, solver_state, hint)`.
    - `controls`: a function of `(terms, step)`, which is what `step.controls` is to be.
        `None` if that is to be `None`.
    """

    step: Callable
    controls: Callable | None


class ClosedSolve(eqx.Module):
    """A solve, and the parts of it that are needed for going back over it.

    - `forward`: makes the whole solve; a function of `(y, solver_state, args, terms)`
        that returns `(final_state, aux_stats, record, stored)`.
    - `replay`: makes one step; a function of `(terms, step, y0, args, solver_state)`
        that returns `(y1, solver_state)`.
    - `step_back`: undoes one step, the controls of which are known; a function of
        `(terms, step, y1, args, hint)` that returns `(y0, solver_state)`. `None` if
        there is no such thing.
    - `vf`: a function of `(terms, t, y, args)`, which is the `hint` for a step that
        ends at `(t, y)` if that is not the solver state.
    - `increment`: a function of `(terms, step, args, hint)`, which is the product of
        `vf` and the control of a step, which is known. `None` if there is no such
        thing.
    - `interpolate`: the solution inside of one step; a function of `(dense_info, step,
        t)`.
    - `reversal`: how steps are undone. (Not the instance, the methods of which are the
        above.)
    - `max_corrections`: how often to correct a guess of where a step started.
    - `checkpoints`, `certificate`: as passed to the adjoint.
    - `saveat`, `t0`, `t1`: as passed to `diffeqsolve`.
    - `on_failure`: what to do if there is no gradient to be had: `"raise"`, `"nan"` or
        `"ignore"`.
    - `name`: what to call the adjoint in error messages.
    """

    forward: Callable
    replay: Callable
    step_back: Callable | None
    vf: Callable
    increment: Callable | None
    interpolate: Callable
    reversal: type[AbstractReversal] = eqx.field(static=True)
    max_corrections: int = eqx.field(static=True)
    checkpoints: int = eqx.field(static=True)
    certificate: str = eqx.field(static=True)
    saveat: SaveAt
    t0: RealScalarLike
    t1: RealScalarLike
    on_failure: str
    name: str


def set_y_and_solver_state(state: Any, y: Y, solver_state: PyTree) -> Any:
    return eqx.tree_at(
        lambda s: (s.y, s.solver_state),
        state,
        (y, solver_state),
        is_leaf=lambda x: x is None,
    )


# In what follows, `solve` is a pair: how steps are undone, and which controls the
# solver asks for.
_Solve = tuple[AbstractReversal, Asked | None]


def _replay(solve: _Solve, terms, step, y0, args, solver_state):
    reversal, _ = solve
    y1, _, solver_state = reversal.replay(terms, step, y0, args, solver_state)
    return as_arrays((y1, solver_state))


def _step(solve: _Solve, terms, step, y0, args, solver_state, has_output):
    reversal, _ = solve
    terms = _with_controls(solve, terms, step)
    return as_arrays(reversal.step(terms, step, y0, args, solver_state, has_output))


def _step_back(solve: _Solve, terms, step, y1, args, hint):
    reversal, _ = solve
    terms = _with_controls(solve, terms, step)
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
    terms: PyTree[AbstractTerm],
    step: Step,
    y: Y,
    args: Args,
    solver_state: PyTree,
) -> Asked | None:
    """Which controls making and undoing a step ask for. `None` if there is nothing to
    be gained by knowing them."""
    if not reversal.knows_controls:
        return None
    asked: list[Asked | None] = []

    def make_and_undo(terms, step, y, args, solver_state):
        def fn(terms):
            y1, _, _, hint = reversal.step(
                terms, step, y, args, solver_state, jnp.array(True)
            )
            reversal.step_back(terms, step, y1, args, hint)

        asked.append(listen(fn, terms, step.t0, step.t1))

    eqx.filter_eval_shape(make_and_undo, terms, step, y, args, solver_state)
    [out] = asked
    return out if out is not None and any(out) else None


def close_solve(
    loop: Callable,
    y: Y,
    solver_state: PyTree,
    args: Args,
    terms: PyTree[AbstractTerm],
    *,
    name: str,
    reversal: AbstractReversal,
    checkpoints: int,
    certificate: str,
    init_state: Any,
    max_steps: int,
    stepsize_controller: Any,
    saveat: SaveAt,
    t0: RealScalarLike,
    t1: RealScalarLike,
    on_failure: str,
    **kwargs: Any,
) -> tuple[LocalSolve, ClosedSolve]:
    """Prepares a solve for `reversible_loop`.

    The arguments are those of [`diffrax.AbstractAdjoint.loop`][]. In addition, `loop`
    is the integration loop, `reversal` is how to undo the steps of its solver,
    `checkpoints` and `certificate` are those of its adjoint, and `name` is what to call
    that in error messages.

    Returns what is differentiated, and the solve.
    """
    jumps = init_state.made_jump is not False or may_jump(stepsize_controller)
    recorded = reversal.record_state(solver_state)
    empty_record = StepRecord.allocate(init_state.tprev, max_steps, jumps, recorded)

    def forward(_y, _solver_state, _args, _terms):
        _init_state = set_y_and_solver_state(init_state, _y, _solver_state)
        # Upstream's loop takes a `True` that is known when tracing to hold for every
        # step, if the controller keeps all steps.
        keeps_all = type(stepsize_controller) in (ConstantStepSize, StepTo)
        always_jumps = init_state.made_jump is True and keeps_all
        if init_state.made_jump is True and not keeps_all:
            _init_state = eqx.tree_at(
                lambda s: s.made_jump, _init_state, jnp.asarray(True)
            )
        _loop = ft.partial(
            loop,
            args=_args,
            terms=_terms,
            solver=reversal.solver,
            init_state=_init_state,
            max_steps=max_steps,
            stepsize_controller=stepsize_controller,
            saveat=saveat,
            t0=t0,
            t1=t1,
            **kwargs,
        )
        kept = _y, _solver_state if reversal.has_state else None
        stored = StoredStates.allocate(checkpoints, kept)
        return _loop_and_record(_loop, reversal, empty_record, stored, always_jumps)

    step = eqx.filter_eval_shape(empty_record.read, 0, 1)
    local, parts = _close_parts(reversal, name, terms, step, y, args, solver_state)
    convert: Any = eqx.filter_closure_convert
    closed_forward = convert(forward, y, solver_state, args, terms)
    return local, ClosedSolve(
        forward=_without_gradient(closed_forward, _ids(local), name),
        **parts,
        reversal=type(reversal),
        max_corrections=reversal.max_corrections,
        checkpoints=checkpoints,
        certificate=certificate,
        saveat=saveat,
        t0=t0,
        t1=t1,
        on_failure=on_failure,
        name=name,
    )


def _close_parts(
    reversal: AbstractReversal,
    name: str,
    terms: PyTree[AbstractTerm],
    step: Step,
    y: Y,
    args: Args,
    solver_state: PyTree,
) -> tuple[LocalSolve, dict[str, Any]]:
    """Returns `local`, and the other functions of a single step."""
    solve = reversal, _listen(reversal, terms, step, y, args, solver_state)

    def convert(fn, *args):
        converted: Any = eqx.filter_closure_convert
        return converted(ft.partial(fn, solve), *args)

    def close(fn, *args):
        return _without_gradient(convert(fn, *args), _ids(local), name)

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
    local = LocalSolve(convert(_step, *step_args, has_output), controls)
    _, dense_info, _, hint = eqx.filter_eval_shape(local.step, *step_args, has_output)
    step_back = increment = None
    if reversal.can_step_back:
        step_back = close(_step_back, terms, with_controls, y, args, hint)
    if not reversal.has_state and hint is not None:
        increment = close(_increment, terms, with_controls, args, hint)
    interpolate = convert(_interpolate, dense_info, with_controls, step.t0)
    return local, dict(
        replay=close(_replay, terms, step, y, args, solver_state),
        step_back=step_back,
        vf=close(_vf, terms, step.t1, y, args),
        increment=increment,
        interpolate=_without_gradient(interpolate, set(), name),
    )


def _ids(local: LocalSolve) -> set[int]:
    """Of everything that these functions close over. They are what passes on the
    gradient with respect to that. Nothing else does."""
    closed: list[Any] = [local.step, local.controls]
    return {id(x) for fn in closed if fn is not None for x in fn.consts}


def _without_gradient(closed: Any, has_gradient: set[int], name: str) -> Any:
    msg = (
        f"Cannot differentiate, when using `adjoint={name}()`, with respect to a value "
        "that only the step size controller, its state, the times of the solve, or the "
        "solver's interpolation depend on. Consider using "
        "`adjoint=RecursiveCheckpointAdjoint()`, or wrapping the value in "
        "`jax.lax.stop_gradient`."
    )
    consts = [
        lax.stop_gradient(x)
        if id(x) in has_gradient
        else eqxi.nondifferentiable(x, msg=msg)
        for x in closed.consts
    ]
    return eqx.tree_at(lambda c: c.consts, closed, consts)


def _loop_and_record(
    loop: Callable,
    reversal: AbstractReversal,
    record: StepRecord,
    stored: StoredStates,
    always_jumps: bool,
) -> tuple[Any, Any, StepRecord, StoredStates]:
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
        final_val, *final = eqxi.while_loop(
            _cond_fun,
            _body_fun,
            (init_val, record, stored),
            max_steps=max_steps,
            buffers=_buffers,
            kind="lax",
        )
        return final_val

    final_state, aux_stats = loop(
        inner_while_loop=ft.partial(_inner_loop, kind="lax"),
        outer_while_loop=outer_while_loop,
    )
    assert final is not None
    return final_state, aux_stats, *final
