"""Work against error of the symplectic and composition methods.

    python benchmarks/compositions.py [--solver NAME ...]

For each method, at the same numbers of evaluations of the force: the largest error of
the solution at the end, and that of the energy after any step. On three problems:

- `kepler`: Kepler's problem with eccentricity 0.5, over 20 periods;
- `henon_heiles`: that of Hénon and Heiles at an energy of 0.09, up to time 100;
- `relativistic`: two coupled relativistic pendulums, up to time 100, the kinetic energy
    of which is not quadratic. So here `BlanesMoanRKN6` is of order 4.

The reference is `KahanLi8` with steps so small that rounding is what is left. In 64-bit
precision. These are not timings, and so are the same on any machine. Takes about a
minute on 2 CPU cores.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array


class Problem(NamedTuple):
    """`energy` is a function of `(q, v)`, and separable: `q' = d energy / dv`."""

    energy: Callable[[Array, Array], Array]
    q0: list[float]
    v0: list[float]
    t1: float
    # In multiples of the length of the interval.
    evaluations: tuple[int, ...]


def _kepler(q, v):
    return v @ v / 2 - 1 / jnp.sqrt(q @ q)


def _henon_heiles(q, v):
    return (v @ v + q @ q) / 2 + q[0] ** 2 * q[1] - q[1] ** 3 / 3


def _relativistic(q, v):
    potential = -jnp.sum(jnp.cos(q)) - 0.3 * jnp.cos(q[0] - q[1])
    return jnp.sqrt(1 + v @ v) + potential


PROBLEMS = {
    "kepler": Problem(
        _kepler, [0.5, 0.0], [0.0, 3**0.5], 40 * jnp.pi, (80, 160, 320, 640)
    ),
    "henon_heiles": Problem(
        _henon_heiles, [0.0, 0.3], [0.3, 0.1], 100.0, (10, 20, 40, 80)
    ),
    "relativistic": Problem(
        _relativistic, [1.2, 0.3], [0.0, 0.5], 100.0, (10, 20, 40, 80)
    ),
}
SOLVERS: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        diffrax.PositionVerlet,
        diffrax.VelocityVerlet,
        diffrax.Ruth3,
        diffrax.ForestRuth,
        diffrax.Suzuki4,
        diffrax.PEFRL,
        diffrax.BlanesMoan4,
        diffrax.BlanesMoan6,
        diffrax.BlanesMoanRKN6,
        diffrax.KahanLi6,
        diffrax.KahanLi8,
    )
}


def num_evaluations(cls: Any) -> int:
    """Of the force, for each step."""
    if cls is diffrax.VelocityVerlet:
        return 1
    return sum(x != 0 for x in cls.coefficients[1::2])


def make_solve(cls: Any, problem: Problem) -> Callable[[int], tuple[Array, Array]]:
    """A function of the number of steps, which returns the final state and the largest
    error of the energy."""
    drift = diffrax.ODETerm(lambda t, v, q0: jax.grad(problem.energy, 1)(q0, v))
    kick = diffrax.ODETerm(lambda t, q, q0: -jax.grad(problem.energy)(q, q0))
    q0, v0 = jnp.array(problem.q0), jnp.array(problem.v0)
    solver = cls()

    @jax.jit
    def solve(num_steps):
        h = problem.t1 / num_steps

        def body(_, carry):
            y, state, error = carry
            args = (drift, kick), 0.0, h, y, q0, state, False
            y, _, _, state, _ = solver.step(*args)
            off = jnp.abs(problem.energy(*y) - problem.energy(q0, v0))
            return y, state, jnp.maximum(error, off)

        state = solver.init((drift, kick), 0.0, h, (q0, v0), q0)
        start = (q0, v0), state, jnp.array(0.0)
        y, _, error = jax.lax.fori_loop(0, num_steps, body, start)
        return jnp.concatenate(y), error

    return solve


def measure(name: str, solvers: list[str], factors: tuple[int, ...]) -> None:
    problem = PROBLEMS[name]
    evaluations = [round(problem.t1 * factor) for factor in factors]
    reference, _ = make_solve(diffrax.KahanLi8, problem)(10 * evaluations[-1] // 17)
    head = "".join(f"{n:9d}" for n in evaluations)
    print(f"\n{name:15s}{'solution':>11s}{head}{'energy':>10s}{head}")
    for solver in solvers:
        cls = SOLVERS[solver]
        solve = make_solve(cls, problem)
        results = [solve(round(n / num_evaluations(cls))) for n in evaluations]
        errors = [jnp.max(jnp.abs(y - reference)) for y, _ in results]
        line = "".join(f"{float(x):9.1e}" for x in errors)
        line += " " * 10 + "".join(f"{float(x):9.1e}" for _, x in results)
        print(f"{solver:26s}{line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--solver", choices=SOLVERS, nargs="+", default=list(SOLVERS))
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    for name, problem in PROBLEMS.items():
        solvers = args.solver[:2] if args.smoke else args.solver
        measure(name, solvers, problem.evaluations[: 1 if args.smoke else None])


if __name__ == "__main__":
    main()
