"""The ways in which a step of a solver can be undone while its solve is being
differentiated."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._custom_types import Args, BoolScalarLike, DenseInfo, RealScalarLike, VF, Y
from ._solver import (
    AbstractReversibleSolver,
    AbstractSolver,
    AsynchronousLeapfrog,
    ReversibleHeun,
    UReversible,
)
from ._solver.base import SharedIndices
from ._solver.fixed_point_reversible import UnrolledSolver
from ._step_record import Step
from ._term import AbstractTerm


class AbstractReversal(eqx.Module):
    """How to make one step such that it can be differentiated, and how to undo it.

    Undoing a step may need more than `y1`. That is called a hint here. It is the solver
    state, if `has_state`, or else `vf`.
    """

    solver: eqx.AbstractVar[AbstractSolver]
    # Whether cotangents are carried from step to step on the solver state. (If not then
    # the solver state is a function of `y`, and `step` starts by evaluating it.)
    has_state: eqx.AbstractClassVar[bool]
    # Whether undoing a step takes iteration: then `step_back` is no more than a guess.
    iterates: eqx.AbstractClassVar[bool]
    # If it does: how often to correct the guess.
    max_corrections: eqx.AbstractVar[int]
    # Whether there is a `step_back`. If not then every step is made from a known state.
    can_step_back: eqx.AbstractClassVar[bool]
    # Whether that recovers every bit: by integers, each step of which is one-to-one.
    is_exact: ClassVar[bool] = False

    @property
    def knows_controls(self) -> bool:
        """Whether the solver takes terms that know their controls."""
        return False

    @property
    def shared_evaluations(self) -> dict[str, SharedIndices]:
        """Which evaluations of the vector field `step` and `step_back` share:
        `shared_evaluations` and `carried_evaluations`, as far as there are any, as
        [`diffrax.AbstractReversibleSolver`][] describes them."""
        return {}

    def record_state(self, solver_state: PyTree) -> PyTree:
        """What to record of the solver state at the start of every step."""
        del solver_state
        return None

    def replay(
        self,
        terms: PyTree[AbstractTerm],
        step: Step,
        y0: Y,
        args: Args,
        solver_state: PyTree,
    ) -> tuple[Y, DenseInfo, PyTree]:
        """The step of the solver itself. Returns `(y1, dense_info, solver_state)`."""
        y1, _, dense_info, solver_state, _ = self.solver.step(
            terms, step.t0, step.t1, y0, args, solver_state, step.made_jump
        )
        return y1, dense_info, solver_state

    def vf(
        self, terms: PyTree[AbstractTerm], t: RealScalarLike, y: Y, args: Args
    ) -> VF | None:
        """If not `has_state`: the hint for a step that ends at `(t, y)`."""
        del terms, t, y, args
        return None

    def increment(
        self, terms: PyTree[AbstractTerm], step: Step, args: Args, vf: VF
    ) -> Y:
        """If not `has_state`, and `vf` is not `None`: its product with the control."""
        raise NotImplementedError

    @abc.abstractmethod
    def step(
        self,
        terms: PyTree[AbstractTerm],
        step: Step,
        y0: Y,
        args: Args,
        solver_state: PyTree,
        has_output: BoolScalarLike,
    ) -> tuple[Y, DenseInfo, PyTree, PyTree]:
        """Makes a step. Returns `(y1, dense_info, solver_state, hint)`, the last of
        which is that for undoing the step before this one. If `has_output=False` then
        `dense_info` need not be right."""

    def step_back(
        self, terms: PyTree[AbstractTerm], step: Step, y1: Y, args: Args, hint: PyTree
    ) -> tuple[Y, PyTree]:
        """Undoes a step. Returns `(y0, solver_state)`."""
        raise NotImplementedError

    @staticmethod
    def forget_state(solver_state: PyTree) -> PyTree:
        """If not `has_state`: the solver state to use at every step but the first."""
        return solver_state


class AlgebraicReversal(AbstractReversal):
    """Steps that have an inverse in closed form."""

    solver: AbstractReversibleSolver
    max_corrections: int = 0
    has_state: ClassVar[bool] = True
    iterates: ClassVar[bool] = False
    can_step_back: ClassVar[bool] = True

    @property
    def knows_controls(self):
        # Of others it is not known what they ask of their terms.
        known = AsynchronousLeapfrog, ReversibleHeun, UReversible
        return type(self.solver) in known

    @property
    def shared_evaluations(self):
        attributes = "shared_evaluations", "carried_evaluations"
        found = {x: self._declared(x) for x in attributes}
        return {x: shared for x, shared in found.items() if shared is not None}

    def _declared(self, attribute: str) -> SharedIndices | None:
        # Not if this is of another `step` or another `backward_step` than the class
        # was told of.
        defined = [
            next(i for i, cls in enumerate(type(self.solver).__mro__) if x in vars(cls))
            for x in (attribute, "step", "backward_step")
        ]
        shared = getattr(self.solver, attribute)
        if shared is None or defined[0] > min(defined):
            return None
        is_by_term = isinstance(shared, tuple) and all(map(_are_indices, shared))
        if not (is_by_term or _are_indices(shared)):
            name = type(self.solver).__name__
            raise ValueError(
                f"`{name}.{attribute}` must be a tuple of integers and `None`, or a "
                f"tuple of such tuples, but is {shared}."
            )
        return shared

    def record_state(self, solver_state):
        return self.solver.record_state(solver_state)

    def step(self, terms, step, y0, args, solver_state, has_output):
        del has_output
        y1, dense_info, state1 = self.replay(terms, step, y0, args, solver_state)
        return y1, dense_info, state1, solver_state

    def step_back(self, terms, step, y1, args, hint):
        solver_state = self.solver.restore_state(
            terms, step.t1, y1, args, hint, step.solver_state, step.next_made_jump
        )
        out: Any = self.solver.backward_step(
            terms, step.t0, step.t1, y1, args, solver_state, step.made_jump
        )
        name = type(self.solver).__name__
        if not (isinstance(out, tuple) and len(out) == 3):
            raise ValueError(
                f"`{name}.backward_step(...)` must return a tuple `(y0, dense_info, "
                f"solver_state)`, but returned {eqx.tree_pformat(out)}."
            )
        y0, _, solver_state0 = out
        for what, at_t0, at_t1 in (
            ("y0", y0, y1),
            ("solver_state", solver_state0, solver_state),
        ):
            if not _are_alike(at_t0, at_t1):
                raise ValueError(
                    f"`{what}` as returned by `{name}.backward_step(...)` must be of "
                    "the structure, shapes and dtypes that it has at `t1`, which are "
                    f"{eqx.tree_pformat(at_t1)}, but it is {eqx.tree_pformat(at_t0)}."
                )
        return y0, solver_state0


class ExactReversal(AlgebraicReversal):
    """Steps that can be undone to the last bit."""

    is_exact: ClassVar[bool] = True


def _are_indices(x: Any) -> bool:
    def is_index(i):
        return i is None or (isinstance(i, int) and not isinstance(i, bool))

    return isinstance(x, tuple) and all(map(is_index, x))


def _are_alike(x: PyTree, y: PyTree) -> bool:
    leaves, treedef = jtu.tree_flatten(x)
    leaves2, treedef2 = jtu.tree_flatten(y)
    return treedef == treedef2 and all(
        jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
        for a, b in zip(leaves, leaves2)
    )


class NumericalReversal(AbstractReversal):
    """Steps that have a good approximate inverse."""

    solver: AbstractSolver
    max_corrections: int = 16
    has_state: ClassVar[bool] = False
    iterates: ClassVar[bool] = True
    can_step_back: ClassVar[bool] = True

    @property
    def knows_controls(self):
        return True

    def vf(self, terms, t, y, args):
        return UnrolledSolver(self.solver).vf(terms, t, y, args)

    def increment(self, terms, step, args, vf):
        del args
        return terms.prod(vf, terms.contr(step.t0, step.t1))

    def step(self, terms, step, y0, args, solver_state, has_output):
        unrolled = UnrolledSolver(self.solver)
        y1, dense_info, vf0 = unrolled.step(
            terms,
            step.t0,
            step.t1,
            y0,
            args,
            solver_state,
            step.made_jump,
            has_output,
        )
        return y1, dense_info, None, vf0

    def step_back(self, terms, step, y1, args, hint):
        y0 = UnrolledSolver(self.solver).step_back(
            terms, step.t0, step.t1, y1, args, hint
        )
        return y0, None

    @staticmethod
    def forget_state(solver_state):
        if solver_state is None:
            return None
        _, vf0 = solver_state
        return jnp.array(True), jtu.tree_map(jnp.zeros_like, vf0)


class NoReversal(AbstractReversal):
    """Steps that cannot be undone. All of them are made again, from stored states."""

    solver: AbstractSolver
    max_corrections: int = 0
    has_state: ClassVar[bool] = True
    iterates: ClassVar[bool] = False
    can_step_back: ClassVar[bool] = False

    def step(self, terms, step, y0, args, solver_state, has_output):
        del has_output
        y1, dense_info, state1 = self.replay(terms, step, y0, args, solver_state)
        return y1, dense_info, state1, solver_state
