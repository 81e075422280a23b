"""Handwritten digits with a neural ODE: trains a classifier with
`diffrax.ReversibleAdjoint()`, then measures what that adjoint is good for.

    python examples/digits.py            # about 2 minutes on two CPU cores
    python examples/digits.py --smoke    # half a minute; the numbers mean nothing
    python examples/digits.py --help     # choice of solver, adjoint, number of steps

The data are the 1797 images of 8 by 8 pixels that come with scikit-learn. A linear
layer takes an image to the initial state of an ODE, whose vector field is a small
neural network; a second linear layer reads the digit off the state at time 1.

At the end it prints the accuracy on images that were not trained on, beside that of
other classifiers; and for the trained model, the error of the gradient, the scratch
memory and the time of a training step with three adjoints, as a table and a figure.
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from matplotlib.figure import Figure
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from tqdm import tqdm


SOLVERS: dict[str, diffrax.AbstractSolver] = {
    "Heun": diffrax.Heun(),
    "Tsit5": diffrax.Tsit5(),
    "UReversible-Tsit5": diffrax.UReversible(diffrax.Tsit5()),
    "UReversible-Heun": diffrax.UReversible(diffrax.Heun()),
    "ReversibleHeun": diffrax.ReversibleHeun(),
}
ADJOINTS: dict[str, diffrax.AbstractAdjoint] = {
    "ReversibleAdjoint": diffrax.ReversibleAdjoint(),
    "RecursiveCheckpointAdjoint": diffrax.RecursiveCheckpointAdjoint(),
    "BacksolveAdjoint": diffrax.BacksolveAdjoint(),
}

# NumPy's or JAX's.
AnyArray: TypeAlias = np.ndarray | Array

#
# The data
#


class Data(NamedTuple):
    train_images: Float[np.ndarray, "train 64"]
    train_labels: Int[np.ndarray, " train"]
    test_images: Float[np.ndarray, "test 64"]
    test_labels: Int[np.ndarray, " test"]


def load_data() -> Data:
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    # Always the same split, so that accuracies can be compared between seeds.
    split: Any = train_test_split(
        images, labels, test_size=360, random_state=0, stratify=labels
    )
    train_images, test_images, train_labels, test_labels = split
    return Data(train_images, train_labels, test_images, test_labels)


def augment(
    images: Float[np.ndarray, "batch 64"], rng: np.random.Generator
) -> Float[np.ndarray, "batch 64"]:
    """Moves each image by up to half a pixel, and adds noise."""
    squares = images.reshape(-1, 8, 8)
    shifts = rng.uniform(-0.5, 0.5, (len(images), 2))
    # With `mode="constant"`, a pixel that comes in part from outside would be black.
    moved = [
        ndimage.shift(x, shift, order=1, mode="grid-constant")
        for x, shift in zip(squares, shifts)
    ]
    noise = rng.normal(0, 0.1, squares.shape)
    return (np.stack(moved) + noise).astype(np.float32).reshape(images.shape)


def batches(
    data: Data, batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    images = augment(data.train_images, rng)
    order = rng.permutation(len(images))
    # Without the rest, so that all batches have one size.
    for start in range(0, len(order) - batch_size + 1, batch_size):
        batch = order[start : start + batch_size]
        yield images[batch], data.train_labels[batch]


#
# The model
#


class Method(NamedTuple):
    """How to solve the ODE, and how to differentiate the solution."""

    solver: diffrax.AbstractSolver
    adjoint: diffrax.AbstractAdjoint
    num_steps: int


class NeuralODE(eqx.Module):
    encode: eqx.nn.Linear
    field: eqx.nn.MLP
    decode: eqx.nn.Linear

    def __init__(self, dim: int, width: int, *, key: PRNGKeyArray):
        encode_key, field_key, decode_key = jr.split(key, 3)
        self.encode = eqx.nn.Linear(64, dim, key=encode_key)
        self.field = eqx.nn.MLP(dim, dim, width, 1, jnp.tanh, key=field_key)
        self.decode = eqx.nn.Linear(dim, 10, key=decode_key)

    def __call__(
        self, images: Float[AnyArray, "batch 64"], method: Method
    ) -> Float[Array, "batch 10"]:
        # One ODE for the whole batch, rather than `jax.vmap` over one for each image:
        # the gradient of the parameters then is accumulated as one, not as a batch.
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, field: jax.vmap(field)(y)),
            method.solver,
            t0=0.0,
            t1=1.0,
            dt0=1 / method.num_steps,
            y0=jax.vmap(self.encode)(jnp.asarray(images)),
            args=self.field,
            adjoint=method.adjoint,
            max_steps=method.num_steps,
            # The default, for emphasis: it is an error if a solve fails. With
            # `UReversible` that is, if its two states drift apart. If this happens,
            # take more steps, or lower the learning rate.
            throw=True,
        )
        assert sol.ys is not None
        return jax.vmap(self.decode)(sol.ys[-1])


def loss_fn(
    model: NeuralODE,
    images: Float[AnyArray, "batch 64"],
    labels: Int[AnyArray, " batch"],
    method: Method,
) -> Float[Array, ""]:
    logits = model(images, method)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


@eqx.filter_jit
def train_step(
    model: NeuralODE,
    opt_state: PyTree,
    images: Float[AnyArray, "batch 64"],
    labels: Int[AnyArray, " batch"],
    method: Method,
    optimiser: optax.GradientTransformation,
) -> tuple[NeuralODE, PyTree, Float[Array, ""]]:
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, images, labels, method)
    params = eqx.filter(model, eqx.is_array)
    updates, opt_state = optimiser.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state, loss


def train(data: Data, method: Method, options: argparse.Namespace) -> NeuralODE:
    model = NeuralODE(64, 128, key=jr.key(options.seed))
    num_batches = options.epochs * (len(data.train_images) // options.batch_size)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, num_batches // 20, num_batches
    )
    optimiser = optax.adamw(schedule, weight_decay=1e-3)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_array))
    rng = np.random.default_rng(options.seed)
    bar = tqdm(range(options.epochs), desc="training", unit="epoch", mininterval=1)
    for _ in bar:
        losses = []
        for images, labels in batches(data, options.batch_size, rng):
            model, opt_state, loss = train_step(
                model, opt_state, images, labels, method, optimiser
            )
            losses.append(loss)
        bar.set_postfix(loss=f"{np.mean(losses):.3f}", refresh=False)
    return model


#
# How good is it?
#


def print_accuracies(data: Data, model: NeuralODE, method: Method) -> None:
    logits = eqx.filter_jit(model)(jnp.asarray(data.test_images), method)
    accuracy = float(np.mean(np.argmax(logits, axis=-1) == data.test_labels))
    rows = [("neural ODE", accuracy)]

    images, labels = data.train_images, data.train_labels
    rng = np.random.default_rng(0)
    more_images = np.concatenate([images] + [augment(images, rng) for _ in range(5)])
    more_labels = np.tile(labels, 6)
    mlp = MLPClassifier((64, 128), early_stopping=True, random_state=0)
    for name, classifier, x, y in [
        ("logistic regression", LogisticRegression(max_iter=1000), images, labels),
        ("multilayer perceptron (64, 128)", mlp, images, labels),
        ("support vector machine", SVC(), images, labels),
        ("support vector machine, more images", SVC(), more_images, more_labels),
    ]:
        classifier.fit(x, y)
        rows.append((name, classifier.score(data.test_images, data.test_labels)))
    print(f"\nAccuracy on {len(data.test_labels)} images that were not trained on:\n")
    for name, accuracy in rows:
        print(f"    {name:<36}{100 * accuracy:6.1f} %")
    print(
        "\n(The neural ODE is trained on images that are moved a little and made noisy,"
        "\nanew in each epoch; 'more images' are five such copies of each.)"
    )


#
# What does its gradient cost?
#


class Row(NamedTuple):
    num_steps: int
    solver: str
    adjoint: str
    gradient_error: float
    scratch_bytes: int
    seconds: float


def name_of(solver: diffrax.AbstractSolver) -> str:
    # By its type: `isinstance` looks into wrappers.
    if type(solver) is diffrax.UReversible:
        return f"UReversible({type(solver.solver).__name__}())"
    return f"{type(solver).__name__}()"


def methods_to_compare(solver: diffrax.AbstractSolver, num_steps: int) -> list[Method]:
    """Three adjoints with a stock solver. If the solver is reversible in closed form,
    also the two exact ones with that."""
    if type(solver) is diffrax.UReversible:
        stock = solver.solver
    elif isinstance(solver, diffrax.AbstractReversibleSolver):
        # `ReversibleHeun` has the order of `Heun`, but wraps nothing.
        stock = diffrax.Heun()
    else:
        stock = solver
    exact = [ADJOINTS["RecursiveCheckpointAdjoint"], ADJOINTS["ReversibleAdjoint"]]
    methods = [Method(stock, adjoint, num_steps) for adjoint in exact]
    methods.append(Method(stock, ADJOINTS["BacksolveAdjoint"], num_steps))
    if stock is not solver:
        methods += [Method(solver, adjoint, num_steps) for adjoint in exact]
    return methods


def measure_errors(
    model: NeuralODE, images: np.ndarray, labels: np.ndarray, methods: list[Method]
) -> list[float]:
    """The relative error of each method's gradient, against that which backpropagation
    through the same solver gives. In double precision, to show the error of the method
    rather than rounding."""
    jax.config.update("jax_enable_x64", True)
    try:
        params, static = eqx.partition(model, eqx.is_array)
        params = jtu.tree_map(lambda x: x.astype(np.float64), params)
        model = eqx.combine(params, static)
        grad = eqx.filter_jit(eqx.filter_grad(loss_fn))
        references: dict[tuple, np.ndarray] = {}
        errors = []
        for method in tqdm(methods, desc="gradient errors", mininterval=1):
            grads = grad(model, images.astype(np.float64), labels, method)
            flat = np.asarray(jfu.ravel_pytree(eqx.filter(grads, eqx.is_array))[0])
            # The first method with each solver is the one that is exact.
            key = (name_of(method.solver), method.num_steps)
            reference = references.setdefault(key, flat)
            difference = np.linalg.norm(flat - reference)
            errors.append(float(difference / np.linalg.norm(reference)))
    finally:
        jax.config.update("jax_enable_x64", False)
    return errors


def measure_costs(
    model: NeuralODE,
    images: np.ndarray,
    labels: np.ndarray,
    methods: list[Method],
    repeats: int = 6,
) -> list[tuple[int, float]]:
    """The scratch memory of a training step, and the median time it takes."""
    optimiser = optax.adam(1e-3)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_array))
    jitted: Any = train_step  # Type checkers see the function inside.
    steps = []
    for method in tqdm(methods, desc="compilation", mininterval=1):
        args = (model, opt_state, images, labels, method, optimiser)
        steps.append((jitted.lower(*args).compile(), args, []))
    # In turn, so that whatever else the computer does slows them all alike. The first
    # round is to warm up.
    for i in tqdm(range(1 + repeats), desc="timing", mininterval=1):
        for step, args, times in steps:
            start = time.perf_counter()
            jax.block_until_ready(step(*args))
            if i > 0:
                times.append(time.perf_counter() - start)
    return [
        (
            step.compiled.memory_analysis().temp_size_in_bytes,
            statistics.median(times),
        )
        for step, _, times in steps
    ]


def compare(
    model: NeuralODE, data: Data, solver: diffrax.AbstractSolver, nums: list[int]
) -> list[Row]:
    images, labels = data.train_images[:64], data.train_labels[:64]
    methods = [method for n in nums for method in methods_to_compare(solver, n)]
    errors = measure_errors(model, images, labels, methods)
    costs = measure_costs(model, images, labels, methods)
    return [
        Row(m.num_steps, name_of(m.solver), type(m.adjoint).__name__, error, *cost)
        for m, error, cost in zip(methods, errors, costs)
    ]


def print_comparison(rows: list[Row]) -> None:
    print(
        "\nOne training step of the trained model (64 images; float32, gradient errors"
        "\nin float64 and relative to backpropagation through the same solver):\n"
    )
    print(
        f"{'steps':>6}  {'solver':<20}{'adjoint':<28}"
        f"{'gradient error':>14}{'scratch memory':>16}{'time':>11}"
    )
    for row in rows:
        error = f"{row.gradient_error:.0e}" if row.gradient_error > 0 else "0"
        print(
            f"{row.num_steps:>6}  {row.solver:<20}{row.adjoint:<28}"
            f"{error:>14}{row.scratch_bytes / 1e6:>13.2f} MB"
            f"{row.seconds * 1e3:>8.1f} ms"
        )


def save_figure(rows: list[Row], path: pathlib.Path) -> None:
    looks: list[dict[str, Any]] = [
        dict(color="#000000", marker="o", linestyle="-"),
        dict(color="#d55e00", marker="^", linestyle="-"),
        dict(color="#0072b2", marker="s", linestyle="-"),
        dict(color="#808080", marker="D", linestyle=":"),
        dict(color="#009e73", marker="v", linestyle="--"),
    ]
    panels = [
        ("Relative error of the gradient", lambda row: row.gradient_error),
        ("Scratch memory (MB)", lambda row: row.scratch_bytes / 1e6),
        ("Time per training step (ms)", lambda row: row.seconds * 1e3),
    ]
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    keys = list(dict.fromkeys((row.solver, row.adjoint) for row in rows))
    for i, (title, value) in enumerate(panels):
        ax = figure.add_subplot(1, 3, i + 1)
        for key, look in zip(keys, looks):
            points = [
                (row.num_steps, value(row))
                for row in rows
                # That which is the reference has no error.
                if (row.solver, row.adjoint) == key and value(row) > 0
            ]
            if len(points) > 0:
                x, y = zip(*points)
                ax.plot(x, y, label=f"{key[1]}, {key[0]}", **look)
        ax.set(xscale="log", yscale="log", title=title, xlabel="Number of steps")
        ax.grid(alpha=0.3)
    handles, labels = figure.axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--solver", choices=SOLVERS, default="Heun")
    parser.add_argument("--adjoint", choices=ADJOINTS, default="ReversibleAdjoint")
    parser.add_argument("--steps", type=int, default=10, help="of the solver")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compare",
        type=int,
        nargs="+",
        default=[10, 100, 1000],
        metavar="STEPS",
        help="numbers of steps for which to compare the adjoints",
    )
    default = pathlib.Path(__file__).parent / "output" / "digits.png"
    parser.add_argument("--figure", type=pathlib.Path, default=default)
    parser.add_argument("--smoke", action="store_true", help="only see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.epochs, options.compare = 2, 1, [2]
        options.figure = options.figure.with_name("smoke.png")
    return options


def main(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    data = load_data()
    solver = SOLVERS[options.solver]
    method = Method(solver, ADJOINTS[options.adjoint], options.steps)
    model = train(data, method, options)
    print_accuracies(data, model, method)
    rows = compare(model, data, solver, options.compare)
    print_comparison(rows)
    save_figure(rows, options.figure)
    seconds = time.perf_counter() - start
    print(f"\nFigure saved as {options.figure}. All of it took {seconds:.0f} s.")


if __name__ == "__main__":
    main(parse_options())
