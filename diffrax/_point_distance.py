"""How far the points at which a vector field was evaluated are from those at which it
should have been."""

import functools as ft
import itertools as it
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Real

from ._custom_types import Y
from ._recorded_field import Evaluation, Point


def distance(
    pairs: list[tuple[Point, Evaluation]], t0: Any, t1: Any, y0: Y, y1: Y
) -> Real[Array, ""]:
    """By how much the points that were asked for differ from those that were recorded,
    as a fraction of how large `t` and `y` are over the step.

    (A fraction of how large the point is by itself would not do: a state that passes
    through zero is not had to that.)"""
    groups: dict[Any, list[tuple[Point, Evaluation]]] = {}
    for point, evaluation in pairs:
        groups.setdefault(_shapes((point, evaluation.out)), []).append(
            (point, evaluation)
        )
    zero = jnp.zeros((), jnp.result_type(float))
    largest = ft.reduce(jnp.maximum, _largest(y0, y1), zero)
    size_t = _largest(t0, t1)
    distances = []
    for group in groups.values():
        recorded = [evaluation.point for _, evaluation in group]
        off = [
            jtu.tree_map(lambda a, b: a - b, point, evaluation.point)
            for point, evaluation in group
        ]
        points = [point.y for point in recorded]
        if _shapes(points[0]) == _shapes(y0):
            size_y = _largest(y0, y1, *points)
        else:
            # Of a part of the state, it is not known which.
            size = ft.reduce(jnp.maximum, _largest(*points), largest)
            size_y = it.repeat(size)
        distances += _ratios(_largest(*(x.t for x in off)), size_t)
        distances += _ratios(_largest(*(x.y for x in off)), size_y)
        # An increment of the control may be much smaller than what it is the difference
        # of, to which it is had. But then, so is what comes of it.
        size_control = _largest(*(x.control for x in recorded))
        of_control = _ratios(_largest(*(x.control for x in off)), size_control)
        of_control = ft.reduce(jnp.maximum, of_control, zero)
        increments = _ratios(_largest(*(e.out for _, e in group)), size_y)
        distances += [jnp.where(of_control == 0, 0, of_control * x) for x in increments]
    return ft.reduce(jnp.maximum, distances, zero)


def _shapes(tree: PyTree[Array]) -> Any:
    leaves, structure = jtu.tree_flatten(tree)
    return structure, tuple((x.shape, x.dtype) for x in leaves)


def _largest(*trees: PyTree[Array]) -> list[Real[Array, ""]]:
    """The largest absolute value in each leaf of all trees."""
    leaves = zip(*map(jtu.tree_leaves, trees), strict=True)
    return [
        # All trees at once, so that each is gone through a single time.
        jnp.max(ft.reduce(jnp.maximum, map(jnp.abs, x)), initial=0).astype(
            jnp.result_type(float)
        )
        for x in leaves
    ]


def _ratios(xs: list[Real[Array, ""]], sizes: Any) -> list[Real[Array, ""]]:
    return [jnp.where(x == 0, 0, x / size) for x, size in zip(xs, sizes)]
