import abc
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

from jaxtyping import PyTree

from .._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, Y
from .._term import AbstractTerm
from ._upstream_base import *  # noqa: F403
from ._upstream_base import (
    _MetaAbstractSolver as _MetaAbstractSolver,
    _set_metaclass as _set_metaclass,
    _SolverState as _SolverState,
    _term_compatible_contr_kwargs as _term_compatible_contr_kwargs,
    AbstractAdaptiveSolver as AbstractAdaptiveSolver,
    AbstractImplicitSolver as AbstractImplicitSolver,
    AbstractItoSolver as AbstractItoSolver,
    AbstractSolver as AbstractSolver,
    AbstractStratonovichSolver as AbstractStratonovichSolver,
    AbstractWrappedSolver as AbstractWrappedSolver,
    HalfSolver as HalfSolver,
    vector_tree_dot as vector_tree_dot,
)


# Of all terms, or of each one of a tuple.
SharedIndices: TypeAlias = tuple[int | None, ...] | tuple[tuple[int | None, ...], ...]


class AbstractReversibleSolver(AbstractSolver[_SolverState]):
    r"""Indicates that a step of this solver can be undone: from what
    [`diffrax.AbstractSolver.step`][] returned at $t_1$, the method `backward_step`
    computes what it had been given at $t_0$.

    This is what [`diffrax.ReversibleAdjoint`][] needs in order to compute exact
    gradients without storing the solution. Subclass this, and define `backward_step`
    next to `step`, to use a solver of your own with it.

    The law that every subclass must obey: for every step, up to rounding,

    ```python
    import diffrax
    import equinox as eqx
    import jax.numpy as jnp

    solver = diffrax.ReversibleHeun()
    terms = diffrax.ODETerm(lambda t, y, args: jnp.sin(y) + t)
    t0, t1, y0, args, made_jump = 0.1, 0.3, jnp.array([1.0, 2.0]), None, False
    solver_state0 = solver.init(terms, t0, t1, y0, args)

    y1, _, dense_info, solver_state1, _ = solver.step(
        terms, t0, t1, y0, args, solver_state0, made_jump
    )
    recorded = solver.record_state(solver_state0)
    solver_state1 = solver.restore_state(
        terms, t1, y1, args, solver_state1, recorded, made_jump=False
    )
    back = solver.backward_step(terms, t0, t1, y1, args, solver_state1, made_jump)
    assert eqx.tree_equal(back, (y0, dense_info, solver_state0), rtol=1e-5)
    ```

    Most solvers need neither `record_state` nor `restore_state`, whose defaults record
    nothing and change nothing.

    If `step` and `backward_step` evaluate the vector field at the same points, then the
    class attribute `shared_evaluations` can say so, for it not to be evaluated twice
    when going back. It is a tuple with one entry for each evaluation in `step`, in
    order: the number, counted from 0, of the evaluation in `backward_step` that is at
    the same `t` and `y`, with the same control if there is one; or `None` if there is
    no such evaluation. If there are several terms then this holds for each of them; or,
    if `terms` is a tuple, it is a tuple of such tuples, one for each term. The default
    is `None`: nothing is shared.

    The class attribute `carried_evaluations` says likewise, for each evaluation in
    `step`, which evaluation is at the same point in the `backward_step` of the step
    that comes *next* (unless that starts with a jump): of a solver, say, that keeps in
    its state the vector field with which a step ended, for the next one to start with.
    """

    # Documented above.
    shared_evaluations: ClassVar[SharedIndices | None] = None
    carried_evaluations: ClassVar[SharedIndices | None] = None

    @abc.abstractmethod
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
        """Undo a single step of the solver.

        The step to undo was made over the interval $[t_0, t_1]$, with $t_0 < t_1$.

        **Arguments:**

        - `terms`: The PyTree of terms representing the vector fields and controls.
        - `t0`: The start of the interval that the step was made over.
        - `t1`: The end of the interval that the step was made over.
        - `y1`: The value of the solution at `t1`.
        - `args`: Any extra arguments passed to the vector field.
        - `solver_state`: The solver state at `t1`, as `step` returned it and as
            `restore_state` completed it.
        - `made_jump`: Whether the step was made with `made_jump`, i.e. whether there
            was a discontinuity in the vector field at `t0`.

        **Returns:**

        A tuple of several objects:

        - The value of the solution at `t0`.
        - The `dense_info` that `step` returned, i.e. what the solver's interpolation
            needs over `[t0, t1]`.
        - The value of the solver state at `t0`. If `made_jump` then anything that
            `step` did not make use of (a vector field that was evaluated before the
            jump) may have any value.
        """

    def record_state(self, solver_state: _SolverState) -> PyTree:
        """The part of a solver state that `backward_step` has no way to compute; for
        example the time at which the step before the last one started. It is stored on
        the way forward for every accepted step, so its size is the memory per step that
        [`diffrax.ReversibleAdjoint`][] needs in addition to that for the step times:
        keep it to a few scalars.

        **Arguments:**

        - `solver_state`: the solver state at the start `t0` of a step.

        **Returns:**

        A PyTree of arrays. The default is `None`: nothing.
        """
        del solver_state
        return None

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
        """Completes the solver state at `t1` before it is passed to `backward_step`.

        **Arguments:**

        - `terms`, `t1`, `y1`, `args`: as for `backward_step`.
        - `solver_state`: the solver state at `t1`, either as `step` returned it or as
            the `backward_step` of the step that came next reconstructed it.
        - `recorded`: what `record_state` returned at the start of this step.
        - `made_jump`: whether the step that came *next* was made with `made_jump`. If
            so then the solver state may hold a vector field that was evaluated after
            the jump, where `step` had returned the one before it.

        **Returns:**

        The solver state to pass to `backward_step`. The default is `solver_state`.
        """
        del terms, t1, y1, args, recorded, made_jump
        return solver_state

    def shears(
        self,
        terms: PyTree[AbstractTerm],
        t0: RealScalarLike,
        t1: RealScalarLike,
        args: Args,
    ) -> Sequence[tuple[int, Callable[[Sequence[PyTree]], PyTree]]]:
        """For [`diffrax.BitExact`][], if `y` is a tuple and there is no solver state:
        what `step` adds, one part of `y` after the other.

        **Arguments:** as for `backward_step`.

        **Returns:**

        Pairs of an index and a function of `y`, in the order in which they are made:
        `(i, increment)` stands for adding `increment(y)` to `y[i]`, on which that must
        not depend. Arithmetic other than `terms[i].contr(t0, t1)` belongs inside of
        that function, where it is rounded alike each time.

        By default there are none, and the solver cannot be wrapped.
        """
        raise NotImplementedError
