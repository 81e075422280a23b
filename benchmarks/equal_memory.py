"""How long a gradient takes in the same scratch memory, by `ReversibleAdjoint` and by
`RecursiveCheckpointAdjoint`.

    python benchmarks/equal_memory.py [--case NAME ...] [--repeats N] [--output FILE]

For each case of `ratios.py` with constant steps of `Tsit5`, and for 4 and 16 stored
states (16 is the default): the scratch memory of `ReversibleAdjoint(checkpoints=K)`;
with how many stored states `RecursiveCheckpointAdjoint` needs no more than that, the
most of these; and the ratio of the two times. Where the latter needs more with a single
state as well, it is given that.

The goal is a ratio of 0.5. Times are medians over repetitions that take turns in one
process, on a machine that should have nothing else to do: about ten minutes on 2 CPU
cores. Writes one line of JSON for each row.
"""

import argparse
import bisect
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import diffrax
import gradient
import jax
import numpy as np
import ratios


CASES = ("neural ODE", "Lorenz", "pendulum", "heat, 100,000 unknowns", "convolution")
STORED = (4, 16)
# How many states the other adjoint may store.
OTHERS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)


def measure(name: str, num_steps: int | None, repeats: int) -> Iterator[dict[str, Any]]:
    case = ratios.CASES[name]
    steps = case.steps if num_steps is None else num_steps
    with jax.enable_x64(case.dtype == "float64"):
        problem = gradient.PROBLEMS[case.problem]()
        inputs = problem.params, problem.y0

        def compile_(adjoint):
            solver = gradient.SOLVERS[case.solver]()
            fn = gradient.make_gradient(problem, solver, adjoint, steps)
            compiled, row = ratios.compile_(fn, inputs)
            return compiled, int(row["temp_bytes"])

        others: dict[int, Any] = {}

        def other(checkpoints):
            if checkpoints not in others:
                adjoint = diffrax.RecursiveCheckpointAdjoint(checkpoints=checkpoints)
                others[checkpoints] = compile_(adjoint)
            return others[checkpoints]

        for stored in STORED:
            ours, memory = compile_(diffrax.ReversibleAdjoint(checkpoints=stored))
            # How many of these need no more.
            candidates = [k for k in OTHERS if k < steps]
            count = bisect.bisect_right(candidates, memory, key=lambda k: other(k)[1])
            checkpoints = candidates[max(count - 1, 0)]
            theirs, their_memory = other(checkpoints)
            seconds: list[list[float]] = [[], []]
            for _ in range(repeats + 1):
                for fn, times in zip((ours, theirs), seconds):
                    start = time.perf_counter()
                    jax.block_until_ready(fn(*inputs))
                    times.append(time.perf_counter() - start)
            # Without the first time, which is for pages that were never touched.
            medians = [float(np.median(times[1:])) for times in seconds]
            yield dict(
                case=name,
                steps=steps,
                dtype=case.dtype,
                ours=dict(
                    checkpoints=stored, temp_bytes=memory, seconds_median=medians[0]
                ),
                recursive=dict(
                    checkpoints=checkpoints,
                    temp_bytes=their_memory,
                    seconds_median=medians[1],
                ),
                time_ratio=medians[0] / medians[1],
                repeats=repeats,
                **gradient.provenance(),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", choices=CASES, nargs="+", default=CASES)
    parser.add_argument("--repeats", type=int, default=10)
    output = pathlib.Path(__file__).parent / "output" / "equal_memory.jsonl"
    parser.add_argument("--output", type=pathlib.Path, default=output)
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    num_steps = None
    if args.smoke:
        args.case, args.repeats, num_steps = ["pendulum"], 1, 20
        args.output = output.with_name("equal_memory-smoke.jsonl")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.case:
        for row in measure(name, num_steps, args.repeats):
            ours, theirs = row["ours"], row["recursive"]
            print(
                f"{name:24s} {ours['checkpoints']:3d} {ours['temp_bytes']:10d} "
                f"{theirs['checkpoints']:3d} {theirs['temp_bytes']:10d} "
                f"{row['time_ratio']:6.2f}",
                flush=True,
            )
            rows.append(row)
    args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
