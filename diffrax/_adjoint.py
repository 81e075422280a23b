import functools as ft
import operator
from typing import Any, cast

import equinox as eqx
import equinox.internal as eqxi
from jaxtyping import Array, PyTree

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


def _as_int(x: Any) -> Any:
    # Of NumPy, say. What is none is refused later.
    is_index = hasattr(x, "__index__") and not isinstance(x, bool)
    return operator.index(x) if is_index else x


class ReversibleAdjoint(AbstractAdjoint):
    """Backpropagate through [`diffrax.diffeqsolve`][] by undoing the solver's steps one
    after another, from the last to the first, and differentiating each one at the state
    that has been reconstructed.

    This computes the gradient of the numerical solution ("discretise-then-optimise"),
    as [`diffrax.RecursiveCheckpointAdjoint`][] does, and agrees with it up to rounding.
    It does so in memory that does not grow with the number of steps: that of a few
    states, and of those that are stored (see `checkpoints`). (What does grow is the
    record of the step times: one number for each of `max_steps` steps; two and a
    boolean if there may be jumps; and what the solver itself records.) The forward pass
    is that of the solver, with whatever solver.

    A step is undone

    - in closed form, if the solver is a [`diffrax.AbstractReversibleSolver`][]:
        [`diffrax.ReversibleHeun`][], [`diffrax.LeapfrogMidpoint`][],
        [`diffrax.SemiImplicitEuler`][], [`diffrax.UReversible`][], or [your
        own](../extending.md);
    - numerically, up to rounding, for every explicit Runge--Kutta method, and every
        other that carries nothing but `y` from one step to the next: see
        [`diffrax.FixedPointReversible`][];
    - not at all otherwise. Then all steps are made again, from stored states.

    **Stored states.** Undoing a step is exact up to rounding; undoing many multiplies
    these rounding errors if the dynamics backward in time are unstable, that is
    wherever solutions approach each other. So some states are stored on the way
    forward, between which the solve is divided into segments. Going backward, each is
    returned to before the step from there is differentiated. If it then turns out that
    going back over the segment has drifted, or that a step of it could not be undone,
    then the segment is made again from its stored start, storing states that are nearer
    to each other, and differentiated again; if need be down to single steps, which are
    right as they are. A segment that is so short that there is room for all of its
    states is made again at once, which is less work. So also the gradients of stiff, of
    dissipative and of chaotic problems are exact, for up to about the cost of
    [`diffrax.RecursiveCheckpointAdjoint`][].

    **The certificate** tells whether going back over a segment has drifted. It is the
    largest of: how far the step from the stored state ends from where going back had
    come by; how large an error of the size of rounding becomes that is carried along
    (which shows where errors are expanded and then contracted again); and what
    difference it makes to the cotangents, of `y` and of all parameters, whether the
    first step of the segment is taken to start from the stored state, or from where
    going back would have it start, times the number of steps of the segment (which
    shows whether the gradient is more sensitive than the state). Each entry of `y`
    counts for itself, relative to how large it is at the start or at the end of the
    segment. (Entries of less than 1e-4 of the largest one of their leaf are taken to be
    of that size, in 64-bit precision; if they matter, the cotangents show it.) What is
    tolerated is the machine epsilon to the power of 2/3: two thirds of the digits are
    right. [`diffrax.reversal_report`][] returns all
    of these numbers.

    Gradients are computed with respect to `y0`, `args`, `terms`, `solver_state` (if
    passed), and whatever the vector field closes over, through `SaveAt(t0=..., t1=...,
    ts=...)`. An attempt to differentiate anything else (the times `t0`, `t1`, `dt0`,
    `SaveAt(ts=...)` or those of the step size controller; the outputs `Solution.ts`,
    `Solution.solver_state` and `Solution.controller_state`; a gradient) raises an
    error.

    !!! example

        ```python
        import diffrax
        import jax
        import jax.numpy as jnp

        def loss(rate):
            term = diffrax.ODETerm(lambda t, y, args: -args * y)
            sol = diffrax.diffeqsolve(
                term,
                diffrax.Tsit5(),
                t0=0,
                t1=1,
                dt0=0.001,
                y0=jnp.array(1.0),
                args=rate,
                adjoint=diffrax.ReversibleAdjoint(),
            )
            return sol.ys[-1]

        gradient = jax.grad(loss)(2.0)
        assert jnp.allclose(gradient, -jnp.exp(-2.0), rtol=1e-4)
        ```

    !!! warning "When not to use this"

        If memory is not what limits you, or if every step has to be made again anyway
        (implicit solvers; very stiff problems), then
        [`diffrax.RecursiveCheckpointAdjoint`][] computes the same gradient at the same
        cost or less. With `checkpoints=0` nothing can be made again: if the certificate
        has fewer than half of the digits, then there is an error in place of a
        gradient. (See `on_failure`.)

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

    checkpoints: int = eqx.field(default=16, converter=_as_int)
    certificate: str = "full"
    on_failure: str = "raise"

    def __check_init__(self):
        name = type(self).__name__
        is_int = isinstance(self.checkpoints, int)
        if not is_int or isinstance(self.checkpoints, bool) or self.checkpoints < 0:
            raise ValueError(
                f"`checkpoints` in `{name}(checkpoints=...)` must be a non-negative "
                f"integer, but got {self.checkpoints}."
            )
        for what, choices in (
            ("certificate", ("off", "cheap", "full")),
            ("on_failure", ("raise", "nan", "ignore")),
        ):
            value = getattr(self, what)
            if value not in choices:
                raise ValueError(
                    f"`{what}` in `{name}({what}=...)` must be one of {choices}, but "
                    f"got {value!r}."
                )

    def _trace(self, terms: PyTree[AbstractTerm]) -> Array | None:
        """What to pass for `trace` to `reversible_loop`."""
        del terms
        return None

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
        name = ReversibleAdjoint.__name__
        _check_supported(terms, saveat, event, name)
        reversal = _choose_reversal(solver, init_state.solver_state)
        if self.checkpoints == 0:
            _check_can_step_back(reversal, name)
        no_forward_mode = (
            f"Cannot use forward-mode autodifferentiation with `adjoint={name}()`. "
            "Consider using `adjoint=ForwardMode()` instead, or "
            "`adjoint=DirectAdjoint()` for both forward and reverse mode."
        )
        y, solver_state, args, terms = reverse_mode_only(
            (init_state.y, as_arrays(init_state.solver_state), args, terms),
            no_forward_mode,
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
        on_failure = self.on_failure
        if on_failure == "raise" and not throw:
            on_failure = "nan"
        local, closed = close_solve(
            self._loop,
            y,
            solver_state,
            args,
            terms,
            name=name,
            reversal=reversal,
            checkpoints=self.checkpoints,
            certificate=self.certificate,
            on_failure=on_failure,
            **kwargs,
        )
        local = reverse_mode_only(local, no_forward_mode)
        final_state, aux_stats = reversible_loop(
            (y, solver_state, args, terms, local, self._trace(terms)), closed
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
        name = ReversibleAdjoint.__name__
        msg = (
            "Cannot differentiate `diffeqsolve(..., max_steps=None, "
            f"adjoint={name}())`: recording the times of the steps needs memory, the "
            "size of which JAX has to know in advance. Put a bound on the maximum "
            "number of steps."
        )
        final_state = eqxi.nondifferentiable_backward(final_state, msg=msg)
        return final_state, aux_stats


ReversibleAdjoint.__init__.__doc__ = """**Arguments:**

- `checkpoints`: How many states to store on the way forward (each consists of `y` and,
    unless a step is undone numerically, the solver state), spread over all steps. On
    the way back there is room for as many again. With more than the number of steps,
    everything is stored. With zero, nothing is, and no step is made again.
- `certificate`: Either `"full"`; or `"cheap"`, which is only the first of its three
    parts, costs nothing, and may be misled; or `"off"`, with which no step is made
    again because of it, and gradients may be wrong. The full one takes two evaluations
    of the vector field for each step that is undone numerically, or undoing each step a
    second time; and one step more for each segment.
- `on_failure`: What to do with a gradient that has fewer than half of its digits
    according to the certificate, which may happen only with `checkpoints=0`: `"raise"`
    an error (with `diffeqsolve(..., throw=False)` this is as `"nan"`); `"nan"`, to make
    it NaN, under `jax.vmap` for those members of the batch alone that are concerned
    (but what is shared by the whole batch has a single gradient); or `"ignore"`.

**Raises:**

`ValueError` if one of the arguments is none of these.

When used in [`diffrax.diffeqsolve`][], before anything runs: `ValueError` if there is
an `UnsafeBrownianPath`, or with `checkpoints=0` if the steps of the solver cannot be
undone; `NotImplementedError` for an `event`, or for any of `SaveAt(steps=...,
dense=..., fn=..., subs=...)`, or for forward-mode autodifferentiation.
"""


def _choose_reversal(solver: AbstractSolver, solver_state: PyTree) -> AbstractReversal:
    if type(solver) is FixedPointReversible:
        return NumericalReversal(solver.solver, solver.max_corrections)
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


def _check_can_step_back(reversal: AbstractReversal, name: str) -> None:
    if not reversal.can_step_back:
        solver_name = type(reversal.solver).__name__
        raise ValueError(
            f"Cannot use `adjoint={name}(checkpoints=0)` with `solver={solver_name}"
            "(...)`, the steps of which cannot be undone. Consider using "
            f"`adjoint={name}()`, which stores states."
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
