from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree, Real

from ._adjoint import ReversibleAdjoint
from ._custom_types import RealScalarLike
from ._reverse_step import tolerance_for
from ._step_trace import columns
from ._term import WrapTerm


class ReversalReport(eqx.Module):
    """How going back over a solve went, step by step; returned by
    [`diffrax.reversal_report`][].

    All but the last four have shape `(max_steps,)`, with one entry for each accepted
    step, in the order of the steps. What is beyond `num_steps` is NaN, or zero.
    The errors are relative to the size of each entry of `y` (or to a small part of the
    largest entry of its leaf, if that is more). An error is NaN where it does not
    apply. Of a batch, everything has the axis of the batch in front.

    **Attributes:**

    - `t0`, `t1`: The start and the end of each step.
    - `drift`: At a step that starts from a known state (a stored one, or the start of
        the solve): how far it ends from where going back had come by.
    - `residual`: At every other step: how far it ends from where it should, when it
        starts from where going back found it to start.
    - `rounding`: At every other step, with `certificate="full"`: how large an error of
        the size of rounding has become there that is carried along, since the last
        known state.
    - `cotangents`: At the first step of each segment that was undone, with
        `certificate="full"`: what difference it makes to the cotangents, of `y` and of
        all parameters, that it starts from a known state, and not from where going back
        would have had it start, times the number of steps of the segment. Relative to
        the norm of each leaf.
    - `corrections`: How many times a guess of where the step had started was corrected.
    - `replays`: How many times the step was made again.
    - `num_steps`: How many accepted steps there are. Of shape `()`.
    - `tolerance`: What is tolerated of each error by
        [`diffrax.ReversibleAdjoint`][], before it makes steps again.
    - `value`, `grads`: What `loss` returned, and its gradient with respect to `args`.
    """

    t0: Real[Array, " max_steps"]
    t1: Real[Array, " max_steps"]
    drift: Real[Array, " max_steps"]
    residual: Real[Array, " max_steps"]
    rounding: Real[Array, " max_steps"]
    cotangents: Real[Array, " max_steps"]
    corrections: Int[Array, " max_steps"]
    replays: Int[Array, " max_steps"]
    num_steps: Int[Array, ""]
    tolerance: RealScalarLike
    value: Real[Array, ""]
    grads: tuple[PyTree, ...]

    @property
    def certificate(self) -> Real[Array, " *batch"]:
        """The largest of all errors. A scalar; of a batch, one for each member."""
        errors = self.drift, self.residual, self.rounding, self.cotangents
        return jnp.nanmax(jnp.stack(errors), axis=(0, -1), initial=0.0)


def reversal_report(
    loss: Callable[..., Real[Array, ""]],
    *args: PyTree,
    adjoint: ReversibleAdjoint = ReversibleAdjoint(),
) -> ReversalReport:
    """Computes a gradient by [`diffrax.ReversibleAdjoint`][], and tells of each step
    how well that went and what it took.

    The cost is that of the gradient. The memory is that of nine more numbers for each
    of `max_steps` steps. Nothing is raised if the gradient turns out not to be trusted:
    `report.certificate` is to be compared with `report.tolerance`.

    !!! example

        ```python
        import diffrax
        import jax.numpy as jnp

        def loss(adjoint, y0):
            term = diffrax.ODETerm(lambda t, y, args: -y)
            solver = diffrax.Tsit5()
            sol = diffrax.diffeqsolve(
                term, solver, t0=0, t1=20, dt0=0.1, y0=y0, adjoint=adjoint
            )
            return jnp.sum(sol.ys)

        report = diffrax.reversal_report(loss, jnp.array([1.0, 2.0]))
        assert report.certificate <= report.tolerance
        print(report.num_steps, jnp.nanmax(report.drift), jnp.sum(report.replays))
        ```

    **Arguments:**

    - `loss`: A function of an adjoint and of `args`. It calls
        [`diffrax.diffeqsolve`][] with this adjoint once, and returns a scalar.
    - `args`: With respect to what to differentiate: every floating-point array in it.
    - `adjoint`: How many states to store, and which certificate. Its `on_failure` does
        not matter.

    **Returns:**

    A [`diffrax.ReversalReport`][]. For a batch of solves, call this inside of
    `jax.vmap`.

    **Raises:**

    `ValueError` if `adjoint` is not a [`diffrax.ReversibleAdjoint`][]; if there is
    nothing to differentiate in `args`; if `loss` does not solve a differential equation
    with the adjoint that it is passed; if it does so twice; or if it does with
    `max_steps=None`. At run time if it does so inside of `jax.vmap` or of a loop.
    """
    _check(adjoint, args)
    kwargs: dict[str, Any] = dict(
        checkpoints=adjoint.checkpoints,
        certificate=adjoint.certificate,
        on_failure="ignore",
        progress_meter=adjoint.progress_meter,
        solves=_Solves(),
    )
    eqx.filter_eval_shape(lambda *a: loss(_TracingAdjoint(**kwargs), *a), *args)
    found = kwargs["solves"].found
    if len(found) != 1:
        raise ValueError(
            "The function in `reversal_report(loss)` must call `diffeqsolve(..., "
            "adjoint=adjoint)` once, with the adjoint that it is passed, but did so "
            f"{len(found)} times."
        )
    ((max_steps, tolerance),) = found

    @eqx.filter_value_and_grad
    def value_and_grad(trace__args):
        trace, _args = trace__args
        return loss(_TracingAdjoint(**kwargs, trace=trace), *_args)

    trace = jnp.zeros((max_steps, len(columns)))
    value, (rows, grads) = value_and_grad((trace, args))
    return _report(rows, tolerance, value, grads)


def _check(adjoint: Any, args: tuple[PyTree, ...]) -> None:
    if not isinstance(adjoint, ReversibleAdjoint):
        raise ValueError(
            "`adjoint` in `reversal_report(..., adjoint=...)` must be an instance of "
            f"`ReversibleAdjoint`, but got {adjoint!r}."
        )
    leaves = jtu.tree_leaves(args)
    if len(leaves) > 0 and not any(map(eqx.is_inexact_array, leaves)):
        raise ValueError(
            "There is nothing to differentiate in `reversal_report(loss, *args)`: pass "
            "floating-point arrays, for example `jnp.array(1.0)`, as `args`."
        )


def _report(
    rows: Array, tolerance: float, value: Array, grads: tuple[PyTree, ...]
) -> ReversalReport:
    of = dict(zip(columns, rows.T))
    is_step = eqx.error_if(
        of["count"] == 1,
        jnp.any(of["count"] > 1),
        "The function in `reversal_report(loss)` must call `diffeqsolve(..., "
        "adjoint=adjoint)` once, but did so inside of `jax.vmap` or of a loop. For a "
        "batch, call `reversal_report` inside of `jax.vmap`.",
    )

    def column(name, unit=1.0):
        return jnp.where(is_step, unit * of[name], jnp.nan)

    return ReversalReport(
        t0=column("t0"),
        t1=column("t1"),
        drift=column("drift", tolerance),
        residual=column("residual", tolerance),
        rounding=column("rounding", tolerance),
        cotangents=column("cotangents", tolerance),
        corrections=of["corrections"].astype(int),
        replays=of["replays"].astype(int),
        num_steps=jnp.sum(is_step),
        tolerance=tolerance,
        value=value,
        grads=grads,
    )


class _Solves:
    """The calls of `diffeqsolve` that were seen while tracing: for each `max_steps`,
    and what is tolerated."""

    found: list[tuple[int, float]]

    def __init__(self):
        self.found = []


class _TracingAdjoint(ReversibleAdjoint):
    """Has as the gradient with respect to `trace` what each step took."""

    trace: Array | None = None
    solves: _Solves = eqx.field(static=True, default_factory=_Solves)

    def loop(self, *, max_steps, init_state, **kwargs):
        if max_steps is None:
            raise ValueError(
                "Cannot use `reversal_report` with `diffeqsolve(..., max_steps=None)`."
            )
        self.solves.found.append((max_steps, tolerance_for(init_state.y)))
        return super().loop(max_steps=max_steps, init_state=init_state, **kwargs)

    def _trace(self, terms):
        if self.trace is None:
            return None
        # The direction of time; diffeqsolve itself knows only one.
        is_wrapped = lambda x: isinstance(x, WrapTerm)
        leaves = jtu.tree_leaves(terms, is_leaf=is_wrapped)
        direction = next(x.direction for x in leaves if is_wrapped(x))
        is_time = jnp.array([name in ("t0", "t1") for name in columns])
        # What is a factor here is one of the gradient, too.
        factor = jnp.where(is_time, direction, 1).astype(self.trace.dtype)
        return self.trace * factor[None]
