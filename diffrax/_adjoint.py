import functools as ft
import operator
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._closed_solve import (
    as_arrays,
    close_solve,
    flatten_subs,
    has_steps_without_gradient,
    set_y_and_solver_state,
    without_derivative,
)
from ._constant_record import can_compute_times
from ._custom_types import RealScalarLike
from ._progress_meter import AbstractProgressMeter, NoProgressMeter
from ._reversal import (
    AbstractReversal,
    AlgebraicReversal,
    ExactReversal,
    NoReversal,
    NumericalReversal,
)
from ._reverse_mode_only import reverse_mode_only
from ._reversible_loop import Inputs, put_back_start, reversible_loop
from ._solver import (
    AbstractReversibleSolver,
    AbstractSolver,
    BitExact,
    HalfSolver,
)
from ._solver.fixed_point_reversible import FixedPointReversible, is_plain_erk
from ._solver.reversible_half_solver import records_state, ReversibleHalfSolver
from ._step_size_controller import (
    AbstractStepSizeController,
    StepTo,
)
from ._step_times import get_times, set_times
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
    boolean if there may be jumps; and what the solver itself records. Nothing for
    constant steps with `max_steps=None`. And output does, such as that of
    `SaveAt(dense=True)`.) The forward pass is that of the solver, with whatever solver.

    A step is undone

    - in closed form, if the solver is a [`diffrax.AbstractReversibleSolver`][]:
        [`diffrax.ReversibleHeun`][], [`diffrax.LeapfrogMidpoint`][],
        [`diffrax.SemiImplicitEuler`][], [`diffrax.UReversible`][], the [symplectic
        methods](../solvers.md#symplectic-methods), or [your own](../extending.md);
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
    right. (Of leaves of `y` of different precision, it is that of the least precise one
    that counts, for all of them.) What it does not see is that
    `SaveAt(ts=..., fn=...)` is much more sensitive to `y` at some time within a segment
    than the state at its ends: such an `fn` magnifies the error of `y` without notice.
    [`diffrax.reversal_report`][] returns all of these numbers.

    Gradients are computed with respect to `y0`, `args`, `terms`, `solver_state` (if
    passed), the times `t0`, `t1`, `dt0`, `SaveAt(ts=...)` and `StepTo(ts=...)`, and
    whatever the vector field, `SaveAt(fn=...)` or the condition of an event closes
    over; through all of `SaveAt`, and through events. They can be differentiated
    further in forward mode (as by `jax.hessian`). An attempt to differentiate anything
    else (the tolerances and other parameters of the step size controller; a gradient in
    reverse mode; a solve with `max_steps=None`, unless its steps are those of `StepTo`,
    or constant without a Brownian motion) raises an error.

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

        A solve cannot be forward-mode autodifferentiated (e.g. using `jax.jvp`); only
        its gradient can. Try using [`diffrax.ForwardMode`][] if you need forward-mode
        autodifferentiation, or [`diffrax.DirectAdjoint`][] if you need both forward and
        reverse-mode autodifferentiation.

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
    progress_meter: AbstractProgressMeter = NoProgressMeter()

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
        if not isinstance(self.progress_meter, AbstractProgressMeter):
            raise ValueError(
                f"`progress_meter` in `{name}(progress_meter=...)` must be a progress "
                f"meter, such as `TqdmProgressMeter()`, but got "
                f"{self.progress_meter!r}."
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
        del passed_solver_state, passed_controller_state
        name = ReversibleAdjoint.__name__
        reversal = _choose_reversal(solver, init_state.solver_state)
        if self.checkpoints == 0:
            _check_can_step_back(reversal, name)
        init_state = set_y_and_solver_state(
            init_state, init_state.y, as_arrays(init_state.solver_state)
        )
        _refuse_gradient_of_steps(
            stepsize_controller, solver, terms, args, init_state, name
        )
        stepsize_controller, init_state = _refuse_gradient_of_controller(
            stepsize_controller, init_state, name
        )
        on_failure = self.on_failure
        if on_failure == "raise" and not throw:
            on_failure = "nan"
        closing = dict(
            name=name,
            reversal=reversal,
            checkpoints=self.checkpoints,
            certificate=self.certificate,
            on_failure=on_failure,
            backward_meter=self.progress_meter,
        )
        kwargs: dict[str, Any] = dict(
            args=args,
            terms=terms,
            stepsize_controller=stepsize_controller,
            event=event,
            saveat=saveat,
            t0=t0,
            t1=t1,
            dt0=dt0,
            max_steps=max_steps,
            init_state=init_state,
            progress_meter=progress_meter,
        )
        if max_steps is None and not _needs_no_buffer(
            terms, stepsize_controller, reversal, init_state.solver_state
        ):
            return self._unbounded_loop(solver=solver, **kwargs)
        return self._loop(
            solver=solver,
            inner_while_loop=ft.partial(_inner_loop, kind="lax"),
            outer_while_loop=ft.partial(
                _reversible_while_loop,
                self._loop,
                closing=closing,
                trace=self._trace(terms),
                **kwargs,
            ),
            **kwargs,
        )

    def _unbounded_loop(self, *, solver, **kwargs):
        final_state, aux_stats = self._loop(
            solver=without_derivative(solver),
            inner_while_loop=ft.partial(_inner_loop, kind="lax"),
            outer_while_loop=ft.partial(_outer_loop, kind="lax"),
            **kwargs,
        )
        name = ReversibleAdjoint.__name__
        msg = (
            "Cannot differentiate `diffeqsolve(..., max_steps=None, "
            f"adjoint={name}())`: recording the times of the steps needs memory, the "
            "size of which JAX has to know in advance. (Unless they are those of "
            "`StepTo`; or of `ConstantStepSize`, with controls that are functions or "
            "interpolations and a solver that records nothing of its own.) Put a bound "
            "on the maximum number of steps."
        )
        final_state = reverse_mode_only(final_state, _no_forward_mode(name))
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
    second time (for every fourth step, where steps are small); and one step more for
    each segment.
- `on_failure`: What to do with a gradient that has fewer than half of its digits
    according to the certificate, which may happen only with `checkpoints=0`: `"raise"`
    an error (with `diffeqsolve(..., throw=False)` this is as `"nan"`); `"nan"`, to make
    it NaN, under `jax.vmap` for those members of the batch alone that are concerned
    (but what is shared by the whole batch has a single gradient); or `"ignore"`.
- `progress_meter`: Shows how far going back has come, from 0 at the end of the solve to
    1 at its start, by steps undone. (That of `diffeqsolve(..., progress_meter=...)`
    shows how far the solve has come on the way forward.) Any [progress
    meter](./progress_meter.md); by default there is none.

**Raises:**

`ValueError` if one of the arguments is none of these.

When used in [`diffrax.diffeqsolve`][], before anything runs: `ValueError` with an
`UnsafeBrownianPath` if the solver asks for other increments than those of whole steps,
or with `checkpoints=0` if the steps of the solver cannot be undone;
`NotImplementedError` for forward-mode autodifferentiation. When it is differentiated:
`RuntimeError` if that is with respect to anything for which there is no gradient, twice
in reverse mode, or without the bound on the number of steps that is needed.
"""


def _choose_reversal(solver: AbstractSolver, solver_state: PyTree) -> AbstractReversal:
    if type(solver) is FixedPointReversible:
        return NumericalReversal(solver.solver, solver.max_corrections)
    # `isinstance` looks through wrappers. Being able to undo the step of the solver
    # inside does not mean being able to undo that of the wrapper.
    if issubclass(type(solver), AbstractReversibleSolver):
        reversible = cast(AbstractReversibleSolver, solver)
        # Not a subclass, which may be anything.
        cls = ExactReversal if type(solver) is BitExact else AlgebraicReversal
        return cls(reversible)
    if type(solver) is HalfSolver and issubclass(
        type(solver.solver), AbstractReversibleSolver
    ):
        if not records_state(solver.solver):
            return AlgebraicReversal(ReversibleHalfSolver(solver.solver))
    elif is_plain_erk(solver) or solver_state is None:
        return NumericalReversal(solver)
    return NoReversal(solver)


def _needs_no_buffer(
    terms: PyTree[AbstractTerm],
    controller: AbstractStepSizeController,
    reversal: AbstractReversal,
    solver_state: PyTree,
) -> bool:
    """Whether the times of the steps are known without recording them (to the last bit,
    if it depends on that), and the solver records nothing else."""
    if type(controller) is StepTo:
        return True
    if reversal.is_exact or reversal.record_state(solver_state) is not None:
        return False
    return can_compute_times(terms, controller)


def _check_can_step_back(reversal: AbstractReversal, name: str) -> None:
    if not reversal.can_step_back:
        solver_name = type(reversal.solver).__name__
        raise ValueError(
            f"Cannot use `adjoint={name}(checkpoints=0)` with `solver={solver_name}"
            "(...)`, the steps of which cannot be undone. Consider using "
            f"`adjoint={name}()`, which stores states."
        )


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
    if has_steps_without_gradient(controller):
        return
    # Only the derivative of this is of interest; its values are not used. And only that
    # with respect to other things than times.
    state = eqx.tree_at(
        lambda s: (s.tprev, s.tnext, s.controller_state),
        state,
        replace_fn=lax.stop_gradient,
        is_leaf=lambda x: x is None,
    )
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


def _refuse_gradient_of_controller(
    controller: AbstractStepSizeController, state: Any, name: str
) -> tuple[AbstractStepSizeController, Any]:
    """Raises an error if anything is differentiated in the step size controller, or in
    its state, but for what is among `Times`."""
    msg = (
        "Cannot differentiate with respect to `stepsize_controller`, or to arrays in "
        f"its state, when using `adjoint={name}()`, other than to `StepTo(ts=...)`. "
        "Consider using `adjoint=RecursiveCheckpointAdjoint()` instead, or wrapping "
        "what is passed in `jax.lax.stop_gradient`."
    )
    times = get_times(controller, state, state.tprev)
    if times.step_to is not None:
        controller = eqx.tree_at(
            lambda c: c.ts, controller, lax.stop_gradient(times.step_to)
        )
    controller = eqxi.nondifferentiable(controller, msg=msg)
    arrays = eqx.filter(state.controller_state, lambda x: jnp.ndim(x) > 0)
    rest = eqx.filter(state.controller_state, lambda x: jnp.ndim(x) > 0, inverse=True)
    arrays = eqxi.nondifferentiable(arrays, msg=msg)
    state = eqx.tree_at(
        lambda s: s.controller_state,
        state,
        eqx.combine(arrays, rest),
        is_leaf=lambda x: x is None,
    )
    return set_times(times, controller, state)


def _no_forward_mode(name: str) -> str:
    return (
        f"Cannot use forward-mode autodifferentiation with `adjoint={name}()`. "
        "Consider using `adjoint=ForwardMode()` instead, or `adjoint=DirectAdjoint()` "
        "for both forward and reverse mode."
    )


def _reversible_while_loop(
    loop: Callable,
    cond_fun: Callable,
    body_fun: Callable,
    init_val: Any,
    *,
    buffers: Callable,
    closing: dict[str, Any],
    trace: Array | None,
    args: PyTree,
    terms: PyTree[AbstractTerm],
    t1: RealScalarLike,
    **kwargs: Any,
) -> Any:
    """The loop over steps. Takes the place of `eqxi.while_loop`."""
    del cond_fun, body_fun, buffers  # Which are made again.
    init_state, saveat = kwargs["init_state"], kwargs["saveat"]
    times = get_times(kwargs["stepsize_controller"], init_state, t1)
    y, solver_state = init_state.y, init_state.solver_state
    local, closed = close_solve(
        loop, y, solver_state, args, terms, times, **kwargs, **closing
    )
    arrays, rest = eqx.partition(closed, eqx.is_array)
    inputs = Inputs(
        y=y,
        solver_state=solver_state,
        args=args,
        terms=terms,
        local=local,
        times=times,
        save_ts=[sub.ts for sub in flatten_subs(saveat)],
        closed=arrays,
        trace=trace,
    )
    inputs = reverse_mode_only(inputs, _no_forward_mode(closing["name"]))
    final_state = reversible_loop(inputs, rest)
    # From a custom derivative rule even integers have a tangent, if an empty one, and
    # not every primitive that comes later has a rule for that.
    floats, others = eqx.partition(final_state, eqx.is_inexact_array)
    others = eqxi.nondifferentiable_backward(others, symbolic=False)
    final_state = eqx.combine(floats, others)
    return put_back_start(final_state, init_val, flatten_subs(saveat))
