"""How often the vector field is evaluated for each step of a gradient, and the least
that it takes.

    python benchmarks/least.py [--solver NAME ...] [--output FILE]

Counts, per accepted step with constant steps and `checkpoints=0`: the evaluations of
the solve; those of the way back, be that to undo a step or to linearise it; and the
transposed ones. Next to each stands the least number: that of a loop which evaluates
the vector field nowhere twice. (Where there are two vector fields, each counts.)
Then the same with what the certificate takes in addition.

These are counts, exact on any machine. Takes about two minutes on 2 CPU cores.
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from evaluations import count_calls


def _num_stages(solver: Any) -> int:
    """Without the last one, if that is the first of the step that comes next."""
    tableau = solver.tableau
    return tableau.num_stages - 1 if tableau.fsal else tableau.num_stages


def _coupled(solver: Any) -> tuple[int, int, int]:
    s = 2 * _num_stages(solver)
    return s, s, s


def _numerical(solver: Any) -> tuple[int, int, int]:
    # A step back, the first stage of which is that of the step which started there.
    s = _num_stages(solver)
    return s, 2 * s - 1, s


# For each solver: the least number of evaluations of the solve, of the way back, and of
# transposed ones.
Least = tuple[int, int, int]
SOLVERS: dict[str, tuple[Callable[[], diffrax.AbstractSolver], Least]] = {
    "SemiImplicitEuler": (diffrax.SemiImplicitEuler, (2, 2, 2)),
    "PositionVerlet": (diffrax.PositionVerlet, (3, 3, 3)),
    "VelocityVerlet": (diffrax.VelocityVerlet, (2, 2, 2)),
    "ForestRuth": (diffrax.ForestRuth, (7, 7, 7)),
    "LeapfrogMidpoint": (diffrax.LeapfrogMidpoint, (1, 1, 1)),
    "AsynchronousLeapfrog": (diffrax.AsynchronousLeapfrog, (1, 1, 1)),
    "ReversibleHeun": (diffrax.ReversibleHeun, (1, 1, 1)),
    "Euler": (diffrax.Euler, (1, 2, 1)),
    "Heun": (diffrax.Heun, _numerical(diffrax.Heun())),
    "Bosh3": (diffrax.Bosh3, _numerical(diffrax.Bosh3())),
    "Tsit5": (diffrax.Tsit5, _numerical(diffrax.Tsit5())),
    "Dopri8": (diffrax.Dopri8, _numerical(diffrax.Dopri8())),
    "UReversible(Heun)": (
        lambda: diffrax.UReversible(diffrax.Heun()),
        _coupled(diffrax.Heun()),
    ),
    "UReversible(Tsit5)": (
        lambda: diffrax.UReversible(diffrax.Tsit5()),
        _coupled(diffrax.Tsit5()),
    ),
}


def count(
    solver: diffrax.AbstractSolver, certificate: str, num_steps: int
) -> tuple[float, float, float]:
    """The evaluations of the solve, of the way back, and transposed ones, per step."""
    adjoint = diffrax.ReversibleAdjoint(checkpoints=0, certificate=certificate)

    def solve(field, y0):
        terms: Any = diffrax.ODETerm(lambda t, y, args: field(t, y, args))
        if isinstance(solver.term_structure, tuple):
            other = lambda t, y, args: -field(t, y, args)
            terms = terms, diffrax.ODETerm(other)
            y0 = y0, y0
        # Steps so small that no correction is needed.
        sol = diffrax.diffeqsolve(
            terms,
            solver,
            t0=0.0,
            t1=1e-6,
            dt0=1e-6 / num_steps,
            y0=y0,
            args=jnp.array(0.7),
            adjoint=adjoint,
            max_steps=num_steps,
        )
        return sum(jnp.sum(y) for y in jax.tree.leaves(sol.ys))

    def field(t, y, args):
        return args * jnp.sin(y)

    y0 = jnp.array([1.0, 2.0])
    (forward, _, _) = count_calls(field, lambda f: jax.jit(lambda y: solve(f, y))(y0))
    primal, linearised, transposed = count_calls(
        field, lambda f: jax.jit(jax.grad(lambda y: solve(f, y)))(y0)
    )
    backward = primal + linearised - forward
    return forward / num_steps, backward / num_steps, transposed / num_steps


def measure(name: str, num_steps: int) -> dict[str, Any]:
    make_solver, least = SOLVERS[name]
    reached = count(make_solver(), "cheap", num_steps)
    certified = count(make_solver(), "full", num_steps)
    kinds = "solve", "backward", "transposed"
    return dict(
        solver=name,
        steps=num_steps,
        least=dict(zip(kinds, least)),
        reached=dict(zip(kinds, reached)),
        certified=dict(zip(kinds, certified)),
    )


def print_row(row: dict[str, Any]) -> None:
    line = f"{row['solver']:20s}"
    for kind, least in row["least"].items():
        line += f" {row['reached'][kind]:9.2f} {least:5d} {row['certified'][kind]:9.2f}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--solver", choices=SOLVERS, nargs="+", default=list(SOLVERS))
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    if args.smoke:
        args.solver = ["LeapfrogMidpoint", "Heun"]
    jax.config.update("jax_enable_x64", True)
    print(
        " " * 20 + "".join(f" {kind:^25s}" for kind in ("solve", "back", "transposed"))
    )
    print(" " * 20 + f" {'reached':>9s} {'least':>5s} {'certified':>9s}" * 3)
    rows = []
    for name in args.solver:
        rows.append(measure(name, num_steps=20 if args.smoke else 200))
        print_row(rows[-1])
        jax.clear_caches()
    if args.output is not None:
        args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
