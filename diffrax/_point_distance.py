"""How far the points at which a vector field was evaluated are from those at which it
should have been."""

import functools as ft
import itertools as it
from collections.abc import Iterable
from typing import Any

import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Real

from ._custom_types import Y
from ._recorded_field import Evaluation, Point


# With fewer numbers than this, a branch takes longer than it saves.
_least_size = 64


def distance(
    pairs: list[tuple[Point, Evaluation]], t0: Any, t1: Any, y0: Y, y1: Y
) -> Real[Array, ""]:
    """By how much the points that were asked for differ from those that were recorded,
    all of them together, as a fraction of how large `y` is over the step, and of the
    length of the step, but for rounding errors of `t`.

    (A fraction of how large the point is by itself would not do: a state that passes
    through zero is not had to that.)"""
    groups: dict[Any, list[tuple[Point, Evaluation]]] = {}
    for point, evaluation in pairs:
        groups.setdefault(_shapes((point, evaluation.out)), []).append(
            (point, evaluation)
        )
    zero = jnp.zeros((), jnp.result_type(float))
    size_t, size_y = _largest(t0, t1), _largest(y0, y1)
    length = _max(jnp.abs(t1 - t0))
    distances = []
    for group in groups.values():
        point, _ = group[0]
        sizes = size_y
        if jtu.tree_structure(point.y) != jtu.tree_structure(y0):
            # Of a part of the state, it is not known which.
            sizes = it.repeat(ft.reduce(jnp.maximum, size_y, zero))
        off = [
            jtu.tree_map(lambda a, b: a - b, point, evaluation.point)
            for point, evaluation in group
        ]
        # Each is known to a few units of rounding.
        known = 4 * len(off) * float(jnp.finfo(jnp.result_type(t0)).eps)
        excess = [
            jnp.maximum(x - known * size, 0)
            for x, size in zip(_total(*(x.t for x in off)), size_t)
        ]
        distances += _ratios(excess, it.repeat(length))
        distances += _ratios(_total(*(x.y for x in off)), sizes)
        controls = [evaluation.point.control for _, evaluation in group]
        of_control = _ratios(_total(*(x.control for x in off)), _largest(*controls))
        outs = [evaluation.out for _, evaluation in group]
        if len(of_control) > 0:
            of_control = ft.reduce(jnp.maximum, of_control)
            distances.append(_weighted(of_control, outs, sizes))
    return ft.reduce(jnp.maximum, distances, zero)


def _weighted(
    of_control: Real[Array, ""], outs: list[list[Array]], sizes: Any
) -> Real[Array, ""]:
    """That of controls, as a fraction of these, in terms of what comes of them. (An
    increment may be much smaller than what it is the difference of, and be had to no
    fraction of itself.)"""

    def weigh():
        weights = _ratios(_largest(*outs), sizes)
        return of_control * ft.reduce(jnp.maximum, weights, jnp.zeros_like(of_control))

    if sum(x.size for x in outs[0]) < _least_size:
        return jnp.where(of_control == 0, 0, weigh())
    # They are the same to the bit, as a rule.
    is_off = eqxi.unvmap_any(of_control != 0)
    return lax.cond(is_off, weigh, lambda: jnp.zeros_like(of_control))


def _shapes(tree: PyTree[Array]) -> Any:
    leaves, structure = jtu.tree_flatten(tree)
    return structure, tuple((x.shape, x.dtype) for x in leaves)


def _largest(*trees: PyTree[Array]) -> list[Real[Array, ""]]:
    """The largest absolute value in each leaf of all trees."""
    leaves = zip(*map(jtu.tree_leaves, trees), strict=True)
    return [_max(ft.reduce(jnp.maximum, map(jnp.abs, x))) for x in leaves]


def _total(*trees: PyTree[Array]) -> list[Real[Array, ""]]:
    """The largest value, in each leaf, of the sum over all trees of absolute values."""
    leaves = zip(*map(jtu.tree_leaves, trees), strict=True)
    return [_max(ft.reduce(jnp.add, map(jnp.abs, x))) for x in leaves]


def _max(x: Array) -> Real[Array, ""]:
    return jnp.max(x, initial=0).astype(jnp.result_type(float))


def _ratios(
    xs: list[Real[Array, ""]], sizes: Iterable[Real[Array, ""]]
) -> list[Real[Array, ""]]:
    return [jnp.where(x == 0, 0, x / size) for x, size in zip(xs, sizes)]
