"""Evaluating something for those members of a batch that need it."""

from collections.abc import Callable

import equinox.internal as eqxi
import jax.lax as lax
from jaxtyping import PyTree

from ._custom_types import BoolScalarLike


def evaluate_where(
    pred: BoolScalarLike, fn: Callable[[], PyTree], otherwise: PyTree
) -> PyTree:
    """`fn()` if `pred`. If that holds for no member of a batch then nothing is
    evaluated; nor is anything traced, if it is known not to hold."""
    if pred is False:
        return otherwise
    return lax.cond(
        eqxi.unvmap_any(pred),
        lambda: lax.cond(pred, fn, lambda: otherwise),
        lambda: otherwise,
    )
