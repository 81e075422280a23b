"""The experiments of McCallum and Foster 2024 (arXiv 2410.11648), reproduced.

    python benchmarks/papers/mccallum_foster.py [--part NAME ...] [--data FILE]
    python benchmarks/papers/mccallum_foster.py --measured --part time complexity
    python benchmarks/papers/mccallum_foster.py --measured [--full]
    python benchmarks/papers/mccallum_foster.py --figures  # of what was measured before

They train small networks in the place of a vector field, with their method
(`UReversible(solver, 0.999)` here) and with recursive checkpointing, and compare how
long that takes, and the loss that is reached. Here the same solver by itself, undone
numerically, is compared as well. In parts:

- `time`: how long a step of training takes, with each of their numbers of checkpoints,
  relative to `UReversible`; and the scratch memory of it. Those that are compared take
  turns, and each goes on with its own training; where steps are adaptive, after 1000
  steps of training that are not timed, as their number grows until then. With "nothing
  stored", no state is stored aside and nothing is certified, as in the paper.
- `loss`: the best loss of a training.
- `complexity`: how long a gradient takes, by the number of solver steps.
- `convergence`: the error of solutions, by the step size.
- `stability`: how large steps may be on `y' = a y`, for several coupling parameters,
  from the Jacobian of a real step; and next to it what the closed form says.

Their `Simple` solvers, whose stages are written out, are what checkpoints are taken
with here as well: `Unrolled` is quicker than Diffrax's own solvers.

The coupled oscillators and the double pendulum were recorded in a laboratory. Here they
are simulated with noise, unless `--data FILE` is given together with `--experiment`: a
file of the original format, with columns `trial t x1 x2 v1 v2`.

The expectation is that `UReversible` takes the least time at least memory, but is not
as quick against checkpoints as was published: there, a step of training took a tenth
of a second, which was mostly overhead. Times mean something on a machine that has
nothing else to do: the second command above is the one for that, about a quarter of an
hour on 2 CPU cores. The losses of `--measured` take about as long; with `--full`, which
is as many training steps and seeds as were published, some hours.
"""

import argparse
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from _common import make_parser, Paper, Row, run
from _mccallum_systems import (
    coupled_oscillators,
    double_pendulum,
    Experiment,
    white_dwarf,
)
from _mccallum_theory import (
    draw_convergence,
    draw_stability,
    measure_convergence,
    measure_stability,
)
from _mccallum_training import (
    BY_CONSTANT_STEPS,
    Method,
    REVERSIBLE,
    STORED,
    time_training,
    train,
    UNCERTIFIED,
    unrolled,
)
from matplotlib.figure import Figure


def _experiments(args: argparse.Namespace) -> Iterator[tuple[str, Experiment]]:
    """With each of their solvers."""
    smoke = args.size == "smoke"
    text = None if args.data is None else args.data.read_text()
    points = dict(num_points=20) if smoke else {}
    if "white-dwarf" in args.experiment:
        for base in ("Midpoint",) if smoke else BY_CONSTANT_STEPS:
            yield base, white_dwarf(unrolled(base), 20 if smoke else 1000)
    if "oscillators" in args.experiment:
        for base in ("Euler",) if smoke else BY_CONSTANT_STEPS:
            yield base, coupled_oscillators(text, **points)
    if "pendulum" in args.experiment:
        yield "Bosh3", double_pendulum(text, **points)


def measure_time(args: argparse.Namespace) -> Iterator[Row]:
    turns = dict(smoke=1, reduced=20, full=200)[args.size]
    for base, experiment in _experiments(args):
        stored = [Method(STORED, n) for n in experiment.checkpoints]
        methods = [*REVERSIBLE, *UNCERTIFIED, *stored]
        if args.size == "smoke":
            if experiment.name != "white dwarf":
                continue  # They are trained by the next part.
            methods = [REVERSIBLE[0], stored[-1]]
        # What is not trained yet takes few of the adaptive steps.
        untimed = 1000 if experiment.adaptive else 1
        yield from time_training(experiment, base, methods, turns, untimed)
        jax.clear_caches()


def measure_loss(args: argparse.Namespace) -> Iterator[Row]:
    for base, experiment in _experiments(args):
        methods = [*REVERSIBLE, Method(STORED, experiment.checkpoints[-1])]
        num_steps = experiment.training_steps
        seeds = 5 if experiment.adaptive else 3
        if args.size == "smoke":
            if experiment.name == "white dwarf":
                continue
            methods, num_steps, seeds = [REVERSIBLE[1]], 2, 1
        elif args.size == "reduced":
            num_steps, seeds = min(num_steps, 2000), 3
        for method in methods:
            yield from train(experiment, base, method, num_steps, seeds)
        jax.clear_caches()


def _make_gradient(method: Method, max_steps: int) -> Any:
    """For `y' = network(y)` and a number of steps, compiled once for all numbers."""
    network = eqx.nn.MLP(1, 1, 10, 1, jnp.tanh, key=jr.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    solver, adjoint = method.make("Midpoint")

    def loss(params, num_steps):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: eqx.combine(args, static)(y)),
            solver,
            t0=0.0,
            t1=0.01 * num_steps,
            dt0=0.01,
            y0=jnp.array([1.0]),
            args=params,
            adjoint=adjoint,
            max_steps=max_steps,
            throw=False,
        )
        assert sol.ys is not None
        return jnp.sum(sol.ys)

    gradient = jax.jit(jax.grad(loss))
    return lambda n: jax.block_until_ready(gradient(params, float(n)))


def measure_complexity(args: argparse.Namespace) -> Iterator[Row]:
    numbers, repeats = [100, 200, 500, 1000, 2000, 5000, 10_000], 10
    if args.size == "smoke":
        numbers, repeats = [20, 40], 1
    methods = [*REVERSIBLE, *UNCERTIFIED, *(Method(STORED, n) for n in (2, 4, 8, 44))]
    if args.size == "smoke":
        methods = [REVERSIBLE[0], methods[-1]]
    # Checkpoints do not depend on `max_steps` if their number is given.
    gradients = [_make_gradient(method, max(numbers)) for method in methods]
    for n in numbers:
        seconds: list[list[float]] = [[] for _ in methods]
        # Two checkpoints take half a minute at 2000 steps.
        of = [m.checkpoints is None or n <= 500 * m.checkpoints for m in methods]
        for i in range(repeats + 1):
            for gradient, times, is_measured in zip(gradients, seconds, of):
                slow = len(times) >= 3 and np.median(times) > 0.5
                if not is_measured or slow:
                    continue
                start = time.perf_counter()
                gradient(n)
                if i > 0:
                    times.append(time.perf_counter() - start)
        for method, times in zip(methods, seconds):
            if times:
                yield dict(
                    method=method.name,
                    checkpoints=method.checkpoints,
                    steps=n,
                    repeats=len(times),
                    seconds_median=float(np.median(times)),
                    time_ratio=float(np.median(times) / np.median(seconds[0])),
                )


def _label(row: Row) -> str:
    if row["checkpoints"] is not None:
        return f"{row['checkpoints']} checkpoints"
    return row["method"].replace("numerical", "Midpoint, undone numerically")


def draw_complexity(rows: list[Row]) -> Figure:
    fig, ax = plt.subplots(figsize=(7, 4.6))
    markers = iter("odPXs^v<")
    for label in dict.fromkeys(map(_label, rows)):
        of = [row for row in rows if _label(row) == label]
        points = zip(*((row["steps"], row["seconds_median"]) for row in of))
        line = "--" if "checkpoints" in label else "-"
        ax.loglog(*points, line, marker=next(markers), label=label)
    ax.set_xlabel("number of solver steps")
    ax.set_ylabel("time of a gradient (s)")
    ax.grid(alpha=0.3)
    fig.legend(loc="outside upper center", ncols=2)
    return fig


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = dict(
    time=measure_time,
    loss=measure_loss,
    complexity=measure_complexity,
    convergence=measure_convergence,
    stability=measure_stability,
)
PAPER = Paper(
    "mccallum-foster",
    __doc__ or "",
    PARTS,
    dict(
        complexity=("complexity", draw_complexity),
        convergence=("convergence", draw_convergence),
        stability=("stability", draw_stability),
    ),
    packages=("optax",),
)


def main() -> None:
    parser = make_parser(PAPER)
    names = ["white-dwarf", "oscillators", "pendulum"]
    parser.add_argument("--experiment", choices=names, nargs="+", default=names)
    parser.add_argument("--data", type=pathlib.Path, help="a recording")
    args = parser.parse_args()
    if args.data is not None and args.experiment not in (["oscillators"], ["pendulum"]):
        parser.error("`--data FILE` needs `--experiment oscillators` or `pendulum`")
    run(PAPER, args)


if __name__ == "__main__":
    main()
