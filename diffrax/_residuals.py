"""Which residuals of a derivative have to be held in memory, and how the others are
made of these.

Of `tanh(x)`, say, JAX would hold both the value and one minus the value. Within one
piece of a program XLA makes the latter from the former where it is used; but what is
passed on through a loop or a branch has to be all there.
"""

from collections.abc import Container, Iterable
from typing import Any, NamedTuple

import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


# Operations that take no longer than reading what they are made of. All of them are
# continuous: the operands are those of a step that is made, and what was recorded is of
# one that was undone, which may differ by rounding. (The largest number of the one need
# not be found in the other.)
_cheap = {
    "abs",
    "add",
    "broadcast_in_dim",
    "convert_element_type",
    "integer_pow",
    "max",
    "min",
    "mul",
    "neg",
    "reshape",
    "select_n",
    "square",
    "sub",
}
# How many of them, at the most, are cheap together.
_max_operations = 6


class Residuals:
    """Those of a function of operands that returns `num_out` values, and then the
    residuals of its derivative: `closed`, which is a `ClosedJaxpr`.

    Those that are among the operands or the values are there anyway. Of the others,
    those that are not cheap to make of what comes before them are recorded."""

    def __init__(self, closed: Any, num_out: int):
        operands = [_Variable(x.aval) for x in closed.jaxpr.invars]
        equations: list[_Equation] = []
        self._consts: dict[_Variable, Any] = {}
        outputs = _flatten(closed, operands, equations, self._consts)
        self._wanted = outputs[num_out:]
        made_by = {x: equation for equation in equations for x in equation.outputs}
        known = [*operands, *outputs[:num_out]]
        held = {x for x in known if not _is_literal(x)} | self._consts.keys()
        # By variable: which of the outputs it is.
        places = {x: i for i, x in enumerate(outputs) if not _is_literal(x)}
        recorded: dict[_Variable, int] = {}
        used: set[int] = set()
        others = [x for x in places if x not in held]
        # In an order that is the same each time, for programs to be the same.
        for x in sorted(others, key=lambda x: made_by[x].number):
            # A single number is not worth a further operation.
            needed = _needed(x, held, made_by) if x.aval.size > 1 else None
            if needed is None:
                recorded[x] = places[x]
                held.add(x)
            else:
                used |= needed
        self._recorded = list(recorded.values())
        self._variables = [*known, *recorded]
        self._equations = [equations[i] for i in sorted(used)]

    def recorded(self, outputs: list[Array]) -> list[Array]:
        """Of all that the function returns, what is to be recorded."""
        return [outputs[i] for i in self._recorded]

    def restore(self, known: Iterable[Array]) -> list[Any]:
        """All residuals, from the operands, the values and what was recorded. The
        operands may be off by rounding."""
        pairs = zip(self._variables, known, strict=True)
        values = self._consts | {x: y for x, y in pairs if not _is_literal(x)}
        for equation in self._equations:
            inputs = [_read(x, values) for x in equation.inputs]
            (output,) = equation.outputs
            values[output] = equation.primitive.bind(*inputs, **equation.params)
        return [_read(x, values) for x in self._wanted]


class _Variable:
    """One of those of a function and of all that it calls by `jax.jit`. (Those of JAX
    occur again in each call.)"""

    def __init__(self, aval: Any):
        self.aval = aval


# A `_Variable`, or a literal of JAX.
_Atom = Any


class _Equation(NamedTuple):
    number: int
    primitive: Any
    params: dict[str, Any]
    inputs: list[_Atom]
    outputs: list[_Variable]


def _flatten(
    closed: Any,
    operands: list[_Atom],
    equations: list[_Equation],
    consts: dict[_Variable, Any],
) -> list[_Atom]:
    """Adds the equations of a function of operands, and what it closes over, to what
    is there. Returns what the function returns."""
    jaxpr = closed.jaxpr
    atoms = dict(zip(jaxpr.invars, operands, strict=True))
    for x, value in zip(jaxpr.constvars, closed.consts, strict=True):
        atoms[x] = _Variable(x.aval)
        consts[atoms[x]] = value
    for eqn in jaxpr.eqns:
        inputs = [x if _is_literal(x) else atoms[x] for x in eqn.invars]
        # The second one in older versions of JAX.
        if eqn.primitive.name in ("jit", "pjit"):
            outputs = _flatten(eqn.params["jaxpr"], inputs, equations, consts)
        else:
            outputs = [_Variable(x.aval) for x in eqn.outvars]
            equations.append(
                _Equation(len(equations), eqn.primitive, eqn.params, inputs, outputs)
            )
        atoms |= zip(eqn.outvars, outputs, strict=True)
    return [x if _is_literal(x) else atoms[x] for x in jaxpr.outvars]


def _needed(
    x: _Variable, held: Container[_Atom], made_by: dict[_Variable, _Equation]
) -> set[int] | None:
    """Which equations make a variable of those that are held. `None` if these are not
    all cheap, or too many for that."""
    needed: set[int] = set()
    waiting = [x]
    while waiting:
        x = waiting.pop()
        if _is_literal(x) or x in held:
            continue
        equation = made_by.get(x)
        if equation is None or not _is_cheap(equation):
            return None
        if equation.number not in needed:
            needed.add(equation.number)
            waiting += equation.inputs
        if len(needed) > _max_operations:
            return None
    return needed


def _is_cheap(equation: _Equation) -> bool:
    # Rounding is not continuous, be it to an integer or to a lower precision.
    if equation.primitive.name not in _cheap:
        return False
    from_, to = (
        [_num_digits(x.aval.dtype) for x in xs]
        for xs in (equation.inputs, equation.outputs)
    )
    return min(to) > 0 and min(to) >= max(from_)


def _num_digits(dtype: Any) -> int:
    """In binary; zero if it is no floating-point number."""
    return jnp.finfo(dtype).nmant if jnp.issubdtype(dtype, jnp.inexact) else 0


def _is_literal(x: Any) -> bool:
    return isinstance(x, jex.core.Literal)


def _read(x: _Atom, values: dict[_Variable, Any]) -> Any:
    # A literal is not made a JAX array, which would be one of this trace alone.
    return np.asarray(x.val, x.aval.dtype) if _is_literal(x) else values[x]
