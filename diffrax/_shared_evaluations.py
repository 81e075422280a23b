"""Evaluations of the vector field that undoing a step and linearising it share.

A step that has an inverse in closed form evaluates the vector field at the same points
whether it is made or undone. So what was evaluated in order to undo it need not be
evaluated again to linearise it, provided that the derivative is taken along: it is
recorded where the step is undone, and the step that is linearised takes it from there.

Of a step, the last evaluation of which is the first of the one that comes next, that is
made when undoing the latter: it is carried from there.
"""

import functools as ft
import itertools as it
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.extend as jex
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Real

from ._custom_types import Args, BoolScalarLike, DenseInfo, Y
from ._known_controls import is_single_term, TermWithControl
from ._point_distance import distance
from ._recorded_field import Call, Evaluation, Point, RecordedField
from ._reversal import AbstractReversal
from ._solver.base import SharedIndices
from ._step_record import Step
from ._term import AbstractTerm


# Older versions of JAX have the second one.
_trace_state: Any = (
    getattr(jex.core, "get_opaque_trace_state", None) or jax.core.get_opaque_trace_state  # pyright: ignore
)

# By term and evaluation of `step`. `None` for one that is not shared.
Records = list[list[Evaluation | None]]
# For each term and evaluation of `step`, the number of one of `step_back`.
_Plan = list[list[int | None]]


class _Watched(TermWithControl):
    """A term, the evaluations of which are made by somebody else."""

    evaluate: Callable[..., Any] = eqx.field(static=True)

    def contr(self, t0, t1, **kwargs):
        return self.wrapped.contr(t0, t1, **kwargs)

    def vf(self, t, y, args):
        return self.evaluate("vf", (self.wrapped, t, y, args))

    def vf_prod(self, t, y, args, control):
        return self.evaluate("vf_prod", (self.wrapped, t, y, args, control))


def _watch(
    terms: PyTree[AbstractTerm], handle: Callable[[Call], PyTree]
) -> PyTree[AbstractTerm]:
    """The same terms, evaluated by `handle`."""
    state = _trace_state()

    def evaluate(term, counter, name, arguments):
        if _trace_state() != state:
            # Inside of `jax.lax.cond`, say: nothing that is recorded gets out of there.
            return Call(term, -1, name, arguments).evaluate()
        return handle(Call.of(term, next(counter), name, arguments))

    leaves, treedef = jtu.tree_flatten(terms, is_leaf=is_single_term)
    watched = [
        _Watched(term, ft.partial(evaluate, i, it.count()))
        for i, term in enumerate(leaves)
    ]
    return jtu.tree_unflatten(treedef, watched)


class _Heard(NamedTuple):
    """An evaluation that was listened to."""

    has_args: bool
    point: Point
    field: RecordedField

    def can_share(self, other: "_Heard") -> bool:
        """Whether they can be one, if they are at the same point."""
        same = self.field is other.field and self.has_args and other.has_args
        return same and self.field.can_be_recorded


class SharedEvaluations:
    """Those parts of a solve that are others if evaluations are shared. They are traced
    one after the other, and the vector field once for all of them.

    `prepare` is a function of `(terms, step, y)`, which returns the terms to
    pass to the solver."""

    def __init__(
        self,
        reversal: AbstractReversal,
        prepare: Callable[..., PyTree[AbstractTerm]],
        terms: PyTree[AbstractTerm],
    ):
        self._reversal = reversal
        self._prepare = prepare
        self._num_terms = len(jtu.tree_leaves(terms, is_leaf=is_single_term))
        self._fields: list[tuple[int, str, RecordedField]] = []
        # For each evaluation in a step, that in undoing it; and that in undoing the
        # step that comes next.
        self._plan: _Plan = []
        self._next_plan: _Plan = []

    @classmethod
    def of(
        cls,
        reversal: AbstractReversal,
        prepare: Callable[..., PyTree[AbstractTerm]],
        terms: PyTree[AbstractTerm],
        step: Step,
        y: Y,
        args: Args,
        solver_state: PyTree,
    ) -> "SharedEvaluations | None":
        """`None` if there is nothing to be shared."""
        declared = reversal.shared_evaluations
        if not declared:
            return None
        shared = cls(reversal, prepare, terms)
        made, undone = shared._listen(terms, step, y, args, solver_state)
        name = type(reversal.solver).__name__
        plans: dict[str, _Plan] = {}
        for attribute, indices in declared.items():
            says = f"`{name}.{attribute}` is {indices}"
            of_terms = _by_term(says, indices, terms)
            plan_of_term = ft.partial(_plan, name, says)
            plans[attribute] = list(map(plan_of_term, of_terms, made, undone))
        none: _Plan = [[None] * len(of_term) for of_term in made]
        shared._plan = plans.get("shared_evaluations", none)
        # What is evaluated in undoing the step itself need not be carried.
        shared._next_plan = [
            [None if own is not None else k for own, k in zip(*of_term)]
            for of_term in zip(shared._plan, plans.get("carried_evaluations", none))
        ]
        all_ = it.chain(*shared._plan, *shared._next_plan)
        return None if all(k is None for k in all_) else shared

    def record_end(
        self,
        terms: PyTree[AbstractTerm],
        step: Step,
        y0: Y,
        args: Args,
        solver_state: PyTree,
    ) -> Records:
        """Makes a step, and returns of what it evaluates that which would have been
        carried from the step that comes next."""
        carried: Records = [[None] * len(ks) for ks in self._next_plan]

        def handle(call):
            if self._next_plan[call.term][call.number] is None:
                return call.evaluate()
            out, evaluation = self._field(call).record(call)
            carried[call.term][call.number] = evaluation
            return out

        terms = self._prepare(terms, step, y0)
        no_output = jnp.array(False)
        self._reversal.step(
            _watch(terms, handle), step, y0, args, solver_state, no_output
        )
        return carried

    def record_back(
        self,
        terms: PyTree[AbstractTerm],
        step: Step,
        y1: Y,
        args: Args,
        hint: PyTree,
        carried: Records,
        has_carried: BoolScalarLike,
    ) -> tuple[Y, PyTree, Records, Records]:
        """Undoes a step. `carried` is what was evaluated in undoing the step that comes
        next, if `has_carried`. Returns `(y0, solver_state)`; what was evaluated for
        this step; and for the one before."""
        found: list[dict[int | None, Evaluation | None]]
        found = [{None: None} for _ in self._plan]

        def handle(call):
            plans = self._plan[call.term], self._next_plan[call.term]
            if not any(call.number in plan for plan in plans):
                return call.evaluate()
            out, evaluation = self._field(call).record(call)
            found[call.term][call.number] = evaluation
            return out

        prepared = self._prepare(terms, step, y1)
        y0, solver_state0 = self._reversal.step_back(
            _watch(prepared, handle), step, y1, args, hint
        )
        if jtu.tree_leaves(carried):
            carried = lax.cond(
                eqxi.unvmap_all(has_carried),
                lambda: carried,
                lambda: self.record_end(terms, step, y0, args, solver_state0),
            )
        own, carried0 = (
            [[of_term[k] for k in ks] for of_term, ks in zip(found, plan)]
            for plan in (self._plan, self._next_plan)
        )
        records = [
            [b if a is None else a for a, b in zip(*of_term)]
            for of_term in zip(own, carried)
        ]
        return y0, solver_state0, records, carried0

    def recall(
        self,
        terms: PyTree[AbstractTerm],
        step: Step,
        y0: Y,
        args: Args,
        solver_state: PyTree,
        has_output: BoolScalarLike,
        records: Records,
    ) -> tuple[Y, DenseInfo, PyTree, PyTree, Real[Array, ""]]:
        """Makes a step from what was evaluated when undoing it. Returns what that of
        the reversal does, and by how much the points are off at which that was."""
        pairs: list[tuple[Point, Evaluation]] = []
        perturbed = eqx.filter(y0, eqx.is_inexact_array)

        def handle(call):
            evaluation = records[call.term][call.number]
            if evaluation is None:
                return call.evaluate()
            pairs.append((Point.of(call), evaluation))
            return self._field(call).recall(call, evaluation, perturbed)

        terms = self._prepare(terms, step, y0)
        y1, dense_info, solver_state1, hint = self._reversal.step(
            _watch(terms, handle), step, y0, args, solver_state, has_output
        )
        inexact = eqx.filter((pairs, step.t0, step.t1, y0, y1), eqx.is_inexact_array)
        off = distance(*lax.stop_gradient(inexact))
        return y1, dense_info, solver_state1, hint, off

    def _field(self, call: Call) -> RecordedField:
        for term, name, field in self._fields:
            if (term, name) == (call.term, call.name) and field.fits(call):
                return field
        field = RecordedField(call)
        self._fields.append((call.term, call.name, field))
        return field

    def _listen(
        self,
        terms: PyTree[AbstractTerm],
        step: Step,
        y: Y,
        args: Args,
        solver_state: PyTree,
    ) -> tuple[list[list[_Heard]], list[list[_Heard]]]:
        """The evaluations of each term in a step, and in a step back."""
        made, undone = ([[] for _ in range(self._num_terms)] for _ in range(2))

        def watch(terms, args, heard):
            def handle(call):
                point = jtu.tree_map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), Point.of(call)
                )
                has_args, field = call.has_args(args), self._field(call)
                heard[call.term].append(_Heard(has_args, point, field))
                return call.evaluate()

            return _watch(terms, handle)

        def make_and_undo(terms, step, y, args, solver_state):
            terms = self._prepare(terms, step, y)
            y1, _, _, hint = self._reversal.step(
                watch(terms, args, made), step, y, args, solver_state, jnp.array(True)
            )
            self._reversal.step_back(watch(terms, args, undone), step, y1, args, hint)

        eqx.filter_eval_shape(make_and_undo, terms, step, y, args, solver_state)
        return made, undone


def _by_term(
    says: str, declared: SharedIndices, terms: PyTree[AbstractTerm]
) -> list[Any]:
    """What is declared of each single term."""
    leaves = ft.partial(jtu.tree_leaves, is_leaf=is_single_term)
    if not any(isinstance(x, tuple) for x in declared):
        return [declared] * len(leaves(terms))
    if not isinstance(terms, tuple) or len(terms) != len(declared):
        raise ValueError(
            f"{says}, which is for a tuple of {len(declared)} terms, but the terms are "
            f"{eqx.tree_pformat(terms)}."
        )
    return [of for of, term in zip(declared, terms) for _ in leaves(term)]


def _plan(
    name: str,
    says: str,
    declared: tuple[int | None, ...],
    made: list[_Heard],
    undone: list[_Heard],
) -> list[int | None]:
    """Which evaluations of a term to share."""
    if len(made) == len(undone) == 0:
        return []
    says = f"{says}, but "
    elsewhere = (
        "of a term (without those inside of `jax.lax.cond`, `jax.jit` and the like, "
        "which cannot be shared)."
    )
    if len(declared) != len(made):
        raise ValueError(
            f"{says}`{name}.step(...)` makes {len(made)} evaluations {elsewhere}"
        )
    if any(k is not None and not 0 <= k < len(undone) for k in declared):
        raise ValueError(
            f"{says}`{name}.backward_step(...)` makes {len(undone)} evaluations "
            f"{elsewhere}"
        )
    plan: list[int | None] = []
    for i, k in enumerate(declared):
        if k is None or not made[i].can_share(undone[k]):
            plan.append(None)
            continue
        if not eqx.tree_equal(made[i].point, undone[k].point):
            raise ValueError(
                f"{says}evaluation {i} of `{name}.step(...)` is at "
                f"{eqx.tree_pformat(made[i].point)}, and evaluation {k} of "
                f"`{name}.backward_step(...)` at {eqx.tree_pformat(undone[k].point)}."
            )
        plan.append(k)
    return plan
