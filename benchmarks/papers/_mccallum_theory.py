"""What McCallum and Foster prove, and what they show of it: the order of convergence of
the coupled pair, and where it is stable."""

import argparse
from collections.abc import Iterator
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from _common import Row
from _linear import Entry, maps, stable_up_to
from _mccallum_training import BASES, BY_CONSTANT_STEPS, coupled
from matplotlib.figure import Figure


def _error(solver: Any, dt0: float) -> float:
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: 0.5 * y),
        solver,
        t0=0.0,
        t1=5.0,
        dt0=dt0,
        y0=jnp.array(1.0),
        max_steps=1000,
    )
    assert sol.ys is not None
    return float(jnp.abs(sol.ys[-1] - jnp.exp(2.5)))


def measure_convergence(args: argparse.Namespace) -> Iterator[Row]:
    dt0s = np.logspace(0, -5, 5, base=2)
    for base in ("Euler",) if args.size == "smoke" else BY_CONSTANT_STEPS:
        solvers = dict(coupled=coupled(base), plain=BASES[base]())
        for name, solver in solvers.items():
            errors = [_error(solver, dt0) for dt0 in dt0s]
            order, _ = np.polyfit(np.log(dt0s), np.log(errors), 1)
            last = np.log(errors[-2] / errors[-1]) / np.log(dt0s[-2] / dt0s[-1])
            yield dict(
                solver=base,
                method=name,
                order=float(order),
                last_order=float(last),
                dt0s=dt0s.tolist(),
                errors=errors,
            )


def _closed_form(base: str, coupling: float, x: np.ndarray) -> np.ndarray:
    """The trace and the determinant of a step of the pair, from its equations."""
    degree = BY_CONSTANT_STEPS.index(base) + 1
    r = lambda x: sum(
        x**i / float(np.prod(range(1, i + 1))) for i in range(1, degree + 1)
    )
    trace = 1 + coupling - (1 - coupling) * r(-x) - r(-x) * r(x)
    return np.stack([trace, np.full_like(trace, coupling)])


def measure_stability(args: argparse.Namespace) -> Iterator[Row]:
    couplings = (0.8,) if args.size == "smoke" else (0.5, 0.8, 0.9, 0.99, 0.999)
    re, im = np.linspace(-4, 4, 48), np.linspace(0, 4, 25)
    z = re + 1j * im[:, None]
    for base in ("Midpoint",) if args.size == "smoke" else BY_CONSTANT_STEPS:
        for coupling in couplings:
            entry = Entry(lambda b=base, c=coupling: coupled(b, c))
            found = maps(entry, z).forward
            # Of real matrices that stand for complex ones: rows and columns in pairs.
            found = found[..., ::2, ::2] + 1j * found[..., 1::2, ::2]
            determinant = np.linalg.det(found)
            trace = np.trace(found, axis1=-2, axis2=-1)
            expected = _closed_form(base, coupling, z)
            difference = np.abs(np.stack([trace, determinant]) - expected)
            size = 1 + np.max(np.abs(found), axis=(-2, -1)) ** 2
            radius = np.max(np.abs(np.linalg.eigvals(found)), axis=-1)
            logs = np.clip(100 * np.log10(radius), -300, 300)
            keep = coupling == 0.8
            yield dict(
                solver=base,
                coupling=coupling,
                stable_real=stable_up_to(entry, -1.0),
                closed_form=-float(np.log(coupling)),
                difference=float(np.max(difference / size)),
                radius=np.rint(logs).astype(int).tolist() if keep else None,
            )
        jax.clear_caches()


def draw_convergence(rows: list[Row]) -> Figure:
    fig, ax = plt.subplots(figsize=(6.4, 4.2))
    for i, base in enumerate(dict.fromkeys(row["solver"] for row in rows)):
        for row in (row for row in rows if row["solver"] == base):
            is_coupled = row["method"] == "coupled"
            style = "-o" if is_coupled else ":x"
            label = f"UReversible({base}): {row['order']:.2f}" if is_coupled else None
            ax.loglog(row["dt0s"], row["errors"], style, color=f"C{i}", label=label)
    ax.plot([], [], ":x", color="0.5", label="the solver by itself")
    ax.set_xlabel("step size")
    ax.set_ylabel("error at $t = 5$")
    ax.legend(title="and the slope")
    return fig


def draw_stability(rows: list[Row]) -> Figure:
    fig, axes = plt.subplots(1, 4, figsize=(9.6, 3.0), squeeze=False)
    of = [row for row in rows if row["radius"] is not None]
    for ax, row in zip(axes.flat, of):
        half = np.asarray(row["radius"]) / 100
        radius = np.concatenate([half[:0:-1], half])
        re = np.linspace(-4, 4, radius.shape[1])
        im = np.linspace(-4, 4, radius.shape[0])
        ax.contourf(re, im, radius, [-9, 1e-9], colors=["#9ecae1"])
        ax.contour(re, im, radius, [0.0], colors="tab:blue", linewidths=1)
        ax.axhline(0, color="black", lw=0.5)
        ax.axvline(0, color="black", lw=0.5)
        ax.set_aspect("equal")
        ax.set_title(row["solver"])
    return fig
