"""Whether the certificate of `ReversibleAdjoint` tells the truth about the gradient.

    python benchmarks/certificate.py [--problem NAME ...] [--output FOLDER]

A table of problem by solver by precision by number of stored states: the error of the
gradient by `ReversibleAdjoint`, relative to that by `RecursiveCheckpointAdjoint`; the
certificate; and how much had to be corrected and made again. And a figure: each row as
a point, the error over the certificate.

The expectation is that wherever the certificate is within its tolerance, so is the
gradient, or else it is no further off than the gradient is uncertain: by how much it
changes, relatively, if the initial state changes by one unit of rounding. (On chaotic
problems any two ways of computing it differ by that much.) Rows with `checkpoints=0` or
`certificate="cheap"` are there because they may fail: their certificate is to be large.
(They are computed with `on_failure="ignore"`.)

Of the problems, the last five are made to mislead. On `hump`, going back errs and then
returns to where it should be; on `wiggle`, the gradient is more sensitive than the
state; on `small_leaf`, what is wrong is one leaf which is 1e-8 times as large as the
other, and on `small_entry` an entry of the same leaf; on `growing`, the solution is
1e13 times as large in the end as it is where going back is not possible.

Takes about 20 minutes on 2 CPU cores. Writes `certificate.jsonl` and `certificate.png`.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Problem:
    """`y' = field(t, y, params)` from `t=0` to `t1`."""

    field: Callable[[Any, PyTree[Array], PyTree[Array]], PyTree[Array]]
    t1: float
    params: PyTree[Array]
    y0: PyTree[Array]
    # What is to count for itself.
    parts: Callable[[PyTree[Array]], PyTree[Array]] = lambda y: y


def _lorenz(t, y, params):
    x, y, z = y
    sigma, rho, beta = params
    return jnp.stack([sigma * (y - x), x * (rho - z) - y, x * y - beta * z])


def _van_der_pol(t, y, mu):
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def _oscillator(t, y, params):
    return jnp.stack([y[1], -params[0] * y[0] - params[1] * y[1]])


def _fitzhugh_nagumo(t, y, params):
    v, w = y
    a, b, rate, current = params
    return jnp.stack([v - v**3 / 3 - w + current, rate * (v + a - b * w)])


def _heat(t, y, conductivity):
    y = jnp.pad(y, 1)
    return conductivity * (y[2:] - 2 * y[1:-1] + y[:-2])


def _neural_ode(t1: float) -> Problem:
    network = eqx.nn.MLP(8, 8, 32, 2, jnp.tanh, key=jr.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    field = lambda t, y, p: eqx.combine(p, static)(y)
    return Problem(field, t1, params, jr.normal(jr.key(1), (8,)))


def _hump(t, y, rate):
    # Until t=1, solutions come apart, by a factor of 1e3; then they come together
    # again, by 1e8. Going back, that is 1e8 first, and what is left of it in the end is
    # 1e5. The derivative with respect to the rate, which is zero, depends strongly on
    # what there is between; the state does not.
    near, other = y
    away = near - jnp.cos(t)
    return 14 * (1 - t) * away - jnp.sin(t), rate * other * jnp.sin(1 + 1e3 * away)


def _wiggle(t, y, rate):
    # Much of the derivative, and next to nothing of the value, is in the sine.
    return -rate * y + 1e-6 * jnp.sin(1e6 * y) * jnp.cos(t)


def _small_leaf(t, y, rate):
    large, small = y
    return -large, -rate * small * large


def _contracting(t, y, rate):
    return -rate * (y**3 - jnp.cos(3 * t) - 1.2)


def _small_entry(t, y, rate):
    return jnp.stack([1e8 * jnp.cos(t), _contracting(t, y[1], rate)])


def _growing(t, y, rate):
    return jnp.where(t < 2, _contracting(t, y, rate), 10 * y)


def make_problems() -> dict[str, Problem]:
    """Made in the precision that JAX is set to."""
    grid = jnp.linspace(0, 1, 66)[1:-1]
    profile = jnp.sin(jnp.pi * grid) + 0.1 * jnp.sin(20 * jnp.pi * grid)
    nerve = jnp.array([0.7, 0.8, 0.08, 0.5])
    return dict(
        decay=Problem(lambda t, y, a: -a * y, 20.0, jnp.array(1.0), jnp.ones(2)),
        oscillator=Problem(
            _oscillator, 50.0, jnp.array([1.0, 0.2]), jnp.array([1, 0.0])
        ),
        fitzhugh_nagumo=Problem(_fitzhugh_nagumo, 50.0, nerve, jnp.array([0.1, 0.0])),
        heat=Problem(_heat, 1.0, jnp.array(65.0), profile),
        van_der_pol=Problem(_van_der_pol, 10.0, jnp.array(5.0), jnp.array([2.0, 0.0])),
        lorenz=Problem(_lorenz, 20.0, jnp.array([10.0, 28.0, 8 / 3]), jnp.ones(3)),
        neural_ode=_neural_ode(20.0),
        long_neural_ode=_neural_ode(100.0),
        hump=Problem(_hump, 2.6, jnp.array(0.0), (jnp.ones(1), jnp.ones(1))),
        wiggle=Problem(_wiggle, 8.0, jnp.array(1.0), jnp.ones(1)),
        small_leaf=Problem(
            _small_leaf, 4.0, jnp.array(15.0), (jnp.ones(2), 1e-8 * jnp.ones(2))
        ),
        small_entry=Problem(
            _small_entry, 5.0, jnp.array(5.0), jnp.array([1e8, 1.0]), tuple
        ),
        growing=Problem(_growing, 5.0, jnp.array(3.0), jnp.ones(1)),
    )


SOLVERS: dict[str, Callable[[], diffrax.AbstractSolver]] = {
    "Tsit5": diffrax.Tsit5,
    "Heun": diffrax.Heun,
    "Bosh3": diffrax.Bosh3,
    "Dopri8": diffrax.Dopri8,
    "Kvaerno3": diffrax.Kvaerno3,
    "UReversible(Tsit5, 0.5)": lambda: diffrax.UReversible(diffrax.Tsit5(), 0.5),
    "UReversible(Tsit5, 0.999)": lambda: diffrax.UReversible(diffrax.Tsit5()),
    "LeapfrogMidpoint": diffrax.LeapfrogMidpoint,
    "ReversibleHeun": diffrax.ReversibleHeun,
    "AsynchronousLeapfrog": diffrax.AsynchronousLeapfrog,
    "BitExact(ReversibleHeun)": lambda: diffrax.BitExact(
        diffrax.ReversibleHeun(), size=10.0
    ),
}
_closed_forms = tuple(SOLVERS)[-4:]


@dataclasses.dataclass(frozen=True)
class Case:
    """One program; a row for each of `steps`, which are numbers of constant steps, or
    tolerances of adaptive ones."""

    problem: str
    steps: tuple[float, ...]
    dtype: str = "float64"
    checkpoints: int = 16
    solver: str = "Tsit5"
    certificate: str = "full"


_tolerances = (1e-3, 1e-6, 1e-9)
_misleading = "hump", "wiggle", "small_leaf", "small_entry", "growing"


def cases() -> Iterator[Case]:
    for problem, steps in (
        ("decay", (200, 2000)),
        ("oscillator", (500, 2000)),
        ("fitzhugh_nagumo", (500, 2000)),
        ("heat", (100, 1000)),
        ("van_der_pol", (500, 2000)),
        ("lorenz", (1000, 4000)),
        ("neural_ode", (200, 1000)),
        ("hump", (300, 3000)),
        ("wiggle", (100, 400)),
        ("small_leaf", (200, 1000)),
        ("small_entry", (100, 1000)),
        ("growing", (100, 1000)),
    ):
        for dtype in ("float64", "float32"):
            yield Case(problem, steps, dtype)
        # With so few, most are undone, rather than made again.
        yield Case(problem, steps, checkpoints=4)
        yield Case(problem, steps, checkpoints=0)
        for solver in _closed_forms:
            yield Case(problem, steps[-1:], checkpoints=4, solver=solver)
    for problem in _misleading:
        yield Case(problem, (300,), checkpoints=0, certificate="cheap")
    for problem in ("lorenz", "van_der_pol"):
        yield Case(problem, _tolerances)
        yield Case(problem, _tolerances, checkpoints=64)
        yield Case(problem, (1e-3,), "float32")
        for solver in ("Heun", "Bosh3", "Dopri8", "UReversible(Tsit5, 0.5)"):
            yield Case(problem, (4000,), solver=solver)
    yield Case("lorenz", (4000,), solver="UReversible(Tsit5, 0.999)")
    yield Case("van_der_pol", (1e-3,), solver="Kvaerno3")
    yield Case("heat", (1e-3,), solver="Kvaerno3")
    yield Case("long_neural_ode", (100_000,), "float32")


def _norm(x: PyTree[Array]) -> float:
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jtu.tree_leaves(x)]
    return float(np.linalg.norm(np.concatenate(leaves)))


def _distance(x: PyTree[Array], y: PyTree[Array]) -> float:
    """Relative; of each leaf for itself, as the certificate has it."""
    pairs = zip(jtu.tree_leaves(x), jtu.tree_leaves(y), strict=True)
    return max(_norm(a - b) / (_norm(b) or 1.0) for a, b in pairs)


def measure(case: Case) -> Iterator[dict[str, Any]]:
    problem = make_problems()[case.problem]
    is_adaptive = case.steps[0] < 1
    max_steps = 2**14 if is_adaptive else int(max(case.steps))
    field = diffrax.ODETerm(problem.field)

    def loss(adjoint, y0, params, steps):
        # Through the solver's own types, so that `steps` is no input of the gradient.
        steps = jax.lax.stop_gradient(steps)
        controller = diffrax.ConstantStepSize()
        dt0 = problem.t1 / steps
        if is_adaptive:
            controller = diffrax.PIDController(rtol=steps, atol=1e-3 * steps)
            dt0 = None
        sol = diffrax.diffeqsolve(
            field,
            SOLVERS[case.solver](),
            t0=0.0,
            t1=problem.t1,
            dt0=dt0,
            y0=y0,
            args=params,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=max_steps,
            throw=False,
        )
        # Each part counts, however small it is.
        ends = problem.parts(jtu.tree_map(lambda y: y[-1], sol.ys))
        sizes = [jnp.sum(y**2) for y in jtu.tree_leaves(ends)]
        return sum((x / jax.lax.stop_gradient(x) for x in sizes), jnp.array(0.0))

    adjoint = diffrax.ReversibleAdjoint(case.checkpoints, case.certificate)

    @jax.jit
    def report(y0, params, steps):
        fn = lambda adjoint, y0, params: loss(adjoint, y0, params, steps)
        return diffrax.reversal_report(fn, y0, params, adjoint=adjoint)

    @jax.jit
    def reference(y0, params, steps):
        fn = jax.grad(loss, argnums=(1, 2))
        return fn(diffrax.RecursiveCheckpointAdjoint(), y0, params, steps)

    eps = float(jnp.finfo(case.dtype).eps)
    nudged = jtu.tree_map(lambda y: y * (1 + eps), problem.y0)
    for steps in map(jnp.array, case.steps):
        out = report(problem.y0, problem.params, steps)
        expected = reference(problem.y0, problem.params, steps)
        row = dataclasses.asdict(case) | dict(
            steps=float(steps) if is_adaptive else int(steps),
            tolerance=float(out.tolerance),
        )
        num_steps = int(out.num_steps)
        row |= dict(num_steps=num_steps, failed=not np.isfinite(float(out.value)))
        if not row["failed"]:
            other = reference(nudged, problem.params, steps)
            row |= dict(
                error=_distance(out.grads, expected),
                uncertainty=_distance(other, expected),
                measured=float(out.certificate),
                corrections=float(jnp.sum(out.corrections)) / num_steps,
                replays=float(jnp.sum(out.replays)) / num_steps,
            )
        yield row


def print_row(row: dict[str, Any]) -> None:
    line = f"{row['problem']:16s} {row['solver']:25s} {row['dtype']:8s}"
    line += f"{row['checkpoints']:4d} {row['certificate']:6s}{row['steps']:8g}"
    line += f"{row['num_steps']:8d}"
    if row["failed"]:
        line += "  the solve fails"
    else:
        line += f"{row['error']:9.0e}{row['uncertainty']:9.0e}{row['measured']:9.0e}"
        line += f"{row['corrections']:9.2f}{row['replays']:9.2f}"
        if is_trusted(row) and not is_right(row):
            line += "  WRONG"
    print(line, flush=True)


def is_trusted(row: dict[str, Any]) -> bool:
    return row["measured"] <= row["tolerance"]


def is_right(row: dict[str, Any]) -> bool:
    return row["error"] <= max(row["tolerance"], 10 * row["uncertainty"])


def misleads(row: dict[str, Any]) -> bool:
    return row["problem"] in _misleading


def is_cheap(row: dict[str, Any]) -> bool:
    return row["certificate"] == "cheap"


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {
        "others": ("o", lambda row: not misleads(row)),
        "made to mislead": ("^", lambda row: misleads(row) and not is_cheap(row)),
        "the same, cheap certificate": ("x", is_cheap),
    }
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True)
    for ax, dtype in zip(axes, ("float64", "float32"), strict=True):
        eps = float(jnp.finfo(dtype).eps)
        tolerance = eps ** (2 / 3)
        for i, (label, (marker, belongs)) in enumerate(groups.items()):
            chosen = [row for row in rows if row["dtype"] == dtype and belongs(row)]
            points = [(row["measured"], row["error"]) for row in chosen]
            x, y = np.clip(np.array(points).reshape(-1, 2), eps / 8, 1e3).T
            ax.plot([], [], marker, color=f"C{i}", label=label)
            for row, *point in zip(chosen, x, y, strict=True):
                # Hollow: the gradient itself is uncertain by about as much.
                uncertain = row["error"] <= 10 * row["uncertainty"]
                face = "none" if uncertain and marker != "x" else f"C{i}"
                ax.plot(*point, marker, color=f"C{i}", markerfacecolor=face)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.axvline(tolerance, color="gray", linewidth=0.8)
        ax.axhline(tolerance, color="gray", linewidth=0.8)
        ax.set_title(f"{dtype} (lines: the tolerance)")
        ax.set_xlabel("certificate")
    axes[0].set_ylabel("relative error of the gradient")
    axes[0].legend()
    fig.tight_layout()
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problem", nargs="+", choices=make_problems())
    folder = pathlib.Path(__file__).parent / "output"
    parser.add_argument("--output", type=pathlib.Path, default=folder)
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    chosen = [c for c in cases() if args.problem is None or c.problem in args.problem]
    if args.smoke:
        chosen = [Case("decay", (20, 40)), Case("decay", (20,), "float32")]
    args.output.mkdir(parents=True, exist_ok=True)
    name = "certificate-smoke" if args.smoke else "certificate"
    print(
        f"{'problem':16s} {'solver':25s} {'dtype':8s}{'K':>4s} {'':6s}{'steps':>8s}"
        f"{'made':>8s}{'error':>9s}{'+-':>9s}{'cert.':>9s}{'correct.':>9s}{'replays':>9s}"
    )
    rows = []
    for case in chosen:
        with jax.enable_x64(case.dtype == "float64"):
            for row in measure(case):
                print_row(row)
                rows.append(row)
        jax.clear_caches()
    path = args.output / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [row for row in rows if not row["failed"]]
    plot(rows, path.with_suffix(".png"))
    for certificate in ("full", "cheap"):
        of = [row for row in rows if row["certificate"] == certificate]
        trusted = [row for row in of if is_trusted(row)]
        wrong = [row for row in trusted if not is_right(row)]
        print(
            f"With the {certificate} certificate: {len(of)} gradients, of which "
            f"{len(trusted)} are trusted, and {len(wrong)} of these are wrong."
        )


if __name__ == "__main__":
    main()
