"""Evaluations of a vector field, recorded such that they can be had again, derivative
and all, without evaluating anything."""

import operator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._custom_types import Args
from ._residuals import Residuals
from ._without_tangents import get_aval


class Call(NamedTuple):
    """An evaluation: which one it is (`number`) of which single term, and by what
    method of that (`name`). The first of the arguments is the term."""

    term: int
    number: int
    name: str
    arguments: tuple[Any, ...]

    @classmethod
    def of(
        cls, term: int, number: int, name: str, arguments: tuple[Any, ...]
    ) -> "Call":
        wrapped, t, y, args, *control = arguments
        t, y, control = jtu.tree_map(
            lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, (t, y, control)
        )
        return cls(term, number, name, (wrapped, t, y, args, *control))

    def evaluate(self) -> PyTree:
        term, *arguments = self.arguments
        return getattr(term, self.name)(*arguments)

    def has_args(self, args: Args) -> bool:
        """Whether these very `args` are among the arguments."""
        _, _, _, own, *_ = self.arguments
        leaves, treedef = jtu.tree_flatten(args)
        own, own_treedef = jtu.tree_flatten(own)
        same = all(x is x2 for x, x2 in zip(leaves, own))
        return treedef == own_treedef and same


class Point(eqx.Module):
    """Where a vector field is evaluated: those of the arguments that are not the same
    for all evaluations."""

    t: PyTree[Array]
    y: PyTree[Array]
    # Empty for `vf`.
    control: list[PyTree[Array]]

    @classmethod
    def of(cls, call: Call) -> "Point":
        _, t, y, _, *control = eqx.filter(call.arguments, eqx.is_array)
        return cls(t, y, control)


class Evaluation(eqx.Module):
    """What was recorded: where that was, what came of it, and what pulling back through
    it needs in addition to its operands."""

    point: Point
    out: list[Array]
    residuals: list[Array]


class RecordedField:
    """A method of a term, traced once. Inside, it is a function of operands: of the
    values that it closes over, and of the arrays among its arguments."""

    # What tracing it returns besides arrays.
    _out_tree: Any
    _out_static: PyTree
    _pull_back_tree: Any
    _is_inexact_out: list[bool]

    def __init__(self, call: Call):
        dynamic, self._static = eqx.partition(call.arguments, eqx.is_array)
        leaves, self._in_tree = jtu.tree_flatten(dynamic)
        self._avals = [get_aval(x) for x in leaves]

        def evaluate(*leaves):
            arguments = eqx.combine(self._in_tree.unflatten(leaves), self._static)
            out = call._replace(arguments=arguments).evaluate()
            dynamic, self._out_static = eqx.partition(out, eqx.is_array)
            leaves, self._out_tree = jtu.tree_flatten(dynamic)
            return leaves

        closed = jax.make_jaxpr(evaluate)(*leaves)
        self._jaxpr, self._consts = closed.jaxpr, closed.consts
        self._num_out = len(closed.out_avals)
        operands = self._operands(call)
        variables = [*self._jaxpr.constvars, *self._jaxpr.invars]
        used = {id(x) for eqn in self._jaxpr.eqns for x in eqn.invars}
        used |= {id(x) for x in self._jaxpr.outvars}
        self._is_diff = [
            id(variable) in used and eqx.is_inexact_array(x)
            for variable, x in zip(variables, operands, strict=True)
        ]
        # What is raised here is raised again by who differentiates with respect to
        # fewer operands, unless it is because of the others.
        try:
            self._linearise(operands)
        except Exception:
            self.can_be_recorded = False
        else:
            self._residuals = Residuals(self._linearised, self._num_out)
            self.can_be_recorded = True

    def fits(self, call: Call) -> bool:
        """Whether this is the method for arguments like these, of such a term."""
        dynamic, static = eqx.partition(call.arguments, eqx.is_array)
        leaves, in_tree = jtu.tree_flatten(dynamic)
        if in_tree != self._in_tree or self._avals != [get_aval(x) for x in leaves]:
            return False
        static, static2 = (jtu.tree_leaves(x) for x in (static, self._static))
        return len(static) == len(static2) and all(map(operator.is_, static, static2))

    def record(self, call: Call) -> tuple[PyTree, Evaluation]:
        """What comes of an evaluation."""
        all_ = jex.core.jaxpr_as_fun(self._linearised)(*self._operands(call))
        # What is constant is one of NumPy's.
        avals = self._linearised.out_avals
        all_ = [
            x if isinstance(x, jax.Array) else jnp.asarray(x, aval.dtype)
            for x, aval in zip(all_, avals, strict=True)
        ]
        out = all_[: self._num_out]
        residuals = self._residuals.recorded(all_)
        return self._complete(out), Evaluation(Point.of(call), out, residuals)

    def recall(
        self, call: Call, evaluation: Evaluation, perturbed: PyTree[Array]
    ) -> PyTree:
        """The same, of an evaluation that was recorded at the same point: that can be
        differentiated, and evaluates nothing. `perturbed` is anything that whoever does
        so differentiates with respect to."""

        @jax.custom_vjp
        def recall(diff, rest, out, residuals, perturbed):
            del diff, rest, residuals, perturbed
            return out

        def fwd(diff, rest, out, residuals, perturbed):
            del perturbed
            return out, [*self._merge(diff, rest), *out, *residuals]

        def bwd(known, grad_out):
            leaves = self._residuals.restore(known)
            pull_back = jtu.tree_unflatten(self._pull_back_tree, leaves)
            grad_out = [g for g, x in zip(grad_out, self._is_inexact_out) if x]
            return list(pull_back(grad_out)), None, None, None, None

        recall.defvjp(fwd, bwd)
        diff, rest = self._split(self._operands(call))
        # If none of the operands were perturbed then this would be left as it is, in
        # the way of who differentiates once more, in forward mode.
        out = recall(diff, rest, evaluation.out, evaluation.residuals, perturbed)
        return self._complete(out)

    def _linearise(self, operands: list[Any]) -> None:
        """Traces what is to be recorded: the values of the method, and the residuals of
        its derivative with respect to all operands."""

        def vjp(operands):
            diff, rest = self._split(operands)

            def evaluate(*diff):
                operands = self._merge(diff, rest)
                num_consts = len(self._consts)
                closed = jex.core.ClosedJaxpr(self._jaxpr, operands[:num_consts])
                out = jex.core.jaxpr_as_fun(closed)(*operands[num_consts:])
                return list(filter(eqx.is_inexact_array, out)), out

            return jax.vjp(evaluate, *diff, has_aux=True)

        def record(*operands):
            _, pull_back, out = vjp(operands)
            self._is_inexact_out = [eqx.is_inexact_array(x) for x in out]
            residuals, self._pull_back_tree = jtu.tree_flatten(pull_back)
            return out, residuals

        def check(*operands):
            out, pull_back, _ = vjp(operands)
            pull_back(out)

        self._linearised = jax.make_jaxpr(record)(*operands)
        jax.make_jaxpr(check)(*operands)

    def _operands(self, call: Call) -> list[Any]:
        leaves = jtu.tree_leaves(eqx.filter(call.arguments, eqx.is_array))
        return [*self._consts, *leaves]

    def _split(self, operands: Any) -> tuple[list[Any], list[Any]]:
        """Those to differentiate with respect to, and the others."""
        diff = [x for x, is_diff in zip(operands, self._is_diff) if is_diff]
        return diff, [x for x, is_diff in zip(operands, self._is_diff) if not is_diff]

    def _merge(self, diff: Any, rest: Any) -> list[Any]:
        diff, rest = iter(diff), iter(rest)
        return [next(diff) if is_diff else next(rest) for is_diff in self._is_diff]

    def _complete(self, out: list[Any]) -> PyTree:
        out = jtu.tree_unflatten(self._out_tree, out)
        return eqx.combine(out, self._out_static)
