"""Explicit and effectively symmetric Runge--Kutta methods, after Shmelev,
Ebrahimi-Fard, Tapia and Salvi 2025 (arXiv 2507.21006), and Shmelev and Salvi 2025
(arXiv 2509.20599).

    python benchmarks/papers/ees.py [--smoke | --measured]
    python benchmarks/papers/ees.py --figures   # draws what was measured before

In parts:

- `order`: by how much a step misses the solution, and by how much a step of size `h`
  and one of size `-h` miss the start, against `h`, on the equations of Lotka and
  Volterra. The slopes are one more than the order and than the antisymmetric order,
  which are to be 2 and 5 for `EES25`, and 2 and 7 for `EES27`.
- `back`: going back over 10 units of time. Without corrections, as the authors do: the
  error of the gradient. With them, which makes it exact: how many there are per step.
- `memory`: scratch memory of the compiled gradient of a neural SDE on the torus of
  dimension 7, against the number of steps: a batch of 1024, networks of width 128 for
  the drift and the diffusion, 32-bit precision. On angles, as the torus is flat: there
  a method for Lie groups is the same as the one for vectors. Diffrax has no
  commutator-free methods, so that the others are `Heun` and `ReversibleHeun`.

The expectation is that without corrections `EES27` has an error that is no longer seen
at small steps, and that with them it takes none there; and that memory is the same for
any number of steps, most of it that of differentiating one step.

Orders and errors in float64, memory exact: the same on any machine. Takes about five
minutes on 2 CPU cores, most of it compiling.
"""

import argparse
import functools as ft
from collections.abc import Callable, Iterator
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import matplotlib.pyplot as plt
import numpy as np
from _common import make_parser, Paper, Row, run
from _runge_kutta import RK4
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from matplotlib.figure import Figure


SOLVERS: dict[str, Callable[[], Any]] = {
    "EES25": diffrax.EES25,
    "EES27": diffrax.EES27,
    "Heun": diffrax.Heun,
    "Bosh3": diffrax.Bosh3,
    "RK4": RK4,
    "Tsit5": diffrax.Tsit5,
}


def _lotka_volterra(t, y, args):
    del t
    prey, predators = y
    return jnp.stack([prey * (args[0] - predators), predators * (args[1] * prey - 0.7)])


TERMS = diffrax.ODETerm(_lotka_volterra)
Y0, PARAMS = np.array([1.3, 0.6]), np.array([1.1, 0.9])
INPUTS = Y0, PARAMS
NOTHING_STORED = diffrax.ReversibleAdjoint(0, "off", "ignore")


def _step(solver: Any, t0: Any, t1: Any, y: Array) -> Array:
    state = solver.init(TERMS, t0, t1, y, PARAMS)
    y1, *_ = solver.step(TERMS, t0, t1, y, PARAMS, state, made_jump=False)
    return y1


def _slope(h: np.ndarray, errors: np.ndarray) -> float:
    """Where they are above rounding, at the smallest such steps."""
    above = np.flatnonzero(errors > 1e-14)[-6:]
    slope, _ = np.polyfit(np.log(h[above]), np.log(errors[above]), 1)
    return float(slope)


def measure_order(args: argparse.Namespace) -> Iterator[Row]:
    h = 2.0 ** -np.linspace(0, 9, 28)
    for name in ("EES25",) if args.size == "smoke" else SOLVERS:
        solver = SOLVERS[name]()

        @jax.jit
        @jax.vmap
        def errors(h, solver=solver):
            y1 = _step(solver, 0.0, h, jnp.asarray(Y0))
            # In 64 steps of order 8: exact up to rounding.
            fine, exact = h / 64, jnp.asarray(Y0)
            for _ in range(64):
                exact = _step(diffrax.Dopri8(scan_kind="lax"), 0.0, fine, exact)
            back = _step(solver, h, 0.0, y1)
            norm = lambda x: jnp.max(jnp.abs(x))
            return norm(y1 - exact), norm(back - Y0)

        missed, missed_start = map(np.asarray, errors(jnp.array(h)))
        yield dict(
            solver=name,
            stages=solver.tableau.num_stages - solver.tableau.fsal,
            order=_slope(h, missed) - 1,
            antisymmetric_order=_slope(h, missed_start) - 1,
            h=h.tolist(),
            errors=missed.tolist(),
            errors_back=missed_start.tolist(),
        )


def _loss(solver: Any, num_steps: int, adjoint: Any, y0__params: Any) -> Array:
    y0, params = y0__params
    sol = diffrax.diffeqsolve(
        TERMS,
        solver,
        t0=0.0,
        t1=10.0,
        dt0=10.0 / num_steps,
        y0=y0,
        args=params,
        adjoint=adjoint,
        max_steps=num_steps,
    )
    assert sol.ys is not None
    return jnp.sum(sol.ys**2)


def _gradient_error(solver: Any, num_steps: int) -> float:
    def gradient(solver, adjoint):
        loss = ft.partial(_loss, solver, num_steps, adjoint)
        return ravel_pytree(jax.jit(jax.grad(loss))(INPUTS))[0]

    uncorrected = diffrax.FixedPointReversible(solver, max_corrections=0)
    found = gradient(uncorrected, NOTHING_STORED)
    exact = gradient(solver, diffrax.RecursiveCheckpointAdjoint())
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))


def _num_corrections(solver: Any, num_steps: int) -> float:
    loss = ft.partial(_loss, solver, num_steps)

    @jax.jit
    def count(inputs):
        report = diffrax.reversal_report(loss, inputs, adjoint=NOTHING_STORED)
        return jnp.sum(report.corrections)

    return int(count(INPUTS)) / num_steps


def measure_back(args: argparse.Namespace) -> Iterator[Row]:
    smoke = args.size == "smoke"
    for name in ("EES25",) if smoke else SOLVERS:
        solver = SOLVERS[name]()
        for num_steps in (20,) if smoke else (50, 100, 200, 500, 1000):
            yield dict(
                solver=name,
                steps=num_steps,
                step_size=10.0 / num_steps,
                error=_gradient_error(solver, num_steps),
                corrections=_num_corrections(solver, num_steps),
            )
        jax.clear_caches()


# By solver and adjoint.
MEMORY: list[tuple[str, Any, Any]] = [
    ("EES25, nothing stored", diffrax.EES25, NOTHING_STORED),
    ("EES25, ReversibleAdjoint", diffrax.EES25, diffrax.ReversibleAdjoint()),
    ("ReversibleHeun, nothing stored", diffrax.ReversibleHeun, NOTHING_STORED),
    ("Heun, nothing stored", diffrax.Heun, NOTHING_STORED),
    (
        "Heun, RecursiveCheckpointAdjoint",
        diffrax.Heun,
        diffrax.RecursiveCheckpointAdjoint(),
    ),
    ("Heun, DirectAdjoint", diffrax.Heun, diffrax.DirectAdjoint()),
]


def _torus_bytes(solver: Any, adjoint: Any, num_steps: int, batch: int) -> int:
    shape = batch, 7
    networks = [eqx.nn.MLP(14, 7, 128, 2, jax.nn.silu, key=jr.key(i)) for i in (0, 1)]

    def loss(networks, angles):
        drift, diffusion = (
            lambda t, y, args, n=n: jax.vmap(n)(
                jnp.concatenate([jnp.cos(y), jnp.sin(y)], axis=1)
            )
            for n in networks
        )
        path = diffrax.VirtualBrownianTree(
            0.0, 1.0, 2.0**-15, jax.ShapeDtypeStruct(shape, angles.dtype), jr.key(2)
        )
        diagonal = lambda t, y, args: lx.DiagonalLinearOperator(diffusion(t, y, args))
        sol = diffrax.diffeqsolve(
            diffrax.MultiTerm(
                diffrax.ODETerm(drift), diffrax.ControlTerm(diagonal, path)
            ),
            solver,
            t0=0.0,
            t1=1.0,
            dt0=1.0 / num_steps,
            y0=angles,
            adjoint=adjoint,
            max_steps=num_steps,
        )
        assert sol.ys is not None
        return jnp.sum(jnp.cos(sol.ys[-1]))

    gradient: Any = eqx.filter_jit(eqx.filter_grad(loss))
    compiled = gradient.lower(networks, jnp.ones(shape)).compile().compiled
    return compiled.memory_analysis().temp_size_in_bytes


def measure_memory(args: argparse.Namespace) -> Iterator[Row]:
    smoke = args.size == "smoke"
    batch = 8 if smoke else 1024
    for name, make_solver, adjoint in MEMORY[:1] if smoke else MEMORY:
        for num_steps in (10,) if smoke else (10, 100, 1000, 10_000):
            with jax.enable_x64(False):
                size = _torus_bytes(make_solver(), adjoint, num_steps, batch)
            yield dict(method=name, batch=batch, steps=num_steps, temp_bytes=size)
            jax.clear_caches()


def draw_order(rows: list[Row]) -> Figure:
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 4.2), sharex=True)
    for ax, which, order, title in (
        (axes[0], "errors", "order", "a step"),
        (axes[1], "errors_back", "antisymmetric_order", "a step and a step back"),
    ):
        for i, row in enumerate(rows):
            errors = np.maximum(row[which], 1e-17)
            style = "-" if row["solver"].startswith("EES") else "--"
            label = f"{row['solver']}: {row[order] + 1:.1f}"
            ax.loglog(row["h"], errors, style, color=f"C{i}", label=label)
        ax.set_title(title)
        ax.set_xlabel("step size $h$")
        ax.grid(alpha=0.3)
        ax.legend(title="slope", fontsize=9)
    axes[0].set_ylabel("error")
    return fig


def draw_memory(rows: list[Row]) -> Figure:
    fig, ax = plt.subplots(figsize=(6.8, 4.4))
    markers = iter("odsP^v")
    for name in dict.fromkeys(row["method"] for row in rows):
        of = [row for row in rows if row["method"] == name]
        sizes = [row["temp_bytes"] / 2**20 for row in of]
        marker = next(markers)
        ax.loglog([row["steps"] for row in of], sizes, "-", marker=marker, label=name)
    ax.set_xlabel("number of steps")
    ax.set_ylabel("scratch memory (MiB)")
    ax.grid(alpha=0.3)
    fig.legend(loc="outside upper center", ncols=2, fontsize=9)
    return fig


PAPER = Paper(
    "ees",
    __doc__ or "",
    dict(order=measure_order, back=measure_back, memory=measure_memory),
    dict(order=("order", draw_order), memory=("memory", draw_memory)),
)

if __name__ == "__main__":
    run(PAPER, make_parser(PAPER).parse_args())
