import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, VF, Y
from .._damped_gap import Damping, Stacks
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
from .exact_carrying import (
    ExactAsynchronousLeapfrog,
    ExactReversibleHeun,
    ExactVelocityVerlet,
)
from .exact_coupled import ExactCoupled
from .exact_steps import (
    AbstractExactStep,
    ExactLeapfrogMidpoint,
    ExactShears,
    Made,
    Setting,
)
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
    r"""Makes the steps of a solver such that undoing them recovers every bit of `y0`,
    after any number of steps and however chaotic the equation.

    Every number moves on a lattice of its own: it is a whole number of spacings away
    from where it started, and what a step adds to it is first rounded to such a number.
    Integers are added and subtracted without any error. So `backward_step` evaluates
    the vector field where `step` did, rounds in the same way, and subtracts what had
    been added. For two parts of the state that drive each other, say,

    $$q_1 = q_0 + [h f(v_0)], \quad v_1 = v_0 + [h g(q_1)] \quad \Longrightarrow \quad
    v_0 = v_1 - [h g(q_1)], \quad q_0 = q_1 - [h f(v_0)].$$

    The solvers that can be wrapped are those whose steps are made of such moves:

    - [`diffrax.SemiImplicitEuler`][], [`diffrax.VelocityVerlet`][], every
        [`diffrax.AbstractSplitting`][], and a solver of your own that [says what its
        moves are](../bit-exact.md#a-solver-of-your-own);
    - [`diffrax.LeapfrogMidpoint`][], [`diffrax.ReversibleHeun`][] and
        [`diffrax.AsynchronousLeapfrog`][];
    - any explicit Runge--Kutta method with a single tableau, and [`diffrax.Euler`][]:
        `BitExact(Tsit5(), size)`. It is coupled with a second copy of the state, as in
        [`diffrax.UReversible`][], with a coupling parameter of one:

        $$y_1 = y_0 + [\Psi_h(t_0, z_0)], \qquad z_1 = z_0 - [\Psi_{-h}(t_1, y_1)];$$

    - [`diffrax.UReversible`][] itself, and [`diffrax.AsynchronousLeapfrog`][] with
        damping. What is damped is contracted, for which there is not room on a lattice:
        so what is thereby forgotten is stored. That is $-\log_2 \lambda$ bits for each
        number and step, with $\lambda$ the coupling parameter: 0.0014 bits for 0.999,
        and 0.19 for 0.9. ($\lambda$ is rounded to $1 - 2^{-k}$, here to 0.875.) In
        return, there is no $\lambda^{-n}$ by which going back over $n$ steps multiplies
        rounding errors, so that $\lambda$ can be as small as stability asks for, down
        to one half.

    The solution is that of the wrapped solver, or of the pair that it is coupled to,
    with what each step adds rounded to the lattice. Order, stability, number of
    evaluations, error estimate and interpolation are the same. (After a jump,
    `ReversibleHeun` evaluates the vector field at $\hat y$, not at $y$. The error
    estimate of a coupled method without damping does not include how far the two states
    are apart: where the method is stable that grows slowly, and no smaller step would
    reduce it.) On the way back
    the evaluations that undo a step are made again to differentiate it: they are [not
    shared](../extending.md#evaluating-once), as the one would not be rounded like the
    other.

    When solving SDEs, converges to the Stratonovich solution if the wrapped method
    does. `AsynchronousLeapfrog` is not for them here; and of `UReversible`, Diffrax
    warns that it does not know, as it looks into one wrapper and not into a second one.

    **Its gradient** is that of the steps without rounding, taken at the points of the
    lattice. (The derivative of rounding is zero almost everywhere, and of no use.) It
    is the same by every adjoint that differentiates the steps. By
    [`diffrax.ReversibleAdjoint`][], with `checkpoints=0`, it takes constant memory,
    apart from the times of the steps and from what is stored for damping, also for
    chaotic problems: that the bits are right is checked where the state is known, and
    then there is nothing else for the [certificate](../how-it-works.md#the-certificate)
    to follow. There are no second derivatives by that adjoint: the derivative of a
    state is no integer, and is rounded.

    !!! warning "About `size`"

        What is much smaller than `size` is lost: whatever the numbers are, they are
        known to about $10^{-7}$ (or $10^{-16}$) times `size`, and not relative to
        themselves. So numbers of $10^{-8}$, in 32-bit precision and with a `size` of
        one, do not move at all. If the leaves of `y0` are of different sizes, then pass
        a `size` for each.

    **The range.** Spacings are those of floating-point numbers of about the given
    `size`: 2^-23 or 2^-52 of the next power of two, in 32-bit or 64-bit precision. No
    number can be farther from where it started than 32 or 256 times that; nor, with
    damping by $1 - 2^{-k}$, the second state from the first one than $2^{7-k}$ or
    $2^{10-k}$ times. A step that would lead there is rejected, if there are adaptive
    steps; or it leads to NaN, and the solve fails with `RESULTS.nonfinite`. So it does
    if there is no more room for what is forgotten (see `max_steps`); and if a
    `solver_state` is passed together with another `y0` than that which it belongs to.
    (Leave it out, then.)

    **Best at** gradients of long solves of conservative, chaotic or not quite stable
    equations, and wherever two runs have to be the same. Take a method for them (a
    splitting method for mechanics), or damping enough for the others.

    !!! example

        ```python
        import diffrax
        import jax
        import jax.numpy as jnp

        def force(t, q, args):
            x, y = q
            return -jnp.stack([x + 2 * x * y, y + x * x - y * y])

        def loss(v0):
            sol = diffrax.diffeqsolve(
                (diffrax.ODETerm(lambda t, v, args: v), diffrax.ODETerm(force)),
                diffrax.BitExact(diffrax.VelocityVerlet(), size=1.0),
                t0=0,
                t1=200,
                dt0=0.05,
                y0=(jnp.array([0.0, 0.1]), v0),
                adjoint=diffrax.ReversibleAdjoint(checkpoints=0),
            )
            q, v = sol.ys
            return jnp.sum(q)

        gradient = jax.grad(loss)(jnp.array([0.55, 0.08]))
        assert jnp.all(jnp.isfinite(gradient))
        ```

    !!! warning "When not to use this"

        Going back need not be exact where it is stable, or where there are enough
        stored states: then the wrapped solver does, at less cost. Without damping, a
        coupled Runge--Kutta method, `LeapfrogMidpoint`, `ReversibleHeun` and
        `AsynchronousLeapfrog` have a second mode, which grows where the equation has
        dissipation. (For a coupled method, the solve fails once the two states differ
        by a tenth of `size`, or of the solution if that is larger; see `max_gap` in
        [`diffrax.UReversible`][].)

        The vector field has to be rounded alike in the programs that make a step and
        that undo it. [This is seen to](../bit-exact.md#where-the-bits-are-the-same), as
        far as one can without a compiler of one's own; it is not with
        `jax_disable_most_optimizations`. Where it is not, `ReversibleAdjoint` finds
        out, and makes steps again.

    ??? cite "References"

        ```bibtex
        @article{rein2018janus,
            author={Rein, Hanno and Tamayo, Daniel},
            title={{JANUS}: a bit-wise reversible integrator for {N}-body dynamics},
            journal={Monthly Notices of the Royal Astronomical Society},
            volume={473},
            number={3},
            pages={3351--3357},
            year={2018},
        }

        @article{levesque1993molecular,
            author={Levesque, D. and Verlet, L.},
            title={Molecular dynamics and time reversibility},
            journal={Journal of Statistical Physics},
            volume={72},
            pages={519--537},
            year={1993},
        }

        @inproceedings{maclaurin2015gradient,
            author={Maclaurin, Dougal and Duvenaud, David and Adams, Ryan P.},
            title={Gradient-based Hyperparameter Optimization through Reversible
                Learning},
            booktitle={International Conference on Machine Learning},
            year={2015},
        }
        ```
    """

    solver: AbstractSolver
    # No default: numbers much smaller than one would not move, and nothing would tell.
    size: PyTree[RealScalarLike]
    max_steps: int = 4096

    def __check_init__(self):
        sizes = jtu.tree_leaves(self.size)
        if len(sizes) == 0 or not all(map(_is_positive, sizes)):
            raise ValueError(
                "`size` in `BitExact(solver, size=...)` must be a positive Python "
                f"number, or a PyTree of these, but got {self.size!r}."
            )
        if not _is_positive(self.max_steps) or not isinstance(self.max_steps, int):
            raise ValueError(
                "`max_steps` in `BitExact(solver, size, max_steps=...)` must be a "
                f"positive Python integer, but got {self.max_steps!r}."
            )
        _ = self._steps

    @property
    def _steps(self) -> AbstractExactStep:
        solver: Any = self.solver
        if type(solver) is LeapfrogMidpoint:
            return ExactLeapfrogMidpoint(solver)
        if type(solver) is ReversibleHeun:
            return ExactReversibleHeun(solver)
        if type(solver) is VelocityVerlet:
            return ExactVelocityVerlet(solver)
        if type(solver) is AsynchronousLeapfrog:
            factor = abs(2 * float(solver.eta) - 1)
            if factor == 1:
                return ExactAsynchronousLeapfrog(solver, None)
            damping = Damping.nearest(factor, self.max_steps)
            sign = 1 if solver.eta > 0.5 else -1
            solver = AsynchronousLeapfrog((1 + sign * damping.factor) / 2)
            return ExactAsynchronousLeapfrog(solver, damping)
        if type(solver) is UReversible:
            factor = float(solver.coupling_parameter)
            damping = Damping.nearest(factor, self.max_steps)
            solver = UReversible(solver.solver, damping.factor, solver.max_gap)
            return ExactCoupled(solver, damping, self.size)
        if _has_shears(solver):
            return ExactShears(solver)
        if _is_explicit(solver):
            return ExactCoupled(UReversible(solver), None, self.size)
        name = solver.__name__ if isinstance(solver, type) else type(solver).__name__
        raise ValueError(
            f"Cannot use `BitExact({name})`: pass an instance of `SemiImplicitEuler`, "
            "`VelocityVerlet`, `LeapfrogMidpoint`, `ReversibleHeun`, "
            "`AsynchronousLeapfrog`, `UReversible`, an explicit Runge--Kutta method, "
            "or a solver that defines `shears`."
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
                f"Cannot use `BitExact({type(self.solver).__name__}(), size)` to solve "
                "an SDE: it converges to the Itô solution, and only methods that "
                "converge to the Stratonovich solution can be made reversible like "
                "this. "
                "Consider using `BitExact(ReversibleHeun(), size)`, together with the "
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
        step = Setting.of(terms, t0, t1, y0, args)
        start = self._point(y0, solver_state)
        # `y0` may be another one than that of `solver_state`, if that was passed.
        belongs = jnp.array(True)
        for part in start.parts:
            belongs &= jnp.invert(part.is_elsewhere())
        parts = tuple(part.nan_unless(belongs) for part in start.parts)
        start = steps.across_jump(step, start._replace(parts=parts), made_jump)
        end, kicks = make(steps.moves(step, start.carry), step.same_bits, start)
        end = end._replace(carry=steps.after(step, end.carry))
        made = Made(start, end, kicks)

        y1, solver_state1 = self._state(end, solver_state)
        is_outside = jnp.array(False)
        for part in end.parts:
            is_outside |= part.is_outside()
        may_retry = belongs & steps.has_room(start)
        result: Any = RESULTS.successful
        has_failed = steps.has_failed(end)
        result = RESULTS.where(has_failed, RESULTS.nonlinear_divergence, result)  # pyright: ignore
        result = RESULTS.where(is_outside, RESULTS.nonfinite, result)  # pyright: ignore
        # For a smaller step to be tried, if there are any, and if that may help.
        y_error = jtu.tree_map(
            lambda x: jnp.where(is_outside, jnp.where(may_retry, jnp.inf, 0), x),
            steps.error(made),
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
        step = Setting.of(terms, t0, t1, y1, args)
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
        step = Setting.of(terms, t1, t1, y1, args)
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


def _is_positive(x: Any) -> bool:
    """Whether it is a Python number, positive and one that a float can be."""
    is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
    return is_number and 0 < x <= sys.float_info.max


def _is_explicit(solver: Any) -> bool:
    if isinstance(solver, type):
        return False
    if issubclass(type(solver), Euler):
        return type(solver).step is Euler.step
    # `UReversible` looks at the rest.
    return issubclass(type(solver), AbstractERK)


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


BitExact.__init__.__doc__ = """**Arguments:**

- `solver`: The solver to wrap: see above.
- `size`: About how large the numbers in `y` become; a positive Python number, or a
    PyTree of these, which is a prefix of `y`. Also of the second state of
    `AsynchronousLeapfrog`, which is the derivative of `y`.
- `max_steps`: For how many steps there is room to store what is forgotten in damping;
    the solve fails at the step after that. Only with damping is anything allocated: for
    each number, in 64-bit precision, 16 bytes and $-\\log_2(\\lambda) / 8$ for each of
    `max_steps`. It is part of the solver state, so that `ReversibleAdjoint` has a copy
    of it for each of its stored states: use that with `checkpoints=0`. Passing over so
    much at each of many steps takes time as well, so do not ask for much more than is
    needed.

**Raises:**

`ValueError` if the solver is none of these; if one of the other arguments is outside
its range; if $\\lambda$ (of `AsynchronousLeapfrog`, $|2 \\eta - 1|$) is less than one
half; and, when solving, if it is nearer to one than there is room for (in 32-bit
precision, $1 - 2^{-14}$), if `size` is not of the range of the precision, if `y0` is of
another precision than 32 or 64 bits, or if an Euler method is to solve an SDE, or
`AsynchronousLeapfrog` an SDE or a CDE.
"""
