"""Measures anew the costs that the documentation shows, draws the figure of them, and
writes the table of the README.

    python benchmarks/costs.py             # about ten minutes on 2 CPU cores
    python benchmarks/costs.py --figures   # of what has been measured before

Runs `gradient.py` on each of its problems, on a machine that should have nothing else
to do, and writes what that measures to `docs/measured/gradient.jsonl`, from which all
tables of costs are made: that of the README here, and those of the documentation when
it is built.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


HERE = pathlib.Path(__file__).parent
README = HERE.parent / "README.md"
MEASURED = HERE.parent / "docs" / "measured"
STYLES = {
    ("Tsit5", "DirectAdjoint"): ("tab:red", ":", "^"),
    ("Tsit5", "RecursiveCheckpointAdjoint"): ("tab:orange", "--", "s"),
    ("Tsit5", "BacksolveAdjoint"): ("tab:gray", "-.", "v"),
    ("Tsit5", "ReversibleAdjoint"): ("tab:blue", "-", "o"),
    ("UReversible(Tsit5)", "ReversibleAdjoint"): ("tab:green", "-", "d"),
}
ALL = ("RecursiveCheckpointAdjoint", "ReversibleAdjoint", "BacksolveAdjoint")


def commands(gradients: pathlib.Path) -> list[list[str]]:
    """The arguments of each run."""
    gradient = [str(HERE / "gradient.py"), "--output", str(gradients)]
    timed = [*gradient, "--adjoint", *ALL, "DirectAdjoint"]
    compiled = [*gradient, "--compile-only", "--adjoint"]
    by_problem = [
        [*gradient, "--float64", "--problem", problem, "--steps", str(steps)]
        for problem, steps in dict(
            mlp=1000,
            pendulum=1000,
            wave=2000,
            decay=1000,
            heat=100,
            van_der_pol=2000,
            lorenz=4000,
        ).items()
    ]
    return [
        [*timed, "--steps", "100", "1000"],
        [*compiled, *ALL, "--steps", "10000", "100000"],
        *by_problem,
    ]


def measure() -> None:
    gradients = MEASURED / "gradient.jsonl"
    # The script appends; what is there is replaced when all is done.
    new = HERE / "output" / "gradient-new.jsonl"
    new.parent.mkdir(exist_ok=True)
    new.unlink(missing_ok=True)
    for command in commands(new):
        subprocess.run([sys.executable, *command], check=True)
    shutil.move(new, gradients)


def headline(rows: list[dict[str, Any]]) -> str:
    """The table of the README: of the neural ODE, what ours costs and the default."""
    of = {
        (row["solver"], row["adjoint"], row["steps"]): row
        for row in rows
        if (row["problem"], row["dtype"]) == ("mlp", "float32")
    }
    head = (
        "solver | adjoint | scratch memory, 1000 steps | 100,000 steps | error | time"
    )
    lines = [head, " | ".join(["---"] * 6)]
    for solver, code, adjoint in (
        ("Tsit5", "Tsit5()", "RecursiveCheckpointAdjoint"),
        ("Tsit5", "Tsit5()", "ReversibleAdjoint"),
        ("UReversible(Tsit5)", "UReversible(Tsit5())", "ReversibleAdjoint"),
    ):
        few, many = (of[solver, adjoint, steps] for steps in (1000, 100_000))
        memory = [f"{row['temp_bytes'] / 2**20:.2f} MiB" for row in (few, many)]
        error = f"{few['error']:.1e}".replace("e-0", "e-")
        time = f"{few['time_ratio']:.2f}".replace("1.00", "1")
        lines.append(" | ".join([f"`{code}` | `{adjoint}()`", *memory, error, time]))
    return "\n".join(f"| {line} |" for line in lines)


def write_headline(rows: list[dict[str, Any]], readme: pathlib.Path) -> None:
    """In the place of the one that was there."""
    table = re.compile(r"^\| solver \| adjoint \|.*?(?=\n\n)", re.MULTILINE | re.DOTALL)
    new, count = table.subn(lambda _: headline(rows), README.read_text())
    if count != 1:
        raise ValueError(f"{README.name} has {count} tables of solver and adjoint.")
    readme.write_text(new)


def plot_memory(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (solver, adjoint), (color, line, marker) in STYLES.items():
        points = sorted(
            (row["steps"], row["temp_bytes"] / 2**20)
            for row in rows
            if (row["solver"], row["adjoint"]) == (solver, adjoint)
            and (row["problem"], row["dtype"]) == ("mlp", "float32")
        )
        label = adjoint if solver == "Tsit5" else f"{adjoint}, {solver}"
        ax.plot(*zip(*points), line, color=color, marker=marker, label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("number of steps", fontsize=12)
    ax.set_ylabel("scratch memory (MiB)", fontsize=12)
    ax.tick_params(labelsize=11)
    ax.grid(alpha=0.3)
    fig.legend(loc="outside upper center", ncols=2, fontsize=11)
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figures", action="store_true", help="measure nothing")
    parser.add_argument("--smoke", action="store_true", help="as little as will run")
    args = parser.parse_args()
    if not (args.figures or args.smoke):
        measure()
    lines = (MEASURED / "gradient.jsonl").read_text().splitlines()
    folder = HERE / "output" if args.smoke else MEASURED
    folder.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in lines]
    plot_memory(rows, folder / "memory.png")
    write_headline(rows, folder / "README.md" if args.smoke else README)


if __name__ == "__main__":
    main()
