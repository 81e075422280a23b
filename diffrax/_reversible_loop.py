"""The integration loop of `ReversibleAdjoint`, and its derivative.

Forward, this is Diffrax's own loop, which leaves a record of the times of its steps and
stores some of its states. Backward, it is a loop over these steps from the last to the
first, which undoes each, linearises it where it started, and pulls the cotangents back
through it.
"""

from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._closed_solve import as_arrays, ClosedSolve, LocalSolve
from ._constant_record import ConstantRecord
from ._custom_types import Args, Y
from ._drift_error import refuse_drift
from ._reverse_mode_only import reverse_mode_only
from ._reverse_output import Cursor, DenseOutput, SavedOutput
from ._reverse_pass import ReversePass
from ._reverse_step import add, filter_inexact, Position, ReverseStep, zeros_like
from ._saveat import SubSaveAt
from ._step_record import Step, StepRecord
from ._step_size_controller.clip import _ClipState
from ._step_times import directions, TimeCotangents, TimeGradient, Times
from ._step_trace import StepTrace
from ._term import AbstractTerm


class Inputs(eqx.Module):
    """What a solve is differentiated with respect to.

    - `y`, `solver_state`: at the start of the solve. (If `solver_state` came from
        `solver.init`, then JAX takes its gradient on to `y0`, `args` and `terms`.)
    - `args`: explicit parameters.
    - `terms`: implicit parameters, as part of the vector field.
    - `local`: parameters that the vector field, or `SubSaveAt(fn=...)`, closes over.
    - `times`: what the times of the steps depend on.
    - `save_ts`: the `ts` of each `SubSaveAt`.
    - `closed`: the arrays of the `ClosedSolve`. They have no gradient here: what they
        depend on is above. But further derivatives see them.
    - `trace`: which is no input: its "cotangent" is what each step took to undo. `None`
        if nobody asks for that.
    """

    y: Y
    solver_state: PyTree
    args: Args
    terms: PyTree[AbstractTerm]
    local: LocalSolve
    times: Times
    save_ts: list[Any]
    closed: Any
    trace: Array | None


@eqx.filter_custom_vjp
def reversible_loop(inputs: Inputs, closed: Any) -> Any:
    """Makes the steps of a solve, and differentiates it by undoing each. Returns the
    state after the last step. `closed` is what is no array of a `ClosedSolve`."""
    closed = eqx.combine(inputs.closed, closed)
    final_state, _, _ = _forward(inputs, inputs.times, closed)
    return _batch_as(final_state, inputs)


def _forward(
    inputs: Inputs, times: Times, closed: ClosedSolve, token: Array | None = None
) -> Any:
    token = jnp.array(0.0) if token is None else token
    return closed.forward(
        inputs.y, inputs.solver_state, inputs.args, inputs.terms, times, token
    )


def _forward_and_moved(
    inputs: Inputs, perturbed: PyTree[bool], closed: ClosedSolve
) -> tuple[Any, Any]:
    """What the forward pass returns; and the derivatives of the record, and of the
    final state's times, in each direction in which the times may change."""
    diff, nondiff = eqx.partition(inputs.times, perturbed)
    if len(jtu.tree_leaves(diff)) == 0:
        return _forward(inputs, inputs.times, closed), None
    static: Any = None

    def _run(_diff, token):
        nonlocal static
        out = _forward(inputs, eqx.combine(_diff, nondiff), closed, token)
        final_state, record, _ = out
        moving = record.times_only(), _final_times(final_state)
        moving, fixed = eqx.partition(moving, eqx.is_inexact_array)
        dynamic, static = eqx.partition((out, fixed), eqx.is_array)
        return moving, dynamic

    token = jnp.array(0.0)
    _, moved, dynamic = jax.vmap(
        lambda direction: jax.jvp(
            _run, (diff, token), (direction, token), has_aux=True
        ),
        out_axes=(None, 0, None),
    )(directions(diff))
    out, fixed = eqx.combine(dynamic, static)
    return out, eqx.combine(moved, fixed)


def _final_times(state: Any) -> PyTree[Array]:
    scalars = eqx.filter(
        state.controller_state, lambda x: eqx.is_inexact_array(x) and x.ndim == 0
    )
    return state.tprev, scalars


@reversible_loop.def_fwd
def _reversible_loop_fwd(perturbed, inputs: Inputs, closed: Any):
    is_perturbed: Any = perturbed
    closed = eqx.combine(inputs.closed, closed)
    (final_state, record, stored), moved = _forward_and_moved(
        inputs, is_perturbed.times, closed
    )
    record = record.check(closed.name)
    # Everything here but the record and what is stored is of the size of one state.
    residuals = (
        final_state.y,
        as_arrays(final_state.solver_state),
        final_state.num_accepted_steps,
        [(s.saveat_ts_index, s.save_index) for s in _save_states(final_state)],
        (final_state.event_tprev, final_state.event_tnext),
        record,
        stored,
        moved,
    )
    final_state = _batch_as(final_state, inputs)
    return _no_second_reverse((final_state, residuals), closed.name)


def _batch_as(tree: PyTree, inputs: Inputs) -> PyTree:
    """`tree`, batched under `jax.vmap` if any of `inputs` is.

    An output that is not, say `y` if `SaveAt(ts=...)` alone is batched, would have a
    single cotangent for the whole batch. JAX would pull that back once for each member
    of the batch, and add the results."""
    any_: Any = jnp.array(False)
    for x in jtu.tree_leaves(eqx.filter(inputs, eqx.is_array)):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if x.size > 0:
            any_ = any_ | (x.ravel()[0] == jnp.zeros((), x.dtype))
    arrays, rest = eqx.partition(tree, eqx.is_array)
    # Its value does not matter, but that it is batched.
    arrays = jtu.tree_map(lambda x: jnp.where(any_, x, x), arrays)
    return eqx.combine(arrays, rest)


def _no_second_reverse(x: PyTree, name: str) -> PyTree:
    msg = (
        f"Cannot differentiate twice in reverse mode when using `adjoint={name}()`. "
        "Consider differentiating the gradient in forward mode (`jax.hessian`, "
        "`jax.jvp(jax.grad(...), ...)`), or using `adjoint=DirectAdjoint()` instead."
    )
    # At once, before JAX comes to the loops, of which it would say something else.
    return eqxi.nondifferentiable_backward(x, msg=msg, symbolic=True)


def _no_second_derivative(x: PyTree, name: str) -> PyTree:
    # Nothing is rounded in undoing a step; but in undoing the derivative of one, which
    # is no integer. Whatever that comes to, nothing would tell.
    return reverse_mode_only(
        x,
        f"Cannot differentiate a gradient through `BitExact(solver)` by `adjoint={name}"
        "()`: every bit of a state comes back, but not of its derivative. Consider "
        "using `solver` without `BitExact`, or `adjoint=DirectAdjoint()`.",
    )


def put_back_start(final_state: Any, init_state: Any, subs: list[SubSaveAt]) -> Any:
    """`final_state` with what the loop did not change, but only passed on, as it was in
    `init_state`: its gradient does not go through the loop."""

    def saved(state):
        states = zip(_save_states(state), subs, strict=True)
        rows = [(s.ts, s.ys) for s, sub in states if sub.t0]
        return [rows, state.dense_ts]

    def event(state):
        return [state.event_tprev, state.event_tnext, state.event_dense_info]

    def constants(state):
        return _constants(state.controller_state)

    def first_row(x, x0):
        return x.at[0].set(x0[0])

    def if_no_step(x, x0):
        return jnp.where(final_state.num_steps == 0, x0, x)

    for get, put_back in (
        (saved, first_row),
        (event, if_no_step),
        (constants, lambda _, x0: x0),
    ):
        where = lambda s, get=get: jtu.tree_leaves(get(s))
        leaves = where(final_state)
        if len(leaves) > 0:
            leaves = list(map(put_back, leaves, where(init_state)))
            final_state = eqx.tree_at(where, final_state, leaves)
    return final_state


def _constants(controller_state: PyTree) -> Any:
    """Those arrays in the state of a `ClipStepSizeController` that never change."""
    if not isinstance(controller_state, _ClipState):
        return []
    infos = controller_state.step_info, controller_state.jump_info
    return [info[1] for info in infos if info is not None]


def _save_states(state: Any) -> list[Any]:
    from ._integrate import SaveState  # Which imports this.

    is_save_state = lambda x: isinstance(x, SaveState)
    return jtu.tree_leaves(state.save_state, is_leaf=is_save_state)


@reversible_loop.def_bwd
def _reversible_loop_bwd(
    residuals, grad_final_state, perturbed, inputs: Inputs, closed: Any
):
    closed = eqx.combine(inputs.closed, closed)
    y1, solver_state1, num_steps, rows, event_times, record, stored, moved = residuals
    if closed.reversal.is_exact:
        y1, solver_state1 = _no_second_derivative((y1, solver_state1), closed.name)
    is_perturbed: Any = perturbed
    diff_times = eqx.filter(inputs.times, is_perturbed.times)
    # Parameters that are not being differentiated need no gradient, so do not compute
    # any.
    params = [inputs.args, inputs.terms, inputs.local]
    diff_params, nondiff_params = eqx.partition(
        params, [is_perturbed.args, is_perturbed.terms, is_perturbed.local]
    )
    moved_record, moved_end = (None, None) if moved is None else moved
    last_step = record.read(num_steps - 1, num_steps)
    step = ReverseStep(
        closed=closed,
        record=record,
        num_steps=num_steps,
        y0=inputs.y,
        solver_state0=as_arrays(inputs.solver_state),
        diff_params=diff_params,
        nondiff_params=nondiff_params,
        outputs=[
            SavedOutput(ts, every, grad.ts, grad.ys)
            for ts, every, grad in zip(
                inputs.save_ts, closed.every, _save_states(grad_final_state)
            )
        ],
        dense=_dense_output(grad_final_state, event_times, record, num_steps),
        moved=moved_record,
        first_time=closed.first_time,
    )
    cursors = [
        Cursor(
            row=jnp.asarray(row),
            ts_index=jnp.asarray(ts_index),
            grad_ts=jnp.zeros_like(ts) if is_ts_perturbed else None,
        )
        for (ts_index, row), ts, is_ts_perturbed in zip(
            rows, inputs.save_ts, is_perturbed.save_ts, strict=True
        )
    ]
    grad_times = None
    if moved is not None:
        grad_times = _pull_back_final_times(
            step, grad_final_state, moved_end, diff_times
        )
    end = _end(
        step, cursors, (y1, solver_state1), last_step, grad_final_state, grad_times
    )
    trace = None if inputs.trace is None else jnp.zeros_like(inputs.trace)
    start, worst, taken = ReversePass(step).run(end, stored, StepTrace(trace))
    args, terms, local = start.grads
    grads = Inputs(
        y=start.grad_y,
        solver_state=start.grad_solver_state,
        args=args,
        terms=terms,
        local=local,
        times=_pull_back_times(start.grad_times, diff_times),
        save_ts=[cursor.grad_ts for cursor in start.cursors],
        closed=jtu.tree_map(lambda _: None, filter_inexact(inputs.closed)),
        trace=None,
    )
    grads = _no_second_reverse(refuse_drift(grads, worst, step, y1), closed.name)
    return eqx.tree_at(
        lambda g: g.trace, grads, taken.rows, is_leaf=lambda x: x is None
    )


def _materialise(grad: PyTree, like: PyTree) -> PyTree[Array]:
    """`grad`, with zeros for what has not been differentiated."""

    def _zeros(x, g):
        return jnp.zeros_like(x) if g is None else g

    return jtu.tree_map(_zeros, filter_inexact(like), grad)


def _end(
    step: ReverseStep,
    cursors: list[Cursor],
    state1: tuple[Y, PyTree],
    last_step: Step,
    grad_final_state: Any,
    grad_times: TimeGradient | None,
) -> Position:
    """Where going backward starts."""
    closed = step.closed
    y1, solver_state1 = state1
    grad_y1 = _materialise(grad_final_state.y, y1)
    grads = zeros_like(step.diff_params)
    hint = solver_state1
    if not closed.reversal.has_state:
        hint, of_state = _pull_back_vf(step, y1, last_step, grad_final_state)
        if of_state is not None:
            of_y1, of_params, of_t = of_state
            grad_y1, grads = add((grad_y1, grads), (of_y1, of_params))
            if grad_times is not None and step.moved is not None:
                grad_times = grad_times.add(
                    step.num_steps - 1,
                    TimeCotangents(0.0, of_t, 0.0),
                    step.moved,
                    step.num_steps,
                    closed.first_time,
                )
    return Position(
        index=jnp.asarray(step.num_steps),
        cursors=cursors,
        y=y1,
        hint=hint,
        grad_y=grad_y1,
        # Without a step, this is that of the start.
        grad_solver_state=_materialise(grad_final_state.solver_state, solver_state1),
        grads=grads,
        grad_times=grad_times,
        probe=step.start_probe(step.num_steps, y1, hint),
    )


def _pull_back_vf(
    step: ReverseStep, y1: Y, last_step: Step, grad_final_state: Any
) -> tuple[PyTree, PyTree]:
    """For a solver the state of which is a function of `y`, if there is any: the hint
    at the end of the solve, and the cotangents that come of the solver state there: of
    `y1`, of the parameters, and of the time. `None` if there are none."""
    diff_y1, rest = eqx.partition(y1, eqx.is_inexact_array)

    def _vf(_diff_y1, _params, _t):
        _args, _terms, _local = eqx.combine(_params, step.nondiff_params)
        vf = _local.vf(_terms, _t, eqx.combine(_diff_y1, rest), _args)
        return filter_inexact(vf), vf

    inputs = diff_y1, step.diff_params, last_step.t1
    grad_state1 = grad_final_state.solver_state
    if len(jtu.tree_leaves(grad_state1)) == 0:
        _, hint = _vf(*inputs)
        return hint, None
    # That of a first-same-as-last method. It is `hint`, if there were any steps.
    _, grad_vf = grad_state1
    _, pull_back, hint = jax.vjp(_vf, *inputs, has_aux=True)
    is_step = step.num_steps > 0
    grad_vf = jtu.tree_map(
        lambda g: jnp.where(is_step, g, 0), _materialise(grad_vf, hint)
    )
    return hint, pull_back(grad_vf)


def _pull_back_final_times(
    step: ReverseStep, grad_final_state: Any, moved_end: Any, diff_times: Times
) -> TimeGradient:
    """What comes of the times at the end of the solve."""
    closed = step.closed
    is_none = lambda x: x is None
    cts, moved = (
        jtu.tree_leaves(x, is_leaf=is_none)
        for x in (_final_times(grad_final_state), moved_end)
    )
    total = TimeGradient.zeros(diff_times)
    for ct, dx in zip(cts, moved, strict=True):
        total = total.add_end(ct, dx, step.num_steps, closed.first_time)
    # The times of rejected steps, say. Those that never change were put back.
    for x in jtu.tree_leaves(filter_inexact(grad_final_state.controller_state)):
        if x.ndim > 0:
            scalars = eqx.error_if(
                total.scalars,
                jnp.any(x != 0),
                "Cannot differentiate the arrays in `Solution.controller_state` with "
                f"respect to times when using `adjoint={closed.name}()`. Consider "
                "wrapping them in `jax.lax.stop_gradient`, or using "
                "`adjoint=RecursiveCheckpointAdjoint()` instead.",
            )
            total = TimeGradient(scalars, total.step_to)
    return total


def _pull_back_times(grad_times: TimeGradient | None, diff_times: Times) -> Times:
    if grad_times is None:
        return diff_times  # In which there is nothing.
    return grad_times.pull_back(diff_times)


def _dense_output(
    grad_final_state: Any,
    event_times: Any,
    record: StepRecord | ConstantRecord,
    num_steps: Any,
) -> DenseOutput:
    event_tprev, event_tnext = event_times
    last_step = record.read(num_steps - 1, num_steps)
    event_infos = grad_final_state.event_dense_info
    if len(jtu.tree_leaves(event_infos)) > 0:
        # Of a step that was rejected nothing is known any more.
        is_last = (event_tprev == last_step.t0) & (event_tnext == last_step.t1)
        if isinstance(record, ConstantRecord):
            # None is; and `t0` is off by a rounding error.
            is_last = True
        is_known = (num_steps > 0) & is_last
        event_infos = jtu.tree_map(
            lambda g: jnp.where(is_known | (g == 0), g, jnp.nan), event_infos
        )
    return DenseOutput(
        ts=grad_final_state.dense_ts,
        infos=grad_final_state.dense_infos,
        event_infos=event_infos,
        event_tprev=grad_final_state.event_tprev,
        event_tnext=grad_final_state.event_tnext,
    )
