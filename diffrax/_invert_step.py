"""Finding where a step of a solver started from where it ended."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from equinox.internal import ω
from jaxtyping import Array, Bool, Int, PyTree, Real

from ._closed_function import close_function
from ._custom_types import BoolScalarLike, IntScalarLike, Y


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


class Search(eqx.Module):
    """Looking for where a step started that ended at `y1`.

    It starts from `step_back(y1)`, an approximate inverse, and corrects that by

        y0 <- y0 + step_back(y1) - step_back(step(y0))

    until `step(y0)` is within 16 units of rounding of `y1`, for each leaf; or until two
    rounds have not halved the distance, when it goes back to the best of all.

    The step from `y0` is needed with its linearisation in the end. So `look` corrects
    as often as it is expected to take without finding out whether the last of these
    was enough. To `judge` that is for whoever then makes the step; who has to `look`
    again if it was not.

    - `index`: how many `y0` there were.
    - `y0`: where to start from.
    - `end`: where that led to. `is_judged`: whether that is known, and was judged.
    - `target`: what `step_back` makes of `y1`.
    - `error`: by how much `end` misses that, in units of rounding.
    - `best_y0`, `best_error`: from where it missed by the least so far.
    - `stalled`: how many rounds did not halve the best error.
    - `at_best`: whether `y0` is the best of all, or is to be that next.
    - `done`: whether `y0` is it.
    - `planned`: how many corrections are expected to be needed.
    """

    index: Int[Array, ""]
    y0: Y
    end: Y
    is_judged: Bool[Array, ""]
    target: Y
    error: Real[Array, ""]
    best_y0: Y
    best_error: Real[Array, ""]
    stalled: Int[Array, ""]
    at_best: Bool[Array, ""]
    done: Bool[Array, ""]
    planned: Int[Array, ""]

    @classmethod
    def start(cls, y1: Y, planned: IntScalarLike = 0) -> "Search":
        infinity = jnp.array(jnp.inf, jnp.result_type(float))
        return cls(
            index=jnp.array(0),
            y0=y1,
            end=y1,
            is_judged=jnp.array(True),
            target=y1,
            error=infinity,
            best_y0=y1,
            best_error=infinity,
            stalled=jnp.array(0),
            at_best=jnp.array(False),
            done=jnp.array(False),
            planned=jnp.asarray(planned),
        )

    @property
    def num_corrections(self) -> Int[Array, ""]:
        """How often the first guess was corrected."""
        return self.index - 1

    def know(self, y0: Y) -> "Search":
        """There is no need to look."""
        return eqx.tree_at(lambda s: s.y0, self, y0)

    def accept(self) -> "Search":
        """`y0` is it."""
        return eqx.tree_at(lambda s: s.done, self, jnp.array(True))

    def next(self, known: BoolScalarLike) -> "Search":
        """If `done`: for the step before that. Otherwise the same one, to be
        corrected."""
        done = self.done
        planned = jnp.where(done, self.num_corrections, self.index)
        return eqx.tree_at(
            lambda s: (s.index, s.is_judged, s.at_best, s.done, s.planned),
            self,
            (
                jnp.where(done, 0, self.index),
                jnp.array(True),
                self.at_best & jnp.invert(done),
                jnp.array(False),
                jnp.where(known, self.planned, planned),
            ),
        )

    def look(
        self,
        step: Callable[[Y], Y],
        step_back: Callable[[Y, BoolScalarLike], Y],
        y1: Y,
        known: BoolScalarLike,
        start: Y,
        max_corrections: int,
    ) -> "Search":
        """What to try next. That is `start` in the first round, if that is `known`.
        `step_back` is a function of `(y, is_y1)`, the second of which is `False` if `y`
        is not `y1` for any member of a batch."""

        def cond_fun(carry):
            _, is_ready = carry
            return jnp.invert(is_ready)

        def body_fun(carry):
            search, _ = carry
            search = lax.cond(
                eqxi.unvmap_all(search.is_judged),
                lambda: search,
                lambda: search.where_not_judged(
                    search.judge(step(search.y0), y1, False, max_corrections)
                ),
            )
            new = search.propose(step_back, y1, known, start)
            is_ready = known | new.at_best | (new.num_corrections >= new.planned)
            new = jtu.tree_map(lambda a, b: jnp.where(search.done, a, b), search, new)
            return new, search.done | is_ready

        search, _ = eqxi.while_loop(
            cond_fun, body_fun, (self, jnp.array(False)), kind="lax"
        )
        return search

    def where_not_judged(self, other: "Search") -> "Search":
        return jtu.tree_map(lambda a, b: jnp.where(self.is_judged, a, b), self, other)

    def propose(
        self,
        step_back: Callable[[Y, BoolScalarLike], Y],
        y1: Y,
        known: BoolScalarLike,
        start: Y,
    ) -> "Search":
        """The next `y0`, after the one before has been judged."""
        is_first = self.index == 0
        end = jtu.tree_map(lambda a, b: jnp.where(is_first, a, b), y1, self.end)
        back = lax.cond(
            eqxi.unvmap_any(jnp.invert(self.at_best | (is_first & known))),
            lambda: step_back(end, is_first),
            lambda: end,
        )
        # A guess of NaN would be the end of it.
        finite = [jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(back)]
        is_finite = ft.reduce(jnp.logical_and, finite, jnp.array(True))

        def choose(start, back, y0, target, best, y1):
            guess = jnp.where(is_finite, back, y1)
            first = jnp.where(known, start, guess)
            corrected = y0 + (target - back)
            return jnp.where(is_first, first, jnp.where(self.at_best, best, corrected))

        y0 = jtu.tree_map(choose, start, back, self.y0, self.target, self.best_y0, y1)
        target = jtu.tree_map(lambda a, b: jnp.where(is_first, a, b), back, self.target)
        return eqx.tree_at(
            lambda s: (s.index, s.y0, s.is_judged, s.target),
            self,
            (self.index + 1, y0, jnp.array(False), target),
        )

    def judge(
        self, end: Y, y1: Y, known: BoolScalarLike, max_corrections: int
    ) -> "Search":
        """What has become of it, if a step from `y0` led to `end`."""
        is_first = self.index <= 1
        size = jtu.tree_map(jnp.maximum, max_abs(y1), max_abs(self.y0))
        error = relative_distance(end, y1, size)
        last_error = jnp.where(is_first, jnp.inf, self.best_error)
        last_stalled = jnp.where(is_first, 0, self.stalled)
        stalled = jnp.where(error <= 0.5 * last_error, 0, last_stalled + 1)
        best_error = jnp.where(error < last_error, error, last_error)
        is_best = is_first | (error < last_error)
        best_y0 = jtu.tree_map(
            lambda a, b: jnp.where(is_best, a, b), self.y0, self.best_y0
        )
        given_up = (stalled >= 2) | (self.num_corrections >= max_corrections)
        done = (
            known
            | (error <= _tolerance)
            | self.at_best
            | (given_up & (error <= 2 * best_error))
        )
        return Search(
            index=self.index,
            y0=self.y0,
            end=end,
            is_judged=jnp.array(True),
            target=self.target,
            error=error,
            best_y0=best_y0,
            best_error=best_error,
            stalled=stalled,
            at_best=given_up,
            done=self.done | done,
            planned=self.planned,
        )


@eqx.filter_custom_jvp
def root(
    y0: Y,
    y1: Y,
    known: BoolScalarLike,
    start: Y,
    step: Callable[[Y], Y],
    step_back: Callable[[Y], Y],
) -> Y:
    """Returns `y0`, of which it is known that `step(y0) == y1`.

    What is differentiated is that equation, in place of the iteration by which it was
    solved: the derivative of that is behind it, and would still be wrong in the digits
    that the last round was for. If `known` then `y0` is `start`.

    `step` and `step_back` are PyTrees of all that they depend on.
    """
    del y1, known, start, step, step_back
    return y0


@root.def_jvp
def _root_jvp(primals, tangents):
    y0, y1, known, start, step, step_back = primals
    _, t_y1, _, t_start, t_step, _ = tangents
    t_y1, t_start = jtu.tree_map(_instantiate, (y1, start), (t_y1, t_start))
    if all(x is None for x in jtu.tree_leaves(t_step, is_leaf=lambda x: x is None)):
        rhs = t_y1
    else:
        _, t_end = eqx.filter_jvp(lambda _step: _step(y0), (step,), (t_step,))
        rhs = (t_y1**ω - t_end**ω).ω
    rhs = jtu.tree_map(lambda x: jnp.where(known, 0, x), rhs)
    _, derivative = jax.linearize(step, y0)
    _, inverse = jax.linearize(step_back, y1)
    solution = solve_linear(derivative, inverse, rhs)
    return y0, jtu.tree_map(lambda a, b: jnp.where(known, a, b), t_start, solution)


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


class InvertedStep(eqx.Module):
    """What `invert_step` found.

    - `y0`: where the step starts.
    - `error`: by how much it misses `y1`, in units of rounding.
    """

    y0: Y
    error: Real[Array, ""]


def invert_step(
    step: Callable[[Y], Y],
    step_back: Callable[[Y], Y],
    y1: Y,
    max_corrections: int = 16,
) -> InvertedStep:
    """Solves `step(y0) == y1` for `y0`, by a `Search`.

    **Arguments:**

    - `step`: a function of `y0` that returns `y1`.
    - `step_back`: an approximate inverse of that.
    - `y1`: where the step is to end. All of its leaves are floating-point arrays.
    - `max_corrections`: how often to correct the first guess.
    """
    closed_step, closed_back = close_function(step, y1), close_function(step_back, y1)
    fixed_step, fixed_back, fixed_y1 = _stop_gradient((closed_step, closed_back, y1))
    no = jnp.array(False)
    search = Search.start(fixed_y1, planned=max_corrections + 2)
    search = search.look(
        fixed_step,
        lambda y, is_y1: fixed_back(y),
        fixed_y1,
        no,
        fixed_y1,
        max_corrections,
    )
    # If it has gone back to the best of all then that is what it was judged by.
    error = jnp.minimum(search.error, search.best_error)
    y0 = root(search.y0, y1, no, y1, closed_step, closed_back)
    return InvertedStep(y0, error)


def _stop_gradient(tree: PyTree) -> PyTree:
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(lax.stop_gradient(arrays), rest)
