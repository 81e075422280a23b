"""What it takes to find where a step started: evaluations of the vector field against
accuracy, for several ways of doing it.

    python benchmarks/corrections.py [--problem NAME ...] [--output FILE]

A solve in constant steps is undone one step at a time, each from where the solve had
come to, for several step sizes. A way of doing it is a first guess and what that is
corrected by:

- `step back`: a step back from where the step ended, of which the first stage is known
  already. Or `extrapolated`: the polynomial through the three states that come after,
  and through the vector field there; it takes no evaluations.
- `plain`: by the difference of a step back from where the step should end and one from
  where it does end. This is what `ReversibleAdjoint` does.
- `residual`: by how much it misses where it should end.
- `Anderson`: the same, with the best combination of the last two corrections.
- `Newton--Krylov`: Newton's method, each linear equation being solved by two iterations
  of GMRES, with derivatives in one direction, each of which counts as a step. (In the
  linearisation that is needed in the end, they cost about that.)

The expectation is that `plain` takes the fewest evaluations of those that start with a
step back, or is near to that. To extrapolate takes fewer, but from states that are
right to the last bit, as they are here: it magnifies by what they are off. So the last
column is another number: the share of the steps which an extrapolated guess finds at
once if it goes on from what it has found.

With each step size stands `h L`, its product with the Lipschitz constant: the largest
norm of the Jacobian over the solve. The evaluations are the mean over all steps,
without those of the step that is linearised in the end, which every way has to make. A
step has been found if the one that starts there ends within 16 units of rounding of
where it should, of the largest entry. A way that has not found some step in 12 rounds
has no evaluations, but the distance that it came to.

These are counts, exact on any machine. Takes about two minutes on 2 CPU cores.
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
from jaxtyping import Array, Bool, Float


State = Float[Array, " n"]
Map = Callable[[State], State]

NUM_STEPS = 40
NUM_ROUNDS = 12
TOLERANCE = 16.0


def _lorenz(y: State) -> State:
    a, b, c = y
    return jnp.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c])


def _van_der_pol(y: State) -> State:
    a, b = y
    return jnp.stack([b, 5 * (1 - a**2) * b - a])


def _network(y: State) -> State:
    w0, w1 = (jr.normal(jr.key(i), (16, 16)) / 4 for i in (0, 1))
    return w1 @ jnp.tanh(2 * (w0 @ y))


def _heat(y: State) -> State:
    return 100 * (jnp.roll(y, 1) - 2 * y + jnp.roll(y, -1))


# With where to start from.
PROBLEMS: dict[str, tuple[Map, np.ndarray]] = {
    "lorenz": (_lorenz, np.array([1.0, 2.0, 20.0])),
    "van_der_pol": (_van_der_pol, np.array([2.0, 0.5])),
    "neural_ode": (_network, np.sin(np.arange(16.0))),
    "heat": (_heat, np.sin(np.arange(32.0) ** 2)),
}
# The products of the step size and the Lipschitz constant.
SIZES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that a way of undoing a step has to do with. `step` and `step_back` are
    functions of a state, and `num_stages` is what each takes."""

    step: Map
    step_back: Map
    num_stages: int


# A correction is a function of the setting, `y0`, where that leads to, `y1`, and what
# it keeps from one round to the next. It returns the next `y0`, and the last of these.
Correction = Callable[[Setting, State, State, State, Any], tuple[State, Any]]


def _plain(setting, y0, end, y1, kept):
    return y0 + setting.step_back(y1) - setting.step_back(end), kept


def _residual(setting, y0, end, y1, kept):
    return y0 + y1 - end, kept


def _anderson(correct: Correction, setting, y0, end, y1, kept):
    """Of depth one: there are two corrections to be combined."""
    index, last_y0, last_change = kept
    new, _ = correct(setting, y0, end, y1, None)
    change = new - y0
    difference = change - last_change
    size = jnp.sum(difference**2)
    weight = jnp.sum(difference * change) / jnp.where(size > 0, size, 1)
    weight = jnp.where((index > 0) & (size > 0), weight, 0)
    mixed = new - weight * ((y0 - last_y0) + difference)
    return mixed, (index + 1, y0, change)


def _newton_krylov(num_iterations, setting, y0, end, y1, kept):
    def derivative(direction):
        _, out = jax.jvp(setting.step, (y0,), (direction,))
        return out

    rhs = y1 - end
    basis, images = [rhs], [derivative(rhs)]
    for _ in range(num_iterations - 1):
        basis.append(images[-1])
        images.append(derivative(images[-1]))
    matrix = jnp.stack(images, axis=-1)
    scale = jnp.linalg.norm(matrix, axis=0)
    scale = jnp.where(scale > 0, scale, 1)
    # Several of them may be nearly the same.
    weights, *_ = jnp.linalg.lstsq(matrix / scale, rhs, rcond=1e-12)
    return y0 + jnp.stack(basis, axis=-1) @ (weights / scale), kept


@dataclasses.dataclass(frozen=True)
class Way:
    """`steps`: how many steps, or as much as that, a correction takes, together with
    finding out where it leads to."""

    correct: Correction
    steps: int
    extrapolates: bool = False


WAYS: dict[str, Way] = {
    "plain": Way(_plain, 2),
    "residual": Way(_residual, 1),
    "Anderson, plain": Way(ft.partial(_anderson, _plain), 2),
    "Anderson, residual": Way(ft.partial(_anderson, _residual), 1),
    "Newton--Krylov": Way(ft.partial(_newton_krylov, 2), 3),
    "extrapolated, plain": Way(_plain, 2, True),
    "extrapolated, residual": Way(_residual, 1, True),
}


def _extrapolate(ys: Float[Array, "3 n"], fs: Float[Array, "3 n"], h: Any) -> State:
    """At -1, from values and derivatives at 0, 1, and 2 steps: Hermite's polynomial."""
    nodes = np.arange(3.0)
    powers = np.arange(6)
    values = nodes[:, None] ** powers
    slopes = powers * np.where(powers > 0, nodes[:, None] ** np.abs(powers - 1), 0)
    weights = np.linalg.solve(np.concatenate([values, slopes]).T, (-1.0) ** powers)
    return jnp.asarray(weights) @ jnp.concatenate([ys, h * fs])


def _miss(y0: State, end: State, y1: State) -> Array:
    """By how much a step from `y0` misses `y1`, in units of rounding."""
    size = jnp.maximum(jnp.max(jnp.abs(y0)), jnp.max(jnp.abs(y1)))
    return jnp.max(jnp.abs(end - y1)) / (jnp.finfo(y1.dtype).eps * size)


def _share_found(setting: Setting, field: Map, h: float, ys: Array) -> Array:
    """Of all steps, how many an extrapolated guess finds at once that goes on from what
    it has found; and from a step back, where it has not."""

    def go_back(later, _):
        guess = _extrapolate(later, jax.vmap(field)(later), h)
        y1 = later[0]
        found = _miss(guess, setting.step(guess), y1) <= TOLERANCE
        y0 = jnp.where(found, guess, setting.step_back(y1))
        return jnp.stack([y0, *later[:2]]), found

    _, found = jax.lax.scan(go_back, ys[:-4:-1], None, NUM_STEPS)
    return jnp.mean(found)


def _undo(
    setting: Setting, way: Way, y1: State, guess: State
) -> tuple[Array, Bool[Array, ""], Array]:
    """How many corrections it took, whether it was found, and how far off it was."""

    miss = lambda y0, end: _miss(y0, end, y1)

    def body_fun(carry):
        index, y0, end, kept, _ = carry
        y0, kept = way.correct(setting, y0, end, y1, kept)
        end = setting.step(y0)
        return index + 1, y0, end, kept, miss(y0, end)

    def cond_fun(carry):
        index, *_, missed = carry
        return (missed > TOLERANCE) & (index < NUM_ROUNDS)

    end = setting.step(guess)
    start = jnp.array(0), guess, end, (0, guess, guess), miss(guess, end)
    index, *_, missed = jax.lax.while_loop(cond_fun, body_fun, start)
    return index, missed <= TOLERANCE, missed


def measure(problem: str, size: float) -> dict[str, Any]:
    field, start = PROBLEMS[problem]
    y0 = jnp.asarray(start)
    solver = diffrax.Tsit5(scan_kind="lax")
    num_stages = solver.tableau.num_stages - 1
    norms = jax.jit(jax.vmap(lambda y: jnp.linalg.norm(jax.jacfwd(field)(y), 2)))
    terms = diffrax.ODETerm(lambda t, y, args: field(y))
    # Rather more steps than are undone, for the first of these to have some after it.
    total = NUM_STEPS + 3

    @jax.jit
    def solve(h):
        def one(y, _):
            return _step(terms, solver, h, y), y

        return jax.lax.scan(one, y0, None, total)[1]

    lipschitz = jnp.max(norms(solve(jnp.array(1e-3))))
    h = size / float(lipschitz)
    ys = solve(jnp.array(h))
    fs = jax.vmap(field)(ys)
    setting = Setting(
        ft.partial(_step, terms, solver, h),
        ft.partial(_step, terms, solver, -h),
        num_stages,
    )
    row: dict[str, Any] = dict(
        problem=problem,
        solver="Tsit5",
        size=size,
        h=h,
        lipschitz=float(jnp.max(norms(ys))),
    )
    for name, way in WAYS.items():

        def undo(i, way=way):
            y1 = ys[i + 1]
            if way.extrapolates:
                later = i + 1 + jnp.arange(3)
                guess = _extrapolate(ys[later], fs[later], h)
            else:
                guess = setting.step_back(y1)
            return _undo(setting, way, y1, guess)

        rounds, found, missed = jax.jit(jax.vmap(undo))(jnp.arange(NUM_STEPS))
        evaluations = way.steps * num_stages * float(jnp.mean(rounds))
        if not way.extrapolates:
            evaluations += num_stages - 1
        is_found = bool(jnp.all(found))
        row[name] = dict(
            evaluations=evaluations if is_found else None,
            missed=float(jnp.max(missed)),
        )
    row["found"] = float(jax.jit(ft.partial(_share_found, setting, field, h))(ys))
    return row


def _step(terms, solver, h, y):
    """Without what the solver carries on from one step to the next: a step back is no
    part of a solve."""
    state = solver.init(terms, 0.0, h, y, None)
    y1, *_ = solver.step(terms, 0.0, h, y, None, state, False)
    return y1


def print_row(row: dict[str, Any]) -> None:
    cells = []
    for name in WAYS:
        of = row[name]
        found = of["evaluations"] is not None
        cells.append(f"{of['evaluations']:8.1f}" if found else f"({of['missed']:6.0e})")
    cells.append(f"{row['found']:8.0%}")
    print(f"{row['problem']:12s} {row['size']:6g}", *cells, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--problem", choices=PROBLEMS, nargs="+", default=[*PROBLEMS])
    default = pathlib.Path(__file__).parent / "output" / "corrections.jsonl"
    parser.add_argument("--output", type=pathlib.Path, default=default)
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    problems, sizes = (["lorenz"], (0.1,)) if args.smoke else (args.problem, SIZES)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'':19s}", *(f"{name[:8]:>8s}" for name in WAYS), "   found")
    with args.output.open("w") as file:
        for problem in problems:
            for size in sizes:
                row = measure(problem, size)
                print_row(row)
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
