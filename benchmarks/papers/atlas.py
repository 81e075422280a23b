"""An atlas of stability: for which step sizes reversible solvers are stable, and by how
much a step back magnifies errors.

    python benchmarks/papers/atlas.py [--smoke | --measured]
    python benchmarks/papers/atlas.py --figures   # draws what was measured before

Of the equation `y' = z y` with steps of size one, for complex `z`. (For solvers of
pairs, such as `SemiImplicitEuler`, it is `q' = z p`, `p' = z q`.) Nothing is taken from
a formula: each number is an eigenvalue of the Jacobian of one real step of the solver,
or of one call of its `backward_step`. Of a solver that is undone numerically, undoing a
step is the inverse of the step; where the iteration for that converges is found from
two real steps, one forward and one backward in time.

What each row has:

- how far the solver is stable along the negative real axis and along the imaginary one
  (up to rounding; and on the latter also up to a growth of 1e-3 per step);
- by how much a step magnifies at `z = -0.1`, of which the equation makes 0.905;
- by how much a step back magnifies at `z` of -0.1, 0.1i and 0.1. The equation itself
  does so by 1.105, 1 and 0.905;
- up to which size the iteration converges, along the two axes.

The expectation is that an explicit solver with a closed form for going back is stable
on nothing but a part of the imaginary axis, or magnifies on the way back by more than
the equation does: the determinant of the step is that of a whole matrix, with a second
state in it.

Exact up to rounding on any machine. Takes about two minutes on 2 CPU cores. To add a
solver, add a line to `SOLVERS`.
"""

import argparse
import functools as ft
from collections.abc import Iterator
from typing import Any

import diffrax
import jax
import matplotlib.pyplot as plt
import numpy as np
from _common import make_parser, Paper, Row, run
from _linear import convergence, Entry, maps, spectral_radius, stable_up_to
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def _coupled(base: Any, coupling: float = 0.999) -> diffrax.UReversible:
    return diffrax.UReversible(base(), coupling, max_gap=float("inf"))


def _implicit(solver: Any) -> diffrax.AbstractSolver:
    return solver(root_finder=diffrax.VeryChord(rtol=1e-12, atol=1e-12))


SOLVERS = {
    "ReversibleHeun": Entry(diffrax.ReversibleHeun),
    "LeapfrogMidpoint": Entry(diffrax.LeapfrogMidpoint),
    "AsynchronousLeapfrog": Entry(diffrax.AsynchronousLeapfrog),
    "AsynchronousLeapfrog(0.9)": Entry(ft.partial(diffrax.AsynchronousLeapfrog, 0.9)),
    "UReversible(Heun)": Entry(ft.partial(_coupled, diffrax.Heun)),
    "UReversible(Tsit5)": Entry(ft.partial(_coupled, diffrax.Tsit5)),
    "UReversible(Tsit5, 0.9)": Entry(ft.partial(_coupled, diffrax.Tsit5, 0.9)),
    "SemiImplicitEuler": Entry(diffrax.SemiImplicitEuler, of_pairs=True),
    "PositionVerlet": Entry(diffrax.PositionVerlet, of_pairs=True),
    "VelocityVerlet": Entry(diffrax.VelocityVerlet, of_pairs=True),
    "Ruth3": Entry(diffrax.Ruth3, of_pairs=True),
    "ForestRuth": Entry(diffrax.ForestRuth, of_pairs=True),
    "Suzuki4": Entry(diffrax.Suzuki4, of_pairs=True),
    "PEFRL": Entry(diffrax.PEFRL, of_pairs=True),
    "BlanesMoan4": Entry(diffrax.BlanesMoan4, of_pairs=True),
    "BlanesMoan6": Entry(diffrax.BlanesMoan6, of_pairs=True),
    "BlanesMoanRKN6": Entry(diffrax.BlanesMoanRKN6, of_pairs=True),
    "KahanLi6": Entry(diffrax.KahanLi6, of_pairs=True),
    "KahanLi8": Entry(diffrax.KahanLi8, of_pairs=True),
    "ImplicitMidpoint": Entry(diffrax.ImplicitMidpoint),
    "GaussLegendre4": Entry(diffrax.GaussLegendre4),
    "Euler": Entry(diffrax.Euler),
    "Heun": Entry(diffrax.Heun),
    "Bosh3": Entry(diffrax.Bosh3),
    "Tsit5": Entry(diffrax.Tsit5),
    "Dopri8": Entry(diffrax.Dopri8),
    "EES25": Entry(diffrax.EES25),
    "EES27": Entry(diffrax.EES27),
    "ImplicitEuler": Entry(ft.partial(_implicit, diffrax.ImplicitEuler)),
}
LEFT, RIGHT, HEIGHT = -5.0, 2.0, 4.5


def _grid(num_points: int) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.linspace(LEFT, RIGHT, num_points),
        np.linspace(0.0, HEIGHT, num_points * 2 // 3),
    )


def _rounded(x: np.ndarray) -> list[list[int]]:
    """Hundredths of the logarithms to base 10: that is enough for a figure."""
    with np.errstate(divide="ignore"):
        logs = np.clip(np.log10(x), -3.0, 3.0)
    return np.rint(100 * logs).astype(int).tolist()


def _measure_one(name: str, num_points: int) -> Row:
    entry = SOLVERS[name]
    re, im = _grid(num_points)
    # Next to round numbers, at some of which a matrix is singular.
    on_grid = maps(entry, re + 1j * im[:, None] + 1e-6)
    at_points = maps(entry, np.array([-0.1, 0.1j, 0.1]))
    step_decay, *_ = spectral_radius(at_points.forward)
    decay, turn, growth = spectral_radius(at_points.backward)
    # The equation for pairs has an eigenvalue of the opposite sign, too.
    away = {}
    if not entry.of_pairs:
        away = dict(
            step_decay=float(step_decay),
            back_decay=float(decay),
            back_growth=float(growth),
        )
    rate = convergence(on_grid)
    converges = {}
    if rate is not None:
        s = np.linspace(0, 10, 1000)[1:]
        for axis, direction in (("real", -1.0), ("imaginary", 1j)):
            of: Any = convergence(maps(entry, s * direction))
            first = np.flatnonzero(of >= 1)
            converges[f"converges_{axis}"] = float(s[first[0]]) if len(first) else None
    return dict(
        solver=name,
        of_pairs=entry.of_pairs,
        stable_real=stable_up_to(entry, -1.0),
        stable_imaginary=stable_up_to(entry, 1j),
        nearly_stable_imaginary=stable_up_to(entry, 1j, 1e-3),
        back_turn=float(turn),
        **away,
        **converges,
        forward=_rounded(spectral_radius(on_grid.forward)),
        # If there is but one eigenvalue, it is one over the other.
        backward=None
        if on_grid.forward.shape[-1] == 2
        else _rounded(spectral_radius(on_grid.backward)),
        rate=None if rate is None else _rounded(rate),
    )


def measure(args: argparse.Namespace) -> Iterator[Row]:
    names, num_points = list(SOLVERS), 48
    if args.size == "smoke":
        names, num_points = ["ReversibleHeun", "SemiImplicitEuler", "Heun"], 12
    for name in names:
        yield _measure_one(name, num_points)
        jax.clear_caches()


def _mirrored(values: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates and values in the whole plane, of those in its upper half."""
    half = np.asarray(values) / 100
    num_points = half.shape[1]
    re, im = _grid(num_points)
    return re, np.concatenate([-im[:0:-1], im]), np.concatenate([half[:0:-1], half])


def _axes(ax: Axes) -> None:
    ax.axhline(0, color="black", lw=0.5)
    ax.axvline(0, color="black", lw=0.5)
    ax.set_aspect("equal")
    ax.set_xlim(LEFT, RIGHT)
    ax.set_ylim(-HEIGHT, HEIGHT)
    ax.tick_params(labelsize=8)


def _draw_forward(ax: Axes, row: Row) -> None:
    re, im, radius = _mirrored(row["forward"])
    ax.contourf(re, im, radius, [-9, 1e-9], colors=["#9ecae1"])
    levels = [np.log10(1.01), np.log10(1.5)]
    ax.contour(re, im, radius, levels, colors="0.5", linewidths=0.8)
    stable = row["nearly_stable_imaginary"]
    ax.plot([0, 0], [-stable, stable], color="tab:blue", lw=3)
    ax.plot([-row["stable_real"], 0], [0, 0], color="tab:blue", lw=3)
    ax.set_title(row["solver"], fontsize=9)
    _axes(ax)


def _draw_backward(ax: Axes, row: Row) -> Any:
    re, im, radius = _mirrored(row["backward"] or row["forward"])
    radius = radius if row["backward"] else -radius
    levels = np.linspace(-1.5, 1.5, 13)
    filled = ax.contourf(re, im, radius, levels, cmap="RdBu_r", extend="both")
    ax.contour(re, im, radius, [0.0], colors="black", linewidths=0.8)
    if row["rate"] is not None:
        re, im, rate = _mirrored(row["rate"])
        ax.contourf(re, im, rate, [0, 10], colors="none", hatches=["////"])
    _axes(ax)
    return filled


def draw(rows: list[Row]) -> Figure:
    columns = 6
    lines = -(-len(rows) // columns)
    fig, axes = plt.subplots(
        2 * lines, columns, figsize=(2.1 * columns, 5.5 * lines), squeeze=False
    )
    filled = None
    for ax in axes.flat:
        ax.set_visible(False)
    for i, row in enumerate(rows):
        line, column = divmod(i, columns)
        above, below = axes[2 * line, column], axes[2 * line + 1, column]
        for ax in (above, below):
            ax.set_visible(True)
        _draw_forward(above, row)
        filled = _draw_backward(below, row)
    if filled is not None:
        bar = fig.colorbar(filled, ax=axes, location="bottom", shrink=0.5, aspect=40)
        bar.set_label("a step back multiplies errors by 10 to the power of")
    return fig


def draw_closed(rows: list[Row]) -> Figure:
    return draw([row for row in rows if row["rate"] is None])


def draw_numerical(rows: list[Row]) -> Figure:
    return draw([row for row in rows if row["rate"] is not None])


PAPER = Paper(
    "atlas",
    __doc__ or "",
    dict(atlas=measure),
    dict(closed=("atlas", draw_closed), numerical=("atlas", draw_numerical)),
)

if __name__ == "__main__":
    run(PAPER, make_parser(PAPER).parse_args())
