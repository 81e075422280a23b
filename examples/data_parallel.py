"""Data-parallel training of a neural ODE: each device solves it for its own part of the
batch, differentiates the solution by `diffrax.ReversibleAdjoint()`, and exchanges
nothing with the others but the gradient of the parameters, once.

    python examples/data_parallel.py                 # in one process
    python examples/data_parallel.py --processes 2   # in two, which it starts itself
    python examples/data_parallel.py --smoke         # both, only to see that they run

Takes all GPUs that there are, divided among the processes. If there are fewer GPUs than
processes, then the CPU is made to look like 8 devices (`--devices`); they share its
cores, so nothing is faster for it. On two cores the first takes 20 s, the others 45 s.

The data are the 1797 images of 8 by 8 pixels that come with scikit-learn. Prints by how
much the gradient differs from that on one device, which is an error if it is too much;
the loss of each epoch; and the accuracy on images that were not trained on.

On several machines, start one process on each, with its number and the address of the
first, which is number 0:

    data_parallel.py --processes 2 --process-id 0 --coordinator HOST:PORT
"""

import argparse
import functools
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from sklearn.datasets import load_digits


#
# The model
#


class NeuralODE(eqx.Module):
    """A linear map to the initial state, an ODE, and a linear map to the classes. All
    of its leaves are parameters."""

    encode: eqx.nn.Linear
    field: list[eqx.nn.Linear]
    decode: eqx.nn.Linear

    def __init__(self, dim: int, width: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        self.encode = eqx.nn.Linear(64, dim, key=keys[0])
        self.field = [
            eqx.nn.Linear(dim, width, key=keys[1]),
            eqx.nn.Linear(width, dim, key=keys[2]),
        ]
        self.decode = eqx.nn.Linear(dim, 10, key=keys[3])

    def __call__(self, images: Float[Array, "batch 64"]) -> Float[Array, "batch 10"]:
        def vector_field(t, y, field):
            hidden, out = field
            return jax.vmap(lambda y: out(jnp.tanh(hidden(y))))(y)

        # One ODE for the whole batch that is here. Its steps are constant, as otherwise
        # they, and so the solution, would depend on how the batch is divided. For
        # adaptive steps use `jax.vmap` over one ODE for each image.
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            diffrax.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=0.05,
            y0=jax.vmap(self.encode)(images),
            args=self.field,
            adjoint=diffrax.ReversibleAdjoint(),
            max_steps=32,
        )
        assert sol.ys is not None
        return jax.vmap(self.decode)(sol.ys[-1])


def loss_fn(
    model: NeuralODE, images: Float[Array, "batch 64"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
    return jnp.mean(losses)


#
# On several devices
#


def parallel_gradient(mesh: jax.sharding.Mesh) -> Any:
    """A function that returns the loss of a batch, which is divided among the devices
    of `mesh`, and its gradient."""

    def on_each_device(model, images, labels):
        # Of what is here, as on a single device. Then the mean over all devices, which
        # is that over the batch, as the parts are of one size.
        value_and_grad = jax.value_and_grad(loss_fn)(model, images, labels)
        return jax.lax.pmean(value_and_grad, "batch")

    # With `check_vma`, JAX would track what differs between devices, which Diffrax's
    # loops do not support.
    return jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=(P(), P("batch"), P("batch")),
        out_specs=P(),
        check_vma=False,
    )


def put(mesh: jax.sharding.Mesh, spec: P, tree: PyTree) -> PyTree:
    """Makes global arrays of what this process has: of everything, if `spec` is `P()`;
    of its rows of a batch, if that is `P("batch")`."""
    make: Any = jax.make_array_from_process_local_data
    sharding = NamedSharding(mesh, spec)
    return jtu.tree_map(lambda x: make(sharding, np.asarray(x)), tree)


def say(message: str) -> None:
    if jax.process_index() == 0:
        print(message, flush=True)


def check_gradient(grads: NeuralODE, model: NeuralODE, *batch: np.ndarray) -> None:
    """Raises an error if `grads` are not those on one device."""
    expected = jax.jit(jax.grad(loss_fn))(model, *batch)

    def error(x, true_x):
        return np.max(np.abs(x - true_x)) / np.max(np.abs(true_x))

    errors = jtu.tree_map(error, *jax.device_get((grads, expected)))
    worst = max(jtu.tree_leaves(errors))
    print(f"largest relative difference to the gradient on one device: {worst:.1e}")
    if not worst < 1e-4:
        raise RuntimeError("The gradient is not that on one device.")


def load_data() -> tuple[np.ndarray, np.ndarray]:
    data: Any = load_digits(return_X_y=True)
    images, labels = data
    order = np.random.default_rng(0).permutation(len(images))
    return (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)


def train(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    num_devices, num_processes = jax.device_count(), jax.process_count()
    mesh = jax.make_mesh((num_devices,), ("batch",), axis_types=(AxisType.Auto,))
    say(f"{num_devices} devices, {num_processes} process(es): {jax.devices()[0]}, ...")
    if options.batch_size % num_devices != 0:
        raise SystemExit("`--batch-size` has to be a multiple of that.")

    # All of this is the same in each process.
    images, labels = load_data()
    num_train = 1536
    model = NeuralODE(16, 32, key=jr.key(0))
    num_batches = num_train // options.batch_size
    schedule = optax.cosine_decay_schedule(1e-2, options.epochs * num_batches)
    optimiser = optax.adam(schedule)
    rng = np.random.default_rng(1)

    gradient = jax.jit(parallel_gradient(mesh))

    # The new parameters are given the memory of the old ones.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(model, opt_state, grads):
        updates, opt_state = optimiser.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state

    opt_state = put(mesh, P(), optimiser.init(eqx.filter(model, eqx.is_array)))
    model = put(mesh, P(), model)
    for epoch in range(options.epochs):
        losses = []
        order = rng.permutation(num_train)[: num_batches * options.batch_size]
        for rows in order.reshape(num_batches, options.batch_size):
            mine = rows[jax.process_index() :: num_processes]
            batch = put(mesh, P("batch"), (images[mine], labels[mine]))
            loss, grads = gradient(model, *batch)
            if epoch == 0 and len(losses) == 0 and jax.process_index() == 0:
                check_gradient(grads, jax.device_get(model), images[rows], labels[rows])
            model, opt_state = update(model, opt_state, grads)
            losses.append(loss)
        say(f"epoch {epoch + 1:2}: loss {np.mean(jax.device_get(losses)):.3f}")

    logits = jax.jit(NeuralODE.__call__)(jax.device_get(model), images[num_train:])
    accuracy = np.mean(np.argmax(logits, axis=-1) == labels[num_train:])
    say(f"accuracy on {len(logits)} images that were not trained on: {accuracy:.1%}")
    say(f"All of it took {time.perf_counter() - start:.0f} s.")


#
# In several processes
#


def local_gpus() -> int:
    # In a process of its own, which gives back their memory.
    code = "import jax; print(len([x for x in jax.devices() if x.platform == 'gpu']))"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120)
    return int(out.stdout)


def start_processes(num: int, timeout: float) -> None:
    """Starts this program `num` times, and waits for all of them. If one fails, or it
    takes too long, then it ends the others."""
    env = dict(os.environ)
    gpus_each = local_gpus() // num
    if gpus_each == 0:
        env["JAX_PLATFORMS"] = "cpu"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # So that what is below is done also if this process is asked to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    processes: list[subprocess.Popen] = []
    deadline = time.monotonic() + timeout
    try:
        for i in range(num):
            which = ["--processes", num, "--process-id", i, "--coordinator", address]
            if gpus_each > 0:
                ids = range(i * gpus_each, (i + 1) * gpus_each)
                env["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, ids))
            command = [sys.executable, __file__, *sys.argv[1:], *map(str, which)]
            processes.append(subprocess.Popen(command, env=env))
        while True:
            codes = [process.poll() for process in processes]
            if any(codes):
                raise SystemExit(f"A process failed (exit codes: {codes}).")
            if None not in codes:
                return
            if time.monotonic() > deadline:
                raise SystemExit(f"Not done within {timeout:.0f} s.")
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def train_with_others(options: argparse.Namespace) -> None:
    """Trains as one of several processes."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        options.coordinator,
        options.processes,
        options.process_id,
        initialization_timeout=60,
    )
    try:
        train(options)
    except BaseException:
        traceback.print_exc()
        # At once. Otherwise JAX would wait for the others, which wait for this one.
        os._exit(1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, help="how many; one by default")
    parser.add_argument(
        "--devices", type=int, default=8, help="of the CPU, in all processes together"
    )
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--timeout", type=float, default=900, help="in seconds")
    parser.add_argument("--coordinator", help="address of the first process")
    parser.add_argument("--process-id", type=int, help="which of them this is")
    parser.add_argument("--smoke", action="store_true", help="only see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.epochs, options.timeout = 2, 120
        # Compiling takes most of the time.
        jax.config.update("jax_disable_most_optimizations", True)
    # GPUs would multiply matrices to three digits only.
    jax.config.update("jax_default_matmul_precision", "float32")
    return options


def main(options: argparse.Namespace) -> None:
    is_child = options.process_id is not None
    num = options.processes or 1
    if options.devices % num != 0:
        raise SystemExit("`--devices` has to be a multiple of `--processes`.")
    if not is_child and options.smoke and options.processes is None:
        # Before this process takes the GPUs, if any.
        start_processes(2, options.timeout)
    elif not is_child and num > 1:
        start_processes(num, options.timeout)
        return
    # This has no effect on GPUs.
    jax.config.update("jax_num_cpu_devices", options.devices // num)
    if is_child:
        train_with_others(options)
    else:
        train(options)


if __name__ == "__main__":
    main(parse_options())
