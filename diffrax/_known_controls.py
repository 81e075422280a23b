"""Controls that are evaluated once for each step, and then known to its terms.

The increment of a Brownian motion or of a control path over a step is the same for
making it and for undoing it, however often that is tried, and may take longer to
evaluate than the vector field.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._custom_types import RealScalarLike
from ._term import AbstractTerm, ODETerm


# For each term that is not an `ODETerm`: with which keyword arguments a solver asks for
# its control over a whole step.
Asked = tuple[tuple[tuple[tuple[str, Any], ...], ...], ...]


def is_single_term(x: Any) -> bool:
    # Of a `MultiTerm`, the terms one by one: solvers take it apart.
    return isinstance(x, AbstractTerm) and not hasattr(x, "terms")


def _leaves(terms: PyTree[AbstractTerm]) -> list[Any]:
    return jtu.tree_leaves(terms, is_leaf=is_single_term)


def _replace(terms: PyTree[AbstractTerm], new: list[Any]) -> PyTree[AbstractTerm]:
    treedef = jtu.tree_structure(terms, is_leaf=is_single_term)
    return jtu.tree_unflatten(treedef, new)


def map_single_terms(
    fn: Callable[[Any], Any], terms: PyTree[AbstractTerm]
) -> PyTree[AbstractTerm]:
    return _replace(terms, list(map(fn, _leaves(terms))))


def _is_ode(term: Any) -> bool:
    while hasattr(term, "term"):
        term = term.term
    return isinstance(term, ODETerm)


def has_no_controls(terms: PyTree[AbstractTerm]) -> bool:
    """Whether there is nothing to be known, as all terms are `ODETerm`s."""
    return all(map(_is_ode, _leaves(terms)))


def _key(kwargs: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(kwargs.items()))


class TermWithControl(AbstractTerm):
    """A term, but for its control."""

    wrapped: AbstractTerm

    def __getattr__(self, name):
        # What is not in this file, a solver of its own may ask a term of its own for.
        if name == "wrapped":
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def vf(self, t, y, args):
        return self.wrapped.vf(t, y, args)

    def prod(self, vf, control):
        return self.wrapped.prod(vf, control)

    def vf_prod(self, t, y, args, control):
        return self.wrapped.vf_prod(t, y, args, control)

    def is_vf_expensive(self, t0, t1, y, args):
        return self.wrapped.is_vf_expensive(t0, t1, y, args)


class _Listening(TermWithControl):
    """Notes which controls it is asked for."""

    times: tuple[RealScalarLike, RealScalarLike]
    note: Callable[[Any], None] = eqx.field(static=True)

    def contr(self, t0, t1, **kwargs):
        # The very same objects: these cannot be compared by value yet.
        is_whole = t0 is self.times[0] and t1 is self.times[1]
        self.note(_key(kwargs) if is_whole else None)
        return self.wrapped.contr(t0, t1, **kwargs)


class _Knowing(TermWithControl):
    """Knows its control over the only interval that it is asked for."""

    keys: tuple[Any, ...] = eqx.field(static=True)
    controls: tuple[PyTree, ...]

    def contr(self, t0, t1, **kwargs):
        return self.controls[self.keys.index(_key(kwargs))]


def listen(
    fn: Callable[[PyTree[AbstractTerm]], Any],
    terms: PyTree[AbstractTerm],
    t0: RealScalarLike,
    t1: RealScalarLike,
) -> Asked | None:
    """Calls `fn(terms)`, and returns which controls it asked for. `None` if there is
    one over any other interval than from `t0` to `t1`."""
    notes: list[list[Any]] = []
    new = []
    for term in _leaves(terms):
        notes.append([])
        if not _is_ode(term):
            term = _Listening(term, (t0, t1), notes[-1].append)
        new.append(term)
    fn(_replace(terms, new))
    if any(None in noted for noted in notes):
        return None
    return tuple(tuple(sorted(set(noted))) for noted in notes)


def evaluate_controls(
    asked: Asked, terms: PyTree[AbstractTerm], t0: RealScalarLike, t1: RealScalarLike
) -> PyTree:
    """The controls that are asked for of each term."""
    return [
        tuple(term.contr(t0, t1, **dict(key)) for key in keys)
        for term, keys in zip(_leaves(terms), asked, strict=True)
    ]


def know_controls(
    asked: Asked, terms: PyTree[AbstractTerm], controls: PyTree
) -> PyTree[AbstractTerm]:
    """The terms, with what `evaluate_controls` returned in place of their controls."""
    return _replace(
        terms,
        [
            _Knowing(term, keys, values) if keys else term
            for term, keys, values in zip(_leaves(terms), asked, controls, strict=True)
        ],
    )
