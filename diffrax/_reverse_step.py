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
from jaxtyping import Array, Int, PyTree

from ._closed_solve import ClosedSolve
from ._custom_types import BoolScalarLike, DenseInfo, IntScalarLike, Y
from ._invert_step import invert_step, relative_distance
from ._rounding_probe import advance, derivative, rounding
from ._step_record import Step, StepRecord
from ._step_trace import Signals


filter_inexact = ft.partial(eqx.filter, filter_spec=eqx.is_inexact_array)


def add(x: PyTree, y: PyTree) -> PyTree:
    return jtu.tree_map(jnp.add, x, y)


def zeros_like(tree: PyTree) -> PyTree:
    return jtu.tree_map(jnp.zeros_like, tree)


def where(pred: BoolScalarLike, x: PyTree, y: PyTree) -> PyTree:
    return jtu.tree_map(lambda a, b: jnp.where(pred, a, b), x, y)


class Position(eqx.Module):
    """How far going backward has come.

    - `index`: the number of the step that starts here.
    - `ts_index`: how many of `SaveAt(ts=...)` are not after this.
    - `y`, `hint`: the state here, and what undoing the step before needs in addition.
    - `grad_y`, `grad_solver_state`: the cotangents of the state.
    - `grads`: those of the parameters, so far.
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
    error: PyTree[Array]


class ReverseStep(eqx.Module):
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
        return tolerance_for(self.y0)

    def too_much(self) -> float:
        """For which certificate, as a fraction of `tolerance`, there is no gradient:
        fewer than half of the digits are right."""
        return self.tolerance() ** -0.25

    def __call__(
        self,
        position: Position,
        known: BoolScalarLike,
        state0: PyTree,
        size: PyTree[Array],
    ) -> tuple[Position, Signals, Step, Int[Array, ""]]:
        """Goes back over one step: from `state0`, if `known`, or else by undoing it.
        `size` is how large each entry of `y` is.

        Returns the new position; how far this may be off, without what is told by
        cotangents; the step; and the number of corrections that were made."""
        closed = self.closed
        index = position.index - 1
        step, pull_back_controls = self._know_controls(
            self.record.read(index, self.num_steps)
        )
        has_output = self._has_output(position, step)
        position = self._before_jump(position, step)
        linearise = ft.partial(
            self._linearise, step, has_output, pull_back_controls is not None
        )
        undone = state0
        corrections = jnp.array(0)

        if not closed.reversal.can_step_back:
            y0, _ = state0
            y1, aux = linearise(*state0)
        elif closed.reversal.iterates:
            forgotten = closed.reversal.forget_state(self.solver_state0)
            solver_state0 = where(index == 0, self.solver_state0, forgotten)
            known_y0, _ = state0
            inverted = invert_step(
                lambda y: _keep_y(linearise(y, solver_state0)),
                lambda y, is_y1: self._guess(step, y, position.hint, is_y1),
                position.y,
                known,
                known_y0,
                closed.max_corrections,
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
            y0, solver_state0 = where(known, state0, undone)
            y1, aux = linearise(y0, solver_state0)

        missed = relative_distance(
            filter_inexact(y1), filter_inexact(position.y), size, self.tolerance()
        )
        zero = jnp.zeros_like(missed)
        signals = Signals(drift=missed, residual=missed, rounding=zero, cotangents=zero)
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
            signals = eqx.tree_at(lambda s: s.rounding, signals, grown)
        position = self._pull_back(position, step, y0, aux, pull_back_controls)
        position = eqx.tree_at(
            lambda p: p.error, position, error, is_leaf=lambda x: x is None
        )
        return position, signals, step, corrections

    def _know_controls(self, step: Step) -> tuple[Step, Callable | None]:
        """The step with its controls; and what pulls back their cotangents onto the
        parameters, if they depend on any."""

        def fn(_diff_params):
            _, _terms, _local = eqx.combine(_diff_params, self.nondiff_params)
            return _local.controls(_terms, step)

        *_, local = self.params
        if local.controls is None:
            return step, None
        if _depends(fn, self.diff_params):
            controls, pull_back = eqx.filter_vjp(fn, self.diff_params)
        else:
            controls, pull_back = fn(self.diff_params), None
        step = eqx.tree_at(
            lambda s: s.controls, step, controls, is_leaf=lambda x: x is None
        )
        return step, pull_back

    def _before_jump(self, position: Position, step: Step) -> Position:
        """The vector field before a jump is not that of the step that starts there."""
        closed = self.closed
        if closed.increment is None or step.next_made_jump is False:
            return position
        args, terms, _ = self.params
        hint = lax.cond(
            eqxi.unvmap_any(step.next_made_jump),
            lambda: where(
                step.next_made_jump,
                closed.vf(terms, step.t1, position.y, args),
                position.hint,
            ),
            lambda: position.hint,
        )
        return eqx.tree_at(lambda p: p.hint, position, hint)

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
                lambda: where(is_y1, hint, closed.vf(terms, step.t1, y, args)),
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
    ) -> tuple[Y, PyTree]:
        """Makes a step. Returns `y1`, and all that is needed in order to pull back
        cotangents through it."""
        diff_state, nondiff_state = eqx.partition(
            (y0, solver_state0), eqx.is_inexact_array
        )
        no_output = self.closed.saveat.subs.ts is None
        controls = filter_inexact(step.controls) if has_grad_controls else None

        def _local(_diff_state, _params, _controls):
            _y0, _solver_state0 = eqx.combine(_diff_state, nondiff_state)
            _args, _terms, _closed = eqx.combine(_params, self.nondiff_params)
            _step = eqx.tree_at(
                lambda s: s.controls,
                step,
                eqx.combine(_controls, step.controls),
                is_leaf=lambda x: x is None,
            )
            y1, dense_info, solver_state1, hint0 = _closed.step(
                _terms, _step, _y0, _args, _solver_state0, has_output
            )
            if no_output:
                dense_info = None
            out = filter_inexact((y1, solver_state1, dense_info))
            return out, (y1, dense_info, hint0)

        _, pull_back, (y1, dense_info, hint0) = jax.vjp(
            _local, diff_state, self.diff_params, controls, has_aux=True
        )
        return y1, (dense_info, hint0, pull_back)

    def _pull_back(
        self,
        position: Position,
        step: Step,
        y0: Y,
        aux: PyTree,
        pull_back_controls: Callable | None,
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
        grad_state0, grads, grad_controls = pull_back(cotangents)
        grad_y0, grad_solver_state0 = grad_state0
        if pull_back_controls is not None:
            (grads_of_controls,) = pull_back_controls(grad_controls)
            grads = add(grads, grads_of_controls)
        return Position(
            index=position.index - 1,
            ts_index=ts_index,
            y=y0,
            hint=hint0,
            grad_y=grad_y0,
            grad_solver_state=grad_solver_state0,
            grads=add(position.grads, grads),
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


def _keep_y(out: tuple[Y, PyTree]) -> tuple[Y, PyTree]:
    return out[0], out


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

    return jtu.tree_map(_size, filter_inexact(y), filter_inexact(other))


def tolerance_for(y: Y) -> float:
    """What is tolerated of each part of the certificate: two thirds of the digits of
    the least precise leaf."""
    eps = [float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(filter_inexact(y))]
    return max(eps, default=1.0) ** (2 / 3)
