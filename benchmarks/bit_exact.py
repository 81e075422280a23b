"""What it takes to recover every bit, and what comes back without that.

    python benchmarks/bit_exact.py [--solver NAME ...] [--steps N] [--repeats N]
        [--output FILE]

For each solver, with and without `BitExact`, in 32-bit and 64-bit precision: by how
much going back over a million steps of the system of Henon and Heiles, which is
chaotic, misses its start (of a pendulum, for solvers that are not for chaotic systems;
of a pendulum with damping, for those that are damped); whether every bit is the same;
and what is stored to that end, in bits for each number and step.

Then what it costs, relative to the same solver without it, both by
`ReversibleAdjoint(checkpoints=0)`: the time of a solve and of a gradient, for that
system, where the overhead of each step is most of it, and for one of 256 oscillators
coupled by a network of width 64, where the vector field is; and tracing and compiling
the gradient. The certificate of the solver without it is not asked for: it would not
let that gradient pass.

Times are medians over repetitions that take turns in one process, on a machine that
should have nothing else to do: about twenty minutes on 2 CPU cores. Appends one line of
JSON for each solver and precision to the output file.
"""

import argparse
import functools as ft
import json
import math
import pathlib
import statistics
import time
from typing import Any

import diffrax
import gradient
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np


SOLVERS: dict[str, Any] = {
    "SemiImplicitEuler": diffrax.SemiImplicitEuler(),
    "VelocityVerlet": diffrax.VelocityVerlet(),
    "PEFRL": diffrax.PEFRL(),
    "LeapfrogMidpoint": diffrax.LeapfrogMidpoint(),
    "AsynchronousLeapfrog": diffrax.AsynchronousLeapfrog(),
    "ReversibleHeun": diffrax.ReversibleHeun(),
    "Tsit5": diffrax.Tsit5(),
    "UReversible(Tsit5, 0.99)": diffrax.UReversible(
        diffrax.Tsit5(), 0.99, max_gap=float("inf")
    ),
    "UReversible(Heun, 0.9)": diffrax.UReversible(
        diffrax.Heun(), 0.9, max_gap=float("inf")
    ),
    "AsynchronousLeapfrog(0.9)": diffrax.AsynchronousLeapfrog(0.9),
}
# On which problem, if not the chaotic one.
REGULAR = {"AsynchronousLeapfrog", "Tsit5"}
DAMPED = {"UReversible(Heun, 0.9)", "AsynchronousLeapfrog(0.9)"}
STEP = 1 / 64


def _pair(force: Any, solver: Any) -> Any:
    """The terms of `q' = v, v' = force(t, q, v, args)`."""
    if isinstance(solver.term_structure, tuple):
        return (
            diffrax.ODETerm(lambda t, v, args: v),
            diffrax.ODETerm(lambda t, q, args: force(t, q, None, args)),
        )
    return diffrax.ODETerm(lambda t, y, args: (y[1], force(t, *y, args)))


def _henon_heiles(t, q, v, scale):
    x, y = q
    return -scale * jnp.stack([x + 2 * x * y, y + x * x - y * y])


def _pendulum(t, q, v, scale):
    return -scale * jnp.sin(q)


def _damped(t, q, v, scale):
    return jnp.cos(t).astype(q.dtype) - scale * jnp.sin(q) - v / 4


def _network(t, q, v, weights):
    w0, w1 = weights
    return jnp.tanh(q @ w0) @ w1 - q


def _force(name: str) -> Any:
    if name in DAMPED:
        return _damped
    return _pendulum if name in REGULAR else _henon_heiles


def _start(dtype: Any) -> tuple[jax.Array, jax.Array]:
    return jnp.array([0.0, 0.1], dtype), jnp.array([0.55, 0.08], dtype)


def there_and_back(solver: Any, terms: Any, num_steps: int, y0: Any) -> Any:
    """Makes steps of one size, and undoes them all. Returns the state there, and the
    start that came of it."""
    dtype = jtu.tree_leaves(y0)[0].dtype
    h, scale = jnp.array(STEP, dtype), jnp.array(1.0, dtype)

    def at(i):
        return i.astype(dtype) * h

    def step(i, carry):
        y, state = carry
        y, _, _, state, _ = solver.step(terms, at(i), at(i + 1), y, scale, state, False)
        return y, state

    def back(j, carry):
        y, state = carry
        i = num_steps - 1 - j
        recorded = at(jnp.maximum(i - 1, 0))
        state = solver.restore_state(terms, at(i + 1), y, scale, state, recorded, False)
        y, _, state = solver.backward_step(
            terms, at(i), at(i + 1), y, scale, state, False
        )
        return y, state

    state0 = solver.init(terms, 0 * h, h, y0, scale)
    end = jax.lax.fori_loop(0, num_steps, step, (y0, state0))
    return end, jax.lax.fori_loop(0, num_steps, back, end)


def recover(name: str, solver: Any, num_steps: int, dtype: Any) -> dict[str, Any]:
    terms = _pair(_force(name), solver)
    run = jax.jit(ft.partial(there_and_back, solver, terms, num_steps))
    y0 = _start(dtype)
    (_, state), (y, _) = run(y0)
    pairs = list(zip(y0, y))
    missed = max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)
    size = max(float(jnp.max(jnp.abs(a))) for a in y0)
    stacks = getattr(state, "stacks", None)
    stored = 0 if stacks is None else sum(x.nbytes for x in jtu.tree_leaves(stacks))
    return dict(
        exact=all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs),
        missed=missed / size if math.isfinite(missed) else None,
        stored_bits=8 * stored / num_steps / sum(a.size for a in y0),
    )


def _loss(problem, name, solver, num_steps, certificate, y0, args):
    dtype = y0[0].dtype
    force = _network if problem == "network" else _force(name)
    sol = diffrax.diffeqsolve(
        _pair(force, solver),
        solver,
        jnp.array(0.0, dtype),
        jnp.array(num_steps * STEP, dtype),
        jnp.array(STEP, dtype),
        y0,
        args,
        max_steps=num_steps,
        adjoint=diffrax.ReversibleAdjoint(0, certificate, "ignore"),
        throw=False,
    )
    ys: Any = sol.ys
    return sum(jnp.sum(y**2) for y in ys)


def _problem(problem: str, dtype: Any) -> tuple[int, Any]:
    """The number of steps, and the arguments."""
    if problem == "small":
        return 20_000, (_start(dtype), jnp.array(1.0, dtype))
    keys = jr.split(jr.key(0), 4)
    y0 = tuple(jr.normal(k, (256, 16), dtype) / 4 for k in keys[:2])
    weights = (
        jr.normal(keys[2], (16, 64), dtype) / 4,
        jr.normal(keys[3], (64, 16), dtype) / 16,
    )
    return 500, (y0, weights)


def cost(problem: str, name: str, dtype: Any, repeats: int) -> dict[str, Any]:
    """Relative to the solver without `BitExact`."""
    solver = SOLVERS[name]
    num_steps, args = _problem(problem, dtype)
    plain = solver
    if name == "Tsit5":
        # That of which it is the limit.
        plain = diffrax.UReversible(solver, 0.999, max_gap=float("inf"))
    exact = diffrax.BitExact(solver, size=1.0, max_steps=num_steps)
    programs: dict[str, list[Any]] = {"solve": [], "gradient": []}
    compiling = []
    for one, certificate in ((exact, "full"), (plain, "off")):
        loss = ft.partial(_loss, problem, name, one, num_steps, certificate)
        start = time.perf_counter()
        grad = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile()
        compiling.append(time.perf_counter() - start)
        programs["solve"].append(jax.jit(loss).lower(*args).compile())
        programs["gradient"].append(grad)
    out = dict(compiling=compiling[0] / compiling[1])
    for what, pair in programs.items():
        times: list[list[float]] = [[], []]
        for _ in range(repeats + 1):
            for program, found in zip(pair, times):
                start = time.perf_counter()
                jax.block_until_ready(program(*args))
                found.append(time.perf_counter() - start)
        exact_time, plain_time = (statistics.median(x[1:]) for x in times)
        out[what] = exact_time / plain_time
        out[f"{what}_microseconds"] = 1e6 * exact_time / num_steps
    return out


def measure(name: str, dtype: str, num_steps: int, repeats: int) -> dict[str, Any]:
    solver = SOLVERS[name]
    row: dict[str, Any] = dict(solver=name, dtype=dtype, steps=num_steps)
    exact = diffrax.BitExact(solver, size=1.0, max_steps=num_steps)
    row["exact"] = recover(name, exact, num_steps, dtype)
    if isinstance(solver, diffrax.AbstractReversibleSolver):
        row["plain"] = recover(name, solver, num_steps, dtype)
    for problem in ("small", "network"):
        row[problem] = cost(problem, name, jnp.dtype(dtype), repeats)
    return row


def print_row(row: dict[str, Any]) -> None:
    plain = row.get("plain", {}).get("missed")
    line = f"{row['solver']:26s} {row['dtype']} {row['exact']['exact']!s:5s} "
    line += f"{row['exact']['stored_bits']:8.4f} "
    line += f"{'' if plain is None else f'{plain:.0e}':>7s}"
    for problem in ("small", "network"):
        for what in ("solve", "gradient", "compiling"):
            line += f" {row[problem][what]:9.2f}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--solver", choices=SOLVERS, nargs="+", default=list(SOLVERS))
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    if args.smoke:
        args.solver, args.steps, args.repeats = ["LeapfrogMidpoint"], 100, 1
    output: pathlib.Path | None = args.output
    jax.config.update("jax_enable_x64", True)
    heads = ("solve", "gradient", "compiling") * 2
    print(f"{'':26s} {'':7s} same  {'bits':>9s} {'without':>7s}", end="")
    print("".join(f" {head:>9s}" for head in heads))
    for name in args.solver:
        for dtype in ("float32", "float64"):
            row = measure(name, dtype, args.steps, args.repeats)
            row |= gradient.provenance()
            print_row(row)
            jax.clear_caches()
            if output is not None:
                with output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
