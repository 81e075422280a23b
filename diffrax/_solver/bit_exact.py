from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, VF, Y
from .._damped_gap import Stacks
from .._heuristics import is_sde
from .._lattice import Part, spacings
from .._local_interpolation import AbstractLocalInterpolation
from .._moves import make, Point, undo
from .._solution import RESULTS
from .._term import AbstractTerm
from .asynchronous_leapfrog import AsynchronousLeapfrog
from .base import (
    AbstractItoSolver,
    AbstractReversibleSolver,
    AbstractSolver,
    AbstractWrappedSolver,
)
from .euler import Euler
from .exact_carrying import Asynchronous, Heun, Verlet
from .exact_coupled import Coupled
from .exact_steps import AbstractExactStep, Leapfrog, Made, Shears, Step
from .leapfrog_midpoint import LeapfrogMidpoint
from .reversible import UReversible
from .reversible_heun import ReversibleHeun
from .runge_kutta import AbstractERK
from .velocity_verlet import VelocityVerlet


class _SolverState(eqx.Module):
    """All but `y` of a `Point`.

    - `counts`: of all parts.
    - `starts`: those of the parts of `y`; and of the others, unless they start there.
    - `others`: the values of the parts that are no part of `y`. `None` if there are
        none. (Not an empty tuple, in which `eqx.tree_at` sees a leaf.)
    - `carry`, `stacks`: as there.
    """

    counts: tuple[PyTree[Array], ...]
    starts: tuple[PyTree[Array], ...]
    others: tuple[PyTree[Array], ...] | None
    carry: PyTree
    stacks: Stacks | None


class BitExact(AbstractReversibleSolver, AbstractWrappedSolver):
    r"""TODO"""

    solver: AbstractSolver
    size: PyTree[float] = 1.0
    max_steps: int = 100_000

    is_bit_exact: ClassVar[bool] = True

    def __check_init__(self):
        for size in jtu.tree_leaves(self.size):
            if not isinstance(size, (int, float)) or not 0 < size < float("inf"):
                raise ValueError(
                    "`size` in `BitExact(solver, size=...)` must be a positive Python "
                    f"number, or a PyTree of these, but got {self.size}."
                )
        if not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise ValueError(
                "`max_steps` in `BitExact(solver, max_steps=...)` must be a positive "
                f"integer, but got {self.max_steps}."
            )
        _ = self._steps

    @property
    def _steps(self) -> AbstractExactStep:
        solver = self.solver
        if type(solver) is LeapfrogMidpoint:
            return Leapfrog(solver)
        if type(solver) is ReversibleHeun:
            return Heun(solver)
        if type(solver) is VelocityVerlet:
            return Verlet(solver)
        if type(solver) is AsynchronousLeapfrog:
            return Asynchronous(solver, self.max_steps)
        if type(solver) is UReversible:
            return Coupled(solver, True, self.max_steps, self.size)
        if _has_shears(solver):
            return Shears(solver)
        if issubclass(type(solver), (AbstractERK, Euler)):
            return Coupled(UReversible(solver), False, self.max_steps, self.size)
        name = solver.__name__ if isinstance(solver, type) else type(solver).__name__
        raise ValueError(
            f"Cannot use `BitExact({name})`: pass an instance of `SemiImplicitEuler`, "
            "`LeapfrogMidpoint`, `ReversibleHeun`, `UReversible`, an explicit "
            "Runge--Kutta method, or a solver that defines `shears`."
        )

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self) -> Callable[..., AbstractLocalInterpolation]:  # pyright: ignore
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def scan_kind(self):
        # As for `UReversible`: there is no loop over stages.
        return "lax"

    def order(self, terms: PyTree[AbstractTerm]) -> int | None:
        return self.solver.order(terms)

    def strong_order(self, terms: PyTree[AbstractTerm]) -> RealScalarLike | None:
        return self.solver.strong_order(terms)

    def error_order(self, terms: PyTree[AbstractTerm]) -> RealScalarLike | None:
        return self.solver.error_order(terms)

    def init(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> _SolverState:
        del t1
        if is_sde(terms) and isinstance(self.solver, AbstractItoSolver):
            raise ValueError(
                f"Cannot use `BitExact({type(self.solver).__name__}())` to solve an "
                "SDE: it converges to the Itô solution, and only methods that converge "
                "to the Stratonovich solution can be made reversible like this. "
                "Consider using `BitExact(ReversibleHeun())`, together with the "
                "Stratonovich form of the SDE."
            )
        for x in jtu.tree_leaves(y0):
            if jnp.finfo(x.dtype).bits not in (32, 64):
                raise ValueError(
                    "Cannot use `BitExact(solver)` with `y0` in another precision than "
                    f"32 or 64 bits, but got {x.dtype}. Consider converting `y0`."
                )
        steps = self._steps
        others = steps.others(terms, t0, y0, args)
        parts = [Part.at(*x) for x in self._values_and_spacings(y0, others)]
        counts = tuple(part.count for part in parts)
        starts = tuple(part.start for part in parts)
        if steps.others_start_at_y:
            starts = starts[: len(parts) - len(others)]
        return _SolverState(
            counts=counts,
            starts=starts,
            others=others or None,
            carry=steps.carry(terms, t0, y0, args),
            stacks=steps.stacks(counts),
        )

    def step(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y | None, DenseInfo, _SolverState, RESULTS]:
        steps = self._steps
        step = Step.of(terms, t0, t1, y0, args)
        start = steps.across_jump(step, self._point(y0, solver_state), made_jump)
        end, kicks = make(steps.moves(step, start.carry), step.same_bits, start)
        end = end._replace(carry=steps.after(step, end.carry))
        made = Made(start, end, kicks)

        y1, solver_state1 = self._state(end, solver_state)
        is_outside = jnp.array(False)
        for part in end.parts:
            is_outside |= part.is_outside()
        has_failed = steps.has_failed(end)
        result: Any = RESULTS.successful
        result = RESULTS.where(has_failed, RESULTS.nonlinear_divergence, result)  # pyright: ignore
        result = RESULTS.where(is_outside, RESULTS.nonfinite, result)  # pyright: ignore
        # For a smaller step to be tried, if there are any.
        y_error = jtu.tree_map(
            lambda x: jnp.where(is_outside, jnp.inf, x), steps.error(made)
        )
        return y1, y_error, steps.dense_info(made), solver_state1, result

    def backward_step(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, DenseInfo, _SolverState]:
        del made_jump
        steps = self._steps
        step = Step.of(terms, t0, t1, y1, args)
        end = self._point(y1, solver_state)
        start, kicks = undo(steps.moves(step, end.carry), step.same_bits, end)
        y0, solver_state0 = self._state(start, solver_state)
        return y0, steps.dense_info(Made(start, end, kicks)), solver_state0

    def record_state(self, solver_state: _SolverState) -> PyTree:
        return self._steps.record(solver_state.carry)

    def restore_state(
        self,
        terms: PyTree[AbstractTerm],
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: _SolverState,
        recorded: PyTree,
        made_jump: BoolScalarLike,
    ) -> _SolverState:
        step = Step.of(terms, t1, t1, y1, args)
        point = self._point(y1, solver_state)
        point = self._steps.before_jump(step, point, recorded, made_jump)
        _, solver_state = self._state(point, solver_state)
        return solver_state

    def func(
        self, terms: PyTree[AbstractTerm], t0: RealScalarLike, y0: Y, args: Args
    ) -> VF:
        return self.solver.func(terms, t0, y0, args)

    def _values_and_spacings(
        self, y: Y, others: tuple[PyTree, ...] | None
    ) -> list[tuple[PyTree, tuple[float, ...]]]:
        """Of all parts."""
        of_y = left = spacings(y, self.size)
        out = []
        for value in self._steps.split(y):
            num = len(jtu.tree_leaves(value))
            out.append((value, left[:num]))
            left = left[num:]
        return [*out, *((value, of_y) for value in others or ())]

    def _point(self, y: Y, state: _SolverState) -> Point:
        parts = []
        for i, (value, spacing) in enumerate(
            self._values_and_spacings(y, state.others)
        ):
            start = state.starts[min(i, len(state.starts) - 1)]
            parts.append(Part(value, state.counts[i], start, spacing))
        return Point(tuple(parts), state.carry, state.stacks)

    def _state(self, point: Point, old: _SolverState) -> tuple[Y, _SolverState]:
        num_others = len(old.others or ())
        state = _SolverState(
            counts=tuple(part.count for part in point.parts),
            starts=tuple(part.start for part in point.parts[: len(old.starts)]),
            others=point.values[len(point.values) - num_others :] or None,
            carry=point.carry,
            stacks=point.stacks,
        )
        return self._steps.join(point.values), state


def _has_shears(solver: Any) -> bool:
    """Whether these are known of the very `step` of a solver."""
    for cls in type(solver).__mro__:
        if cls is AbstractReversibleSolver:
            return False
        if "shears" in vars(cls):
            return True
        if "step" in vars(cls):
            return False
    return False


BitExact.__init__.__doc__ = """**Arguments:** TODO
"""
