"""What each reversible solver is good for, in one table.

    python benchmarks/solvers.py [--solver NAME ...] [--repeats N] [--output FILE]
    python benchmarks/solvers.py --table [--output FILE]

For each solver:

- its order, as claimed and as measured on a driven pendulum;
- evaluations of the vector field for each step of a gradient (as `least.py` counts
  them): of the solve, of the way back, and transposed (not of implicit methods, which
  take derivatives of it as well);
- the stability intervals on the negative real and on the imaginary axis, from the map
  that a step makes (for a solver of two equations, that of a harmonic oscillator), to
  where that grows by no more than 1e-9 a step;
- by how much going back over 10,000 steps of Kepler's problem misses its start,
  relative to the largest entry: in closed form, or numerically, without any stored
  states;
- by how much the gradient differs from that of `RecursiveCheckpointAdjoint` on the same
  solver, in 1000 steps;
- for three problems (the pendulum, Kepler's with an eccentricity of one half, and that
  of Henon and Heiles), the number of steps to an error of 1e-4 at the end, relative to
  the largest entry, and the time of a gradient of so many steps, relative to
  `RecursiveCheckpointAdjoint()` on `Tsit5` with the same error. None if that takes more
  than 2^16 steps.

All in 64-bit precision. Times are medians over repetitions that take turns in one
process, on a machine that should have nothing else to do: about 25 minutes on 2 CPU
cores. Appends one line of JSON for each solver to the output file. `--table` prints
what is in that, if it is given, or else what the documentation shows.
"""

import argparse
import dataclasses
import functools as ft
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import diffrax
import gradient
import jax
import jax.numpy as jnp
import least
import numpy as np
from jax.flatten_util import ravel_pytree


sys.path.append(str(pathlib.Path(__file__).parent / "papers"))
from _linear import Entry, stable_up_to  # noqa: E402


def _coupled(base: Any) -> diffrax.AbstractSolver:
    # Its error estimate is not asked for.
    return diffrax.UReversible(base(), max_gap=float("inf"))


SOLVERS: dict[str, Callable[[], Any]] = {
    "SemiImplicitEuler": diffrax.SemiImplicitEuler,
    "PositionVerlet": diffrax.PositionVerlet,
    "VelocityVerlet": diffrax.VelocityVerlet,
    "Ruth3": diffrax.Ruth3,
    "ForestRuth": diffrax.ForestRuth,
    "Suzuki4": diffrax.Suzuki4,
    "PEFRL": diffrax.PEFRL,
    "BlanesMoan4": diffrax.BlanesMoan4,
    "BlanesMoan6": diffrax.BlanesMoan6,
    "BlanesMoanRKN6": diffrax.BlanesMoanRKN6,
    "KahanLi6": diffrax.KahanLi6,
    "KahanLi8": diffrax.KahanLi8,
    "LeapfrogMidpoint": diffrax.LeapfrogMidpoint,
    "AsynchronousLeapfrog": diffrax.AsynchronousLeapfrog,
    "ImplicitMidpoint": diffrax.ImplicitMidpoint,
    "GaussLegendre4": diffrax.GaussLegendre4,
    "ReversibleHeun": diffrax.ReversibleHeun,
    "UReversible(Heun)": ft.partial(_coupled, diffrax.Heun),
    "UReversible(Tsit5)": ft.partial(_coupled, diffrax.Tsit5),
    "BitExact(VelocityVerlet)": lambda: diffrax.BitExact(
        diffrax.VelocityVerlet(), size=1.0
    ),
    "BitExact(Tsit5)": lambda: diffrax.BitExact(diffrax.Tsit5(), size=1.0),
    "EES25": diffrax.EES25,
    "EES27": diffrax.EES27,
    "Heun": diffrax.Heun,
    "Bosh3": diffrax.Bosh3,
    "Tsit5": diffrax.Tsit5,
    "Dopri8": diffrax.Dopri8,
}
TARGET = 1e-4
MOST_STEPS = 2**16


@dataclasses.dataclass(frozen=True)
class Problem:
    """`q' = p, p' = force(t, q, params)` from `t=0` to `t1`."""

    force: Callable[[Any, Any, Any], Any]
    q0: tuple[float, ...]
    p0: tuple[float, ...]
    t1: float
    params: float = 1.0


def _henon_heiles(t, q, k):
    return jnp.stack([-q[0] - 2 * k * q[0] * q[1], -q[1] - k * (q[0] ** 2 - q[1] ** 2)])


PROBLEMS = {
    "pendulum": Problem(
        lambda t, q, k: 0.3 * jnp.cos(t) - k * jnp.sin(q), (1.0,), (0.5,), 10.0
    ),
    "Kepler": Problem(
        lambda t, q, k: -k * q / jnp.sum(q**2) ** 1.5,
        (0.5, 0.0),
        (0.0, math.sqrt(3.0)),
        # Somewhat more than two revolutions.
        14.0,
    ),
    "Henon-Heiles": Problem(_henon_heiles, (0.0, 0.1), (0.4, 0.0), 30.0),
}


def is_pair(solver: Any) -> bool:
    """Whether the solver takes a pair of equations."""
    return isinstance(solver.term_structure, tuple)


def make_terms(problem: Problem, pair: bool) -> tuple[Any, Any]:
    """The terms, and `y0`."""
    q0, p0 = jnp.array(problem.q0), jnp.array(problem.p0)
    if pair:
        terms = (
            diffrax.ODETerm(lambda t, p, k: p),
            diffrax.ODETerm(problem.force),
        )
    else:
        field = lambda t, y, k: (y[1], problem.force(t, y[0], k))
        terms = diffrax.ODETerm(field)
    return terms, (q0, p0)


def solve(
    problem: Problem,
    solver: Any,
    adjoint: Any,
    max_steps: int,
    num_steps: Any,
    params: Any,
) -> Any:
    """The state at the end, as one array."""
    terms, y0 = make_terms(problem, is_pair(solver))
    sol = diffrax.diffeqsolve(
        terms,
        solver,
        0.0,
        problem.t1,
        problem.t1 / num_steps,
        y0,
        params,
        adjoint=adjoint,
        # Rounding may take one more.
        max_steps=max_steps + 1,
        # Steps may be too large.
        throw=False,
    )
    return ravel_pytree(sol.ys)[0]


@ft.cache
def exact(name: str) -> np.ndarray:
    """Where the problem ends."""
    problem = PROBLEMS[name]
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    y1 = jax.jit(
        lambda: solve(problem, diffrax.Dopri8(), adjoint, 2**13, 2**13, problem.params)
    )()
    return np.asarray(y1)


def errors(name: str, solver: Any, stop: float, ratio: float = 2.0) -> dict[int, float]:
    """By the number of steps, up to that of which the error is less than `stop`."""
    problem, found = PROBLEMS[name], {}
    adjoint = diffrax.RecursiveCheckpointAdjoint()
    fn = jax.jit(
        lambda n: solve(problem, solver, adjoint, MOST_STEPS, n, problem.params)
    )
    numbers = 4 * ratio ** np.arange(math.log(MOST_STEPS / 4, ratio) + 1e-6)
    for num_steps in map(round, numbers.tolist()):
        difference = np.asarray(fn(jnp.asarray(num_steps))) - exact(name)
        error = np.max(np.abs(difference)) / np.max(np.abs(exact(name)))
        found[num_steps] = float(error)
        if error < stop:
            break
    return found


def order(solver: Any) -> float:
    """As measured: the slope of the last five errors that rounding does not matter
    for."""
    found = errors("pendulum", solver, 1e-11, ratio=2**0.25)
    numbers, of = zip(*[x for x in found.items() if x[1] > 1e-11][-5:])
    return -float(np.polyfit(np.log(numbers), np.log(of), 1)[0])


def steps_to(name: str, solver: Any) -> int | None:
    """The number of steps to an error of `TARGET`."""
    found = list(errors(name, solver, TARGET).items())
    n2, error2 = found[-1]
    if error2 >= TARGET:
        return None
    if len(found) == 1:
        return n2
    n, error = found[-2]
    if not np.isfinite(error):
        return n2
    slope = math.log(n2 / n) / math.log(error / error2)
    return math.ceil(n * (error / TARGET) ** slope)


def missed(solver: Any, num_steps: int) -> float:
    """By how much going back misses the start."""
    if not isinstance(solver, diffrax.AbstractReversibleSolver):
        solver = diffrax.FixedPointReversible(solver)
    terms, y0 = make_terms(PROBLEMS["Kepler"], is_pair(solver))
    args, no_jump = jnp.array(1.0), jnp.array(False)
    ts = 0.01 * jnp.arange(num_steps + 1)

    def forward(carry, times):
        y, state = carry
        t0, t1 = times
        y, _, _, new, _ = solver.step(terms, t0, t1, y, args, state, no_jump)
        return (y, new), solver.record_state(state)

    def backward(carry, step):
        (y, state), (t0, t1, recorded) = carry, step
        state = solver.restore_state(terms, t1, y, args, state, recorded, no_jump)
        y, _, state = solver.backward_step(terms, t0, t1, y, args, state, no_jump)
        return (y, state), None

    @jax.jit
    def there_and_back():
        start = y0, solver.init(terms, ts[0], ts[1], y0, args)
        start = jax.tree.map(jnp.asarray, start)
        end, records = jax.lax.scan(forward, start, (ts[:-1], ts[1:]))
        (y, _), _ = jax.lax.scan(
            backward, end, (ts[:-1], ts[1:], records), reverse=True
        )
        return ravel_pytree(y)[0]

    expected = ravel_pytree(y0)[0]
    return float(
        jnp.max(jnp.abs(there_and_back() - expected)) / jnp.max(jnp.abs(expected))
    )


def make_gradient(name: str, solver: Any, adjoint: Any, num_steps: int) -> Callable:
    problem = PROBLEMS[name]
    loss = lambda k: jnp.sum(solve(problem, solver, adjoint, num_steps, num_steps, k))
    return jax.jit(jax.grad(loss))


def gradient_error(solver: Any) -> float:
    params = jnp.array(1.0)
    ours, expected = (
        make_gradient("pendulum", solver, adjoint, 1000)(params)
        for adjoint in (
            diffrax.ReversibleAdjoint(),
            diffrax.RecursiveCheckpointAdjoint(),
        )
    )
    return float(jnp.abs(ours - expected) / jnp.abs(expected))


def times(name: str, solver: Any, num_steps: int, repeats: int) -> dict[str, float]:
    """The seconds that a gradient takes, and that of `Tsit5` with as large an error."""
    stock = steps_to(name, diffrax.Tsit5())
    assert stock is not None
    recursive = diffrax.RecursiveCheckpointAdjoint()
    fns = dict(
        seconds=make_gradient(name, solver, diffrax.ReversibleAdjoint(), num_steps),
        stock_seconds=make_gradient(name, diffrax.Tsit5(), recursive, stock),
    )
    params = jnp.array(PROBLEMS[name].params)
    found: dict[str, list[float]] = {kind: [] for kind in fns}
    for i in range(repeats + 1):
        for kind, fn in fns.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(params))
            if i > 0:
                found[kind].append(time.perf_counter() - start)
    return {kind: float(np.median(x)) for kind, x in found.items()}


def measure(name: str, problems: list[str], repeats: int) -> dict[str, Any]:
    solver = SOLVERS[name]()
    terms, _ = make_terms(PROBLEMS["pendulum"], is_pair(solver))
    evaluations = None
    if not isinstance(solver, diffrax.AbstractImplicitSolver):
        kinds = "solve", "backward", "transposed"
        evaluations = dict(zip(kinds, least.count(solver, "cheap", 100)))
    pair = is_pair(solver)
    entry = Entry(SOLVERS[name], pair)
    row: dict[str, Any] = dict(
        solver=name,
        pair=pair,
        claimed=solver.order(terms),
        order=order(solver),
        evaluations=evaluations,
        real=None if pair else stable_up_to(entry, -1.0),
        imaginary=stable_up_to(entry, 1j),
        missed=missed(solver, 10_000),
        gradient=gradient_error(solver),
    )
    for problem in problems:
        num_steps = steps_to(problem, solver)
        row[problem] = dict(steps=num_steps)
        if num_steps is not None:
            row[problem] |= times(problem, solver, num_steps, repeats)
        jax.clear_caches()
    return row | dict(repeats=repeats, target=TARGET, **gradient.provenance())


def print_row(row: dict[str, Any]) -> None:
    counts = "/".join(f"{x:.3g}" for x in (row["evaluations"] or {}).values())
    real = "" if row["real"] is None else f"{row['real']:.3g}"
    line = f"{row['solver']:20s} {row['claimed']:2} {row['order']:5.2f} {counts:>12s} "
    line += f"{real:>7s} {row['imaginary']:7.3g} "
    line += f"{row['missed']:8.0e} {row['gradient']:6.0e}"
    for problem in PROBLEMS:
        of = row.get(problem, dict(steps=None))
        ratio = of["seconds"] / of["stock_seconds"] if "seconds" in of else float("nan")
        line += f" {of['steps'] or '--':>8} {ratio:6.2f}"
    print(line, flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--solver", choices=SOLVERS, nargs="+", default=list(SOLVERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    name = "solvers"
    if args.smoke:
        args.solver, args.repeats, name = ["SemiImplicitEuler"], 1, "solvers-smoke"
    if args.output is None:
        here = pathlib.Path(__file__).parent
        folder = here.parent / "docs" / "measured" if args.table else here / "output"
        args.output = folder / f"{name}.jsonl"
    return args


def main() -> None:
    args = parse_args()
    jax.config.update("jax_enable_x64", True)
    if not args.table:
        problems = ["pendulum"] if args.smoke else list(PROBLEMS)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        for name in args.solver:
            row = measure(name, problems, args.repeats)
            print_row(row)
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return
    for line in args.output.read_text().splitlines():
        print_row(json.loads(line))


if __name__ == "__main__":
    main()
