"""How near a gradient by `ReversibleAdjoint` comes to the least that it can cost.

    python benchmarks/ratios.py [--case NAME ...] [--repeats N] [--output FILE]
    python benchmarks/ratios.py --small-loops [--repeats N] [--output FILE]
    python benchmarks/ratios.py --table [--output FILE]

For each case, relative to `RecursiveCheckpointAdjoint()` on the same solver: the time
of a gradient, how long it takes to trace and compile, and its scratch memory. For
constant steps also relative to a loop that is written by hand (see `limit.py`): the
time, and the scratch memory of `ReversibleAdjoint(checkpoints=0)`, which like that loop
stores nothing; and the time of the solve alone, relative to that without any of this.

The goals are 0.9 for the time of the neural ODE in 32-bit precision and 1 for the
others, 1.15 relative to the loop (1.25 for `UReversible`), 1.05 for the solve alone,
0.7 for compiling and 1.2 for the scratch memory.

Times are medians over repetitions that take turns in one process, on a machine that
should have nothing else to do: about twenty minutes on 2 CPU cores. Appends one line of
JSON for each case to the output file. `--table` prints what is in that, if it is given,
or else what the documentation shows.

`--small-loops` measures the cases with states of a few numbers, with the option by
which XLA compiles loops over so little as a whole. It holds for all of a process, so
that these are in a run of their own.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import diffrax
import gradient
import jax
import limit
import numpy as np
from jax.flatten_util import ravel_pytree


@dataclasses.dataclass(frozen=True)
class Case:
    problem: str
    steps: int
    solver: str = "Tsit5"
    dtype: str = "float32"


CASES = {
    "neural ODE": Case("mlp", 1000),
    "neural ODE, float64": Case("mlp", 1000, dtype="float64"),
    "neural ODE, adaptive, 50 times": Case("mlp_adaptive", 2000),
    "Lorenz": Case("lorenz", 10000, dtype="float64"),
    "pendulum": Case("pendulum", 10000, dtype="float64"),
    "heat, 100,000 unknowns": Case("heat_large", 200),
    "convolution": Case("convolution", 50),
    "neural ODE, UReversible": Case("mlp", 1000, "UReversible(Tsit5)"),
    "neural ODE, ReversibleHeun": Case("mlp", 1000, "ReversibleHeun"),
    "neural ODE, Dopri8": Case("mlp", 1000, "Dopri8"),
}
SMALL = ("Lorenz", "pendulum")
# How many bytes the body of a loop may go through, for XLA to compile the whole loop as
# one function. By default it is 1024.
SMALL_LOOPS = (
    "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1000000"
)
LIMITS: dict[str, Callable[..., limit.Gradient]] = {
    "Tsit5": lambda *args: limit.numerical(diffrax.Tsit5(), *args),
    "Dopri8": lambda *args: limit.numerical(diffrax.Dopri8(), *args),
    "UReversible(Tsit5)": lambda *args: limit.coupled(diffrax.Tsit5(), *args),
    "ReversibleHeun": limit.reversible_heun,
}


def compile_(fn: Callable, inputs: tuple[Any, ...]) -> tuple[Any, dict[str, float]]:
    """The compiled function; how long that took, and its scratch memory."""
    jax.clear_caches()
    start = time.perf_counter()
    compiled = jax.jit(lambda *args: fn(*args)).lower(*inputs).compile()
    seconds = time.perf_counter() - start
    memory = gradient.temp_bytes(compiled)
    return compiled, dict(compile_seconds=seconds, temp_bytes=memory)


def functions(case: Case) -> dict[str, Callable]:
    """What is compared."""
    problem = gradient.PROBLEMS[case.problem]()
    solver = gradient.SOLVERS[case.solver]()
    stock = gradient.STOCK.get(case.solver, case.solver)
    make = gradient.make_gradient
    recursive = diffrax.RecursiveCheckpointAdjoint()
    ours = diffrax.ReversibleAdjoint()
    fns = dict(
        recursive=make(problem, gradient.SOLVERS[stock](), recursive, case.steps),
        ours=make(problem, solver, ours, case.steps),
    )
    if problem.tolerance is not None:
        return fns
    loss = gradient.make_loss(problem, solver, case.steps)
    uncertified = diffrax.ReversibleAdjoint(certificate="cheap")
    nothing_stored = diffrax.ReversibleAdjoint(0, certificate="cheap")
    limit_ = LIMITS[case.solver](problem.field, problem.t1, case.steps)
    return fns | dict(
        uncertified=make(problem, solver, uncertified, case.steps),
        nothing_stored=make(problem, solver, nothing_stored, case.steps),
        limit=limit_,
        solve=lambda *args: loss(ours, args),
        stock_solve=lambda *args: loss(recursive, args),
    )


def measure(name: str, repeats: int) -> dict[str, Any]:
    case = CASES[name]
    with jax.enable_x64(case.dtype == "float64"):
        problem = gradient.PROBLEMS[case.problem]()
        inputs = problem.params, problem.y0
        row: dict[str, Any] = dict(case=name, **dataclasses.asdict(case))
        compiled, seconds = {}, {}
        for kind, fn in functions(case).items():
            compiled[kind], row[kind] = compile_(fn, inputs)
            seconds[kind] = []
        value = np.asarray(ravel_pytree(compiled["recursive"](*inputs))[0])
        if case.solver not in gradient.STOCK:
            error = gradient.relative_error(compiled["ours"](*inputs), value)
            row["ours"]["difference"] = error
        # Once for all the pages of memory that are touched for the first time.
        for fn in compiled.values():
            jax.block_until_ready(fn(*inputs))
        for _ in range(repeats):
            for kind, fn in compiled.items():
                if kind == "nothing_stored":
                    continue
                start = time.perf_counter()
                jax.block_until_ready(fn(*inputs))
                seconds[kind].append(time.perf_counter() - start)
        for kind, times in seconds.items():
            if len(times) > 0:
                row[kind]["seconds"] = float(np.median(times))
                row[kind]["quartiles"] = [
                    float(np.quantile(times, q)) for q in (0.25, 0.75)
                ]
    return row | dict(repeats=repeats, **gradient.provenance())


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Those that the goals are about."""

    def ratio(what, of, to):
        if of not in row or to not in row:
            return float("nan")
        return row[of][what] / row[to][what]

    return {
        "time": ratio("seconds", "ours", "recursive"),
        "to the loop": ratio("seconds", "ours", "limit"),
        "uncertified": ratio("seconds", "uncertified", "limit"),
        "solve": ratio("seconds", "solve", "stock_solve"),
        "compiling": ratio("compile_seconds", "ours", "recursive"),
        "memory": ratio("temp_bytes", "ours", "recursive"),
        "storing nothing": ratio("temp_bytes", "nothing_stored", "limit"),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    for i, row in enumerate(rows):
        values = ratios(row)
        if i == 0:
            print(" " * 31 + " ".join(f"{name:>15s}" for name in values))
        line = " ".join(f"{value:15.2f}" for value in values.values())
        print(f"{row['case']:30s} {line}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", choices=CASES, nargs="+")
    parser.add_argument("--small-loops", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    name = "small_loops" if args.small_loops else "ratios"
    if args.smoke:
        args.case, args.repeats, name = ["pendulum"], 1, f"{name}-smoke"
    if args.case is None:
        args.case = SMALL if args.small_loops else list(CASES)
    if args.output is None:
        here = pathlib.Path(__file__).parent
        folder = here.parent / "docs" / "measured" if args.table else here / "output"
        args.output = folder / f"{name}.jsonl"
    return args


def main() -> None:
    args = parse_args()
    if args.small_loops:
        # XLA looks at it once, before it compiles anything.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} {SMALL_LOOPS}"
    if not args.table:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        for name in args.case:
            row = measure(name, args.repeats)
            print_table([row])
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
    lines = args.output.read_text().splitlines()
    print_table([json.loads(line) for line in lines])


if __name__ == "__main__":
    main()
