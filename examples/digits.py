"""Trains a neural ODE to classify handwritten digits, and compares adjoints on it.

    python examples/digits.py [--solver NAME] [--adjoint NAME] [--steps N] [--epochs N]

The data are the 1797 images of 8x8 pixels that come with scikit-learn. Takes about two
minutes on 2 CPU cores. Saves a figure next to this file.
"""

import argparse
import pathlib
import time
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from tqdm import tqdm


SOLVERS: dict[str, diffrax.AbstractSolver] = {
    "UReversible(Tsit5)": diffrax.UReversible(diffrax.Tsit5()),
    "UReversible(Heun)": diffrax.UReversible(diffrax.Heun()),
    "ReversibleHeun": diffrax.ReversibleHeun(),
}
ADJOINTS: dict[str, diffrax.AbstractAdjoint] = {
    "RecursiveCheckpointAdjoint": diffrax.RecursiveCheckpointAdjoint(),
    "BacksolveAdjoint": diffrax.BacksolveAdjoint(),
    "ReversibleAdjoint": diffrax.ReversibleAdjoint(),
}
REFERENCE = "RecursiveCheckpointAdjoint"


class NeuralODE(eqx.Module):
    """Encodes an image linearly, lets it flow for one unit of time, and reads its class
    off linearly."""

    encoder: eqx.nn.Linear
    field: eqx.nn.MLP
    decoder: eqx.nn.Linear

    def __init__(self, width: int, *, key: Array):
        keys = jr.split(key, 3)
        self.encoder = eqx.nn.Linear(64, width, key=keys[0])
        self.field = eqx.nn.MLP(width, width, width, 1, jnp.tanh, key=keys[1])
        self.decoder = eqx.nn.Linear(width, 10, key=keys[2])

    def __call__(
        self,
        images: Float[Array, "batch 64"],
        solver: diffrax.AbstractSolver,
        adjoint: diffrax.AbstractAdjoint,
        num_steps: int,
    ) -> Float[Array, "batch 10"]:
        # The state is the whole batch. (With a `jax.vmap` around `diffeqsolve`, there
        # would be a gradient with respect to the parameters for each image.)
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, field: jax.vmap(field)(y)),
            solver,
            t0=0.0,
            t1=1.0,
            dt0=1.0 / num_steps,
            y0=jax.vmap(self.encoder)(images),
            args=self.field,
            adjoint=adjoint,
            max_steps=num_steps,
        )
        assert sol.ys is not None
        return jax.vmap(self.decoder)(sol.ys[-1])


def loss_fn(
    model: NeuralODE,
    images: Float[Array, "batch 64"],
    labels: Int[Array, " batch"],
    solve_args: tuple[diffrax.AbstractSolver, diffrax.AbstractAdjoint, int],
) -> Float[Array, ""]:
    logits = model(images, *solve_args)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


@eqx.filter_jit
def accuracy(
    model: NeuralODE,
    images: Float[Array, "batch 64"],
    labels: Int[Array, " batch"],
    solve_args: tuple[diffrax.AbstractSolver, diffrax.AbstractAdjoint, int],
) -> Float[Array, ""]:
    return jnp.mean(jnp.argmax(model(images, *solve_args), axis=-1) == labels)


def load_data(seed: int) -> tuple[Array, Array, Array, Array]:
    """Images and labels: of training, and of testing."""
    images, labels = load_digits(return_X_y=True)
    x0, x1, y0, y1 = train_test_split(
        images.astype(np.float32) / 16,
        labels.astype(np.int32),
        test_size=0.25,
        stratify=labels,
        random_state=seed,
    )
    return jnp.asarray(x0), jnp.asarray(y0), jnp.asarray(x1), jnp.asarray(y1)


def train(
    model: NeuralODE, images: Array, labels: Array, solve_args: Any, args: Any
) -> NeuralODE:
    num_batches = len(images) // args.batch_size
    schedule = optax.cosine_decay_schedule(4e-3, args.epochs * num_batches)
    optimiser = optax.adamw(schedule, weight_decay=1e-3)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def make_step(model, opt_state, x, y):
        loss, grad = eqx.filter_value_and_grad(loss_fn)(model, x, y, solve_args)
        params = eqx.filter(model, eqx.is_array)
        updates, opt_state = optimiser.update(grad, opt_state, params)
        return loss, eqx.apply_updates(model, updates), opt_state

    rng = np.random.default_rng(args.seed)
    loss = jnp.inf
    progress = tqdm(range(args.epochs), desc="training", unit="epoch")
    for _ in progress:
        order = rng.permutation(len(images))[: num_batches * args.batch_size]
        for i in order.reshape(num_batches, args.batch_size):
            loss, model, opt_state = make_step(model, opt_state, images[i], labels[i])
        progress.set_postfix(loss=f"{loss:.4f}")
    return model


#
# Comparing the adjoints
#


def flatten(tree: PyTree[Array]) -> Array:
    return ravel_pytree(tree)[0]


def compare(
    model: NeuralODE,
    images: Array,
    labels: Array,
    solver: diffrax.AbstractSolver,
    nums_steps: list[int],
    repeats: int,
) -> list[dict[str, Any]]:
    """The error of the gradient, the memory, and the time of one evaluation of it, for
    each adjoint and number of steps. The error is relative to the gradient that
    `RecursiveCheckpointAdjoint` computes in float64."""
    rows = []
    params, static = eqx.partition(model, eqx.is_inexact_array)
    for num_steps in nums_steps:
        with jax.enable_x64(True):
            model64 = jax.tree.map(
                lambda x: jnp.asarray(x, jnp.float64) if eqx.is_array(x) else x, model
            )
            solve_args = (solver, ADJOINTS[REFERENCE], num_steps)
            grad = eqx.filter_jit(eqx.filter_grad(loss_fn))
            x64 = jnp.asarray(images, jnp.float64)
            true_grad = np.asarray(flatten(grad(model64, x64, labels, solve_args)))
        compiled = {}
        for name, adjoint in ADJOINTS.items():
            solve_args = (solver, adjoint, num_steps)
            fn = jax.jit(
                lambda p, x, y, solve_args=solve_args: jax.grad(
                    lambda q: loss_fn(eqx.combine(q, static), x, y, solve_args)
                )(p)
            )
            compiled[name] = fn.lower(params, images, labels).compile()
        times = {name: [] for name in ADJOINTS}
        for i in range(repeats + 1):
            for name, fn in compiled.items():
                start = time.perf_counter()
                grad_value = jax.block_until_ready(fn(params, images, labels))
                if i > 0:  # The first is for warming up.
                    times[name].append(time.perf_counter() - start)
                elif not np.all(np.isfinite(flatten(grad_value))):
                    raise RuntimeError(f"The gradient of `{name}` is not finite.")
        for name, fn in compiled.items():
            error = np.asarray(flatten(fn(params, images, labels))) - true_grad
            rows.append(
                dict(
                    adjoint=name,
                    steps=num_steps,
                    error=np.linalg.norm(error) / np.linalg.norm(true_grad),
                    memory=fn.memory_analysis().temp_size_in_bytes / 2**20,
                    time=float(np.median(times[name])),
                )
            )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'adjoint':27s} {'steps':>6s} {'error':>9s} {'memory':>10s} {'time':>9s}")
    for row in rows:
        print(
            f"{row['adjoint']:27s} {row['steps']:6d} {row['error']:9.1e} "
            f"{row['memory']:6.2f} MiB {1000 * row['time']:6.1f} ms"
        )


def save_figure(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    columns = (
        ("error", "relative error of the gradient (float32)"),
        ("memory", "scratch memory of the gradient [MiB]"),
        ("time", "time of one gradient [s]"),
    )
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), constrained_layout=True)
    for ax, (key, label) in zip(axes, columns, strict=True):
        for name, marker in zip(ADJOINTS, ("s", "^", "o"), strict=True):
            points = [(r["steps"], r[key]) for r in rows if r["adjoint"] == name]
            ax.loglog(*zip(*points, strict=True), marker=marker, label=name)
        ax.set_xlabel("number of steps")
        ax.set_title(label, fontsize=10)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    print(f"\nSaved {path}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--solver", choices=SOLVERS, default="UReversible(Heun)")
    parser.add_argument("--adjoint", choices=ADJOINTS, default="ReversibleAdjoint")
    parser.add_argument("--steps", type=int, default=10, help="when training")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=pathlib.Path, default=None)
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    if args.figure is None:
        name = "smoke.png" if args.smoke else "digits.png"
        args.figure = pathlib.Path(__file__).parent / "output" / name
    if args.smoke:
        args.epochs, args.steps = 1, 2
    return args


def main() -> None:
    args = parse_args()
    matplotlib.use("Agg")
    solver = SOLVERS[args.solver]
    solve_args = (solver, ADJOINTS[args.adjoint], args.steps)
    train_x, train_y, test_x, test_y = load_data(args.seed)

    model = NeuralODE(args.width, key=jr.key(args.seed))
    model = train(model, train_x, train_y, solve_args, args)
    print(f"\nTest accuracy on {len(test_x)} digits:")
    result = accuracy(model, test_x, test_y, solve_args)
    print(f"  neural ODE, {args.adjoint:27s} {100 * result:6.2f} %")
    for name, classifier in (
        ("logistic regression", LogisticRegression(max_iter=2000)),
        ("support vector machine, RBF kernel", SVC()),
    ):
        score = classifier.fit(train_x, train_y).score(test_x, test_y)
        print(f"  {name:39s} {100 * score:6.2f} %")

    x, y = train_x[: args.batch_size], train_y[: args.batch_size]
    nums_steps = [2, 4] if args.smoke else [10, 100, 1000]
    rows = compare(model, x, y, solver, nums_steps, repeats=1 if args.smoke else 5)
    print_table(rows)
    save_figure(rows, args.figure)


if __name__ == "__main__":
    main()
