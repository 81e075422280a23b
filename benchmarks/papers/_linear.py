"""What a step of a solver does to `y' = z y`, as a matrix: the Jacobian of the step
itself, and of what undoes it. The step size is one, so that `z` is its product with the
eigenvalue.

A complex number is two real ones here. A matrix acts on `y` and on whatever of the
solver state is like it: a second state, or a vector field that is carried along. For a
solver of pairs the equation is `q' = z p`, `p' = z q`: an oscillator, if `z` is
imaginary.
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax._adjoint import _choose_reversal
from diffrax._reversal import AlgebraicReversal, NumericalReversal
from diffrax._solver.fixed_point_reversible import UnrolledSolver
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Entry:
    """A solver, and whether it is one of pairs."""

    make: Callable[[], diffrax.AbstractSolver]
    of_pairs: bool = False

    def make_for_forward_mode(self) -> Any:
        solver: Any = self.make()
        if getattr(solver, "scan_kind", "lax") is None:
            # As `ForwardMode` does with the loop over the stages.
            is_leaf = lambda x: x is None
            solver = eqx.tree_at(lambda s: s.scan_kind, solver, "lax", is_leaf=is_leaf)
        return solver


@dataclasses.dataclass(frozen=True)
class Maps:
    """Of many `z`. `guess` is the first guess at what undoes a step, if that is what
    the solver is reversed by: it is then corrected by iteration."""

    forward: np.ndarray
    backward: np.ndarray
    guess: np.ndarray | None


def spectral_radius(matrices: np.ndarray) -> np.ndarray:
    finite = np.all(np.isfinite(matrices), axis=(-2, -1))
    matrices = np.where(finite[..., None, None], matrices, 0.0)
    radius = np.max(np.abs(np.linalg.eigvals(matrices)), axis=-1)
    return np.where(finite, radius, np.inf)


def _field(t, y, matrix):
    del t
    return matrix @ y


def _terms_and_start(entry: Entry) -> tuple[Any, Any]:
    # At a point that is nothing special.
    y = jnp.array([0.6, -0.8])
    term: Any = diffrax.ODETerm(_field)
    return ((term, term), (y, y[::-1])) if entry.of_pairs else (term, y)


def _matrix_of(fn: Callable[[Any], Any], at: Any) -> Array:
    """The Jacobian of a function from a PyTree to one of the same structure, with
    respect to its leaves that are like `y`."""
    leaves, treedef = jtu.tree_flatten(at)
    varies = [jnp.shape(x) == (2,) and eqx.is_inexact_array(x) for x in leaves]

    def flat(vector):
        parts = iter(vector.reshape(-1, 2))
        filled = [next(parts) if v else x for x, v in zip(leaves, varies)]
        out = jtu.tree_leaves(fn(jtu.tree_unflatten(treedef, filled)))
        return jnp.concatenate([x for x, v in zip(out, varies, strict=True) if v])

    return jax.jacfwd(flat)(
        jnp.concatenate([x for x, v in zip(leaves, varies) if v]),
    )


def _step(solver: Any, terms: Any, t0: Any, t1: Any, args: Any, y__state: Any) -> Any:
    y, state = y__state
    y, _, _, state, _ = solver.step(terms, t0, t1, y, args, state, made_jump=False)
    return y, state


def _algebraic(entry: Entry, args: Array) -> tuple[Array, Array]:
    """Of the second step, as the first may be a special one."""
    solver = entry.make_for_forward_mode()
    terms, y = _terms_and_start(entry)
    t0, t1, t2 = jnp.array(0.0), jnp.array(1.0), jnp.array(2.0)
    start = y, solver.init(terms, t0, t1, y, args)
    middle = _step(solver, terms, t0, t1, args, start)
    second = ft.partial(_step, solver, terms, t1, t2, args)
    y2, state2 = second(middle)
    recorded = solver.record_state(middle[1])
    state2 = solver.restore_state(
        terms, t2, y2, args, state2, recorded, made_jump=False
    )

    def back(y__state):
        y, state = y__state
        y, _, state = solver.backward_step(
            terms, t1, t2, y, args, state, made_jump=False
        )
        return y, state

    return _matrix_of(second, middle), _matrix_of(back, (y2, state2))


def _one_step(entry: Entry, args: Array) -> tuple[Array, Array]:
    """Of `y` alone, as such a solver knows of nothing else: a step, and the guess at
    where it has started from its end."""
    solver = entry.make_for_forward_mode()
    terms, y = _terms_and_start(entry)
    t0, t1 = jnp.array(0.0), jnp.array(1.0)

    def step(y):
        state = solver.init(terms, t0, t1, y, args)
        y, _ = _step(solver, terms, t0, t1, args, (y, state))
        return y

    def step_back(y):
        unrolled = UnrolledSolver(solver)
        vf = unrolled.vf(terms, t1, y, args)
        return unrolled.step_back(terms, t0, t1, y, args, vf)

    return _matrix_of(step, y), _matrix_of(step_back, y)


def is_one_step(entry: Entry) -> bool:
    """Whether it is undone numerically, and not in closed form."""
    solver: Any = entry.make()
    terms, y = _terms_and_start(entry)
    reversal = _choose_reversal(solver, solver.init(terms, 0.0, 1.0, y, jnp.eye(2)))
    assert isinstance(reversal, (AlgebraicReversal, NumericalReversal))
    return isinstance(reversal, NumericalReversal)


@ft.cache
def _compiled(entry: Entry) -> Callable[[Array], tuple[Array, Array]]:
    of = _one_step if is_one_step(entry) else _algebraic

    @jax.jit
    @jax.vmap
    def both(re__im):
        re, im = re__im
        return of(entry, jnp.stack([jnp.stack([re, -im]), jnp.stack([im, re])]))

    return both


def maps(entry: Entry, z: np.ndarray) -> Maps:
    """At each of the complex numbers `z`, of any shape."""
    one_step = is_one_step(entry)
    flat = np.asarray(z, complex).ravel()
    # Always of the same shape, to be compiled once.
    padded: Any = np.pad(flat, (0, -len(flat) % 512)).reshape(-1, 512)
    points = jnp.asarray(np.stack([padded.real, padded.imag], axis=-1))
    parts = [_compiled(entry)(p) for p in points]
    forward, other = (
        np.concatenate(m)[: len(flat)].reshape(*np.shape(z), *m[0].shape[1:])
        for m in zip(*parts)
    )
    if not one_step:
        return Maps(forward, other, None)
    finite = np.all(np.isfinite(forward), axis=(-2, -1), keepdims=True)
    singular = np.abs(np.linalg.det(np.where(finite, forward, 0.0))) < 1e-300
    safe = np.where(singular[..., None, None], np.eye(forward.shape[-1]), forward)
    inverse = np.linalg.inv(np.where(finite, safe, np.eye(forward.shape[-1])))
    bad = singular[..., None, None] | ~finite
    return Maps(forward, np.where(bad, np.inf, inverse), other)


def convergence(maps: Maps) -> np.ndarray | None:
    """By what the distance to the start of a step is multiplied by each correction."""
    if maps.guess is None:
        return None
    eye = np.eye(maps.forward.shape[-1])
    return spectral_radius(eye - maps.guess @ maps.forward)


def stable_up_to(
    entry: Entry, direction: complex, tol: float = 1e-9, most: float = 20.0
) -> float:
    """The largest `r` such that the solver is stable at `s * direction`, for all `s` up
    to `r`: for no eigenvalue to be larger than `1 + tol`."""
    lower, upper = 0.0, most
    s: Any
    # In no round numbers, at which some matrices are singular. There may be a narrow
    # gap, so finely at first.
    for num_points in (40_000, 400, 400):
        s = np.linspace(lower, upper, num_points)[1:]
        radius = spectral_radius(maps(entry, s * direction).forward)
        unstable = np.flatnonzero(radius > 1 + tol)
        if len(unstable) == 0:
            return upper
        spacing = s[1] - s[0]
        lower, upper = s[unstable[0]] - spacing, s[unstable[0]]
    return float(lower)
