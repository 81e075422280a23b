import functools as ft
from typing import Any, cast

import equinox as eqx
import equinox.internal as eqxi
from jaxtyping import PyTree

from ._closed_solve import as_arrays, close_solve, set_y_and_solver_state
from ._event import Event
from ._heuristics import is_unsafe_sde
from ._reversal import (
    AbstractReversal,
    AlgebraicReversal,
    NoReversal,
    NumericalReversal,
)
from ._reverse_mode_only import reverse_mode_only
from ._reversible_loop import reversible_loop
from ._saveat import save_y, SaveAt, SubSaveAt
from ._solver import (
    AbstractReversibleSolver,
    AbstractSolver,
    HalfSolver,
)
from ._solver.fixed_point_reversible import FixedPointReversible, is_plain_erk
from ._solver.reversible_half_solver import records_state, ReversibleHalfSolver
from ._step_size_controller import (
    AbstractStepSizeController,
    ClipStepSizeController,
    ConstantStepSize,
    PIDController,
    StepTo,
)
from ._term import AbstractTerm
from ._upstream_adjoint import *  # noqa: F403
from ._upstream_adjoint import (
    _inner_loop as _inner_loop,
    _is_none as _is_none,
    _is_subsaveat as _is_subsaveat,
    _loop_backsolve as _loop_backsolve,
    _loop_backsolve_bwd as _loop_backsolve_bwd,
    _loop_backsolve_fwd as _loop_backsolve_fwd,
    _materialise_none as _materialise_none,
    _nondiff_solver_controller_state as _nondiff_solver_controller_state,
    _only_transpose_ys as _only_transpose_ys,
    _outer_loop as _outer_loop,
    _solve as _solve,
    _uncallable as _uncallable,
    _vf as _vf,
    AbstractAdjoint as AbstractAdjoint,
    BacksolveAdjoint as BacksolveAdjoint,
    DirectAdjoint as DirectAdjoint,
    ForwardMode as ForwardMode,
    ImplicitAdjoint as ImplicitAdjoint,
    RecursiveCheckpointAdjoint as RecursiveCheckpointAdjoint,
)


class ReversibleAdjoint(AbstractAdjoint):
    """Backpropagate through [`diffrax.diffeqsolve`][] by undoing the solver's steps one
    after another, from the last to the first, and differentiating each one at the state
    that has been reconstructed.

    This computes the gradient of the numerical solution ("discretise-then-optimise"),
    as [`diffrax.RecursiveCheckpointAdjoint`][] does, and agrees with it up to rounding.
    It does so in memory that does not grow with the number of steps, as no states are
    stored. (What does grow is the record of the step times: one number for each of
    `max_steps` steps; two and a boolean if there may be jumps; and what the solver
    itself records.) In time, each step costs one step backward and one vector-Jacobian
    product, in addition to the step forward.

    It needs a solver whose steps can be undone, that is a
    [`diffrax.AbstractReversibleSolver`][]:

    - [`diffrax.UReversible`][], which makes any explicit Runge--Kutta method
        reversible;
    - [`diffrax.ReversibleHeun`][], [`diffrax.LeapfrogMidpoint`][] or
        [`diffrax.SemiImplicitEuler`][];
    - any of these inside of [`diffrax.HalfSolver`][], except for `LeapfrogMidpoint`;
    - your own: see [the page on extending](../extending.md).

    Gradients are computed with respect to `y0`, `args`, `terms`, `solver_state` (if
    passed), and whatever the vector field closes over, through `SaveAt(t0=..., t1=...,
    ts=...)`. An attempt to differentiate anything else (the times `t0`, `t1`, `dt0`,
    `SaveAt(ts=...)` or those of the step size controller; the outputs `Solution.ts`,
    `Solution.solver_state` and `Solution.controller_state`; a gradient) raises an
    error.

    !!! warning

        Undoing a step is exact up to rounding; undoing many multiplies these rounding
        errors if the dynamics backward in time are unstable. The docstring of each
        solver tells what it is suited for. Going back ends at a `y0` that is known: if
        the difference is more than half of the digits (the square root of the machine
        epsilon, relative to how large that leaf of `y` becomes) then there is an error
        rather than a gradient, or with `throw=False` one that is NaN. A gradient can be
        far more sensitive than that. If in doubt, compare it to that of
        [`diffrax.RecursiveCheckpointAdjoint`][].

    !!! info

        This cannot be forward-mode autodifferentiated. (E.g. using `jax.jvp`.) Try
        using [`diffrax.ForwardMode`][] if you need forward-mode autodifferentiation, or
        [`diffrax.DirectAdjoint`][] if you need both forward and reverse-mode
        autodifferentiation.

    ??? cite "References"

        ```bibtex
        @article{kidger2021efficient,
            author={Kidger, Patrick and Foster, James and Li, Xuechen and Lyons, Terry},
            title={{E}fficient and {A}ccurate {G}radients for {N}eural {SDE}s},
            year={2021},
            journal={Advances in Neural Information Processing Systems}
        }

        @article{mccallum2024efficient,
            author={McCallum, Sam and Foster, James},
            title={Efficient, Accurate and Stable Gradients for Neural ODEs},
            journal={arXiv:2410.11648},
            year={2024},
        }
        ```
    """

    checkpoints: int = 16

    def __check_init__(self):
        name = type(self).__name__
        is_int = isinstance(self.checkpoints, int)
        if not is_int or isinstance(self.checkpoints, bool) or self.checkpoints < 0:
            raise ValueError(
                f"`checkpoints` in `{name}(checkpoints=...)` must be a non-negative "
                f"integer, but got {self.checkpoints}."
            )

    def loop(
        self,
        *,
        args,
        terms,
        solver,
        stepsize_controller,
        event,
        saveat,
        t0,
        t1,
        dt0,
        max_steps,
        throw,
        init_state,
        passed_solver_state,
        passed_controller_state,
        progress_meter,
    ) -> Any:
        del passed_solver_state, passed_controller_state
        name = type(self).__name__
        _check_supported(terms, saveat, event, name)
        reversal = _choose_reversal(solver, init_state.solver_state)
        if self.checkpoints == 0 and not reversal.can_step_back:
            solver_name = type(solver).__name__
            raise ValueError(
                f"Cannot use `adjoint={name}(checkpoints=0)` with `solver={solver_name}"
                "(...)`, the steps of which cannot be undone. Consider using "
                f"`adjoint={name}()`, which stores states."
            )
        y, solver_state, args, terms = reverse_mode_only(
            (init_state.y, as_arrays(init_state.solver_state), args, terms),
            f"Cannot use forward-mode autodifferentiation with `adjoint={name}()`. "
            "Consider using `adjoint=ForwardMode()` instead, or "
            "`adjoint=DirectAdjoint()` for both forward and reverse mode.",
        )
        _refuse_gradient_of_steps(
            stepsize_controller, solver, terms, args, init_state, name
        )
        nondifferentiable = ft.partial(_nondifferentiable_input, name=name)
        t0 = nondifferentiable(t0, "t0")
        t1 = nondifferentiable(t1, "t1")
        saveat = nondifferentiable(saveat, "SaveAt(ts=...)")
        kwargs: dict[str, Any] = dict(
            stepsize_controller=nondifferentiable(
                stepsize_controller, "stepsize_controller"
            ),
            event=event,
            saveat=saveat,
            t0=t0,
            t1=t1,
            dt0=nondifferentiable(dt0, "dt0"),
            max_steps=max_steps,
            init_state=init_state,
            progress_meter=progress_meter,
        )
        if max_steps is None:
            return self._unbounded_loop(
                y, solver_state, args, terms, solver=solver, **kwargs
            )
        local, closed = close_solve(
            self._loop,
            y,
            solver_state,
            args,
            terms,
            name=name,
            reversal=reversal,
            checkpoints=self.checkpoints,
            throw=throw,
            **kwargs,
        )
        final_state, aux_stats = reversible_loop(
            (y, solver_state, args, terms, local), closed
        )
        # From a custom derivative rule even integers have a tangent, if an empty one,
        # and not every primitive that comes later has a rule for that.
        floats, others = eqx.partition(final_state, eqx.is_inexact_array)
        others = eqxi.nondifferentiable_backward(others, symbolic=False)
        return eqx.combine(floats, others), aux_stats

    def _unbounded_loop(self, y, solver_state, args, terms, *, init_state, **kwargs):
        init_state = set_y_and_solver_state(init_state, y, solver_state)
        final_state, aux_stats = self._loop(
            args=args,
            terms=terms,
            init_state=init_state,
            inner_while_loop=ft.partial(_inner_loop, kind="lax"),
            outer_while_loop=ft.partial(_outer_loop, kind="lax"),
            **kwargs,
        )
        name = type(self).__name__
        msg = (
            "Cannot differentiate `diffeqsolve(..., max_steps=None, "
            f"adjoint={name}())`: recording the times of the steps needs memory, the "
            "size of which JAX has to know in advance. Put a bound on the maximum "
            "number of steps."
        )
        final_state = eqxi.nondifferentiable_backward(final_state, msg=msg)
        return final_state, aux_stats


ReversibleAdjoint.__init__.__doc__ = """**Arguments:** None

**Raises:**

When used in [`diffrax.diffeqsolve`][], before anything runs: `ValueError` if the solver
is not reversible (or is `HalfSolver(LeapfrogMidpoint())`), or if there is an
`UnsafeBrownianPath`; `NotImplementedError` for an
`event`, or for any of `SaveAt(steps=..., dense=..., fn=..., subs=...)`, or for
forward-mode autodifferentiation.
"""


def _choose_reversal(solver: AbstractSolver, solver_state: PyTree) -> AbstractReversal:
    if type(solver) is FixedPointReversible:
        return NumericalReversal(solver.solver)
    # `isinstance` looks through wrappers. Being able to undo the step of the solver
    # inside does not mean being able to undo that of the wrapper.
    if issubclass(type(solver), AbstractReversibleSolver):
        return AlgebraicReversal(cast(AbstractReversibleSolver, solver))
    if type(solver) is HalfSolver and issubclass(
        type(solver.solver), AbstractReversibleSolver
    ):
        if not records_state(solver.solver):
            return AlgebraicReversal(ReversibleHalfSolver(solver.solver))
    elif is_plain_erk(solver) or solver_state is None:
        return NumericalReversal(solver)
    return NoReversal(solver)


def _check_supported(
    terms: PyTree[AbstractTerm], saveat: SaveAt, event: Event | None, name: str
) -> None:
    if is_unsafe_sde(terms):
        raise ValueError(
            f"Cannot use `adjoint={name}()` with `UnsafeBrownianPath`: the same "
            "Brownian increments are needed again on the way back. Consider using "
            "`VirtualBrownianTree` instead."
        )
    if saveat.dense:
        refused = "SaveAt(dense=True)"
    elif type(saveat.subs) is not SubSaveAt:
        refused = "SaveAt(subs=...)` of anything but a single `SubSaveAt"
    elif saveat.subs.steps != 0:
        refused = "SaveAt(steps=...)"
    elif saveat.subs.fn is not save_y:
        refused = "SaveAt(fn=...)"
    elif event is not None:
        refused = "diffeqsolve(..., event=...)"
    else:
        return
    raise NotImplementedError(
        f"Cannot use `adjoint={name}()` with `{refused}`. Consider using "
        "`adjoint=RecursiveCheckpointAdjoint()` instead."
    )


def _has_steps_without_gradient(controller: AbstractStepSizeController) -> bool:
    """Whether this is known to be a controller through the steps of which no gradient
    flows: those of Diffrax stop it."""
    if type(controller) is ClipStepSizeController:
        return _has_steps_without_gradient(controller.controller)
    return type(controller) in (ConstantStepSize, StepTo, PIDController)


def _refuse_gradient_of_steps(
    controller: AbstractStepSizeController,
    solver: AbstractSolver,
    terms: PyTree[AbstractTerm],
    args: PyTree,
    state: Any,
    name: str,
) -> None:
    """Raises an error if the size of the next step, which takes no part in the backward
    pass, is a function of what is being differentiated."""
    if _has_steps_without_gradient(controller):
        return
    # Only the derivative of this is of interest; its values are not used.
    times = state.tprev, state.tnext
    y1, y_error, *_ = solver.step(
        terms, *times, state.y, args, state.solver_state, state.made_jump
    )
    error_order: Any = solver.error_order(terms)
    _, *next_times, _, controller_state, _ = controller.adapt_step_size(
        *times, state.y, y1, args, y_error, error_order, state.controller_state
    )
    eqxi.nondifferentiable(
        (next_times, controller_state),
        msg=f"Cannot differentiate through the steps of `stepsize_controller="
        f"{type(controller).__name__}(...)` when using `adjoint={name}()`. Consider "
        "using `adjoint=RecursiveCheckpointAdjoint()` instead, or "
        "`jax.lax.stop_gradient` in the controller, as `PIDController` does.",
    )


def _nondifferentiable_input(x: PyTree, what: str, *, name: str) -> PyTree:
    msg = (
        f"Cannot differentiate with respect to `{what}` when using `adjoint={name}()`. "
        "Consider using `adjoint=RecursiveCheckpointAdjoint()` instead."
    )
    return eqxi.nondifferentiable(x, msg=msg)
