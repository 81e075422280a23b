"""The problems of `peers.py`, each written once for NumPy, JAX and PyTorch alike."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np


# `field(xp, t, y, params)`, where `xp` is `jax.numpy` or `torch`.
Field = Callable[[Any, Any, Any, list[Any]], Any]
# For all tools, if steps are adaptive. It is what Diffrax has by default.
MAX_STEPS = 4096


@dataclasses.dataclass(frozen=True)
class Problem:
    """`dy = field(t, y, params) dt`, and `+ diffusion(t, y, params) * dW` in the sense
    of Stratonovich if there is a diffusion, from `t = 0` to `t1`. The gradient is that
    of the sum of the squares of `y(t1)`, with respect to `params` and to `y0`."""

    name: str
    field: Field
    t1: float
    params: list[np.ndarray]
    y0: np.ndarray
    diffusion: Field | None = None

    @property
    def dtype(self) -> str:
        return self.y0.dtype.name

    def astype(self, dtype: str) -> "Problem":
        params = [p.astype(dtype) for p in self.params]
        return dataclasses.replace(self, params=params, y0=self.y0.astype(dtype))


def _layers(rng: np.random.Generator, sizes: list[int], gain: float) -> list[Any]:
    """Weights and biases by turns."""
    params = []
    for n, m in zip(sizes[:-1], sizes[1:]):
        bound = gain / math.sqrt(n)
        params += [rng.uniform(-bound, bound, (n, m)), rng.uniform(-bound, bound, m)]
    return params


def _mlp(xp: Any, y: Any, params: list[Any]) -> Any:
    for weight, bias in zip(params[:-2:2], params[1:-2:2]):
        y = xp.tanh(y @ weight + bias)
    return y @ params[-2] + params[-1]


def neural_ode(size: int) -> Problem:
    """A network of width 64; the state is a batch of `size` vectors of 16 numbers."""
    rng = np.random.default_rng(0)
    params = _layers(rng, [16, 64, 64, 16], gain=2.0)
    y0 = rng.normal(size=(size, 16))
    field = lambda xp, t, y, params: _mlp(xp, y, params)
    return Problem("neural_ode", field, 10.0, params, y0).astype("float32")


def lorenz(size: int) -> Problem:
    """Lorenz's equations, over a time in which errors do not grow much. The state is
    three numbers, and they are in float64, for small tolerances."""

    def field(xp, t, y, params):
        del t
        sigma, rho, beta = params
        a, b, c = y[0], y[1], y[2]
        return xp.stack([sigma * (b - a), a * (rho - c) - b, a * b - beta * c])

    assert size == 3
    params = [np.array(10.0), np.array(28.0), np.array(8 / 3)]
    return Problem("lorenz", field, 2.0, params, np.array([1.0, 2.0, 3.0]))


def _heat(name: str, size: int, neighbours: Callable[[Any, Any], Any]) -> Problem:
    """Heat on a square grid of `size` points, with as many unknown conductivities. 8 is
    about the largest rate at which anything decays."""

    def field(xp, t, y, params):
        del t
        (conductivity,) = params
        return conductivity * (neighbours(xp, y) - 4 * y)

    n = math.isqrt(size)
    assert n**2 == size
    rng = np.random.default_rng(0)
    x = np.arange(n) * (2 * np.pi / n)
    conductivity = 0.8 + 0.2 * np.sin(x)[:, None] * np.cos(2 * x)
    y0 = rng.normal(size=(n, n))
    return Problem(name, field, 20.0, [conductivity], y0).astype("float32")


def heat(size: int) -> Problem:
    """Zero outside of the grid."""

    def neighbours(xp, y):
        around = (1, 1, 1, 1)
        y = xp.constant_pad_nd(y, around) if xp.__name__ == "torch" else xp.pad(y, 1)
        return y[2:, 1:-1] + y[:-2, 1:-1] + y[1:-1, 2:] + y[1:-1, :-2]

    return _heat("heat", size, neighbours)


def heat_periodic(size: int) -> Problem:
    """`ReversibleAdjoint` is slow here, by what XLA makes of it on a CPU: it fuses the
    stages of a step, and then computes much of each of them anew for each of the four
    neighbours. With `XLA_FLAGS=--xla_disable_hlo_passes=fusion` it is not slow."""

    def neighbours(xp, y):
        vertical = xp.roll(y, 1, 0) + xp.roll(y, -1, 0)
        return vertical + xp.roll(y, 1, 1) + xp.roll(y, -1, 1)

    return _heat("heat_periodic", size, neighbours)


def neural_sde(size: int) -> Problem:
    """Drift and diagonal diffusion are networks of width 64; the state is a batch of
    `size` vectors of 16 numbers."""
    rng = np.random.default_rng(0)
    drift = _layers(rng, [16, 64, 16], gain=1.0)
    params = drift + _layers(rng, [16, 64, 16], gain=1.0)
    num_drift = len(drift)

    def field(xp, t, y, params):
        del t
        return xp.tanh(_mlp(xp, y, params[:num_drift]))

    def diffusion(xp, t, y, params):
        del t
        return 0.5 * xp.tanh(_mlp(xp, y, params[num_drift:]))

    y0 = rng.normal(size=(size, 16))
    return Problem("neural_sde", field, 1.0, params, y0, diffusion).astype("float32")


PROBLEMS: dict[str, Callable[[int], Problem]] = dict(
    neural_ode=neural_ode,
    lorenz=lorenz,
    heat=heat,
    heat_periodic=heat_periodic,
    neural_sde=neural_sde,
)


@dataclasses.dataclass(frozen=True)
class Work:
    """How finely a problem is solved: in so many constant steps, or to a relative and
    absolute tolerance."""

    steps: int | None = None
    tol: float | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    tool: str  # "diffrax", "jax", "torchdiffeq" or "torchsde"
    solver: str
    gradient: str
    noise: str = ""  # What makes a Brownian motion, for an SDE.


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What there is to be run. `run` returns when all is computed; what it returns
    `flatten` makes a vector: the gradient with respect to `params`, then to `y0`."""

    run: Callable[[], Any]
    flatten: Callable[[Any], np.ndarray]
    details: dict[str, Any]
