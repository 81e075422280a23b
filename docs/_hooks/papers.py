"""As `tables.py`, for the pages of the papers that are reproduced: puts a table in the
place of `<!-- paper: NAME -->`. What was published is in `docs/measured/` as well, in
`published.json`.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from tables import _code, _measured, _read, _table


_mark = re.compile(r"^<!-- paper: ([a-z ]+) -->$", re.MULTILINE)
_published = json.loads((_measured / "published.json").read_text())
_coupled, _numerical = "UReversible", "numerical"
_ours = {
    _coupled: "`UReversible`",
    _numerical: "numerical",
    f"{_coupled}, nothing stored": "`UReversible`, nothing stored",
    f"{_numerical}, nothing stored": "numerical, nothing stored",
}

Row = dict[str, Any]


def on_page_markdown(markdown, **kwargs):
    del kwargs
    return _mark.sub(lambda match: _table_of(match[1]), markdown)


def _table_of(name: str) -> str:
    try:
        return tables[name]()
    except NotMeasured:
        return "Not measured yet."


class NotMeasured(Exception):
    """There are no rows of this part of a paper."""


def _part(paper: str, part: str) -> list[Row]:
    rows = [row for row in _read(paper) if row["part"] == part]
    if len(rows) == 0:
        raise NotMeasured(paper, part)
    return rows


def _values(rows: Iterable[Row], name: str) -> list[Any]:
    """Each that occurs, in order."""
    return list(dict.fromkeys(row[name] for row in rows))


def _number(x: float | None) -> str:
    """Three digits."""
    if x is None:
        return "–"
    return f"{x:.0f}" if x >= 99.5 else f"{x:.3g}"


def _small(x: float | None) -> str:
    return "fails" if x is None else f"{x:.0e}"


def _date(rows: list[Row]) -> str:
    row = rows[-1]
    versions = ", ".join(f"{name} {v}" for name, v in row["versions"].items())
    return (
        f"Measured on {row['date']}, on {row['device']} ({row['machine']}), with "
        f"{versions}, Python {row['python']}."
    )


#
# McCallum and Foster
#


def _time() -> str:
    """Ratios of what checkpoints take to what each of ours takes."""
    parts = []
    rows = _part("mccallum-foster", "time")
    for experiment in _published["mccallum-foster"]["time"]:
        of = [row for row in rows if row["experiment"] == experiment]
        numbers = [n for n in _values(of, "checkpoints") if n is not None]
        cells = []
        for solver in _values(of, "solver"):
            seconds = {
                row["checkpoints"] or row["method"]: row["seconds_median"]
                for row in of
                if row["solver"] == solver
            }
            published = _published["mccallum-foster"]["time"][experiment][solver]
            ratios = [published[str(n)] / published[_coupled] for n in numbers]
            cells.append([_code(solver), "published", "", *map(_number, ratios)])
            for method, label in _ours.items():
                ratios = [seconds[n] / seconds[method] for n in numbers]
                milliseconds = f"{1000 * seconds[method]:.1f}"
                cells.append(["", label, milliseconds, *map(_number, ratios)])
        head = ["Solver", "Relative to", "ms", *map(str, numbers)]
        title = experiment[0].upper() + experiment[1:]
        parts.append(f"### {title}\n\n{_table(head, cells)}")
    turns = max(row["training_steps"] for row in rows)
    note = (
        f"Medians of {turns} steps of training; of 3, if they take over half a second."
    )
    return "\n\n".join([*parts, f"{note} {_date(rows)}"])


def _bytes() -> str:
    rows = _part("mccallum-foster", "time")
    cells = []
    for experiment in _published["mccallum-foster"]["time"]:
        of = [row for row in rows if row["experiment"] == experiment]
        for solver in _values(of, "solver"):
            sizes = {
                row["checkpoints"] or row["method"]: row["temp_bytes"] / 1024
                for row in of
                if row["solver"] == solver
            }
            stored = [n for n in sizes if isinstance(n, int)]
            shown = [*_ours, min(stored), max(stored)]
            cells.append(
                [experiment, _code(solver), *(f"{sizes[key]:.1f}" for key in shown)]
            )
    head = ["Experiment", "Solver", *_ours.values()]
    return _table([*head, "2 checkpoints", "most checkpoints"], cells)


def _spread(values: list[float], unit: float) -> str:
    mean = statistics.mean(values) / unit
    if len(values) < 2:
        return f"{mean:.3g}"
    return f"{mean:.3g} ± {statistics.stdev(values) / unit:.1g}"


def _loss() -> str:
    rows = _part("mccallum-foster", "loss")
    cells = []
    for experiment in _published["mccallum-foster"]["loss"]:
        of = [row for row in rows if row["experiment"] == experiment]
        unit = 1e-4 if experiment == "white dwarf" else 1e-3
        for solver in _values(of, "solver"):
            group = [row for row in of if row["solver"] == solver]
            published = _published["mccallum-foster"]["loss"][experiment][solver]
            line = [experiment, _code(solver), f"{unit:.0e}"]
            line += [f"{published[m] / unit:.3g}" for m in (_coupled, "checkpoints")]
            for method in (_coupled, _numerical, "checkpoints"):
                found = [row["loss"] for row in group if row["method"] == method]
                line.append(_spread(found, unit))
            noise = group[0]["noise"]
            line.append("" if noise is None else f"{noise / unit:.2g}")
            line += [
                f"{group[0]['training_steps']:,}",
                str(len(_values(group, "seed"))),
            ]
            cells.append(line)
    head = ["Experiment", "Solver", "Unit", "published: reversible", "checkpoints"]
    head += ["ours: `UReversible`", "numerical", "checkpoints", "noise"]
    return _table([*head, "Training steps", "Seeds"], cells)


def _complexity() -> str:
    rows = _part("mccallum-foster", "complexity")
    of = {(row["steps"], row["checkpoints"] or row["method"]): row for row in rows}
    numbers = [n for n in _values(rows, "checkpoints") if n is not None]
    cells = []
    for steps in _values(rows, "steps"):
        published = _published["mccallum-foster"]["complexity"].get(str(steps), {})
        line = [f"{steps:,}"]
        line += [
            _number(published[str(n)] / published[_coupled])
            if str(n) in published
            else ""
            for n in numbers
        ]
        for n in numbers:
            row = of.get((steps, n))
            line.append("" if row is None else _number(row["time_ratio"]))
        numerical = of[steps, _numerical]["time_ratio"]
        cells.append([*line, _number(numerical)])
    head = [
        "Steps",
        *(f"published, {n}" for n in numbers),
        *(f"ours, {n}" for n in numbers),
    ]
    return f"{_table([*head, 'numerical'], cells)}\n\n{_date(rows)}"


def _convergence() -> str:
    rows = _part("mccallum-foster", "convergence")
    of = {(row["solver"], row["method"]): row for row in rows}
    cells = [
        [
            _code(solver),
            *(
                f"{of[solver, method][which]:.2f}"
                for method in ("plain", "coupled")
                for which in ("order", "last_order")
            ),
        ]
        for solver in _values(rows, "solver")
    ]
    head = ["Solver", "by itself", "last two", "`UReversible`", "last two"]
    return _table(head, cells)


def _stability() -> str:
    rows = _part("mccallum-foster", "stability")
    solvers = _values(rows, "solver")
    of = {(row["solver"], row["coupling"]): row for row in rows}
    cells = [
        [
            f"{coupling:g}",
            *(_number(of[solver, coupling]["stable_real"]) for solver in solvers),
            _number(of[solvers[0], coupling]["closed_form"]),
        ]
        for coupling in _values(rows, "coupling")
    ]
    worst = max(row["difference"] for row in rows)
    table = _table([r"$\lambda$", *map(_code, solvers), r"$-\ln \lambda$"], cells)
    return f"{table}\n\nLargest difference to the closed form: {worst:.0e}."


#
# The others
#


def _kidger() -> str:
    rows = _part("kidger", "error")
    of = {(row["solver"], row["adjoint"], row["step_size"]): row for row in rows}
    sizes = _values(rows, "step_size")[::2]
    methods = dict.fromkeys((row["solver"], row["adjoint"]) for row in rows)
    cells = [
        [_code(s), _code(a), *(_small(of[s, a, h]["error"]) for h in sizes)]
        for s, a in methods
    ]
    head = ["Solver", "Adjoint", *(f"1/{round(1 / h)}" for h in sizes)]
    return _table(head, cells)


def _mali_error() -> str:
    rows = _part("mali", "error")
    lengths = _values(rows, "length")
    cells = []
    for method in _values(rows, "method"):
        for rate in _values(rows, "rate"):
            of = [r for r in rows if (r["method"], r["rate"]) == (method, rate)]
            cells.append(
                [method, f"{rate:g}", *(_small(row["error"]) for row in of)]
                + [_small(max((row["error_to_solve"] or 0) for row in of))]
                + [f"{max(row['steps'] for row in of if row['error']):,}"]
            )
    head = ["Method", "$a$", *(f"$T = {n:g}$" for n in lengths)]
    return _table([*head, "to that of the solve", "most steps"], cells)


def _by_steps(paper: str, unit: int) -> str:
    rows = _part(paper, "memory")
    steps = _values(rows, "steps")
    of = {(row["method"], row["steps"]): row["temp_bytes"] / unit for row in rows}
    cells = [
        [method, *(f"{of[method, n]:,.0f}" for n in steps)]
        for method in _values(rows, "method")
    ]
    return _table(["Method", *(f"{n:,} steps" for n in steps)], cells)


def _ees_order() -> str:
    claimed = {"EES25": ("2", "5"), "EES27": ("2", "7")}
    cells = []
    for row in _part("ees", "order"):
        order, antisymmetric = claimed.get(row["solver"], ("", ""))
        cells.append(
            [
                _code(row["solver"]),
                str(row["stages"]),
                order,
                f"{row['order']:.2f}",
                antisymmetric,
                f"{row['antisymmetric_order']:.2f}",
            ]
        )
    head = ["Solver", "Evaluations", "Order: claimed", "measured"]
    return _table([*head, "Antisymmetric order: claimed", "measured"], cells)


def _ees_back() -> str:
    rows = _part("ees", "back")
    of = {(row["solver"], row["steps"]): row for row in rows}
    steps = _values(rows, "steps")
    cells = []
    for solver in _values(rows, "solver"):
        found = [of[solver, n] for n in steps]
        cells.append(
            [
                _code(solver),
                *(f"{_small(r['error'])} ({r['corrections']:.2g})" for r in found),
            ]
        )
    sizes = [of[_values(rows, "solver")[0], n]["step_size"] for n in steps]
    return _table(["Solver", *(f"$h = {h:g}$" for h in sizes)], cells)


def _limit(x: float) -> str:
    """Of an interval of stability."""
    if x < 1e-4:
        return "0"
    return "all" if x >= 20 else f"{x:.3g}"


def _atlas() -> str:
    shown = "step_decay", "back_decay", "back_turn", "back_growth"
    cells = []
    for row in _part("atlas", "atlas"):
        converges = ""
        if row["rate"] is not None:
            limits = row.get("converges_real"), row.get("converges_imaginary")
            converges = ", ".join("all" if x is None else f"{x:.2g}" for x in limits)
        cells.append(
            [
                _code(row["solver"]) + (" (pairs)" if row["of_pairs"] else ""),
                "" if row["of_pairs"] else _limit(row["stable_real"]),
                _limit(row["stable_imaginary"]),
                _limit(row["nearly_stable_imaginary"]),
                *(f"{row[x]:.4f}" if x in row else "" for x in shown),
                converges,
            ]
        )
    head = ["Solver", "Real", "Imaginary", "Imaginary, nearly", "Step at -0.1"]
    head += ["Back at -0.1", "at 0.1i", "at 0.1", "Iteration: real, imaginary"]
    return _table(head, cells)


tables: dict[str, Callable[[], str]] = {
    "time": _time,
    "bytes": _bytes,
    "loss": _loss,
    "complexity": _complexity,
    "convergence": _convergence,
    "stability": _stability,
    "kidger": _kidger,
    "mali error": _mali_error,
    "mali memory": lambda: _by_steps("mali", 1024),
    "ees order": _ees_order,
    "ees back": _ees_back,
    "ees memory": lambda: _by_steps("ees", 2**20),
    "atlas": _atlas,
}
