"""Finding where a step of a solver started from where it ended."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.extend as jex
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from equinox.internal import ω
from jaxtyping import Array, Bool, Int, PyTree, Real

from ._custom_types import BoolScalarLike, Y


# Iterating further does not bring a step that is this near any nearer: the rounding
# errors of the step itself are a few units, up to 20 for steps that are large.
_tolerance = 16.0


def max_abs(y: PyTree) -> PyTree[Array]:
    """The largest absolute value of each leaf."""
    return jtu.tree_map(lambda x: jnp.max(jnp.abs(x), initial=0), y)


def relative_distance(
    y: PyTree, other: PyTree, size: PyTree, unit: float | None = None
) -> Real[Array, ""]:
    """The largest difference between two PyTrees, in units of `unit` times `size`,
    which is how large each leaf is, or each entry of it. The default for `unit` is the
    machine epsilon. NaN if anything is; infinity if they differ where `size` is
    zero."""

    def _distance(x, x2, size_x):
        eps = float(jnp.finfo(x.dtype).eps) if unit is None else unit
        difference = jnp.abs(x - x2)
        ratio = jnp.where(difference == 0, 0, difference / (eps * size_x))
        return jnp.max(ratio, initial=0).astype(jnp.result_type(float))

    distances = jtu.tree_leaves(jtu.tree_map(_distance, y, other, size))
    return ft.reduce(jnp.maximum, distances, jnp.zeros((), jnp.result_type(float)))


class _Traced:
    """A function, traced once, whose outputs of which some are among its inputs (as the
    parameters of the vector field are among what its derivative needs) can do without
    these, so as not to copy them at every iteration of a loop."""

    def __init__(self, fn: Callable[[Y], PyTree[Array]], y: Y):
        def flat(*leaves):
            out = fn(jtu.tree_unflatten(in_tree, leaves))
            leaves_out, out_tree = jtu.tree_flatten(out)
            out_trees.append(out_tree)
            return leaves_out

        out_trees = []
        leaves, in_tree = jtu.tree_flatten(y)
        closed = jax.make_jaxpr(flat)(*leaves)
        [self._out_tree] = out_trees
        jaxpr = closed.jaxpr
        known = dict(zip(jaxpr.constvars, closed.consts))
        self._jaxpr = closed
        self._known = [
            x.val if isinstance(x, jex.core.Literal) else known.get(x)
            for x in jaxpr.outvars
        ]
        self.struct = [
            jax.ShapeDtypeStruct(x.shape, x.dtype)
            for x, value in zip(closed.out_avals, self._known)
            if value is None
        ]

    @property
    def consts(self) -> list[Any]:
        """What the function closes over."""
        return self._jaxpr.consts

    def __call__(self, y: Y, consts: list[Any]) -> list[Array]:
        """The outputs that are not known without evaluating anything."""
        closed = jex.core.ClosedJaxpr(self._jaxpr.jaxpr, consts)
        out = jex.core.jaxpr_as_fun(closed)(*jtu.tree_leaves(y))
        return [x for x, value in zip(out, self._known) if value is None]

    def complete(self, outputs: list[Array]) -> PyTree:
        """All outputs, in the structure that the function returned them."""
        remaining = iter(outputs)
        leaves = [next(remaining) if x is None else x for x in self._known]
        return jtu.tree_unflatten(self._out_tree, leaves)


class _Iteration(eqx.Module):
    index: Int[Array, ""]
    # Where the step starts; where it then ends; and what else comes of making it.
    y0: Y
    outputs: list[Array]
    # What `step_back` makes of where the step is to end.
    target: Y
    # How far the step misses, the least that it has missed by, and from where.
    error: Real[Array, ""]
    best_error: Real[Array, ""]
    best_y0: Y
    # How many rounds did not halve the best error.
    stalled: Int[Array, ""]
    at_best: Bool[Array, ""]
    done: Bool[Array, ""]


def _start(y1: Y, outputs: list[Array]) -> _Iteration:
    infinity = jnp.array(jnp.inf, jnp.result_type(float))
    return _Iteration(
        index=jnp.array(0),
        y0=y1,
        outputs=outputs,
        target=y1,
        error=infinity,
        best_error=infinity,
        best_y0=y1,
        stalled=jnp.array(0),
        at_best=jnp.array(False),
        done=jnp.array(False),
    )


class InvertedStep(eqx.Module):
    """What `invert_step` found.

    - `y0`: where the step starts.
    - `guess`: what `step_back` returned for `y1`. Has no meaning if `y0` was known.
    - `aux`: what else `step` returned there.
    - `error`: by how much it misses `y1`, in units of rounding.
    - `num_corrections`: how often the first guess was corrected.
    """

    y0: Y
    guess: Y
    aux: Any
    error: Real[Array, ""]
    num_corrections: Int[Array, ""]


def _next_y0(
    val: _Iteration,
    step_back: Callable[[Y, BoolScalarLike], Y],
    end: Y,
    y1: Y,
    known: BoolScalarLike,
    start: Y,
) -> tuple[Y, Y]:
    """What to try next, where the step from `val.y0` led to `end`. And `val.target`."""
    is_first = val.index == 0
    end = jtu.tree_map(lambda a, b: jnp.where(is_first, a, b), y1, end)
    back = lax.cond(
        eqxi.unvmap_any(~(val.at_best | (is_first & known))),
        lambda: step_back(end, is_first),
        lambda: end,
    )
    corrected = (val.y0**ω + val.target**ω - back**ω).ω
    # A guess of NaN would be the end of it.
    finite = [jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(back)]
    is_finite = ft.reduce(jnp.logical_and, finite, jnp.array(True))

    def choose(start, guess, correction, best, y1):
        guess = jnp.where(is_finite, guess, y1)
        first = jnp.where(known, start, guess)
        return jnp.where(is_first, first, jnp.where(val.at_best, best, correction))

    y0 = jtu.tree_map(choose, start, back, corrected, val.best_y0, y1)
    target = jtu.tree_map(lambda a, b: jnp.where(is_first, a, b), back, val.target)
    return y0, target


class _Problem(NamedTuple):
    """The functions that are passed to `invert_step`, but for what they close over."""

    step: _Traced
    step_back: _Traced
    max_corrections: int

    def end(self, y0: Y, consts: list[Any]) -> Y:
        """Where the step from `y0` ends."""
        y1, _ = self.step.complete(self.step(y0, consts))
        return y1

    def back(self, y: Y, is_y1: BoolScalarLike, consts: list[Any]) -> Y:
        return self.step_back.complete(self.step_back((y, jnp.asarray(is_y1)), consts))


# The derivative of an iteration is behind that iteration: it would still be wrong in
# the digits that the last round was for. So this has a rule of its own.
@eqx.filter_custom_jvp
def _invert(
    y1: Y,
    start: Y,
    known: Bool[Array, ""],
    consts: list[Any],
    back_consts: list[Any],
    *,
    problem: _Problem,
) -> _Iteration:
    """The last iterate. `start` is where the step starts, if `known`."""
    size1 = max_abs(y1)

    def distance(y0, outputs):
        end, _ = problem.step.complete(outputs)
        size = jtu.tree_map(jnp.maximum, size1, max_abs(y0))
        return relative_distance(end, y1, size)

    def step_back(y, is_y1):
        return problem.back(y, is_y1, back_consts)

    def body_fun(val: _Iteration) -> _Iteration:
        end, _ = problem.step.complete(val.outputs)
        y0, target = _next_y0(val, step_back, end, y1, known, start)
        outputs = problem.step(y0, consts)
        error = distance(y0, outputs)
        halved = error <= 0.5 * val.best_error
        stalled = jnp.where(halved, 0, val.stalled + 1)
        is_best = error < val.best_error
        best_error = jnp.where(is_best, error, val.best_error)
        best_y0 = jtu.tree_map(lambda a, b: jnp.where(is_best, a, b), y0, val.best_y0)
        given_up = (stalled >= 2) | (val.index >= problem.max_corrections)
        done = (
            known
            | (error <= _tolerance)
            | val.at_best
            | (given_up & (error <= 2 * best_error))
        )
        return _Iteration(
            index=val.index + 1,
            y0=y0,
            outputs=outputs,
            target=target,
            error=error,
            best_error=best_error,
            best_y0=best_y0,
            stalled=stalled,
            at_best=given_up,
            done=jnp.asarray(done),
        )

    zeros = [jnp.zeros(x.shape, x.dtype) for x in problem.step.struct]
    return eqxi.while_loop(
        lambda val: ~val.done, body_fun, _start(y1, zeros), kind="lax"
    )


@_invert.def_jvp
def _invert_jvp(primals, tangents, *, problem: _Problem):
    """Differentiates the equation that the step ends at `y1`."""
    y1, _, known, consts, back_consts = primals
    val = _invert(*primals, problem=problem)
    t_y1, t_start, _, t_consts, _ = jtu.tree_map(_instantiate, primals, tangents)
    diff_consts, nondiff_consts = eqx.partition(consts, eqx.is_inexact_array)

    def end(_diff_consts):
        return problem.end(val.y0, eqx.combine(_diff_consts, nondiff_consts))

    _, t_end = jax.jvp(end, (diff_consts,), (t_consts,))
    rhs = (t_y1**ω - t_end**ω).ω
    rhs = jtu.tree_map(lambda x: jnp.where(known, 0, x), rhs)
    _, derivative = jax.linearize(lambda y0: problem.end(y0, consts), val.y0)
    _, inverse = jax.linearize(
        lambda y: problem.back(y, jnp.array(False), back_consts), y1
    )
    solution = solve_linear(derivative, inverse, rhs)
    t_y0 = jtu.tree_map(lambda a, b: jnp.where(known, a, b), t_start, solution)

    def outputs(y0, _diff_consts):
        out = problem.step(y0, eqx.combine(_diff_consts, nondiff_consts))
        return eqx.filter(out, eqx.is_inexact_array)

    _, t_outputs = jax.jvp(outputs, (val.y0, diff_consts), (t_y0, t_consts))
    none = jtu.tree_map(lambda _: None, val)
    return val, eqx.tree_at(
        lambda v: (v.y0, v.outputs),
        none,
        (t_y0, t_outputs),
        is_leaf=lambda x: x is None,
    )


def _instantiate(x: Any, tangent: Any) -> Any:
    if tangent is None and eqx.is_inexact_array(x):
        return jnp.zeros_like(x)
    return tangent


def solve_linear(operator: Callable[[Y], Y], inverse: Callable[[Y], Y], rhs: Y) -> Y:
    """Solves `operator(x) == rhs`, where `inverse` is an approximate inverse, by

        x <- x + inverse(rhs - operator(x))

    NaN if this does not converge. Can be differentiated any number of times: its
    derivative is the solution of another such equation."""
    eps = [float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(rhs)]
    eps = max(eps, default=1.0)

    def solve(matvec, b):
        largest = _norm(b)

        def cond_fun(carry):
            index, _, _, error, last_error = carry
            go_on = (error > 4 * eps * largest) & (error <= 0.5 * last_error)
            return go_on & (index < 64)

        def body_fun(carry):
            index, x, residual, error, _ = carry
            x = (x**ω + inverse(residual) ** ω).ω
            residual = (b**ω - matvec(x) ** ω).ω
            return index + 1, x, residual, _norm(residual), error

        zeros = jtu.tree_map(jnp.zeros_like, b)
        infinity = jnp.full_like(largest, jnp.inf)
        _, x, _, error, _ = lax.while_loop(
            cond_fun, body_fun, (jnp.array(0), zeros, b, largest, infinity)
        )
        converged = error <= eps ** (2 / 3) * largest
        return jtu.tree_map(lambda x: jnp.where(converged, x, jnp.nan), x)

    return lax.custom_linear_solve(operator, rhs, solve)


def _norm(tree: PyTree[Array]) -> Real[Array, ""]:
    dtype = jnp.result_type(float)
    squares = [jnp.sum(jnp.abs(x) ** 2).astype(dtype) for x in jtu.tree_leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros((), dtype)))


def invert_step(
    step: Callable[[Y], tuple[Y, PyTree[Array]]],
    step_back: Callable[[Y, BoolScalarLike], Y],
    y1: Y,
    known: BoolScalarLike = False,
    known_y0: Y | None = None,
    max_corrections: int = 16,
) -> InvertedStep:
    """Solves `step(y0) == y1` for `y0`.

    Starts from `step_back(y1)`, an approximate inverse, and corrects it by

        y0 <- y0 + step_back(y1) - step_back(step(y0))

    until `step(y0)` is within 16 units of rounding of `y1`, for each leaf; or until two
    rounds have not halved the distance, when the best of all is returned.

    **Arguments:**

    - `step`: a function of `y0` that returns `(y1, aux)`.
    - `step_back`: a function of `(y, is_y1)`. The second is `False` if `y` is not `y1`
        for any member of the batch.
    - `y1`: where the step is to end. All of its leaves are floating-point arrays.
    - `known`: if `True` then `y0` is `known_y0`, and no more is done than to evaluate
        `step` there.
    - `max_corrections`: how often to correct the first guess.
    """
    traced = _Traced(step, y1)
    back = _Traced(lambda y: step_back(*y), (y1, jnp.array(True)))
    start = y1 if known_y0 is None else known_y0
    val = _invert(
        y1,
        start,
        jnp.asarray(known),
        traced.consts,
        back.consts,
        problem=_Problem(traced, back, max_corrections),
    )
    _, aux = traced.complete(val.outputs)
    return InvertedStep(val.y0, val.target, aux, val.error, val.index - 1)
