"""The integration loop of `ReversibleAdjoint`, and its derivative.

Forward, this is Diffrax's own loop, which leaves a record of the times of its steps.
Backward, it is a loop over these steps from the last to the first, which undoes each,
linearises it where it started, and pulls the cotangents back through it.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._custom_types import (
    Args,
    BoolScalarLike,
    DenseInfo,
    IntScalarLike,
    RealScalarLike,
    Y,
)
from ._saveat import SaveAt
from ._solver import AbstractReversibleSolver
from ._step_record import may_jump, Step, StepRecord
from ._step_size_controller import ConstantStepSize, StepTo
from ._term import AbstractTerm
from ._upstream_adjoint import _inner_loop


_filter_inexact = ft.partial(eqx.filter, filter_spec=eqx.is_inexact_array)


def as_arrays(tree: PyTree) -> PyTree:
    """Makes arrays, of a dtype that is not weak, of everything like an array."""

    def _as_array(x):
        if eqx.is_array_like(x):
            x = jnp.asarray(x)
            return lax.convert_element_type(x, x.dtype)
        return x

    return jtu.tree_map(_as_array, tree)


def _add(x: PyTree, y: PyTree) -> PyTree:
    return jtu.tree_map(jnp.add, x, y)


def _zeros_like(tree: PyTree) -> PyTree:
    return jtu.tree_map(jnp.zeros_like, tree)


#
# Closing over nothing.
#
# The functions inside `args` and `terms` may close over values that are being
# differentiated. A custom derivative rule cannot do so. So every function that is
# called below this point is first turned into one that holds such values as part of its
# PyTree structure.
#


class ClosedSolve(eqx.Module):
    """A differential equation solve in terms of functions that close over nothing.

    - `forward`: makes the whole solve; a function of `(y, solver_state, args, terms)`
        that returns `(final_state, aux_stats, record)`.
    - `reverse`: undoes one step; a function of `(terms, step, y1, args, solver_state)`
        that returns `(y0, dense_info, solver_state)`.
    - `interpolate`: the solution inside of one step; a function of `(dense_info, step,
        t)`.
    - `saveat`, `t0`, `t1`, `throw`: as passed to `diffeqsolve`.
    - `name`: what to call the adjoint in error messages.
    """

    forward: Callable
    reverse: Callable
    interpolate: Callable
    saveat: SaveAt
    t0: RealScalarLike
    t1: RealScalarLike
    throw: bool
    name: str


def set_y_and_solver_state(state: Any, y: Y, solver_state: PyTree) -> Any:
    return eqx.tree_at(
        lambda s: (s.y, s.solver_state),
        state,
        (y, solver_state),
        is_leaf=lambda x: x is None,
    )


def _step(solver, terms, step, y0, args, solver_state):
    y1, _, dense_info, solver_state, _ = solver.step(
        terms, step.t0, step.t1, y0, args, solver_state, step.made_jump
    )
    return as_arrays((y1, dense_info, solver_state))


def _step_back(solver, terms, step, y1, args, solver_state):
    solver_state = solver.restore_state(
        terms, step.t1, y1, args, solver_state, step.solver_state, step.next_made_jump
    )
    y0, dense_info, solver_state = solver.backward_step(
        terms, step.t0, step.t1, y1, args, solver_state, step.made_jump
    )
    return as_arrays((y0, dense_info, solver_state))


def _interpolate(solver, dense_info, step, t):
    interpolation = solver.interpolation_cls(t0=step.t0, t1=step.t1, **dense_info)
    return interpolation.evaluate(t)


def close_solve(
    loop: Callable,
    y: Y,
    solver_state: PyTree,
    args: Args,
    terms: PyTree[AbstractTerm],
    *,
    name: str,
    solver: AbstractReversibleSolver,
    init_state: Any,
    max_steps: int,
    stepsize_controller: Any,
    saveat: SaveAt,
    t0: RealScalarLike,
    t1: RealScalarLike,
    throw: bool,
    **kwargs: Any,
) -> tuple[Callable, ClosedSolve]:
    """Prepares a solve for `reversible_loop`.

    The arguments are those of [`diffrax.AbstractAdjoint.loop`][]. In addition, `loop`
    is the integration loop, and `name` is what to call its adjoint in error messages.

    Returns a function `local` and the solve. The former makes one step; it is a
    function of `(terms, step, y0, args, solver_state)` that returns `(y1, dense_info,
    solver_state)`. This is what is differentiated.
    """
    jumps = init_state.made_jump is not False or may_jump(stepsize_controller)
    recorded = solver.record_state(solver_state)
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
            solver=solver,
            init_state=_init_state,
            max_steps=max_steps,
            stepsize_controller=stepsize_controller,
            saveat=saveat,
            t0=t0,
            t1=t1,
            **kwargs,
        )
        return _loop_and_record(_loop, solver, empty_record, always_jumps)

    step = eqx.filter_eval_shape(empty_record.read, 0, 1)
    convert: Any = eqx.filter_closure_convert
    step_args = terms, step, y, args, solver_state
    closed_local = convert(ft.partial(_step, solver), *step_args)
    closed_reverse = convert(ft.partial(_step_back, solver), *step_args)
    closed_forward = convert(forward, y, solver_state, args, terms)
    _, dense_info, _ = eqx.filter_eval_shape(closed_local, *step_args)
    closed_interpolate = convert(
        ft.partial(_interpolate, solver), dense_info, step, step.t0
    )
    # `local` is what passes on the gradient with respect to anything that it closes
    # over. Anything else does not have one.
    has_gradient = {id(x) for x in closed_local.consts}
    return closed_local, ClosedSolve(
        forward=_without_gradient(closed_forward, has_gradient, name),
        reverse=_without_gradient(closed_reverse, has_gradient, name),
        interpolate=_without_gradient(closed_interpolate, set(), name),
        saveat=saveat,
        t0=t0,
        t1=t1,
        throw=throw,
        name=name,
    )


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


#
# Forward.
#


def _loop_and_record(
    loop: Callable,
    solver: AbstractReversibleSolver,
    record: StepRecord,
    always_jumps: bool,
) -> tuple[Any, Any, StepRecord]:
    """Runs `loop`, recording every accepted step."""
    final_record = None

    def outer_while_loop(cond_fun, body_fun, init_val, *, max_steps, buffers):
        def _cond_fun(val):
            state, _ = val
            return cond_fun(state)

        def _body_fun(val):
            state, _record = val
            new_state = body_fun(state)
            _record = _record.write(
                state.num_accepted_steps,
                state.tprev,
                state.tnext,
                True if always_jumps else state.made_jump,
                solver.record_state(state.solver_state),
                pred=new_state.num_accepted_steps > state.num_accepted_steps,
            )
            return new_state, _record

        def _buffers(val):
            state, _record = val
            return buffers(state), _record.buffers

        nonlocal final_record
        final_val, final_record = eqxi.while_loop(
            _cond_fun,
            _body_fun,
            (init_val, record),
            max_steps=max_steps,
            buffers=_buffers,
            kind="lax",
        )
        return final_val

    final_state, aux_stats = loop(
        inner_while_loop=ft.partial(_inner_loop, kind="lax"),
        outer_while_loop=outer_while_loop,
    )
    assert final_record is not None
    return final_state, aux_stats, final_record


# Computes derivatives with respect to the first argument:
# - `y` and `solver_state`, at the start of the solve. (If `solver_state` came from
#   `solver.init`, then JAX takes its gradient on to `y0`, `args` and `terms`.);
# - `args`, corresponding to explicit parameters;
# - `terms`, corresponding to implicit parameters as part of the vector field;
# - `local`, corresponding to parameters that the vector field closes over.
# There are none with respect to any of the times, nor the step size controller.
@eqx.filter_custom_vjp
def reversible_loop(y__solver_state__args__terms__local, closed: ClosedSolve):
    """Solves a differential equation, and differentiates it by undoing each step."""
    y, solver_state, args, terms, _ = y__solver_state__args__terms__local
    final_state, aux_stats, _ = closed.forward(y, solver_state, args, terms)
    return final_state, aux_stats


@reversible_loop.def_fwd
def _reversible_loop_fwd(
    perturbed, y__solver_state__args__terms__local, closed: ClosedSolve
):
    del perturbed
    y, solver_state, args, terms, _ = y__solver_state__args__terms__local
    final_state, aux_stats, record = closed.forward(y, solver_state, args, terms)
    # Everything here but the record is of the size of one state.
    residuals = (
        final_state.y,
        as_arrays(final_state.solver_state),
        final_state.num_accepted_steps,
        final_state.save_state.saveat_ts_index,
        final_state.save_state.save_index,
        record,
    )
    return (final_state, aux_stats), residuals


#
# Backward.
#


@reversible_loop.def_bwd
def _reversible_loop_bwd(
    residuals,
    grad_final_state__aux_stats,
    perturbed,
    y__solver_state__args__terms__local,
    closed: ClosedSolve,
):
    residuals, grad_final_state__aux_stats, inputs = eqxi.nondifferentiable(
        (residuals, grad_final_state__aux_stats, y__solver_state__args__terms__local),
        msg=f"Cannot differentiate twice when using `adjoint={closed.name}()`. "
        "Consider using `adjoint=RecursiveCheckpointAdjoint()` instead.",
    )
    y1, solver_state1, num_steps, num_ts, num_saved, record = residuals
    grad_final_state, _ = grad_final_state__aux_stats
    y0, _, *params = inputs
    _, _, *perturbed_params = perturbed
    del residuals, grad_final_state__aux_stats, inputs, perturbed
    del y__solver_state__args__terms__local

    # The cotangents of what was saved, each one or more rows of `grad_ys`:
    # `[t0, ts[0], ..., ts[num_ts - 1], t1]`, of which each may be missing.
    saveat = closed.saveat
    grad_ys = _materialise_zeros(grad_final_state.save_state.ys, y0, saveat)
    ts_offset = 1 if saveat.subs.t0 else 0
    grad_y1 = _zeros_like(_filter_inexact(y1))
    if saveat.subs.t1:
        grad_y1 = jtu.tree_map(lambda g: g[num_saved - 1], grad_ys)
    grad_y1 = _refuse_other_outputs(grad_y1, grad_final_state, closed.name)

    # Parameters that are not being differentiated need no gradient, so do not compute
    # any.
    diff_params, nondiff_params = eqx.partition(params, perturbed_params)
    args, terms, _ = params

    def cond_fun(carry):
        index, *_ = carry
        return index > 0

    def body_fun(carry):
        index, ts_index, size, *states, grads = carry
        y1, solver_state1, grad_y1, grad_solver_state1 = states
        index = index - 1
        step = record.read(index, num_steps)
        y0, dense_info, solver_state0 = closed.reverse(
            terms, step, y1, args, solver_state1
        )
        if saveat.subs.ts is None:
            grad_dense_info = None
        else:
            ts_index, grad_dense_info = _pull_back_ts(
                saveat.subs.ts,
                ts_index,
                ts_offset,
                grad_ys,
                lambda info, t, step=step: closed.interpolate(info, step, t),
                dense_info,
                step.previous_t1,
            )
        grad_y0, grad_solver_state0, step_grads = _pull_back_step(
            step,
            y0,
            solver_state0,
            diff_params,
            nondiff_params,
            (grad_y1, grad_solver_state1, grad_dense_info),
        )
        size = jtu.tree_map(jnp.maximum, size, _max_abs(y0))
        states = (y0, solver_state0, grad_y0, grad_solver_state0)
        return index, ts_index, size, *states, _add(grads, step_grads)

    grad_solver_state1 = _zeros_like(_filter_inexact(solver_state1))
    states = (y1, solver_state1, grad_y1, grad_solver_state1)
    init_carry = (num_steps, num_ts, _max_abs(y1), *states, _zeros_like(diff_params))
    final_carry = lax.while_loop(cond_fun, body_fun, init_carry)
    _, _, size, found_y0, _, grad_y0, grad_solver_state0, grads = final_carry
    grad_y0 = _pull_back_start(
        grad_y0, grad_ys, ts_offset, saveat, closed.t0 == closed.t1
    )
    grads = (grad_y0, grad_solver_state0, *grads)
    return _refuse_drift(grads, found_y0, y0, y1, size, closed)


def _materialise_zeros(grad_ys: PyTree, y0: Y, saveat: SaveAt) -> PyTree:
    subs = saveat.subs
    size = subs.t0 + (0 if subs.ts is None else len(subs.ts)) + subs.t1

    def _materialise(_y, _grad):
        if _grad is None:
            return jnp.zeros((size, *_y.shape), _y.dtype)
        return _grad

    return jtu.tree_map(_materialise, _filter_inexact(y0), grad_ys)


def _pull_back_start(
    grad_y0: Y,
    grad_ys: PyTree[Array],
    ts_offset: int,
    saveat: SaveAt,
    no_steps: BoolScalarLike,
) -> Y:
    """Adds the cotangents of that output which is `y0` itself."""
    if saveat.subs.t0:
        grad_y0 = _add(grad_y0, jtu.tree_map(lambda g: g[0], grad_ys))
    if saveat.subs.ts is not None:
        at_ts = slice(ts_offset, ts_offset + len(saveat.subs.ts))
        grad_y0 = jtu.tree_map(
            lambda g, gs: g + jnp.where(no_steps, jnp.sum(gs[at_ts], axis=0), 0),
            grad_y0,
            grad_ys,
        )
    return grad_y0


def _refuse_other_outputs(grad_y1: Y, grad_final_state: Any, name: str) -> Y:
    """Returns `grad_y1`. Raises an error at run time if there is a cotangent of any
    output but what was saved of `y`, rather than let it have a gradient of zero."""
    save_state = grad_final_state.save_state
    others = {
        "Solution.ts": save_state.ts,
        "Solution.solver_state": grad_final_state.solver_state,
        "Solution.controller_state": grad_final_state.controller_state,
    }
    get_named = lambda s: (s.save_state, s.solver_state, s.controller_state)
    others["Solution.stats"] = eqx.tree_at(
        get_named, grad_final_state, (None, None, None), is_leaf=lambda x: x is None
    )
    for what, grad in others.items():
        # What has not been differentiated is `None`. Zeros are no reason to raise:
        # transformations may have made them of what had been `None`.
        for x in jtu.tree_leaves(grad):
            msg = (
                f"Cannot differentiate `{what}` when using `adjoint={name}()`. "
                "Consider using `adjoint=RecursiveCheckpointAdjoint()` instead, or "
                "wrapping it in `jax.lax.stop_gradient`."
            )
            grad_y1 = eqx.error_if(grad_y1, jnp.any(x != 0), msg)
    return grad_y1


def _max_abs(tree: PyTree) -> PyTree:
    return jtu.tree_map(lambda x: jnp.max(jnp.abs(x), initial=0), _filter_inexact(tree))


def _refuse_drift(
    grads: PyTree, found_y0: Y, y0: Y, y1: Y, size: PyTree, closed: ClosedSolve
) -> PyTree:
    """Returns `grads`, if going back over the whole solve led to where it had started,
    to half of the digits. Raises an error at run time if not, or with `throw=False`
    makes the gradients NaN.

    `size` is how large each leaf of the solution became."""
    has_drifted = False
    leaves = [jtu.tree_leaves(_filter_inexact(y)) for y in (found_y0, y0, y1)]
    for found, true, end, max_abs in zip(*leaves, jtu.tree_leaves(size)):
        tolerance = float(jnp.finfo(true.dtype).eps) ** 0.5
        drift = jnp.max(jnp.abs(found - true), initial=0)
        # A solve that failed has told so itself. Its gradients are not finite either.
        is_finite = jnp.all(jnp.isfinite(end))
        # Not `>`, for which NaN would be small.
        has_drifted |= ~(drift <= tolerance * max_abs) & is_finite
    if closed.throw:
        return eqx.error_if(
            grads,
            has_drifted,
            f"Cannot compute the gradient using `adjoint={closed.name}()`: going back "
            "over the steps of the solver did not lead to the `y0` that it had started "
            "from, as too many rounding errors have piled up. Consider making fewer "
            "steps, using float64, a solver that is stable for this problem or, for "
            "`UReversible`, a `coupling_parameter` nearer to one; or using "
            "`adjoint=RecursiveCheckpointAdjoint()` instead.",
        )
    return jtu.tree_map(
        lambda g: jnp.where(has_drifted, jnp.nan, g) if eqx.is_inexact_array(g) else g,
        grads,
    )


def _pull_back_ts(
    ts: Array,
    ts_index: IntScalarLike,
    ts_offset: int,
    grad_ys: PyTree[Array],
    interpolate: Callable,
    dense_info: DenseInfo,
    previous_t1: RealScalarLike,
) -> tuple[IntScalarLike, PyTree[Array]]:
    """Pulls the cotangents of the output that was saved during this step back through
    the interpolation, onto `dense_info`."""
    diff, nondiff = eqx.partition(dense_info, eqx.is_inexact_array)

    def cond_fun(carry):
        index, _ = carry
        return (index > 0) & (ts[jnp.maximum(index - 1, 0)] > previous_t1)

    def body_fun(carry):
        index, grad_dense_info = carry
        index = index - 1

        def _evaluate(_diff):
            return interpolate(eqx.combine(_diff, nondiff), ts[index])

        y, pull_back = jax.vjp(_evaluate, diff)
        grad_y = jtu.tree_map(
            lambda g, _y: g[ts_offset + index].astype(_y.dtype), grad_ys, y
        )
        (grad,) = pull_back(grad_y)
        return index, _add(grad_dense_info, grad)

    return lax.while_loop(cond_fun, body_fun, (ts_index, _zeros_like(diff)))


def _pull_back_step(
    step: Step,
    y0: Y,
    solver_state0: PyTree,
    params: PyTree,
    nondiff_params: PyTree,
    cotangents: tuple[PyTree, PyTree, PyTree | None],
) -> tuple[PyTree, PyTree, PyTree]:
    """Pulls cotangents of `(y1, solver_state1, dense_info)` back through one step, onto
    `(y0, solver_state0, params)`."""
    diff_state, nondiff_state = eqx.partition((y0, solver_state0), eqx.is_inexact_array)
    *_, grad_dense_info = cotangents

    def _local(_diff_state, _params):
        _y0, _solver_state0 = eqx.combine(_diff_state, nondiff_state)
        _args, _terms, _closed = eqx.combine(_params, nondiff_params)
        _y1, _dense_info, _solver_state1 = _closed(
            _terms, step, _y0, _args, _solver_state0
        )
        if grad_dense_info is None:
            _dense_info = None
        return _filter_inexact((_y1, _solver_state1, _dense_info))

    _, pull_back = jax.vjp(_local, diff_state, params)
    (grad_y0, grad_solver_state0), grads = pull_back(cotangents)
    return grad_y0, grad_solver_state0, grads
