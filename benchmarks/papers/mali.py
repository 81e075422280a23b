"""The toy problem of MALI, the asynchronous leapfrog method with its steps undone,
after Zhuang, Dvornek, Tatikonda and Duncan 2021 (arXiv 2102.04668).

    python benchmarks/papers/mali.py [--smoke | --measured]
    python benchmarks/papers/mali.py --figures   # draws what was measured before

`y' = a y`, with `L = y(T)^2` to be differentiated with respect to `y(0)` and `a`. The
true gradients are known: `2 y(0) exp(2 a T)` and `2 T y(0)^2 exp(2 a T)`. In parts:

- `error`: the relative error of the worse one against the length of the solve, in
  adaptive steps at `rtol=1e-5, atol=1e-6`. Compared are those of the paper: the adjoint
  equation, solved backward in time ("adjoint"); backpropagation ("naive"); both with
  `Dopri5`; and MALI, as it is and damped (`eta=0.9`). And `Dopri5` with its steps
  undone by `ReversibleAdjoint`. Each row also has the error against the exact gradient
  of the same discrete solve: that is what going back is responsible for, and the rest
  is that of the solve.
- `memory`: scratch memory of the compiled gradient against the number of steps, for a
  state of 1000 numbers, in constant steps.

For `a < 0` the solution has to be found backward in time by the adjoint equation from
where it has all but vanished; for `a > 0` it is benign backward in time. The
expectation is that the error of the adjoint equation grows with the length for `a < 0`,
and those of all others do not, but for the error of the solve. And that the
asynchronous leapfrog method, which is stable for no `a < 0` unless it is damped, takes
very many steps there: a solve that takes more than 4096 has failed, and no error.

In float64, exact up to rounding on any machine. Takes about three minutes on 2 CPU
cores.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from _common import make_parser, Paper, Row, run
from matplotlib.figure import Figure


RTOL, ATOL = 1e-5, 1e-6
MAX_STEPS = 4096
# By the names of the paper; and ours.
METHODS: dict[str, tuple[diffrax.AbstractSolver, diffrax.AbstractAdjoint]] = {
    "adjoint": (
        diffrax.Dopri5(),
        diffrax.BacksolveAdjoint(
            stepsize_controller=diffrax.PIDController(rtol=RTOL, atol=ATOL)
        ),
    ),
    "naive": (diffrax.Dopri5(), diffrax.DirectAdjoint()),
    "MALI": (diffrax.AsynchronousLeapfrog(), diffrax.ReversibleAdjoint()),
    "MALI, damped": (diffrax.AsynchronousLeapfrog(0.9), diffrax.ReversibleAdjoint()),
    "Dopri5, undone": (diffrax.Dopri5(), diffrax.ReversibleAdjoint()),
}


def _solve(solver, adjoint, y0, a, t1, controller, dt0, max_steps):
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: args * y),
        solver,
        t0=0.0,
        t1=t1,
        dt0=dt0,
        y0=y0,
        args=a,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=max_steps,
        throw=False,
    )
    assert sol.ys is not None
    failed = sol.result != diffrax.RESULTS.successful
    value = jnp.where(failed, jnp.nan, jnp.sum(sol.ys[-1] ** 2))
    return value, (sol.stats["num_accepted_steps"], failed)


def _make_gradient(solver: Any, adjoint: Any) -> Any:
    controller = diffrax.PIDController(rtol=RTOL, atol=ATOL)

    def loss(y0, a, t1):
        return _solve(solver, adjoint, y0, a, t1, controller, None, MAX_STEPS)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    def compute(a, t1):
        grads, (steps, failed) = gradient(*map(jnp.array, (1.0, a, t1)))
        found = np.array([np.nan if failed else float(x) for x in grads])
        return found, int(steps)

    return compute


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    """The larger one of the two relative errors. NaN if the solve has failed."""
    return float(np.max(np.abs(found - expected) / np.abs(expected)))


def measure_error(args: argparse.Namespace) -> Iterator[Row]:
    smoke = args.size == "smoke"
    lengths = [1.0] if smoke else [1.0, 2.0, 5.0, 10.0, 15.0, 20.0]
    for name, (solver, adjoint) in METHODS.items():
        if smoke and name != "MALI":
            continue
        gradient = _make_gradient(solver, adjoint)
        discrete = _make_gradient(solver, diffrax.RecursiveCheckpointAdjoint())
        for a in (-0.5, 0.5):
            for t1 in lengths:
                found, steps = gradient(a, t1)
                of_solve, _ = discrete(a, t1)
                true = 2 * np.exp(2 * a * t1) * np.array([1.0, t1])
                yield dict(
                    method=name,
                    rate=a,
                    length=t1,
                    steps=steps,
                    error=_error(found, true),
                    error_to_solve=_error(found, of_solve),
                )
        jax.clear_caches()


def _temp_bytes(solver: Any, adjoint: Any, num_steps: int) -> int:
    def loss(y0, a):
        controller, dt0 = diffrax.ConstantStepSize(), 1.0 / num_steps
        out, _ = _solve(solver, adjoint, y0, a, 1.0, controller, dt0, num_steps)
        return out

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
        jnp.ones(1000), jnp.array(0.5)
    )
    analysis: Any = lowered.compile().memory_analysis()
    return analysis.temp_size_in_bytes


def measure_memory(args: argparse.Namespace) -> Iterator[Row]:
    smoke = args.size == "smoke"
    methods = dict(METHODS)
    methods["adjoint"] = diffrax.Dopri5(), diffrax.BacksolveAdjoint()
    del methods["MALI, damped"]
    methods["MALI, nothing stored"] = (
        diffrax.AsynchronousLeapfrog(),
        diffrax.ReversibleAdjoint(0, "off", "ignore"),
    )
    methods["checkpoints"] = diffrax.Dopri5(), diffrax.RecursiveCheckpointAdjoint()
    for name, (solver, adjoint) in methods.items():
        if smoke and name != "MALI":
            continue
        for num_steps in [100] if smoke else [10, 100, 1000, 10_000]:
            yield dict(
                method=name,
                steps=num_steps,
                temp_bytes=_temp_bytes(solver, adjoint, num_steps),
            )
            jax.clear_caches()


STYLES = {
    "adjoint": ("tab:gray", "v", "adjoint: Dopri5, BacksolveAdjoint"),
    "naive": ("tab:red", "^", "naive: Dopri5, DirectAdjoint"),
    "MALI": ("tab:green", "o", "MALI: AsynchronousLeapfrog, ReversibleAdjoint"),
    "MALI, damped": ("tab:olive", "P", "the same, damped (0.9)"),
    "MALI, nothing stored": ("tab:olive", "P", "MALI, nothing stored nor certified"),
    "Dopri5, undone": ("tab:blue", "s", "Dopri5, ReversibleAdjoint"),
    "checkpoints": ("tab:orange", "D", "Dopri5, RecursiveCheckpointAdjoint"),
}


def draw_error(rows: list[Row]) -> Figure:
    fig, axes = plt.subplots(2, 2, figsize=(8, 7.5), sharex=True)
    for column, a in enumerate((-0.5, 0.5)):
        for line, (which, text) in enumerate(
            (("error", "the true one"), ("error_to_solve", "that of the solve"))
        ):
            ax = axes[line, column]
            for name, (color, marker, label) in STYLES.items():
                of = [r for r in rows if r["method"] == name and r["rate"] == a]
                of = [r for r in of if r[which] is not None]
                if not of:
                    continue
                lengths = [row["length"] for row in of]
                errors = [max(row[which], 1e-17) for row in of]
                ax.semilogy(
                    lengths, errors, "-", color=color, marker=marker, label=label
                )
            ax.grid(alpha=0.3)
            ax.set_title(f"$a = {a}$, relative to {text}", fontsize=10)
    axes[1, 0].set_xlabel("length of the solve")
    axes[1, 1].set_xlabel("length of the solve")
    fig.supylabel("relative error of the gradient")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9)
    return fig


def draw_memory(rows: list[Row]) -> Figure:
    fig, ax = plt.subplots(figsize=(6.8, 4.4))
    for name, (color, marker, label) in STYLES.items():
        of = [row for row in rows if row["method"] == name]
        if of:
            steps = [row["steps"] for row in of]
            sizes = [row["temp_bytes"] / 1024 for row in of]
            ax.loglog(steps, sizes, "-", color=color, marker=marker, label=label)
    ax.set_xlabel("number of steps")
    ax.set_ylabel("scratch memory (KiB)")
    ax.grid(alpha=0.3)
    fig.legend(loc="outside upper center", ncols=2, fontsize=9)
    return fig


PAPER = Paper(
    "mali",
    __doc__ or "",
    dict(error=measure_error, memory=measure_memory),
    dict(error=("error", draw_error), memory=("memory", draw_memory)),
)

if __name__ == "__main__":
    run(PAPER, make_parser(PAPER).parse_args())
