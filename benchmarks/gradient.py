"""What a gradient costs: its error, its scratch memory, and its time.

    python benchmarks/gradient.py [--problem NAME] [--solver NAME] [--adjoint NAME ...]
        [--steps N ...] [--float64] [--compile-only] [--output FILE]
    python benchmarks/gradient.py --count FILE

Compares adjoints on the same solver and the same steps, and with them `UReversible`
around that solver. The expectation is that the memory of `ReversibleAdjoint` is the
same for any number of steps, but for the record of the times of the steps, and its
error that of rounding. Its time is to be that of a fixed number of evaluations of the
vector field for each step, as long as the steps can be undone.

Times are medians (with the quartiles) over repetitions that are interleaved, and ratios
to the first row: to `RecursiveCheckpointAdjoint` with a stock solver. Each error is
relative to the gradient of the same solve by `RecursiveCheckpointAdjoint` in float64.

Some problems are there because something loses on them. On `van_der_pol`, `lorenz` and
`heat` (with 100 steps), going back over all of the steps is impossible, so that
`ReversibleAdjoint` has to make many of them again. On these and on `decay`, the pair of
states of `UReversible` is unstable (see its docstring), so that the solve fails where
the same Runge--Kutta method by itself does not. With few steps, as on `mlp` with 100,
`ReversibleAdjoint` needs more memory than `RecursiveCheckpointAdjoint`. Those with
`_large` or `_adaptive` in their name, and `convolution`, are for `ratios.py`.

With each row of `ReversibleAdjoint` stands how many of the steps it undid, and how many
times it made steps again, both divided by their number. With `--count`, these are
counted anew for what is in the file, and nothing else is measured.

Takes about three minutes on 2 CPU cores with the default arguments. Appends one line of
JSON for each row to the output file.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree


SOLVERS: dict[str, Callable[[], diffrax.AbstractSolver]] = {
    "Tsit5": diffrax.Tsit5,
    "Heun": diffrax.Heun,
    "Dopri8": diffrax.Dopri8,
    "UReversible(Tsit5)": lambda: diffrax.UReversible(diffrax.Tsit5()),
    "UReversible(Heun)": lambda: diffrax.UReversible(diffrax.Heun()),
    "ReversibleHeun": diffrax.ReversibleHeun,
    "LeapfrogMidpoint": diffrax.LeapfrogMidpoint,
}
STOCK = {"UReversible(Tsit5)": "Tsit5", "UReversible(Heun)": "Heun"}
COUPLED = {stock: coupled for coupled, stock in STOCK.items()}
ADJOINTS: dict[str, Callable[[], diffrax.AbstractAdjoint]] = {
    "RecursiveCheckpointAdjoint": diffrax.RecursiveCheckpointAdjoint,
    "DirectAdjoint": diffrax.DirectAdjoint,
    "BacksolveAdjoint": diffrax.BacksolveAdjoint,
    "ReversibleAdjoint": diffrax.ReversibleAdjoint,
}
REFERENCE = "RecursiveCheckpointAdjoint"
OURS = "ReversibleAdjoint"


@dataclasses.dataclass(frozen=True)
class Problem:
    """`y' = field(t, y, params)` from `t=0` to `t1`. With constant steps, and saved at
    `t1`, unless there is a `tolerance`: then with adaptive steps, and `num_saved` times
    to save."""

    field: Callable[[Any, Array, PyTree[Array]], Array]
    t1: float
    params: PyTree[Array]
    y0: Array
    tolerance: float | None = None
    num_saved: int = 1


def _mlp() -> Problem:
    """A neural ODE: a network of width 64, with a batch of 256 as the state."""
    network = eqx.nn.MLP(16, 16, 64, 2, jnp.tanh, key=jr.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    field = lambda t, y, p: jax.vmap(eqx.combine(p, static))(y)
    return Problem(field, 1.0, params, jr.normal(jr.key(1), (256, 16)))


def _pendulum() -> Problem:
    """Three numbers of state, so that the overhead of each step is what counts."""

    def field(t, y, params):
        angle, speed, phase = y
        length, drive = params
        acceleration = drive * jnp.cos(phase) - jnp.sin(angle) / length
        return jnp.stack([speed, acceleration, jnp.ones_like(phase)])

    return Problem(field, 10.0, (jnp.array(1.5), jnp.array(0.3)), jnp.arange(3.0) / 3)


def _wave() -> Problem:
    """The wave equation on 1000 points, periodic: a large state, a cheap field."""

    def field(t, y, speed):
        u, v = y
        laplacian = jnp.roll(u, 1) - 2 * u + jnp.roll(u, -1)
        return jnp.stack([v, speed**2 * laplacian])

    x = jnp.linspace(0, 1, 1000, endpoint=False)
    u = jnp.exp(-100 * (x - 0.5) ** 2)
    return Problem(field, 10.0, jnp.linspace(0.5, 1.0, 1000), jnp.stack([u, 0 * u]))


def _van_der_pol() -> Problem:
    """A limit cycle: what is not on it is drawn to it fast, and in parts very fast."""
    field = lambda t, y, mu: jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])
    return Problem(field, 10.0, jnp.array(5.0), jnp.array([2.0, 0.0]))


def _lorenz() -> Problem:
    """Chaos. For `--float64`: the gradient grows by a factor of 1e8 or so."""

    def field(t, y, params):
        x, y, z = y
        sigma, rho, beta = params
        return jnp.stack([sigma * (y - x), x * (rho - z) - y, x * y - beta * z])

    return Problem(field, 20.0, jnp.array([10.0, 28.0, 8 / 3]), jnp.ones(3))


def _heat() -> Problem:
    """The heat equation on 64 points. With 100 steps, an explicit method is near the
    limit of its stability."""

    def field(t, y, conductivity):
        y = jnp.pad(y, 1)
        return conductivity * (y[2:] - 2 * y[1:-1] + y[:-2])

    x = jnp.linspace(0, 1, 66)[1:-1]
    y0 = jnp.sin(jnp.pi * x) + 0.1 * jnp.sin(20 * jnp.pi * x)
    # Times 4, this is the largest rate at which anything decays.
    return Problem(field, 1.0, jnp.array(65.0), y0)


def _mlp_adaptive() -> Problem:
    """The neural ODE with adaptive steps, faster, and with 50 times to save."""
    problem = _mlp()
    field = lambda t, y, p: 20 * problem.field(t, y, p)
    return dataclasses.replace(problem, field=field, tolerance=1e-6, num_saved=50)


def _heat_large() -> Problem:
    """The heat equation on 100,000 points: a large state, a cheap field."""
    x = jnp.linspace(0, 1, 100_002)[1:-1]
    y0 = jnp.sin(jnp.pi * x) + 0.1 * jnp.sin(20 * jnp.pi * x)
    return dataclasses.replace(_heat(), params=jnp.array(50.0), y0=y0)


def _convolution() -> Problem:
    """A convolutional network of two layers."""
    keys = jr.split(jr.key(0))
    params = (
        jr.normal(keys[0], (3, 3, 8, 16)) / 8,
        jr.normal(keys[1], (3, 3, 16, 8)) / 12,
    )

    def field(t, y, params):
        for i, weight in enumerate(params):
            y = jax.lax.conv_general_dilated(
                jnp.tanh(y) if i > 0 else y,
                weight,
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return y

    return Problem(field, 1.0, params, jr.normal(jr.key(1), (8, 16, 16, 8)))


def _decay() -> Problem:
    """`y' = -rate * y`: `UReversible` is unstable here, and its solve fails."""
    field = lambda t, y, rate: -rate * y
    return Problem(field, 40.0, jnp.array(1.0), jnp.ones(10))


PROBLEMS = dict(
    mlp=_mlp,
    mlp_adaptive=_mlp_adaptive,
    pendulum=_pendulum,
    wave=_wave,
    van_der_pol=_van_der_pol,
    lorenz=_lorenz,
    heat=_heat,
    heat_large=_heat_large,
    convolution=_convolution,
    decay=_decay,
)


def make_loss(
    problem: Problem, solver: diffrax.AbstractSolver, num_steps: int
) -> Callable[[diffrax.AbstractAdjoint, tuple[PyTree[Array], Array]], Array]:
    dt0: float | None = problem.t1 / num_steps
    controller: diffrax.AbstractStepSizeController = diffrax.ConstantStepSize()
    saveat = diffrax.SaveAt(t1=True)
    if problem.tolerance is not None:
        dt0 = None
        controller = diffrax.PIDController(problem.tolerance, problem.tolerance)
        saveat = diffrax.SaveAt(ts=jnp.linspace(0, problem.t1, problem.num_saved))

    def loss(adjoint, params_and_y0):
        params, y0 = params_and_y0
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(problem.field),
            solver,
            t0=0.0,
            t1=problem.t1,
            dt0=dt0,
            y0=y0,
            args=params,
            saveat=saveat,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=num_steps,
            throw=False,
        )
        failed = sol.result != diffrax.RESULTS.successful
        assert sol.ys is not None
        return jnp.where(failed, jnp.nan, jnp.sum(sol.ys**2))

    return loss


def make_gradient(
    problem: Problem,
    solver: diffrax.AbstractSolver,
    adjoint: diffrax.AbstractAdjoint,
    num_steps: int,
) -> Callable[[PyTree[Array], Array], PyTree[Array]]:
    loss = make_loss(problem, solver, num_steps)
    return lambda params, y0: jax.grad(loss, argnums=1)(adjoint, (params, y0))


def count(problem: Problem, solver_name: str, num_steps: int) -> dict[str, float]:
    """What `ReversibleAdjoint` did with the steps, each divided by their number: how
    many were undone, and how many times they were made again."""
    adjoint = diffrax.ReversibleAdjoint()
    loss = make_loss(problem, SOLVERS[solver_name](), num_steps)

    @jax.jit
    def report_of(inputs):
        report = diffrax.reversal_report(loss, inputs, adjoint=adjoint)
        # There is a residual where a step starts from where going back has led.
        return jnp.sum(jnp.isfinite(report.residual)), jnp.sum(report.replays)

    undone, replays = report_of((problem.params, problem.y0))
    return dict(undone=int(undone) / num_steps, replays=int(replays) / num_steps)


def count_again(path: pathlib.Path) -> None:
    """Replaces the counts in the file, and keeps the rest of it."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["adjoint"] == OURS and row["error"] is not None:
            with jax.enable_x64(row["dtype"] == "float64"):
                problem = PROBLEMS[row["problem"]]()
                row.update(count(problem, row["solver"], row["steps"]))
            print(row["problem"], row["dtype"], row["solver"], row["steps"], end=": ")
            print(f"undone {row['undone']:.2f}, again {row['replays']:.2f}", flush=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def reference_gradient(
    problem: Problem, solver_name: str, num_steps: int
) -> np.ndarray:
    """The gradient of the same discrete solve, in float64, flattened."""
    with jax.enable_x64(True):
        solver, adjoint = SOLVERS[solver_name](), ADJOINTS[REFERENCE]()
        gradient = jax.jit(make_gradient(problem, solver, adjoint, num_steps))
        inputs = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64), (problem.params, problem.y0)
        )
        return np.asarray(ravel_pytree(gradient(*inputs))[0])


def relative_error(grad: PyTree[Array], true_grad: np.ndarray) -> float | None:
    """`None` if the solve failed, so that there is no gradient."""
    error = np.asarray(ravel_pytree(grad)[0]) - true_grad
    if not np.all(np.isfinite(error)) or np.all(true_grad == 0):
        return None
    return float(np.linalg.norm(error) / np.linalg.norm(true_grad))


def temp_bytes(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def measure(
    problem_name: str,
    solver_name: str,
    adjoint_names: list[str],
    num_steps: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """With `repeats=0`, runs nothing."""
    problem = PROBLEMS[problem_name]()
    inputs = (problem.params, problem.y0)
    methods = [(solver_name, adjoint_name) for adjoint_name in adjoint_names]
    if solver_name in STOCK:
        # What there is to be compared with: without being reversible.
        methods.insert(0, (STOCK[solver_name], REFERENCE))
    elif solver_name in COUPLED and OURS in adjoint_names:
        methods.append((COUPLED[solver_name], OURS))
    rows = []
    compiled = []
    for name, adjoint_name in methods:
        solver, adjoint = SOLVERS[name](), ADJOINTS[adjoint_name]()
        start = time.perf_counter()
        fn = jax.jit(make_gradient(problem, solver, adjoint, num_steps))
        fn = fn.lower(*inputs).compile()
        compile_time = time.perf_counter() - start
        compiled.append(fn)
        error, counts = None, {}
        if repeats > 0:
            true_grad = reference_gradient(problem, name, num_steps)
            error = relative_error(fn(*inputs), true_grad)
            if adjoint_name == OURS and error is not None:
                counts = count(problem, name, num_steps)
        rows.append(
            dict(
                problem=problem_name,
                solver=name,
                adjoint=adjoint_name,
                steps=num_steps,
                dtype=str(problem.y0.dtype),
                error=error,
                temp_bytes=temp_bytes(fn),
                compile_seconds=compile_time,
                **counts,
            )
        )
    if repeats == 0:
        return rows
    seconds: list[list[float]] = [[] for _ in compiled]
    for _ in range(repeats):
        for fn, times in zip(compiled, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(fn(*inputs))
            times.append(time.perf_counter() - start)
    first = float(np.median(seconds[0]))
    for row, times in zip(rows, seconds, strict=True):
        lower, median, upper = (float(np.quantile(times, q)) for q in (0.25, 0.5, 0.75))
        row.update(
            repeats=repeats,
            seconds_min=min(times),
            seconds_lower_quartile=lower,
            seconds_median=median,
            seconds_upper_quartile=upper,
            time_ratio=median / first,
        )
    return rows


def provenance() -> dict[str, Any]:
    """Where and with what this is measured."""
    here = pathlib.Path(__file__).parent
    git = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    packages = ("diffrax", "equinox", "jax", "jaxlib", "numpy")
    return dict(
        commit=commit or None,
        device=jax.devices()[0].device_kind,
        machine=platform.machine(),
        python=platform.python_version(),
        versions={name: importlib.metadata.version(name) for name in packages},
        date=time.strftime("%Y-%m-%d"),
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="mlp")
    parser.add_argument("--solver", choices=SOLVERS, default="Tsit5")
    adjoints = [REFERENCE, OURS]
    parser.add_argument("--adjoint", choices=ADJOINTS, nargs="+", default=adjoints)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--compile-only", action="store_true", help="no more than that")
    output = pathlib.Path(__file__).parent / "output" / "gradient.jsonl"
    parser.add_argument("--output", type=pathlib.Path, default=output)
    parser.add_argument("--count", type=pathlib.Path, help="a file of measurements")
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    if args.compile_only:
        args.repeats = 0
    if args.smoke:
        args.steps, args.repeats = [50, 100], 1
        args.problem, args.solver = "pendulum", "Heun"
        args.output = args.output.with_name("smoke.jsonl")
    return args


def print_row(row: dict[str, Any]) -> None:
    line = f"{row['solver']:19s} {row['adjoint']:27s} {row['steps']:7d} "
    line += f"{row['temp_bytes'] / 2**20:7.2f} MiB {row['compile_seconds']:6.1f} s"
    if "repeats" in row:
        error = "fails" if row["error"] is None else f"{row['error']:.1e}"
        line += f" {error:>9s} {1000 * row['seconds_median']:7.1f} ms"
        line += f" {row['time_ratio']:6.2f}"
    print(line, flush=True)


def main() -> None:
    args = parse_args()
    if args.count is not None:
        return count_again(args.count)
    jax.config.update("jax_enable_x64", args.float64)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{args.problem}, {'float64' if args.float64 else 'float32'}")
    print(
        f"{'solver':19s} {'adjoint':27s} {'steps':>7s} {'memory':>11s} "
        f"{'compile':>8s} {'error':>9s} {'time':>10s} {'ratio':>6s}"
    )
    for num_steps in args.steps:
        rows = measure(args.problem, args.solver, args.adjoint, num_steps, args.repeats)
        for row in rows:
            print_row(row)
        with args.output.open("a") as file:
            for row in rows:
                file.write(json.dumps(row | provenance()) + "\n")


if __name__ == "__main__":
    main()
