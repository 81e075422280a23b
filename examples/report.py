"""Where on its way back a gradient has to try again.

    python examples/report.py [--checkpoints K] [--steps N]

Solves the equations of FitzHugh and Nagumo, of a nerve cell that fires again and again,
by `Tsit5`, and differentiates the solution by `ReversibleAdjoint`. While the cell is at
rest, solutions approach each other; so going back errors grow, and some parts of the
solve have to be made again from stored states. `diffrax.reversal_report` tells of each
step how far off it was, how often it was corrected, and how often it was made again.

Prints a summary, and saves a figure of all that against time. Takes half a minute.
"""

import argparse
import pathlib

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def loss(adjoint, y0, params, num_steps):
    def field(t, y, params):
        v, w = y
        a, b, rate, current = params
        return jnp.stack([v - v**3 / 3 - w + current, rate * (v + a - b * w)])

    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0=0.0,
        t1=100.0,
        dt0=100.0 / num_steps,
        y0=y0,
        args=params,
        adjoint=adjoint,
        max_steps=num_steps,
    )
    assert sol.ys is not None
    return jnp.sum(sol.ys**2)


def plot(report: diffrax.ReversalReport, path: pathlib.Path) -> None:
    fig, (errors, work) = plt.subplots(2, 1, figsize=(8, 6), sharex=True)
    for name in ("residual", "drift", "rounding", "cotangents"):
        error = getattr(report, name)
        # For the logarithm, and where nothing is left of the solution.
        errors.semilogy(report.t0, jnp.clip(error, 1e-18, 1e18), ".", label=name)
    errors.axhline(report.tolerance, color="gray", linewidth=0.8, label="tolerance")
    errors.set_ylabel("relative error")
    errors.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5)
    work.plot(report.t0, report.corrections, ".", label="corrections")
    work.plot(report.t0, report.replays, ".", label="made again")
    work.set_ylabel("times")
    work.set_xlabel("time")
    work.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoints", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8000)
    folder = pathlib.Path(__file__).parent / "output"
    parser.add_argument("--output", type=pathlib.Path, default=folder)
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    if args.smoke:
        args.steps = 500

    jax.config.update("jax_enable_x64", True)
    report = eqx.filter_jit(diffrax.reversal_report)(
        lambda adjoint, y0, params: loss(adjoint, y0, params, args.steps),
        jnp.array([0.1, 0.0]),
        jnp.array([0.7, 0.8, 0.08, 0.5]),
        adjoint=diffrax.ReversibleAdjoint(args.checkpoints),
    )
    print(f"{args.steps} steps, of which up to {args.checkpoints} states were stored")
    replays = float(jnp.sum(report.replays)) / args.steps
    corrections = float(jnp.sum(report.corrections)) / args.steps
    print(f"steps made again, each:  {replays:.2f} times")
    print(f"guesses corrected, each: {corrections:.2f} times")
    certificate = float(report.certificate)
    print(f"certificate: {certificate:.0e} (tolerated: {report.tolerance:.0e})")
    _, grad = report.grads
    print(f"gradient with respect to the parameters: {grad}")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / ("report-smoke.png" if args.smoke else "report.png")
    plot(report, path)
    print(f"Figure saved as {path}.")


if __name__ == "__main__":
    main()
