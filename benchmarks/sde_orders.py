"""Of which strong and weak order the solvers of Stratonovich SDEs are.

    python benchmarks/sde_orders.py [--solver NAME ...] [--output FILE]

On two equations over [0, 1]:

- `commutative`: dy = (1 - y) dt + 0.8 cos(y) o dW, of one dimension, so that the noise
  commutes with itself. It does not commute with the drift: if it did, a step would be
  one of an ODE, and orders higher than on others.
- `general`: of two dimensions, with two Brownian motions and noise that does not
  commute.

The solution is taken to be that in 4096 steps, along the same `VirtualBrownianTree`, of
`Heun`; or of `SlowRK`, for solvers that ask for the space-time Lévy area.

The strong error is the mean of how far the end of a path is off, and the strong order
is its slope over the number of steps, from 16 to 256. The weak order is the slope, from
4 to 64, of the mean of what halving the steps changes in |y|^2, for which no solution
has to be known; it is left out if that is not seen to be more than noise, and so is a
number of steps with which some solves fail. Both have a standard error, that of the
mean over the paths.

What is expected: on the first equation a strong order of 1 (1.5 for `SlowRK`), on the
second one 0.5, which no method that knows nothing of the Lévy area between the two
Brownian motions can exceed; and a weak order of 1.

Numerical reversal leaves a solver as it is: what is measured of `Heun` or `EES25` is
what a solve has that `ReversibleAdjoint` undoes. `UReversible` makes another solver,
and so has rows of its own.

Everything is in float64, and the paths are the same for every solver that asks for the
same Lévy area. Takes about ten minutes on one CPU core.
"""

import argparse
import dataclasses
import functools as ft
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import diffrax
import gradient
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
from jaxtyping import Array


# By default, in so few steps of such noise, some solves fail: the equations of a step
# are not solved by a chord method, or the two states of a pair come far apart.
_newton = optx.Newton(rtol=1e-10, atol=1e-10)
_coupled = ft.partial(diffrax.UReversible, max_gap=float("inf"))
_W = diffrax.BrownianIncrement
_H = diffrax.SpaceTimeLevyArea
SOLVERS: dict[str, tuple[Callable[[], diffrax.AbstractSolver], Any]] = {
    "ReversibleHeun": (diffrax.ReversibleHeun, _W),
    "AsynchronousLeapfrog": (diffrax.AsynchronousLeapfrog, _W),
    "ImplicitMidpoint": (lambda: diffrax.ImplicitMidpoint(_newton), _W),
    "GaussLegendre4": (lambda: diffrax.GaussLegendre4(_newton), _W),
    "EES25": (diffrax.EES25, _W),
    "EES27": (diffrax.EES27, _W),
    "Heun": (diffrax.Heun, _W),
    "Midpoint": (diffrax.Midpoint, _W),
    "Ralston": (diffrax.Ralston, _W),
    "EulerHeun": (diffrax.EulerHeun, _W),
    "StratonovichMilstein": (diffrax.StratonovichMilstein, _W),
    "SlowRK": (diffrax.SlowRK, _H),
    "SPaRK": (diffrax.SPaRK, _H),
    "GeneralShARK": (diffrax.GeneralShARK, _H),
    "UReversible(Heun)": (lambda: _coupled(diffrax.Heun()), _W),
    "UReversible(Midpoint)": (lambda: _coupled(diffrax.Midpoint()), _W),
    "UReversible(Ralston)": (lambda: _coupled(diffrax.Ralston()), _W),
    "UReversible(EES25)": (lambda: _coupled(diffrax.EES25()), _W),
}
# Numbers of steps.
STRONG = [16, 32, 64, 128, 256]
WEAK = [4, 8, 16, 32, 64]


@dataclasses.dataclass(frozen=True)
class Problem:
    drift: Callable[[Any, Array, None], Array]
    diffusion: Callable[[Any, Array, None], Array]
    y0: Array
    noise: tuple[int, ...]


def _commutative() -> Problem:
    return Problem(
        drift=lambda t, y, args: 1 - y,
        diffusion=lambda t, y, args: 0.8 * jnp.cos(y)[:, None],
        y0=jnp.array([0.3]),
        noise=(1,),
    )


def _general() -> Problem:
    def diffusion(t, y, args):
        p, q = y
        first = jnp.stack([jnp.sin(q), 0.5 * p])
        return jnp.stack([first, jnp.stack([jnp.cos(p), jnp.sin(2 * p)])])

    drift = lambda t, y, args: jnp.stack([y[1], -y[0] - y[1]])
    return Problem(drift, diffusion, jnp.array([1.0, 0.5]), (2,))


PROBLEMS = {"commutative": _commutative, "general": _general}


def _solve(
    problem: Problem, solver: diffrax.AbstractSolver, path: Any, num_steps: Any
) -> Array:
    """Where it ends. NaN, if it fails."""
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(problem.drift), diffrax.ControlTerm(problem.diffusion, path)
    )
    sol = diffrax.diffeqsolve(
        terms,
        solver,
        t0=0.0,
        t1=1.0,
        dt0=1 / num_steps,
        y0=problem.y0,
        adjoint=diffrax.ForwardMode(),
        max_steps=None,
        throw=False,
    )
    assert sol.ys is not None
    return jnp.where(sol.result == diffrax.RESULTS.successful, sol.ys[-1], jnp.nan)


@ft.cache
def _ends(name: str, solver: str, finest: int) -> Callable[[Any, Array], Array]:
    """Where the paths end that belong to some keys, with a number of steps, which is at
    most `finest`."""
    make_solver, levy_area = SOLVERS[solver]
    problem = PROBLEMS[name]()

    @jax.jit
    def ends(num_steps, keys):
        tree = ft.partial(
            diffrax.VirtualBrownianTree, 0.0, 1.0, 0.5 / finest, problem.noise
        )
        of_key = lambda key: tree(key=key, levy_area=levy_area)
        solve = lambda key: _solve(problem, make_solver(), of_key(key), num_steps)
        return jax.vmap(solve)(keys)

    return ends


@ft.cache
def _true_ends(name: str, levy_area: Any, num_paths: int, fine: int) -> Array:
    reference = "Heun" if levy_area is _W else "SlowRK"
    return _ends(name, reference, fine)(float(fine), jr.split(jr.key(0), num_paths))


def _order(samples: Array, nums: list[int]) -> tuple[float | None, float | None]:
    """Minus the slope of the means of the rows of `samples` over `nums`, in logarithms,
    and its standard error. `None` if there are no two means of the same sign that are
    more than noise, by three standard errors. A row with NaNs does not count."""
    num_paths = samples.shape[1]
    means, deviations = (np.asarray(f(samples, axis=1)) for f in (jnp.mean, jnp.std))
    weights = (means / deviations) ** 2 * num_paths
    seen = np.flatnonzero(weights > 9)
    if len(seen) < 2 or len(set(np.sign(means[seen]))) > 1:
        return None, None
    x, weights = np.log(np.array(nums)[seen]), weights[seen]
    x = x - np.average(x, weights=weights)
    slope = weights * x / np.sum(weights * x**2)
    # What a path has a share of, to first order. (The rows are of the same paths.)
    shares = jnp.asarray(slope / means[seen]) @ samples[seen]
    error = float(jnp.std(shares)) / num_paths**0.5
    return -float(slope @ np.log(np.abs(means[seen]))), error


def _finite(values: Array) -> list[float | None]:
    """JSON has no number that is not finite."""
    return [x if math.isfinite(x) else None for x in values.tolist()]


def measure(name: str, solver: str, smoke: bool) -> dict[str, Any]:
    """One row: a solver on an equation."""
    num_strong, num_weak, fine = (32, 64, 512) if smoke else (1000, 50_000, 4096)
    make_solver, levy_area = SOLVERS[solver]
    terms: Any = diffrax.ODETerm(lambda t, y, args: y)

    ends = _ends(name, solver, fine)
    true_ends = _true_ends(name, levy_area, num_strong, fine)
    keys = jr.split(jr.key(0), num_strong)
    off = [ends(float(num), keys) - true_ends for num in STRONG]
    off = jnp.linalg.norm(jnp.stack(off), axis=-1)
    strong_order, strong_order_error = _order(off, STRONG)

    ends = _ends(name, solver, WEAK[-1])
    keys = jr.split(jr.key(1), num_weak)
    squares = [jnp.sum(ends(float(num), keys) ** 2, axis=-1) for num in WEAK]
    changes = jnp.stack([a - b for a, b in zip(squares, squares[1:])])
    weak_order, weak_order_error = _order(changes, WEAK[:-1])
    weak_noise = jnp.std(changes, axis=1) / num_weak**0.5
    return dict(
        problem=name,
        solver=solver,
        levy_area=levy_area.__name__,
        claimed=make_solver().strong_order(terms),
        strong_steps=STRONG,
        strong_errors=_finite(jnp.mean(off, axis=1)),
        strong_order=strong_order,
        strong_order_error=strong_order_error,
        weak_steps=WEAK[:-1],
        weak_changes=_finite(jnp.mean(changes, axis=1)),
        weak_noise=_finite(weak_noise),
        weak_failed=[int(jnp.sum(jnp.isnan(x))) for x in changes],
        weak_order=weak_order,
        weak_order_error=weak_order_error,
        paths=[num_strong, num_weak],
        **gradient.provenance(),
    )


def _cell(order: float | None, error: float | None) -> str:
    return "" if order is None else f"{order:.2f} +- {error:.2f}"


def print_row(row: dict[str, Any]) -> None:
    strong, weak = (
        _cell(row[f"{kind}_order"], row[f"{kind}_order_error"])
        for kind in ("strong", "weak")
    )
    print(
        f"{row['problem']:12s} {row['solver']:22s} {strong:>14s}"
        f" {row['strong_errors'][-1]:9.1e} {weak:>14s}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--solver", choices=SOLVERS, nargs="+", default=list(SOLVERS))
    parser.add_argument("--problem", choices=PROBLEMS, nargs="+", default=[*PROBLEMS])
    default = pathlib.Path(__file__).parent / "output" / "sde_orders.jsonl"
    parser.add_argument("--output", type=pathlib.Path, default=default)
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    if args.smoke:
        args.solver = ["Heun", "SlowRK"]
    jax.config.update("jax_enable_x64", True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'':35s} {'strong':>14s} {'error':>9s} {'weak':>14s}")
    with args.output.open("w") as file:
        for problem in args.problem:
            for solver in args.solver:
                row = measure(problem, solver, args.smoke)
                print_row(row)
                file.write(json.dumps(row) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
