"""The three systems that McCallum and Foster train on, with their data.

Two of them were measured in a laboratory (Schmidt and Lipson 2009), and the files are
not ours to ship. So the same systems are simulated here, with noise, into a table of
the same format, which is then read as a file would be.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


Field = Callable[[Any, Array, Any], Array]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A network in the place of a vector field is trained to have a solution that goes
    through `data` at `ts`. `field` is a function of `(t, y, network)`. The published
    numbers of checkpoints and of training steps go along."""

    name: str
    field: Field
    num_inputs: int
    ts: np.ndarray
    data: np.ndarray
    checkpoints: tuple[int, ...]
    training_steps: int
    adaptive: bool = False
    # The mean square of what the data is off, if that is known.
    noise: float | None = None

    @property
    def num_steps(self) -> int:
        return len(self.ts) - 1


def _solve(
    field: Field, y0: np.ndarray, ts: np.ndarray, solver: Any, controller: Any, dt0: Any
) -> np.ndarray:
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        t0=ts[0],
        t1=ts[-1],
        dt0=dt0,
        y0=jnp.asarray(y0),
        saveat=diffrax.SaveAt(ts=jnp.asarray(ts)),
        stepsize_controller=controller,
        adjoint=diffrax.ForwardMode(),
        max_steps=None,
    )
    return np.asarray(sol.ys)


def _exactly(field: Field, y0: np.ndarray, ts: np.ndarray) -> np.ndarray:
    controller = diffrax.PIDController(rtol=1e-10, atol=1e-10)
    return _solve(field, y0, ts, diffrax.Dopri8(), controller, None)


def white_dwarf(solver: diffrax.AbstractSolver, num_steps: int = 1000) -> Experiment:
    """Chandrasekhar's equation. The data is the solution by the solver itself."""

    def true_field(t, y, args):
        del args
        force = -((y[0] ** 2 - 0.001) ** 1.5) - 2 * y[1] / (t + 0.5)
        return jnp.stack([y[1], force])

    def field(t, y, network):
        return network(jnp.concatenate([jnp.asarray(t, y.dtype)[None], y]))

    ts = np.linspace(0, 5, num_steps + 1)
    dt0 = 5 / num_steps
    y0 = np.array([1.0, 0.0])
    data = _solve(true_field, y0, ts, solver, diffrax.ConstantStepSize(), dt0)
    checkpoints = 2, 4, 8, 16, 32, 44
    return Experiment("white dwarf", field, 3, ts, data, checkpoints, 1000)


def _oscillators(t, y, args):
    """Two gliders on an air track between three springs, with a little friction."""
    del t, args
    x1, x2, v1, v2 = y
    force1, force2 = 4 * (x2 - 2 * x1), 4 * (x1 - 2 * x2)
    return jnp.stack([v1, v2, force1 - 0.1 * v1, force2 - 0.1 * v2])


def _double_pendulum(t, y, args):
    """Two equal masses on rods of 0.3 m."""
    del t, args
    a1, a2, w1, w2 = y
    g, length = 9.81, 0.3
    d = a1 - a2
    scale = length * (3 - jnp.cos(2 * d))
    swing1 = 2 * jnp.sin(d) * length * (w2**2 + w1**2 * jnp.cos(d))
    accel1 = -(3 * g * jnp.sin(a1) + g * jnp.sin(a1 - 2 * a2) + swing1) / scale
    pull2 = 2 * w1**2 * length + 2 * g * jnp.cos(a1) + w2**2 * length * jnp.cos(d)
    return jnp.stack([w1, w2, accel1, 2 * jnp.sin(d) * pull2 / scale])


@dataclasses.dataclass(frozen=True)
class _Laboratory:
    """What is simulated of a recording, in the units of the file: the times of its
    rows, where it starts, and the standard deviation of the noise."""

    field: Field
    times: np.ndarray
    y0: np.ndarray
    noise: np.ndarray

    def record(self) -> tuple[str, float]:
        """The file, and the mean square of the noise in it."""
        ys = _exactly(self.field, self.y0, self.times)
        noise = np.random.default_rng(0).normal(size=ys.shape) * self.noise
        rows = [[0, t, *y] for t, y in zip(self.times, ys + noise, strict=True)]
        lines = (" ".join(f"{x:.9g}" for x in row) for row in rows)
        return "% trial t y...\n" + "\n".join(lines), float(np.mean(noise**2))


_OSCILLATORS = _Laboratory(
    _oscillators,
    np.linspace(0.033, 16.52, 495),
    np.array([60.0, -20.0, 0.0, 0.0]),
    np.full(4, 3.0),
)
_PENDULUM = _Laboratory(
    _double_pendulum,
    np.linspace(0, 8.86, 819),
    np.array([2.0, 2.5, 0.0, 0.0]),
    np.array([0.05, 0.05, 0.5, 0.5]),
)


def read_recording(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Times and values of the first trial of a file of Schmidt and Lipson's: columns
    `trial, t, y...`; lines that do not start with a number are comments."""
    rows = []
    for line in text.replace(",", " ").splitlines():
        words = line.split()
        if words and words[0].lstrip("+-").replace(".", "").isdigit():
            rows.append([float(word) for word in words])
    if not rows or {len(row) for row in rows} != {6}:
        raise ValueError("Each row of the data must have 6 columns: trial, t, and 4.")
    table = np.array(rows)
    table = table[table[:, 0] == table[0, 0]]
    return table[:, 1], table[:, 2:]


def _recorded(
    name: str,
    text: str | None,
    laboratory: _Laboratory,
    ts: np.ndarray,
    scale: float,
    **kwargs: Any,
) -> Experiment:
    noise = None
    if text is None:
        text, noise = laboratory.record()
        noise /= scale**2
    times, values = read_recording(text)
    columns = [np.interp(ts, times, column) for column in values.T / scale]
    field = lambda t, y, network: network(y)
    data = np.stack(columns, axis=1)
    return Experiment(name, field, 4, ts, data, noise=noise, **kwargs)


def coupled_oscillators(text: str | None = None, num_points: int = 500) -> Experiment:
    return _recorded(
        "coupled oscillators",
        text,
        _OSCILLATORS,
        np.linspace(0, 3, num_points),
        100.0,
        checkpoints=(2, 4, 8, 16, 31),
        training_steps=10_000,
    )


def double_pendulum(text: str | None = None, num_points: int = 500) -> Experiment:
    return _recorded(
        "double pendulum",
        text,
        _PENDULUM,
        np.linspace(0, 2, num_points),
        10.0,
        checkpoints=(2, 4, 8, 16, 32),
        training_steps=10_000,
        adaptive=True,
    )
