"""How often the vector field is evaluated for a gradient, and how many states are worth
storing.

    python benchmarks/evaluations.py [--problem NAME ...] [--checkpoints K ...]
        [--steps N] [--float32] [--output FILE]
    python benchmarks/evaluations.py --replays

Counts the evaluations of the vector field for each step of `Tsit5`, forward and
backward: those by themselves, those as part of being linearised, and the transposed
ones. For `ReversibleAdjoint(checkpoints=K)`, and for `RecursiveCheckpointAdjoint` with
the same number of stored states, which is the ratio. The problems are those of
`certificate.py`, from one that is easy to go back over to those for which it is
hopeless.

Forward it is 6 evaluations a step, and 6 more and 6 transposed ones for its derivative,
for each of the two. To that adds, for `RecursiveCheckpointAdjoint`, making steps again:
6 for each, and once or several times for every step. For `ReversibleAdjoint`, it is 5
for undoing the step, 2 for the certificate, 12 for each correction, and 6 for each step
that is made again. The expectation is that the ratio is never over 1.5, and that it is
less than 1 as a rule.

With `--replays`, counts instead how often each step is made again if no step can be
undone, by the number of steps and of stored states. The equation does not matter: it is
`y' = -y`, by `Kvaerno3`.

These are counts, exact on any machine. Takes about ten minutes on 2 CPU cores, and two
with `--replays`.
"""

import argparse
import io
import json
import pathlib
from collections.abc import Callable
from typing import Any, IO

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from certificate import make_problems, Problem


def _counted(field: Any, counts: list[list[None]]) -> Any:
    """The vector field, which counts how often it is evaluated by itself, linearised,
    and transposed."""

    def count(i):
        # Several threads may do this at a time, for which appending is safe.
        counts[i].append(None)

    @jax.custom_vjp
    def counted(t, y, params):
        jax.debug.callback(count, 0)
        return field(t, y, params)

    def forward(t, y, params):
        jax.debug.callback(count, 1)
        return jax.vjp(field, t, y, params)

    def backward(pull_back, grad):
        jax.debug.callback(count, 2)
        return pull_back(grad)

    counted.defvjp(forward, backward)
    return counted


def count_calls(field: Any, run: Callable[[Any], Any]) -> tuple[int, int, int]:
    """How often the vector field is evaluated by itself, linearised, and transposed, by
    `run(counted)`, with `counted` to be used in its place."""
    counts: list[list[None]] = [[], [], []]
    jax.block_until_ready(run(_counted(field, counts)))
    jax.effects_barrier()
    primal, linearised, transposed = map(len, counts)
    return primal, linearised, transposed


def evaluations_per_step(
    problem: Problem, adjoint: diffrax.AbstractAdjoint, num_steps: int
) -> float:
    def loss(field, y0__params):
        y0, params = y0__params
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            t0=0.0,
            t1=problem.t1,
            dt0=problem.t1 / num_steps,
            y0=y0,
            args=params,
            adjoint=adjoint,
            max_steps=num_steps,
        )
        return sum(jnp.sum(y**2) for y in jtu.tree_leaves(sol.ys))

    inputs = problem.y0, problem.params
    counts = count_calls(
        problem.field,
        lambda field: jax.jit(jax.grad(lambda x: loss(field, x)))(inputs),
    )
    return sum(counts) / num_steps


def count_evaluations(args: argparse.Namespace, file: IO[str]) -> None:
    print(f"{'problem':16s} {'steps':>6s} {'K':>4s} {'reversible':>11s}", end=" ")
    print(f"{'recursive':>10s} {'ratio':>6s}")
    for name in args.problem:
        for checkpoints in args.checkpoints:
            ours, theirs = (
                evaluations_per_step(make_problems()[name], adjoint, args.steps)
                for adjoint in (
                    diffrax.ReversibleAdjoint(checkpoints),
                    diffrax.RecursiveCheckpointAdjoint(checkpoints),
                )
            )
            row = dict(
                problem=name,
                steps=args.steps,
                dtype="float32" if args.float32 else "float64",
                checkpoints=checkpoints,
                reversible=ours,
                recursive=theirs,
                ratio=ours / theirs,
            )
            file.write(json.dumps(row) + "\n")
            print(f"{name:16s} {args.steps:6d} {checkpoints:4d} {ours:11.1f}", end=" ")
            print(f"{theirs:10.1f} {ours / theirs:6.2f}", flush=True)
            jax.clear_caches()


def replays_per_step(checkpoints: int, num_steps: int) -> float:
    root_finder = diffrax.VeryChord(rtol=1e-8, atol=1e-8, norm=optx.max_norm)

    def loss(adjoint, y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.Kvaerno3(root_finder=root_finder),
            t0=0.0,
            t1=1.0,
            dt0=1 / num_steps,
            y0=y0,
            adjoint=adjoint,
            max_steps=num_steps,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys)

    @jax.jit
    def count(y0):
        adjoint = diffrax.ReversibleAdjoint(checkpoints)
        report = diffrax.reversal_report(loss, y0, adjoint=adjoint)
        return report.num_steps, jnp.sum(report.replays)

    made, replays = count(jnp.array(1.0))
    assert made == num_steps
    return int(replays) / num_steps


def count_replays(file: IO[str], smoke: bool) -> None:
    print(f"{'K':>4s} {'steps':>8s} {'replays':>8s}")
    for checkpoints in (16,) if smoke else (16, 32, 64):
        for num_steps in (100,) if smoke else (100, 1000, 10_000, 100_000):
            replays = replays_per_step(checkpoints, num_steps)
            row = dict(checkpoints=checkpoints, steps=num_steps, replays=replays)
            file.write(json.dumps(row) + "\n")
            print(f"{checkpoints:4d} {num_steps:8d} {replays:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--problem",
        nargs="+",
        choices=make_problems(),
        default=[
            "neural_ode",
            "decay",
            "oscillator",
            "fitzhugh_nagumo",
            "van_der_pol",
            "lorenz",
            "heat",
        ],
    )
    parser.add_argument(
        "--checkpoints", type=int, nargs="+", default=[4, 8, 16, 32, 64]
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--replays", action="store_true", help="count these instead")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    name = "replays" if args.replays else "evaluations"
    if args.smoke:
        args.problem, args.checkpoints, args.steps = ["decay"], [4], 20
        name += "-smoke"
    if args.output is None:
        args.output = pathlib.Path(__file__).parent / "output" / f"{name}.jsonl"
    jax.config.update("jax_enable_x64", not args.float32)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w") as file:
        if args.replays:
            count_replays(file, args.smoke)
        else:
            count_evaluations(args, file)
    if args.smoke and not args.replays:
        count_replays(io.StringIO(), smoke=True)


if __name__ == "__main__":
    main()
