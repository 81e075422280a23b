"""The integration loop of `ReversibleAdjoint`, and its derivative.

Forward, this is Diffrax's own loop, which leaves a record of the times of its steps and
stores some of its states. Backward, it is a loop over these steps from the last to the
first, which undoes each, linearises it where it started, and pulls the cotangents back
through it.
"""

from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._closed_solve import as_arrays, ClosedSolve
from ._custom_types import BoolScalarLike, Y
from ._drift_error import refuse_drift
from ._reverse_pass import ReversePass
from ._reverse_step import add, filter_inexact, Position, ReverseStep, zeros_like
from ._saveat import SaveAt
from ._step_trace import StepTrace


# Computes derivatives with respect to the first argument, which is a tuple of:
# - `y` and `solver_state`, at the start of the solve. (If `solver_state` came from
#   `solver.init`, then JAX takes its gradient on to `y0`, `args` and `terms`.);
# - `args`, corresponding to explicit parameters;
# - `terms`, corresponding to implicit parameters as part of the vector field;
# - `local`, corresponding to parameters that the vector field closes over.
# There are none with respect to any of the times, nor the step size controller.
# - `trace`, which is no input: its "cotangent" is what each step took to undo. `None`
#   if nobody asks for that.
@eqx.filter_custom_vjp
def reversible_loop(inputs, closed: ClosedSolve):
    """Solves a differential equation, and differentiates it by undoing each step."""
    y, solver_state, args, terms, *_ = inputs
    final_state, aux_stats, _, _ = closed.forward(y, solver_state, args, terms)
    return final_state, aux_stats


@reversible_loop.def_fwd
def _reversible_loop_fwd(perturbed, inputs, closed: ClosedSolve):
    del perturbed
    y, solver_state, args, terms, *_ = inputs
    final_state, aux_stats, record, stored = closed.forward(
        y, solver_state, args, terms
    )
    # Everything here but the record and what is stored is of the size of one state.
    residuals = (
        final_state.y,
        as_arrays(final_state.solver_state),
        final_state.num_accepted_steps,
        final_state.save_state.saveat_ts_index,
        final_state.save_state.save_index,
        record,
        stored,
    )
    return (final_state, aux_stats), residuals


@reversible_loop.def_bwd
def _reversible_loop_bwd(
    residuals,
    grad_final_state__aux_stats,
    perturbed,
    inputs,
    closed: ClosedSolve,
):
    residuals, grad_final_state__aux_stats, inputs = eqxi.nondifferentiable(
        (residuals, grad_final_state__aux_stats, inputs),
        msg=f"Cannot differentiate twice when using `adjoint={closed.name}()`. "
        "Consider using `adjoint=DirectAdjoint()` instead.",
    )
    y1, solver_state1, num_steps, num_ts, num_saved, record, stored = residuals
    grad_final_state, _ = grad_final_state__aux_stats
    y0, solver_state0, *params, trace = inputs
    _, _, *perturbed_params, _ = perturbed
    del residuals, grad_final_state__aux_stats, inputs, perturbed

    # The cotangents of what was saved, each one or more rows of `grad_ys`:
    # `[t0, ts[0], ..., ts[num_ts - 1], t1]`, of which each may be missing.
    saveat = closed.saveat
    grad_ys = _materialise_zeros(grad_final_state.save_state.ys, y0, saveat)
    grad_y1 = zeros_like(filter_inexact(y1))
    if saveat.subs.t1:
        grad_y1 = jtu.tree_map(lambda g: g[num_saved - 1], grad_ys)
    grad_y1 = _refuse_other_outputs(grad_y1, grad_final_state, closed.name)

    # Parameters that are not being differentiated need no gradient, so do not compute
    # any.
    diff_params, nondiff_params = eqx.partition(params, perturbed_params)
    args, terms, _ = params
    hint = solver_state1
    if not closed.reversal.has_state:
        last_step = record.read(num_steps - 1, num_steps)
        hint = closed.vf(terms, last_step.t1, y1, args)
    step = ReverseStep(
        closed=closed,
        record=record,
        num_steps=num_steps,
        y0=y0,
        solver_state0=as_arrays(solver_state0),
        diff_params=diff_params,
        nondiff_params=nondiff_params,
        grad_ys=grad_ys,
    )
    end = Position(
        index=num_steps,
        ts_index=num_ts,
        y=y1,
        hint=hint,
        grad_y=grad_y1,
        grad_solver_state=zeros_like(filter_inexact(solver_state1)),
        grads=zeros_like(diff_params),
        error=step.start_error(y1, hint),
    )
    trace = StepTrace(None if trace is None else jnp.zeros_like(trace))
    start, worst, trace = ReversePass(step).run(end, stored, trace)
    grad_y0 = _pull_back_start(start.grad_y, grad_ys, saveat, closed.t0 == closed.t1)
    grads = (grad_y0, start.grad_solver_state, *start.grads)
    grads = refuse_drift(grads, worst, step, y1)
    return *grads, trace.rows


def _materialise_zeros(grad_ys: PyTree, y0: Y, saveat: SaveAt) -> PyTree:
    subs = saveat.subs
    size = subs.t0 + (0 if subs.ts is None else len(subs.ts)) + subs.t1

    def _materialise(_y, _grad):
        if _grad is None:
            return jnp.zeros((size, *_y.shape), _y.dtype)
        return _grad

    return jtu.tree_map(_materialise, filter_inexact(y0), grad_ys)


def _pull_back_start(
    grad_y0: Y,
    grad_ys: PyTree[Array],
    saveat: SaveAt,
    no_steps: BoolScalarLike,
) -> Y:
    """Adds the cotangents of that output which is `y0` itself."""
    if saveat.subs.t0:
        grad_y0 = add(grad_y0, jtu.tree_map(lambda g: g[0], grad_ys))
    if saveat.subs.ts is not None:
        offset = 1 if saveat.subs.t0 else 0
        at_ts = slice(offset, offset + len(saveat.subs.ts))
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
