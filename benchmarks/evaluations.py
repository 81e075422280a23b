"""How often the vector field is evaluated for a gradient, and how many states are worth
storing.

    python benchmarks/evaluations.py [--problem NAME ...] [--checkpoints K ...]
        [--steps N] [--float32] [--output FILE]

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

These are counts, exact on any machine. Takes about ten minutes on 2 CPU cores.
"""

import argparse
import json
import pathlib
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
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


def evaluations_per_step(
    problem: Problem, adjoint: diffrax.AbstractAdjoint, num_steps: int
) -> float:
    counts: list[list[None]] = [[], [], []]
    terms = diffrax.ODETerm(_counted(problem.field, counts))

    @jax.jit
    @jax.grad
    def grad(y0__params):
        y0, params = y0__params
        sol = diffrax.diffeqsolve(
            terms,
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

    jax.block_until_ready(grad((problem.y0, problem.params)))
    jax.effects_barrier()
    return sum(map(len, counts)) / num_steps


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
    path = pathlib.Path(__file__).parent / "output" / "evaluations.jsonl"
    parser.add_argument("--output", type=pathlib.Path, default=path)
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    if args.smoke:
        args.problem, args.checkpoints, args.steps = ["decay"], [4], 20
        args.output = args.output.with_name("evaluations-smoke.jsonl")
    jax.config.update("jax_enable_x64", not args.float32)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'problem':16s} {'steps':>6s} {'K':>4s} {'reversible':>11s}", end=" ")
    print(f"{'recursive':>10s} {'ratio':>6s}")
    with args.output.open("w") as file:
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
                print(
                    f"{name:16s} {args.steps:6d} {checkpoints:4d} {ours:11.1f}", end=" "
                )
                print(f"{theirs:10.1f} {ours / theirs:6.2f}", flush=True)
                jax.clear_caches()


if __name__ == "__main__":
    main()
