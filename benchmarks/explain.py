"""The figures of the page "How it works".

    python benchmarks/explain.py [--figure NAME ...] [--output FOLDER]
    python benchmarks/explain.py --smoke

- `segments`: a drawing of the forward pass with its stored states, of going back, and
  of a segment that is made again. Nothing is computed for it.
- `corrections`: by how much a step of `Heun` and of `Tsit5` is undone wrongly after 0
  to 3 corrections, against the step size. The slopes are 4 and 6 for the first guess
  (the order plus 2 if that is even, plus 1 if it is odd), and as much again for each
  correction, down to rounding. Prints how many corrections `Tsit5` takes on `y' = -y`.
- `coupled`: the spectral radii of a step of `UReversible(Tsit5())` and of its inverse
  on `y' = a y`, `a < 0`. The first exceeds one from `h |a| = -log(lambda)` on.
- `instability`: the error of the state while going back over `y' = -a (y - cos(t))`
  by undoing one step of `Tsit5` after another, with nothing stored. It grows as
  `exp(a t)`, from rounding. And the same with nine stored states.
- `drift`: what `diffrax.reversal_report` tells of Van der Pol's equation, with 0 and
  with 4 stored states. Prints the totals.

The figures are in float64. Takes about a minute on 2 CPU cores, most of which is
compiling, and writes into `docs/figures`; with `--smoke` about half of that, into
`benchmarks/output`.
"""

import argparse
import functools as ft
import io
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure


ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))
from _png import compress  # noqa: E402


EPS = float(np.finfo(np.float64).eps)
FORWARD, BACKWARD, OTHER = "tab:blue", "tab:orange", "0.55"
STYLE: Any = {
    "font.size": 11,
    "axes.labelsize": 12,
    "axes.titlesize": 12,
    "legend.fontsize": 11,
    "lines.linewidth": 2,
    "figure.constrained_layout.use": True,
}


def step(
    solver: diffrax.AbstractSolver,
    terms: Any,
    t0: Any,
    t1: Any,
    y: Array,
    args: Any = None,
) -> Array:
    """Where one step ends. It may go backward in time."""
    state = solver.init(terms, t0, t1, y, args)
    y1, *_ = solver.step(terms, t0, t1, y, args, state, made_jump=False)
    return y1


#
# A drawing
#


def _path(x: Any) -> np.ndarray:
    return 0.32 * np.sin(0.62 * np.asarray(x, float) + 0.4)


def _lane(ax: Axes, height: float, title: str) -> None:
    x = np.linspace(0, 12, 200)
    ax.plot(x, height + _path(x), color="0.85", zorder=0)
    ax.text(-0.4, height + 0.55, title, va="bottom", linespacing=1.3)


def _arrows(ax: Axes, x: Any, y: Any, color: str) -> None:
    props = dict(arrowstyle="-|>", color=color, lw=1.8, shrinkA=3.5, shrinkB=3.5)
    for start, end in zip(zip(x, y), zip(x[1:], y[1:])):
        ax.annotate("", end, start, arrowprops=props)


def _forward(ax: Axes, height: float, x: Any) -> None:
    x = np.asarray(x)
    y = height + _path(x)
    _arrows(ax, x, y, FORWARD)
    ax.plot(x[1:], y[1:], "o", color=FORWARD, markersize=6, markerfacecolor="w")


def _stored(ax: Axes, height: float, x: Any) -> None:
    ax.plot(x, height + _path(x), "s", color=FORWARD, markersize=10, zorder=3)


def _back(ax: Axes, height: float, x: Any, off: Any) -> None:
    """Going back, from the state that is known at `x[0]`."""
    y = height + _path(x) + np.asarray(off)
    _arrows(ax, x, y, BACKWARD)
    ax.plot(x[1:], y[1:], "o", color=BACKWARD, markersize=6, zorder=3)


def _gap(ax: Axes, height: float, x: float, off: float, text: str, at: Any) -> None:
    """The step from the stored state at `x - 1` ends elsewhere than going back did."""
    _forward(ax, height, [x - 1, x])
    y = height + float(_path(x))
    ax.plot([x, x], [y, y + off], color="black", lw=3, zorder=2)
    props = dict(arrowstyle="-", color="black", lw=1, shrinkB=1)
    where = x, y + off / 2
    ax.annotate(text, where, at, ha="center", va="center", arrowprops=props)


def segments(smoke: bool) -> Figure:
    del smoke
    fig, ax = plt.subplots(figsize=(6.4, 6.0))
    first, second, third = 4.5, 2.35, 0.2
    title = "1. Forward. Some of the states are stored (squares)."
    _lane(ax, first, title)
    _forward(ax, first, range(13))
    _stored(ax, first, [0, 4, 8, 12])
    for x in (0, 4, 8, 12):
        y = first + float(_path(x)) - 0.2
        ax.text(x, y, f"$y_{{{x}}}$", ha="center", va="top", fontsize=12)
    title = "2. Backward, segment by segment. Each step is undone."
    _lane(ax, second, title)
    _stored(ax, second, [0, 4, 8, 12])
    _back(ax, second, [12, 11, 10, 9], [0, 0.02, 0.06, 0.12])
    _gap(ax, second, 9, 0.12, "drift: small,\ngo on", (10.2, second - 0.5))
    _back(ax, second, [8, 7, 6, 5], [0, 0.1, 0.25, 0.58])
    _gap(ax, second, 5, 0.58, "drift: too large,\ndiscard", (2.0, second - 0.4))
    title = (
        "3. This segment is made again, storing states that are\nnearer to each other."
    )
    _lane(ax, third, title)
    _forward(ax, third, [4, 5, 6])
    _stored(ax, third, [0, 4, 6, 8])
    _back(ax, third, [8, 7], [0, 0.12])
    _gap(ax, third, 7, 0.12, "go on", (8.0, third - 0.6))
    _back(ax, third, [6, 5], [0, 0.16])
    _gap(ax, third, 5, 0.16, "go on", (4.0, third - 0.6))
    ax.set_xlim(-0.6, 12.6)
    ax.set_ylim(-0.55, 5.45)
    ax.axis("off")
    return fig


#
# Corrections
#


def _pendulum(t, y, args):
    return jnp.stack([y[1], -jnp.sin(y[0])])


@ft.partial(jax.jit, static_argnums=0)
@ft.partial(jax.vmap, in_axes=(None, 0))
def undo(solver: diffrax.AbstractSolver, h: Array) -> Array:
    """By how much the start of a step of size `h` is missed, after each correction."""
    terms = diffrax.ODETerm(_pendulum)
    y0 = jnp.array([1.0, 1.0])
    y1 = step(solver, terms, 0.0, h, y0)
    guess = y = step(solver, terms, h, 0.0, y1)
    errors = [jnp.max(jnp.abs(y - y0))]
    for _ in range(3):
        end = step(solver, terms, 0.0, h, y)
        y = y + guess - step(solver, terms, h, 0.0, end)
        errors.append(jnp.max(jnp.abs(y - y0)))
    return jnp.stack(errors)


def count_corrections(dtype: str, sizes: tuple[float, ...]) -> list[int]:
    """How many corrections `Tsit5` takes for a step on `y' = -y`."""

    def loss(adjoint, y0, h):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.Tsit5(),
            t0=0.0,
            t1=2 * h,
            dt0=None,
            y0=y0,
            # Two steps, of which the second is undone. (The first starts from `y0`.)
            stepsize_controller=diffrax.StepTo(h * jnp.arange(3)),
            adjoint=adjoint,
            max_steps=2,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys)

    with jax.enable_x64(dtype == "float64"):
        adjoint = diffrax.ReversibleAdjoint(0, "off", "ignore")
        y0 = jnp.array(1.0)

        @jax.jit
        def count(h):
            fn = lambda adjoint, y0: loss(adjoint, y0, h)
            out = diffrax.reversal_report(fn, y0, adjoint=adjoint)
            return out.corrections[1]

        return [int(count(jnp.array(h))) for h in sizes]


def corrections(smoke: bool) -> Figure:
    for dtype in ("float64",) if smoke else ("float64", "float32"):
        sizes = 0.02, 0.1, 0.3, 0.5, 1.0, 2.0
        counts = dict(zip(sizes, count_corrections(dtype, sizes), strict=True))
        print(f"corrections on y' = -y, by step size, {dtype}: {counts}")
    h = 2.0 ** np.linspace(-7, 0.5, 8 if smoke else 76)
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 4.2), sharey=True)
    solvers = (diffrax.Heun(), 4), (diffrax.Tsit5(), 6)
    styles = "-", "--", "-.", ":"
    for ax, (solver, slope) in zip(axes, solvers, strict=True):
        errors = np.asarray(undo(solver, jnp.array(h)))
        for i, style in enumerate(styles):
            # What is less than one unit of rounding is drawn as one.
            ax.loglog(h, np.maximum(errors[:, i], EPS), style, label=f"{i}")
        line = 8 * errors[-1, 0] * (h / h[-1]) ** slope
        ax.loglog(h, line, color="0.6", lw=1)
        ax.text(h[0], 3e-1, f"thin line: $h^{slope}$", va="bottom", color="0.3")
        ax.axhline(16 * EPS, color="black", lw=1)
        ax.set_title(type(solver).__name__)
        ax.set_xlabel("step size $h$")
        ax.set_ylim(EPS / 4, 10)
    axes[0].text(h[-1], 20 * EPS, r"$16\,\varepsilon$", va="bottom", ha="right")
    axes[0].set_ylabel("error of the start that is found")
    axes[1].legend(title="corrections", loc="upper left", bbox_to_anchor=(0, 0.9))
    return fig


#
# The coupled pair
#


def coupled_matrix(base: diffrax.AbstractSolver, coupling: float, x: Array) -> Array:
    """One step of `UReversible` on `y' = x y`, of size one, as a matrix."""
    terms = diffrax.ODETerm(lambda t, y, args: args * y)
    solver = diffrax.UReversible(base, coupling, max_gap=float("inf"))

    def pair(yz):
        y, z = yz
        _, history = solver.init(terms, 0.0, 1.0, y, x)
        y1, _, _, (z1, _), _ = solver.step(
            terms, 0.0, 1.0, y, x, (z, history), made_jump=False
        )
        return jnp.stack([y1, z1])

    return jax.jacfwd(pair)(jnp.ones(2))


def coupled(smoke: bool) -> Figure:
    x = np.logspace(-4.3, 0, 10 if smoke else 300)
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 4.2), sharey=True)
    for i, (coupling, style) in enumerate(((0.9, "-"), (0.99, "--"), (0.999, "-."))):
        at = jax.jit(jax.vmap(ft.partial(coupled_matrix, diffrax.Tsit5(), coupling)))
        matrices = np.asarray(at(jnp.array(-x)))
        for ax, m in zip(axes, (matrices, np.linalg.inv(matrices)), strict=True):
            radius = np.max(np.abs(np.linalg.eigvals(m)), axis=1)
            label = f"$\\lambda = {coupling}$"
            ax.plot(x, radius - 1, style, color=f"C{i}", label=label)
            ax.axvline(-np.log(coupling), color=f"C{i}", lw=1, ls=":")
    axes[0].text(5e-5, 0.6, "above 0:\nunstable", va="center")
    for ax, title in zip(axes, ("a step", "a step back"), strict=True):
        ax.set_xscale("log")
        ax.set_yscale("symlog", linthresh=1e-4, linscale=0.5)
        ax.set_yticks([-0.1, -1e-2, -1e-3, -1e-4, 0, 1e-4, 1e-3, 1e-2, 0.1, 1])
        ax.axhline(0, color="black", lw=1)
        ax.set_title(title)
        ax.set_xlabel("$h |a|$")
        ax.set_xticks([1e-4, 1e-3, 1e-2, 0.1, 1])
    axes[0].set_ylabel("spectral radius $-\\;1$")
    axes[1].legend(loc="lower right")
    return fig


#
# Going back over many steps
#


@ft.partial(jax.jit, static_argnums=(1, 2))
def go_back(rate: Array, num_steps: int, stride: int) -> tuple[Array, Array]:
    """Times, and by how much the state there is missed on the way back from `t=10`. At
    every multiple of `stride`, the state is taken to be known."""
    solver = diffrax.FixedPointReversible(diffrax.Tsit5())
    terms = diffrax.ODETerm(lambda t, y, args: -args * (y - jnp.cos(t)))
    h = 10 / num_steps
    ts = h * jnp.arange(num_steps)

    def forward(y, t):
        return step(solver, terms, t, t + h, y, rate), y

    def backward(y, inputs):
        index, t, known = inputs
        y, *_ = solver.backward_step(terms, t, t + h, y, rate, None, made_jump=False)
        return jnp.where(index % stride == 0, known, y), y

    end, ys = jax.lax.scan(forward, jnp.array(1.5), ts)
    inputs = jnp.arange(num_steps), ts, ys
    _, back = jax.lax.scan(backward, end, inputs, reverse=True)
    return ts, jnp.abs(back - ys)


def instability(smoke: bool) -> Figure:
    num_steps = 40 if smoke else 200
    fig, ax = plt.subplots(figsize=(6.4, 4.2))
    lines = (1.0, "-", 1), (2.0, "--", 1), (4.0, "-.", 1), (4.0, "-", 10)
    for i, (rate, style, segments) in enumerate(lines):
        ts, errors = go_back(jnp.array(rate), num_steps, num_steps // segments)
        label = f"$a = {rate:.0f}$"
        if segments > 1:
            label += f", {segments - 1} stored states"
        errors = np.maximum(np.asarray(errors), EPS)
        ax.semilogy(ts, errors, style, color=f"C{i}", label=label)
        if segments == 1:
            expected = EPS * np.exp(rate * (10 - np.asarray(ts)))
            ax.semilogy(ts, expected, color="0.7", lw=1, zorder=0)
    ax.plot([], [], color="0.7", lw=1, label=r"$\varepsilon\, e^{a (T - t)}$")
    ax.set_xlabel("time $t$ (going back: from right to left)")
    ax.set_ylabel("error of the state")
    ax.set_ylim(EPS / 4, 1e4)
    ax.legend(loc="upper right")
    return fig


#
# What the report tells
#


def _van_der_pol(t, y, mu):
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def report(checkpoints: int, num_steps: int) -> diffrax.ReversalReport:
    def loss(adjoint, y0, mu):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(_van_der_pol),
            diffrax.Tsit5(),
            t0=0.0,
            t1=10.0,
            dt0=10.0 / num_steps,
            y0=y0,
            args=mu,
            adjoint=adjoint,
            max_steps=num_steps,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys**2)

    adjoint = diffrax.ReversibleAdjoint(checkpoints, on_failure="ignore")
    fn: Callable[..., Any] = ft.partial(diffrax.reversal_report, loss, adjoint=adjoint)
    return jax.jit(fn)(jnp.array([2.0, 0.0]), jnp.array(5.0))


def drift(smoke: bool) -> Figure:
    num_steps = 40 if smoke else 2000
    fig, (ax, below) = plt.subplots(
        2, 1, figsize=(6.4, 5.0), sharex=True, height_ratios=(3, 1)
    )
    runs = (0, OTHER, "--", "^"), (4, FORWARD, "-", "o")
    for checkpoints, color, style, marker in runs:
        out = report(checkpoints, num_steps)
        label = f"rounding, checkpoints={checkpoints}"
        rounding = np.asarray(out.rounding)
        ax.semilogy(out.t0, rounding, style, color=color, lw=1.5, label=label)
        ax.semilogy(out.t0, out.drift, marker, color=BACKWARD, markersize=5)
        print(
            f"{label}: certificate {float(out.certificate):.1e}, steps made again "
            f"{int(jnp.sum(out.replays))}, corrections {int(jnp.sum(out.corrections))}"
        )
        if checkpoints > 0:
            below.step(out.t0, out.replays, where="post", color=color, lw=1.5)
            ax.axhline(float(out.tolerance), color="black", lw=1)
            ax.text(0, 1.6 * float(out.tolerance), "tolerated", va="bottom")
    ax.plot([], [], "^", color=BACKWARD, markersize=5, label="drift, checkpoints=0")
    ax.plot([], [], "o", color=BACKWARD, markersize=5, label="drift, checkpoints=4")
    ax.set_ylim(1e-17, 1e14)
    ax.set_ylabel("relative error")
    ax.legend(loc="upper left")
    below.set_ylabel("times\nmade again")
    below.set_yticks([0, 1, 2, 3])
    below.set_xlabel("time $t$ (going back: from right to left)")
    return fig


FIGURES: dict[str, Callable[[bool], Figure]] = dict(
    segments=segments,
    corrections=corrections,
    coupled=coupled,
    instability=instability,
    drift=drift,
)


def save(fig: Figure, path: pathlib.Path) -> None:
    file = io.BytesIO()
    fig.savefig(file, dpi=150, facecolor="white")
    plt.close(fig)
    path.write_bytes(compress(file.getvalue(), colours=64))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--figure", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    default = ROOT / "docs" / "figures"
    if args.smoke:
        default = ROOT / "benchmarks" / "output"
    output = args.output or default
    output.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_enable_x64", True)
    plt.switch_backend("Agg")
    for name in args.figure:
        with plt.rc_context(STYLE):
            fig = FIGURES[name](args.smoke)
            path = output / (f"{name}-smoke.png" if args.smoke else f"{name}.png")
            save(fig, path)
        print(path)


if __name__ == "__main__":
    main()
