"""Of which strong and weak order the solvers of Stratonovich SDEs are.

    python benchmarks/sde_orders.py [--solver NAME ...] [--output FILE]

On two equations over [0, 1]:

- `commutative`: dy = cos(y) (a dt + b o dW), of one dimension, the solution of which is
  y = gd(c + a t + b W(t)), with gd(x) = 2 arctan(tanh(x / 2));
- `general`: of two dimensions, with two Brownian motions and noise that does not
  commute, of which the solution is taken to be that with 4096 steps of Heun's method,
  along the same `VirtualBrownianTree`.

The strong error is the mean of how far the end of a path is off, and the strong order
is the slope of that over the number of steps. The weak order is that of the mean of
what halving the steps changes in |y|^2, for which no solution has to be known; it is
left out if that is not seen to be more than noise. What is expected: 1 for the strong
order on the first equation, 0.5 on the second one (which no method that knows nothing
of the Lévy area can exceed), and 1 for the weak order. More on the first equation,
where drift and noise commute with each other as well, need not mean more on others.

Everything is in float64, and the paths are the same for every solver that asks for the
same Lévy area. Takes about half an hour on 2 CPU cores.
"""

import argparse
import dataclasses
import functools as ft
import json
import pathlib
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
from jaxtyping import Array


# Of 100,000 paths there are some with an increment for which the chord method, which is
# the default, does not converge.
_newton = optx.Newton(rtol=1e-10, atol=1e-10)
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
    "UReversible(Heun)": (lambda: diffrax.UReversible(diffrax.Heun()), _W),
    "UReversible(Midpoint)": (lambda: diffrax.UReversible(diffrax.Midpoint()), _W),
    "UReversible(Ralston)": (lambda: diffrax.UReversible(diffrax.Ralston()), _W),
    "UReversible(EES25)": (lambda: diffrax.UReversible(diffrax.EES25()), _W),
}
_fine = 4096


@dataclasses.dataclass(frozen=True)
class Problem:
    """With `exact`, the solution at 1 as a function of the Brownian motion there."""

    drift: Callable[[Any, Array, None], Array]
    diffusion: Callable[[Any, Array, None], Array]
    y0: Array
    noise: tuple[int, ...]
    exact: Callable[[Array], Array] | None


def _commutative() -> Problem:
    a, b, start = 0.5, 0.8, 0.3
    gudermannian = lambda x: 2 * jnp.arctan(jnp.tanh(x / 2))
    return Problem(
        drift=lambda t, y, args: a * jnp.cos(y),
        diffusion=lambda t, y, args: b * jnp.cos(y)[:, None],
        y0=gudermannian(jnp.array([start])),
        noise=(1,),
        exact=lambda w: gudermannian(start + a + b * w),
    )


def _general() -> Problem:
    def diffusion(t, y, args):
        p, q = y
        first = jnp.stack([jnp.sin(q), 0.5 * p])
        return jnp.stack([first, jnp.stack([jnp.cos(p), jnp.sin(2 * p)])])

    drift = lambda t, y, args: jnp.stack([y[1], -y[0] - y[1]])
    return Problem(drift, diffusion, jnp.array([1.0, 0.5]), (2,), None)


PROBLEMS = {"commutative": _commutative, "general": _general}


def _solve(
    problem: Problem, solver: diffrax.AbstractSolver, path: Any, num_steps: Any
) -> Array:
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
    )
    assert sol.ys is not None
    return sol.ys[-1]


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
    problem = PROBLEMS[name]()
    keys = jr.split(jr.key(0), num_paths)
    if problem.exact is None:
        [reference] = [
            solver
            for solver, (cls, area) in SOLVERS.items()
            if area is levy_area and cls in (diffrax.Heun, diffrax.SlowRK)
        ]
        return _ends(name, reference, fine)(float(fine), keys)
    tree = ft.partial(diffrax.VirtualBrownianTree, 0.0, 1.0, 0.5 / fine, problem.noise)
    of_key = lambda key: tree(key=key, levy_area=levy_area).evaluate(0.0, 1.0)
    increments: Any = jax.vmap(of_key)(keys)
    return jax.vmap(problem.exact)(increments)


def _slope(errors: list[float], nums: list[int]) -> float:
    return -float(np.polyfit(np.log(nums), np.log(errors), 1)[0])


def _noisy_slope(
    errors: list[float], noise: list[float], nums: list[int]
) -> tuple[float | None, float | None]:
    """The slope, and its standard error. `None` if there are not two points to see."""
    seen = [i for i in range(len(errors)) if errors[i] > 3 * noise[i]]
    if len(seen) < 2:
        return None, None
    (slope, _), covariance = np.polyfit(
        np.log([nums[i] for i in seen]),
        np.log([errors[i] for i in seen]),
        1,
        w=[errors[i] / noise[i] for i in seen],
        cov="unscaled",
    )
    return -float(slope), float(covariance[0, 0]) ** 0.5


def measure(name: str, solver: str, smoke: bool) -> dict[str, Any]:
    """One row: a solver on an equation."""
    nums = [4, 8, 16, 32, 64]
    num_strong, num_weak, fine = (32, 64, 256) if smoke else (1000, 100_000, _fine)
    make_solver, levy_area = SOLVERS[solver]
    ends = _ends(name, solver, fine)
    true_ends = _true_ends(name, levy_area, num_strong, fine)
    keys = jr.split(jr.key(0), num_strong)
    strong = []
    for num in nums:
        off = jnp.linalg.norm(ends(float(num), keys) - true_ends, axis=-1)
        strong.append(float(jnp.mean(off)))
    ends = _ends(name, solver, nums[-1])
    keys = jr.split(jr.key(1), num_weak)
    squares = [jnp.sum(ends(float(num), keys) ** 2, axis=-1) for num in nums]
    changes = [a - b for a, b in zip(squares, squares[1:])]
    weak = [float(jnp.abs(jnp.mean(x))) for x in changes]
    noise = [float(jnp.std(x)) / num_weak**0.5 for x in changes]
    weak_order, weak_order_error = _noisy_slope(weak, noise, nums[:-1])
    terms: Any = diffrax.ODETerm(lambda t, y, args: y)
    return dict(
        problem=name,
        solver=solver,
        levy_area=levy_area.__name__,
        claimed=make_solver().strong_order(terms),
        steps=nums,
        strong_errors=strong,
        strong_order=_slope(strong, nums),
        weak_changes=weak,
        weak_noise=noise,
        weak_order=weak_order,
        weak_order_error=weak_order_error,
        paths=[num_strong, num_weak],
    )


def print_row(row: dict[str, Any]) -> None:
    weak, error = row["weak_order"], row["weak_order_error"]
    print(
        f"{row['problem']:12s} {row['solver']:22s} {row['strong_order']:9.2f}"
        f" {row['strong_errors'][-1]:9.1e}"
        f" {'' if weak is None else f'{weak:.2f} +- {error:.2f}':>14s}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--solver", choices=SOLVERS, nargs="+", default=list(SOLVERS))
    parser.add_argument("--problem", choices=PROBLEMS, nargs="+", default=[*PROBLEMS])
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    if args.smoke:
        args.solver = ["Heun", "SlowRK"]
    jax.config.update("jax_enable_x64", True)
    head = "strong", "error", "weak"
    print(" " * 35 + "{:>10s} {:>9s} {:>14s}".format(*head))
    rows = []
    for problem in args.problem:
        for solver in args.solver:
            rows.append(measure(problem, solver, args.smoke))
            print_row(rows[-1])
    if args.output is not None:
        args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
