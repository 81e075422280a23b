"""What the reproductions of papers have in common: their command line, and where their
rows and figures go."""

import argparse
import dataclasses
import io
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure


BENCHMARKS = pathlib.Path(__file__).parent.parent
DOCS = BENCHMARKS.parent / "docs"
MEASURED = DOCS / "measured"
sys.path += [str(BENCHMARKS), str(DOCS)]
from _png import compress  # noqa: E402
from gradient import provenance  # noqa: E402


matplotlib.use("Agg")
Row = dict[str, Any]
# What makes the rows of a part of a paper, from the arguments of the command line, of
# which `size` is "smoke", "reduced" or "full".
Part = Callable[[argparse.Namespace], Iterator[Row]]
STYLE: Any = {
    "font.size": 11,
    "axes.labelsize": 12,
    "axes.titlesize": 12,
    "legend.fontsize": 10,
    "lines.linewidth": 2,
    "figure.constrained_layout.use": True,
}


@dataclasses.dataclass(frozen=True)
class Paper:
    """`figures`: for each, the part that it is drawn from, and how."""

    name: str
    description: str
    parts: dict[str, Part]
    figures: dict[str, tuple[str, Callable[[list[Row]], Figure]]]
    packages: tuple[str, ...] = ()


def make_parser(paper: Paper) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=paper.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--part", choices=paper.parts, nargs="+", default=[*paper.parts]
    )
    parser.add_argument("--measured", action="store_true", help="for the documentation")
    parser.add_argument("--figures", action="store_true", help="measure nothing")
    size = parser.add_mutually_exclusive_group()
    for option, text in (
        ("--smoke", "as little as will run"),
        ("--full", "at the length that was published"),
    ):
        size.add_argument(
            option, dest="size", action="store_const", const=option[2:], help=text
        )
    parser.set_defaults(size="reduced")
    return parser


def read(path: pathlib.Path) -> list[Row]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _finite(x: Any) -> Any:
    """JSON has no number that is not finite."""
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _print_row(row: Row) -> None:
    values = [x for x in row.values() if not isinstance(x, list)]
    cells = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in values)
    print(*cells, sep="  ", flush=True)


def _key(row: Row) -> tuple[Any, Any]:
    return row["part"], row.get("experiment")


def _measure(paper: Paper, args: argparse.Namespace, path: pathlib.Path) -> None:
    """The rows of each part replace those that there were of the same experiments, once
    they are all there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in args.part:
        rows = []
        for row in paper.parts[part](args):
            row = dict(part=part, size=args.size) | row
            row = {name: _finite(x) for name, x in row.items()}
            _print_row(row)
            rows.append(row | provenance(*paper.packages))
        replaced = {_key(row) for row in rows}
        rows = [row for row in read(path) if _key(row) not in replaced] + rows
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        jax.clear_caches()


def save(fig: Figure, path: pathlib.Path) -> None:
    file = io.BytesIO()
    fig.savefig(file, dpi=130, facecolor="white", bbox_inches="tight")
    plt.close(fig)
    path.write_bytes(compress(file.getvalue(), colours=64))


def run(paper: Paper, args: argparse.Namespace) -> None:
    jax.config.update("jax_enable_x64", True)
    name = f"{paper.name}-smoke" if args.size == "smoke" else paper.name
    folder = MEASURED if args.measured or args.figures else BENCHMARKS / "output"
    path = folder / f"{name}.jsonl"
    if not args.figures:
        _measure(paper, args, path)
    rows = read(path)
    for figure, (part, draw) in paper.figures.items():
        of = [row for row in rows if row["part"] == part]
        if of:
            with plt.rc_context(STYLE):
                save(draw(of), folder / f"{name}-{figure}.png")
