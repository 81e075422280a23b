"""What a gradient costs in Diffrax, in torchdiffeq, in torchsde and in JAX itself: its
error, its memory and its time.

    pip install -e '.[benchmarks,peers]'
    python benchmarks/peers.py [--problem NAME ...] [--output FILE]
    python benchmarks/peers.py --measured   # for the documentation, with the figures
    python benchmarks/peers.py --figures    # draws what has been measured before

The problems, in `_peers_problems.py`, are written once, and evaluated by JAX and by
PyTorch with the same weights: a neural ODE, Lorenz's equations (in float64), the heat
equation with one unknown for each point, written in two ways, and a neural SDE. Each
tool is used as its documentation shows; `torch.compile` is not used.

**Error.** Of an ODE: relative to the gradient of the exact solution, so that solvers
and tolerances can be compared. It is that of `Dopri8` and `RecursiveCheckpointAdjoint`
in float64 at a tolerance of 1e-11, or 1e-13 for Lorenz's equations; each row has how
far that is from the same at a tolerance ten times as large. Of an SDE: relative to the
gradient of the same discrete solve in float64 along the same path, by backpropagation.

**Memory.** By how much the resident memory of a process grows at most while it computes
the gradient a second time. Each row has a process of its own, whatever the tool. This
is known to some hundreds of kilobytes, and on Linux only. With JAX, also the scratch
memory of the compiled program, which is exact.

**Time.** Medians of runs that take turns in one process, with 2 threads for JAX and 2
for PyTorch. Those that take over a second run three times. As ratios to
`RecursiveCheckpointAdjoint()` in the same steps or at the same tolerance, with `Tsit5`,
or `ReversibleHeun` for the SDE. Compiling, which PyTorch does not do, is apart.

The expectation is that of all exact gradients, that of `ReversibleAdjoint` needs the
least memory in many steps, and takes the time of `RecursiveCheckpointAdjoint`. Some
cases are there because it loses on them:

- up to some hundreds of constant steps, of which there is nothing to be saved: there is
  room for 32 stored states, however few the steps are;
- the neural ODE, as it is here: smooth, and benign backward in time. Solving backward
  (`BacksolveAdjoint`, and `odeint` of JAX) has the same error there in less memory;
- three numbers of state: whatever is stored is nothing, `ForwardMode` needs the least,
  and compiling takes a thousand times as long as the gradient;
- the periodic heat equation, written with `roll`: XLA, on a CPU, makes a slow program
  of it, several times as slow as for the other adjoints, the stages of which are in a
  loop. Written with `pad`, the heat equation has no such effect;
- the SDE along a `VirtualBrownianTree`, the evaluation of which takes most of the time,
  with any adjoint. `UnsafeBrownianPath` is what helps.

Continuous adjoints (`BacksolveAdjoint`, `odeint` of JAX, `odeint_adjoint`) lose all
digits on the heat equation, and on Lorenz's equations in adaptive steps: solutions of
these cannot be computed backward in time. A row that has failed says why, and has no
error.

What is not installed is reported, and left out. Takes about half an hour on 2 CPU
cores. Appends one line of JSON for each row to the output file.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from _peers_problems import Method, Prepared, Problem, PROBLEMS, Work


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


HERE = pathlib.Path(__file__).parent
MEASURED = HERE.parent / "docs" / "measured"
NEEDED_BY = dict(torchdiffeq=["torch"], torchsde=["torch"])
MODULES = dict(
    diffrax="_peers_jax",
    jax="_peers_jax",
    torchdiffeq="_peers_torch",
    torchsde="_peers_torch",
)
TREE, UNSAFE = "VirtualBrownianTree", "UnsafeBrownianPath"


@dataclasses.dataclass(frozen=True)
class Case:
    """Of its methods, the first is what the times of the others are relative to."""

    problem: str
    size: int
    work: Work
    methods: list[Method]


def _diffrax(*adjoints: str, solver: str = "Tsit5", noise: str = "") -> list[Method]:
    return [Method("diffrax", solver, adjoint, noise) for adjoint in adjoints]


def _torchdiffeq(solver: str) -> list[Method]:
    gradients = "odeint", "odeint_adjoint"
    return [Method("torchdiffeq", solver, gradient) for gradient in gradients]


def _torchsde(solver: str, *gradients: str) -> list[Method]:
    noise = "BrownianInterval"
    return [Method("torchsde", solver, gradient, noise) for gradient in gradients]


RECURSIVE, OURS = "RecursiveCheckpointAdjoint", "ReversibleAdjoint"
FEW_STORED = f"{RECURSIVE}(checkpoints=8)", f"{RECURSIVE}(checkpoints=16)"
DIRECT, BACKSOLVE, FORWARD = "DirectAdjoint", "BacksolveAdjoint", "ForwardMode"
COUPLED = _diffrax(OURS, solver="UReversible(Tsit5)")
ODEINT = [Method("jax", "dopri5", "odeint")]
DOPRI5, RK4 = _torchdiffeq("dopri5"), _torchdiffeq("rk4")


def _neural_ode_cases() -> list[Case]:
    others = [*COUPLED, *ODEINT, *DOPRI5]
    adaptive = [*_diffrax(RECURSIVE, OURS, DIRECT, BACKSOLVE), *others]
    batches = [*_diffrax(RECURSIVE, OURS, BACKSOLVE), *ODEINT, *DOPRI5]
    adjoints = RECURSIVE, *FEW_STORED, OURS, DIRECT, BACKSOLVE
    constant = [*_diffrax(*adjoints), *COUPLED, *RK4]
    # PyTorch would need 15 gigabytes, or a minute for one gradient.
    many = _diffrax(RECURSIVE, FEW_STORED[1], OURS, BACKSOLVE)
    return [
        Case("neural_ode", 256, Work(tol=1e-3), adaptive),
        Case("neural_ode", 256, Work(tol=1e-5), adaptive),
        Case("neural_ode", 256, Work(steps=100), constant),
        Case("neural_ode", 256, Work(steps=1000), constant),
        Case("neural_ode", 256, Work(steps=10_000), many),
        Case("neural_ode", 16, Work(tol=1e-5), batches),
        Case("neural_ode", 2048, Work(tol=1e-5), batches),
    ]


def _lorenz_cases() -> list[Case]:
    exact = _diffrax(RECURSIVE, OURS, FORWARD)
    adaptive = [*exact, *_diffrax(BACKSOLVE), *ODEINT, *DOPRI5]
    constant = [*exact, *_diffrax(DIRECT, BACKSOLVE), *COUPLED, *RK4]
    # In so many steps, PyTorch would take minutes for one gradient.
    many = [*exact, *_diffrax(BACKSOLVE), *COUPLED]
    return [
        Case("lorenz", 3, Work(tol=1e-4), adaptive),
        Case("lorenz", 3, Work(tol=1e-8), adaptive),
        Case("lorenz", 3, Work(steps=1000), constant),
        Case("lorenz", 3, Work(steps=100_000), many),
    ]


def _heat_cases() -> list[Case]:
    ours = OURS, f"{OURS}(checkpoints=4)"
    adaptive = [*_diffrax(RECURSIVE, *ours, DIRECT, BACKSOLVE), *ODEINT, *DOPRI5]
    constant = [*_diffrax(RECURSIVE, *FEW_STORED, *ours, DIRECT), *COUPLED, *RK4]
    large = [*_diffrax(RECURSIVE, *ours), *RK4]
    periodic = [*_diffrax(RECURSIVE, *ours, DIRECT), *RK4]
    return [
        Case("heat", 64**2, Work(tol=1e-3), adaptive),
        Case("heat", 64**2, Work(tol=1e-5), adaptive),
        Case("heat", 64**2, Work(steps=1000), constant),
        Case("heat", 1024**2, Work(steps=64), large),
        Case("heat_periodic", 64**2, Work(steps=64), periodic),
    ]


def _neural_sde_cases() -> list[Case]:
    heun = "ReversibleHeun"
    methods = [
        *_diffrax(RECURSIVE, OURS, DIRECT, solver=heun, noise=TREE),
        *_diffrax(OURS, solver=heun, noise=UNSAFE),
        *_torchsde("reversible_heun", "sdeint", "sdeint_adjoint"),
        *_torchsde("midpoint", "sdeint_adjoint"),
    ]
    # Powers of two: so the times of the steps are the same in float32 and in float64.
    steps = 128, 1024
    return [Case("neural_sde", 128, Work(steps=n), methods) for n in steps]


CASES = [
    *_neural_ode_cases(),
    *_lorenz_cases(),
    *_heat_cases(),
    *_neural_sde_cases(),
]
SMOKE_CASES = [
    Case(
        "lorenz",
        3,
        Work(steps=50),
        [*_diffrax(RECURSIVE, OURS), *_torchdiffeq("rk4")],
    ),
]


def is_installed(tool: str) -> bool:
    names = [tool, *NEEDED_BY.get(tool, [])]
    return all(importlib.util.find_spec(name) is not None for name in names)


def limit_threads() -> int:
    """To be called before JAX or PyTorch computes anything. Returns how many there are
    for each: 2, or 1 if there is but one core."""
    if not hasattr(os, "sched_setaffinity"):
        threads = min(2, os.cpu_count() or 1)
    else:
        # JAX has as many threads as this process has cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        threads = len(os.sched_getaffinity(0))
    if is_installed("torch"):
        importlib.import_module("torch").set_num_threads(threads)
    return threads


def in_precision_of(problem: Problem) -> contextlib.AbstractContextManager[Any]:
    return importlib.import_module("jax").enable_x64(problem.dtype == "float64")


def prepare(problem: Problem, method: Method, work: Work) -> Prepared:
    return importlib.import_module(MODULES[method.tool]).prepare(problem, method, work)


def gradient_in_float64(problem: Problem, method: Method, work: Work) -> np.ndarray:
    problem = problem.astype("float64")
    with in_precision_of(problem):
        prepared = prepare(problem, method, work)
        return prepared.flatten(prepared.run())


def relative_error(gradient: np.ndarray, true_gradient: np.ndarray) -> float:
    error = gradient.astype("float64") - true_gradient
    return float(np.linalg.norm(error) / np.linalg.norm(true_gradient))


class References:
    """What to compare gradients with, each computed once."""

    def __init__(self):
        self._known: dict[Any, tuple[np.ndarray, float | None]] = {}

    def get(self, case: Case, method: Method) -> tuple[np.ndarray, float | None]:
        """The gradient, and about how far it is from the true one, if it is not by
        definition that."""
        if method.noise:
            key = case.problem, case.size, case.work, method.tool, method.noise
            key += (method.solver,)
        else:
            key = case.problem, case.size
        if key not in self._known:
            compute = self._of_same_solve if method.noise else self._converged
            self._known[key] = compute(case, method)
        return self._known[key]

    def _of_same_solve(self, case: Case, method: Method) -> tuple[np.ndarray, None]:
        stored = "sdeint" if method.tool == "torchsde" else RECURSIVE
        method = dataclasses.replace(method, gradient=stored)
        problem = PROBLEMS[case.problem](case.size)
        return gradient_in_float64(problem, method, case.work), None

    def _converged(self, case: Case, method: Method) -> tuple[np.ndarray, float]:
        del method
        problem = PROBLEMS[case.problem](case.size)
        tol = 1e-13 if case.problem == "lorenz" else 1e-11
        method = Method("diffrax", "Dopri8", RECURSIVE)
        best = gradient_in_float64(problem, method, Work(tol=tol))
        second = gradient_in_float64(problem, method, Work(tol=10 * tol))
        return best, relative_error(second, best)


def _peak_resident_bytes() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def peak_increase(run: Callable[[], Any]) -> int | None:
    """By how many bytes the resident memory of this process grows at most."""
    if not sys.platform.startswith("linux"):
        return None
    run()
    # What has been freed is given back, and the peak is that of what comes now.
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _peak_resident_bytes()
    run()
    return _peak_resident_bytes() - before


def print_memory(spec: str) -> None:
    """What the process for a single row does."""
    row = json.loads(spec)
    problem = PROBLEMS[row["problem"]](row["size"])
    limit_threads()
    with in_precision_of(problem):
        prepared = prepare(problem, Method(**row["method"]), Work(**row["work"]))
        print(json.dumps(peak_increase(prepared.run)))


def measure_memory(case: Case, method: Method) -> int | None:
    spec = dict(
        problem=case.problem,
        size=case.size,
        work=dataclasses.asdict(case.work),
        method=dataclasses.asdict(method),
    )
    command = [sys.executable, __file__, "--memory-of", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True)
    # It may be that the solve fails with an error, which the row will tell.
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def try_row(
    case: Case, method: Method, references: References
) -> tuple[dict[str, Any], Callable[[], Any] | None]:
    """Without times; and what is to be timed, unless it raises an error."""
    problem = PROBLEMS[case.problem](case.size)
    row: dict[str, Any] = dict(
        problem=case.problem,
        unknowns=problem.y0.size,
        batch=None if problem.y0.size == case.size else case.size,
        dtype=problem.dtype,
        **dataclasses.asdict(case.work),
        **dataclasses.asdict(method),
        error=None,
    )
    true_gradient, row["reference_error"] = references.get(case, method)
    with in_precision_of(problem):
        prepared = prepare(problem, method, case.work)
        row.update(prepared.details)
        try:
            gradient = prepared.flatten(prepared.run())
        except AssertionError as e:  # By torchdiffeq, of what is not finite, say.
            row["failed"] = str(e).split(":")[0]
            return row, None
    error = relative_error(gradient, true_gradient)
    if not np.isfinite(error):
        row["failed"] = "not finite"
    elif error >= 1:
        row["failed"] = "no digit is right"
    else:
        row["error"] = error
    return row, prepared.run


def time_in_turns(
    runs: list[Callable[[], Any] | None], repeats: int
) -> list[list[float]]:
    """The slow ones are run less often."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, times in zip(runs, seconds, strict=True):
            if run is None or (len(times) >= 3 and np.median(times) > 1):
                continue
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return seconds


def measure(case: Case, references: References, repeats: int) -> list[dict[str, Any]]:
    # Two at a time, while nothing is timed.
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        memory = [*executor.map(lambda m: measure_memory(case, m), case.methods)]
    rows, runs = [], []
    for method, peak in zip(case.methods, memory, strict=True):
        row, run = try_row(case, method, references)
        rows.append(row | dict(peak_bytes=peak))
        runs.append(run)
    problem = PROBLEMS[case.problem](case.size)
    with in_precision_of(problem):
        seconds = time_in_turns(runs, repeats)
    first = float(np.median(seconds[0]))
    for row, times in zip(rows, seconds, strict=True):
        if times:
            lower, median, upper = (
                float(np.quantile(times, q)) for q in (0.25, 0.5, 0.75)
            )
            row.update(
                repeats=len(times),
                seconds_lower_quartile=lower,
                seconds_median=median,
                seconds_upper_quartile=upper,
                time_ratio=median / first,
            )
    return rows


def get_provenance(threads: int) -> dict[str, Any]:
    """Where and with what this is measured."""
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    packages = ["diffrax", "equinox", "jax", "jaxlib", "numpy"]
    packages += filter(is_installed, ["torch", "torchdiffeq", "torchsde"])
    return dict(
        commit=commit or None,
        device=importlib.import_module("jax").devices()[0].device_kind,
        machine=platform.machine(),
        threads=threads,
        python=platform.python_version(),
        versions={name: importlib.metadata.version(name) for name in packages},
        date=time.strftime("%Y-%m-%d"),
    )


def print_row(row: dict[str, Any]) -> None:
    work = f"{row['steps']:,} steps" if row["tol"] is None else f"{row['tol']:.0e}"
    name = f"{row['tool']}, {row['solver']}, {row['gradient']} {row['noise']}"
    line = f"{row['problem']:10s} {row['unknowns']:7d} {work:>13s} {name:75s}"
    peak = row["peak_bytes"]
    line += "         -    " if peak is None else f"{peak / 2**20:9.1f} MiB"
    if "repeats" in row:
        line += f" {1000 * row['seconds_median']:8.1f} ms {row['time_ratio']:6.2f}"
    error = row["error"]
    print(line, row["failed"] if error is None else f"{error:.1e}", flush=True)


def measure_all(cases: list[Case], repeats: int, output: pathlib.Path) -> None:
    tools = dict.fromkeys(method.tool for case in cases for method in case.methods)
    for tool in tools:
        if not is_installed(tool):
            print(f"{tool}: not installed, its rows are left out")
    cases = [
        dataclasses.replace(
            case,
            methods=[method for method in case.methods if is_installed(method.tool)],
        )
        for case in cases
    ]
    provenance = get_provenance(limit_threads())
    references = References()
    output.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        rows = measure(case, references, repeats)
        with output.open("a") as file:
            for row in rows:
                print_row(row)
                file.write(json.dumps(row | provenance) + "\n")


LABELS = dict(
    neural_ode="Neural ODE, a batch of 256",
    lorenz="Lorenz's equations, float64",
    heat="Heat equation, 4,096 unknowns",
    neural_sde="Neural SDE, a batch of 128",
)
# By tool, adjoint, and whether the solver is `UReversible`, or the path is "unsafe".
STYLES: dict[tuple[str, str, bool], tuple[str, str, str]] = {
    ("diffrax", OURS, False): ("ReversibleAdjoint", "tab:blue", "o"),
    ("diffrax", OURS, True): (
        "ReversibleAdjoint, with UReversible or an unsafe path",
        "tab:green",
        "d",
    ),
    ("diffrax", RECURSIVE, False): (RECURSIVE, "tab:orange", "s"),
    ("diffrax", DIRECT, False): (DIRECT, "tab:red", "^"),
    ("diffrax", BACKSOLVE, False): (BACKSOLVE, "tab:gray", "v"),
    ("diffrax", FORWARD, False): (FORWARD, "tab:olive", "P"),
    ("jax", "odeint", False): ("jax: odeint", "black", "X"),
    ("torchdiffeq", "odeint", False): ("torchdiffeq: odeint", "tab:purple", "<"),
    ("torchdiffeq", "odeint_adjoint", False): (
        "torchdiffeq: odeint_adjoint",
        "tab:pink",
        ">",
    ),
    ("torchsde", "sdeint", False): ("torchsde: sdeint", "tab:brown", "<"),
    ("torchsde", "sdeint_adjoint", False): (
        "torchsde: sdeint_adjoint",
        "tab:cyan",
        ">",
    ),
}


def _style(row: dict[str, Any]) -> tuple[str, str, bool]:
    special = row["solver"].startswith("UReversible") or row["noise"] == UNSAFE
    gradient, _, _ = row["gradient"].partition("(checkpoints=")
    return row["tool"], gradient, special


def _plot_problem(
    ax: Any, rows: list[dict[str, Any]], x_of: Callable[[dict[str, Any]], float]
) -> dict[str, Any]:
    """Returns what is in the legend."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    handles = {}
    for style, (label, color, marker) in STYLES.items():
        points = [(x_of(row), row["error"]) for row in rows if _style(row) == style]
        if points:
            (handles[label],) = ax.plot(
                *zip(*points),
                linestyle="none",
                color=color,
                marker=marker,
                markersize=8,
                markerfacecolor=color if label == OURS else "none",
                markeredgewidth=1.6,
            )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(matplotlib.ticker.LogLocator(numticks=6))
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    # At least two decades, of which the labels then are.
    lower, upper = ax.get_xlim()
    ax.set_xlim(min(lower, upper / 100), 1.3 * upper)
    lower, upper = ax.get_ylim()
    ax.set_ylim(min(lower, upper / 100), 1.3 * upper)
    ax.tick_params(labelsize=11)
    ax.grid(alpha=0.3)
    return handles


def plot(rows: list[dict[str, Any]], memory: bool, path: pathlib.Path) -> None:
    """Error over memory, or over time, of all rows that have an error, at the size that
    a problem has first."""
    fig, axes = plt.subplots(2, 2, figsize=(9.5, 9.5), layout="constrained")
    handles = {}
    for ax, (problem, title) in zip(axes.flat, LABELS.items(), strict=True):
        # That is what the rows of a problem start with.
        of = [row for row in rows if row["problem"] == problem]
        size = of[0]["unknowns"] if of else 0
        first = of[0].get("seconds_median", 1.0) if of else 1.0
        of = [r for r in of if r["unknowns"] == size and r["error"] is not None]
        if memory:
            # 2**-4 MiB is what can be told from nothing.
            x_of = lambda row: max(row["peak_bytes"] / 2**20, 2**-4)
            of = [row for row in of if row["peak_bytes"] is not None]
        else:
            x_of = lambda row, first=first: row["seconds_median"] / first
            of = [row for row in of if "seconds_median" in row]
        handles |= _plot_problem(ax, of, x_of)
        ax.set_title(title, fontsize=12)
        ax.set_ylabel("relative error of the gradient", fontsize=11)
        ax.set_xlabel("memory (MiB)" if memory else "time", fontsize=11)
    fig.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=2,
        fontsize=10.5,
    )
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw(measured: pathlib.Path, folder: pathlib.Path) -> None:
    rows = [json.loads(line) for line in measured.read_text().splitlines()]
    plot(rows, False, folder / "peers-time.png")
    plot(rows, True, folder / "peers-memory.png")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--problem", choices=PROBLEMS, nargs="+", default=[*PROBLEMS])
    parser.add_argument("--repeats", type=int, default=7)
    output = HERE / "output" / "peers.jsonl"
    parser.add_argument("--output", type=pathlib.Path, default=output)
    parser.add_argument("--measured", action="store_true", help="for the documentation")
    parser.add_argument("--figures", action="store_true", help="measure nothing")
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.memory_of is not None:
        return print_memory(args.memory_of)
    measured = MEASURED / "peers.jsonl"
    if args.figures:
        return draw(measured, MEASURED)
    cases, repeats, output = CASES, args.repeats, args.output
    if args.smoke:
        cases, repeats = SMOKE_CASES, 1
        output = HERE / "output" / "peers-smoke.jsonl"
    if args.smoke or args.measured:
        # The rows are appended; here they replace what there was.
        new = HERE / "output" / "peers-new.jsonl"
        new.unlink(missing_ok=True)
    else:
        new = output
    cases = [case for case in cases if case.problem in args.problem]
    measure_all(cases, repeats, new)
    if args.measured:
        shutil.move(new, measured)
        draw(measured, MEASURED)
    elif args.smoke:
        shutil.move(new, output)
        draw(output, output.parent)


if __name__ == "__main__":
    main()
