"""The gradient error of reversible Heun, after Kidger, Foster, Li and Lyons 2021 (arXiv
2105.13493).

    python benchmarks/papers/kidger.py [--smoke | --measured]
    python benchmarks/papers/kidger.py --figures   # draws what was measured before

They compare gradients of a neural SDE: those that are found by solving an adjoint
equation backward in time, with backpropagation through the same solve. With the
midpoint method and Heun's, the error of that shrinks only as the steps do; with
reversible Heun, it is at the level of rounding for every step size.

The problem is of their kind: a Stratonovich SDE with general noise, the drift and the
diffusion of which are networks of one hidden layer of width 8 with LipSwish as
activation; a batch of 32, of dimension 32, with Brownian motions of dimension 16; until
`t = 1`, in steps of 1 to 1/1024. (Sizes, weights, initial values and paths are ours.)
The error is the sum of absolute differences over the sum of absolute values, of all
entries of the gradient.

Next to it stands the same for `ReversibleAdjoint`, by which every solver is undone.
Nothing is stored (`checkpoints=0`), and nothing certified, so that what is seen is the
error of going back alone.

In float64. Takes about three minutes on 2 CPU cores, most of it compiling; the numbers
are the same on any machine, up to rounding.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from _common import make_parser, Paper, Row, run
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure


def _lipswish(x):
    return 0.909 * jax.nn.silu(x)


class _Field(eqx.Module):
    network: eqx.nn.MLP
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, size: int, shape: tuple[int, ...], key: Any):
        out = int(np.prod(shape))
        self.network = eqx.nn.MLP(size + 1, out, 8, 1, _lipswish, key=key)
        self.shape = shape

    def __call__(self, t, y, args):
        del args
        t = jnp.asarray(t, y.dtype)[None]
        return self.network(jnp.concatenate([t, y])).reshape(self.shape)


NOTHING_STORED = diffrax.ReversibleAdjoint(0, "off", "ignore")
SOLVERS: dict[str, diffrax.AbstractSolver] = {
    "ReversibleHeun": diffrax.ReversibleHeun(),
    "Midpoint": diffrax.Midpoint(),
    "Heun": diffrax.Heun(),
    "UReversible(Heun)": diffrax.UReversible(diffrax.Heun(), max_gap=float("inf")),
}
# The ones that are published come first.
METHODS = [
    ("ReversibleHeun", "ReversibleAdjoint"),
    ("Midpoint", "BacksolveAdjoint"),
    ("Heun", "BacksolveAdjoint"),
    ("Midpoint", "ReversibleAdjoint"),
    ("Heun", "ReversibleAdjoint"),
    ("UReversible(Heun)", "ReversibleAdjoint"),
]
SIZE, NOISES, BATCH = 32, 16, 32


def _make_gradient(solver: diffrax.AbstractSolver, adjoint: Any, max_steps: int):
    """Of the networks and of `y0`; a function of these and of the step size."""

    def loss(fields__y0, dt0):
        (drift, diffusion), y0 = fields__y0

        def solve(y0, key):
            shape = jax.ShapeDtypeStruct((NOISES,), y0.dtype)
            # The same path for all step sizes.
            path = diffrax.VirtualBrownianTree(0.0, 1.0, 2.0**-12, shape, key)
            sol = diffrax.diffeqsolve(
                diffrax.MultiTerm(
                    diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path)
                ),
                solver,
                t0=0.0,
                t1=1.0,
                dt0=dt0,
                y0=y0,
                adjoint=adjoint,
                max_steps=max_steps,
            )
            assert sol.ys is not None
            return sol.ys[-1]

        ends = jax.vmap(solve)(y0, jr.split(jr.key(0), BATCH))
        return jnp.mean(jnp.sum(ends, axis=1))

    @eqx.filter_jit
    def gradient(fields__y0, dt0):
        return ravel_pytree(eqx.filter_grad(loss)(fields__y0, dt0))[0]

    return gradient


def measure(args: argparse.Namespace) -> Iterator[Row]:
    smoke = args.size == "smoke"
    exponents = [0, 2] if smoke else [*range(11)]
    drift_key, diffusion_key, y0_key = jr.split(jr.key(1), 3)
    fields = (
        _Field(SIZE, (SIZE,), drift_key),
        _Field(SIZE, (SIZE, NOISES), diffusion_key),
    )
    inputs = fields, jr.normal(y0_key, (BATCH, SIZE))
    max_steps = 2 ** exponents[-1]
    exact: dict[str, list[np.ndarray]] = {}
    for solver, adjoint in METHODS[:2] if smoke else METHODS:
        if solver not in exact:
            recursive = diffrax.RecursiveCheckpointAdjoint()
            gradient = _make_gradient(SOLVERS[solver], recursive, max_steps)
            exact[solver] = [
                np.asarray(gradient(inputs, jnp.array(2.0**-n))) for n in exponents
            ]
        if adjoint == "BacksolveAdjoint":
            gradient = _make_gradient(
                SOLVERS[solver], diffrax.BacksolveAdjoint(), max_steps
            )
        else:
            gradient = _make_gradient(SOLVERS[solver], NOTHING_STORED, max_steps)
        for n, expected in zip(exponents, exact[solver]):
            found = np.asarray(gradient(inputs, jnp.array(2.0**-n)))
            size = max(np.sum(np.abs(found)), np.sum(np.abs(expected)))
            yield dict(
                solver=solver,
                adjoint=adjoint,
                step_size=2.0**-n,
                error=float(np.sum(np.abs(found - expected)) / size),
            )
        jax.clear_caches()


def draw(rows: list[Row]) -> Figure:
    fig, ax = plt.subplots(figsize=(6.8, 4.6))
    markers = iter("os^vDP")
    for key in dict.fromkeys((row["solver"], row["adjoint"]) for row in rows):
        of = [row for row in rows if (row["solver"], row["adjoint"]) == key]
        sizes = [row["step_size"] for row in of]
        errors = [max(row["error"], 1e-17) for row in of]
        style = "--" if key[1] == "BacksolveAdjoint" else "-"
        label = f"{key[0]}, {key[1]}"
        ax.loglog(sizes, errors, style, marker=next(markers), label=label, lw=1.5)
    ax.set_xlabel("step size")
    ax.set_ylabel("relative error of the gradient")
    ax.grid(alpha=0.3)
    fig.legend(loc="outside upper center", ncols=2, fontsize=9)
    return fig


PAPER = Paper("kidger", __doc__ or "", dict(error=measure), dict(error=("error", draw)))

if __name__ == "__main__":
    run(PAPER, make_parser(PAPER).parse_args())
