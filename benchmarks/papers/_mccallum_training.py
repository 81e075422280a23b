"""Training as McCallum and Foster do it, with several adjoints: how long it takes, and
the loss that it reaches."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _common import Row
from _mccallum_systems import Experiment
from _runge_kutta import Ralston3, RK4, Unrolled


BASES: dict[str, Callable[[], Any]] = {
    "Euler": diffrax.Euler,
    "Midpoint": diffrax.Midpoint,
    "Ralston3": Ralston3,
    "RK4": RK4,
    "Bosh3": diffrax.Bosh3,
}
BY_CONSTANT_STEPS = "Euler", "Midpoint", "Ralston3", "RK4"
COUPLED, NUMERICAL, STORED = "UReversible", "numerical", "checkpoints"
NOTHING_STORED = ", nothing stored"


def unrolled(base: str) -> diffrax.AbstractSolver:
    method = BASES[base]()
    return Unrolled(method) if isinstance(method, diffrax.AbstractERK) else method


def coupled(base: str, coupling: float = 0.999) -> diffrax.UReversible:
    # It is to go on where the two states have come apart, as that of the paper does.
    return diffrax.UReversible(BASES[base](), coupling, max_gap=float("inf"))


@dataclasses.dataclass(frozen=True)
class Method:
    """How gradients are computed: `COUPLED` or `NUMERICAL`, with `NOTHING_STORED` or
    without; or `STORED`, with so many checkpoints."""

    name: str
    checkpoints: int | None = None

    def make(self, base: str) -> tuple[Any, diffrax.AbstractAdjoint]:
        if self.name == STORED:
            adjoint = diffrax.RecursiveCheckpointAdjoint(self.checkpoints)
            return unrolled(base), adjoint
        if self.name.endswith(NOTHING_STORED):
            adjoint = diffrax.ReversibleAdjoint(0, "off", "ignore")
        else:
            adjoint = diffrax.ReversibleAdjoint()
        return coupled(base) if COUPLED in self.name else BASES[base](), adjoint


REVERSIBLE = [Method(COUPLED), Method(NUMERICAL)]
UNCERTIFIED = [Method(method.name + NOTHING_STORED) for method in REVERSIBLE]

Loss = Callable[[Any], tuple[Any, Any]]
State = tuple[Any, Any]


def make_loss(experiment: Experiment, solver: Any, adjoint: Any, static: Any) -> Loss:
    """Of the parameters of the network. Next to it, the number of steps."""
    ts, data = (jnp.asarray(x) for x in (experiment.ts, experiment.data))
    dt0, controller, max_steps = None, diffrax.ConstantStepSize(), experiment.num_steps
    if experiment.adaptive:
        controller, max_steps = diffrax.PIDController(rtol=1e-6, atol=1e-6), 1000
    else:
        dt0 = float(experiment.ts[-1] - experiment.ts[0]) / max_steps

    def loss(params):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(experiment.field),
            solver,
            t0=experiment.ts[0],
            t1=experiment.ts[-1],
            dt0=dt0,
            y0=data[0],
            args=eqx.combine(params, static),
            saveat=diffrax.SaveAt(steps=True),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=max_steps,
            throw=False,
        )
        assert sol.ts is not None and sol.ys is not None
        found, expected = sol.ys, data[1:]
        if experiment.adaptive:
            # What is not filled in is infinite.
            of = jnp.isfinite(sol.ts)
            steps = jnp.where(of, sol.ts, 10.0), jnp.where(of[:, None], sol.ys, 0.0)
            path = diffrax.LinearInterpolation(*steps)
            found, expected = jax.vmap(path.evaluate)(ts), data
        mean = jnp.mean((found - expected) ** 2)
        return mean, sol.stats["num_accepted_steps"]

    return loss


def make_training(
    experiment: Experiment, base: str, method: Method
) -> tuple[Callable[[int], State], Callable[[State], tuple[State, Any]]]:
    """A function of a seed, for where to start; and a step of training, which returns
    the loss and the number of steps as well."""
    make_network = lambda seed: eqx.nn.MLP(
        experiment.num_inputs,
        experiment.data.shape[1],
        width_size=10,
        depth=1,
        activation=jnp.tanh,
        key=jr.key(seed),
    )
    _, static = eqx.partition(make_network(0), eqx.is_inexact_array)
    loss = make_loss(experiment, *method.make(base), static)
    optimiser = optax.adamw(1e-2, weight_decay=1e-5)

    def start(seed):
        params = eqx.filter(make_network(seed), eqx.is_inexact_array)
        return params, optimiser.init(params)

    def step(state):
        params, rest = state
        value__steps, grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, rest = optimiser.update(grads, rest, params)
        return (eqx.apply_updates(params, updates), rest), value__steps

    return start, step


@dataclasses.dataclass
class _Timed:
    """One that takes its turn."""

    step: Any
    state: State
    seconds: list[float] = dataclasses.field(default_factory=list)
    num_steps: int = 0

    def take_turn(self) -> None:
        # Those that are slow come less often.
        if len(self.seconds) >= 3 and np.median(self.seconds) > 0.5:
            return
        start = time.perf_counter()
        self.state, (_, num_steps) = jax.block_until_ready(self.step(self.state))
        self.seconds.append(time.perf_counter() - start)
        self.num_steps = int(num_steps)


def time_training(
    experiment: Experiment, base: str, methods: list[Method], turns: int, untimed: int
) -> Iterator[Row]:
    """Each method trains a network by itself, all from the same start; they take turns.
    The first steps of each, `untimed` many, do not count."""
    timed, rows = [], []
    for method in methods:
        start, step = make_training(experiment, base, method)
        state = start(0)
        compiled: Any = jax.jit(step).lower(state).compile()
        for _ in range(untimed):
            state, _ = jax.block_until_ready(compiled(state))
        timed.append(_Timed(compiled, state))
        rows.append(
            dict(
                experiment=experiment.name,
                solver=base,
                method=method.name,
                checkpoints=method.checkpoints,
                temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
            )
        )
    for _ in range(turns):
        for one in timed:
            one.take_turn()
    first = float(np.median(timed[0].seconds))
    for row, one in zip(rows, timed, strict=True):
        lower, median, upper = (
            float(np.quantile(one.seconds, q)) for q in (0.25, 0.5, 0.75)
        )
        yield row | dict(
            training_steps=len(one.seconds),
            untimed=untimed,
            steps=one.num_steps,
            seconds_lower_quartile=lower,
            seconds_median=median,
            seconds_upper_quartile=upper,
            time_ratio=median / first,
        )


def train(
    experiment: Experiment, base: str, method: Method, num_steps: int, seeds: int
) -> Iterator[Row]:
    """The best loss over the training, as that is what is published."""
    start, step = make_training(experiment, base, method)

    @jax.jit
    def run(state):
        _, (losses, steps) = jax.lax.scan(lambda s, _: step(s), state, None, num_steps)
        return losses, steps

    for seed in range(seeds):
        losses, steps = map(np.asarray, run(start(seed)))
        finite = np.where(np.isfinite(losses), losses, np.inf)
        yield dict(
            experiment=experiment.name,
            solver=base,
            method=method.name,
            checkpoints=method.checkpoints,
            seed=seed,
            training_steps=num_steps,
            loss=float(np.min(finite)),
            reached_at=int(np.argmin(finite)),
            all_finite=bool(np.all(np.isfinite(losses))),
            steps=int(steps[np.argmin(finite)]),
            noise=experiment.noise,
        )
