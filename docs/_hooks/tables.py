"""Puts tables of what was measured in the place of `<!-- table: NAME -->` while the
site is built. They are made from the files in `docs/measured/`, which the scripts in
`benchmarks/` have written: no number of them is written by hand.
"""

import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any


_measured = pathlib.Path(__file__).parent.parent / "measured"
_mark = re.compile(r"^<!-- table: ([a-z ]+) -->$", re.MULTILINE)
_exact = 1e-10  # As in `benchmarks/features.py`.
_ours = "ReversibleAdjoint"
_problems = {
    "mlp": "neural ODE",
    "pendulum": "driven pendulum",
    "wave": "wave equation",
    "decay": "$y' = -y$",
    "heat": "heat equation",
    "van_der_pol": "Van der Pol's equation",
    "lorenz": "Lorenz's equations",
}
_peer_problems = {
    "neural_ode": "neural ODE",
    "lorenz": "Lorenz's equations",
    "heat": "heat equation",
    "heat_periodic": "heat equation, periodic",
    "neural_sde": "neural SDE",
}


def on_page_markdown(markdown, **kwargs):
    del kwargs
    return _mark.sub(lambda match: tables[match[1]](), markdown)


def _read(name: str) -> list[dict[str, Any]]:
    lines = (_measured / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _feature_cell(result: str | float) -> str:
    if isinstance(result, str):
        return "--"
    error = f"{result:.0e}" if result > 0 else ""
    return f"✓ {error}".strip() if result < _exact else f"≈ {error}"


def _features() -> str:
    rows = _read("features")
    # Ours first: it is what the page is about, and what a small screen shows.
    adjoints = sorted(rows[0]["results"], key=lambda name: name != _ours)
    groups = dict.fromkeys(row["group"] for row in rows)
    parts = []
    for group in groups:
        of = [row for row in rows if row["group"] == group]
        cells = [
            [
                row["feature"],
                *(_feature_cell(row["results"][a]) for a in adjoints),
                "" if row["step_bytes"] is None else f"{row['step_bytes']:.0f}",
            ]
            for row in of
        ]
        head = ["", *map(_code, adjoints), "Bytes for each step"]
        parts.append(f"### {group}\n\n{_table(head, cells)}")
    return "\n\n".join(parts)


def _refusals() -> str:
    """What one adjoint says where it cannot, and another one can."""
    rows = _read("features")
    cells = []
    for row in rows:
        result = row["results"][_ours]
        if isinstance(result, str):
            message = result.replace("|", r"\|")
            cells.append([f"{row['group']}: {row['feature']}", message])
    return _table(["Feature", "What `ReversibleAdjoint` says"], cells)


def _code(name: str) -> str:
    return f"`{name}`"


def _gradients(**kept: Any) -> list[dict[str, Any]]:
    """The rows of `benchmarks/gradient.py` in which everything is as given."""
    return [
        row
        for row in _read("gradient")
        if all(row[name] == value for name, value in kept.items())
    ]


def _mebibytes(row: dict[str, Any]) -> str:
    mebibytes = row["temp_bytes"] / 2**20
    return f"{mebibytes:.0f}" if mebibytes >= 100 else f"{mebibytes:.2f}"


def _error(row: dict[str, Any]) -> str:
    return "the solve fails" if row["error"] is None else f"{row['error']:.0e}"


def _memory() -> str:
    rows = _gradients(problem="mlp", dtype="float32")
    steps = sorted({row["steps"] for row in rows})
    methods = dict.fromkeys((row["solver"], row["adjoint"]) for row in rows)
    of = {(row["solver"], row["adjoint"], row["steps"]): row for row in rows}
    cells = []
    for solver, adjoint in methods:
        found = [of.get((solver, adjoint, n)) for n in steps]
        sizes = ["" if row is None else _mebibytes(row) for row in found]
        cells.append([f"`{solver}`", f"`{adjoint}`", *sizes])
    return _table(["Solver", "Adjoint", *(f"{n:,} steps" for n in steps)], cells)


def _cost() -> str:
    """Time, error and compile time of the neural ODE, where it was run."""
    cells = []
    for row in _gradients(problem="mlp", dtype="float32", steps=1000):
        cells.append(
            [
                f"`{row['solver']}`",
                f"`{row['adjoint']}`",
                f"{row['time_ratio']:.2f}",
                f"{row['compile_seconds']:.1f}",
                _error(row),
                _mebibytes(row),
                f"{row['undone']:.0%}" if "undone" in row else "",
                f"{row['replays']:.2f}" if "replays" in row else "",
            ]
        )
    head = ["Solver", "Adjoint", "Time", "Compiling (s)", "Error", "MiB"]
    return _table([*head, "Undone", "Made again"], cells)


def _by_problem() -> str:
    """Every problem in float64: what `ReversibleAdjoint` does to it."""
    cells = []
    for problem, label in _problems.items():
        rows = _gradients(problem=problem, dtype="float64")
        of = {(row["solver"], row["adjoint"]): row for row in rows}
        recursive = of["Tsit5", "RecursiveCheckpointAdjoint"]
        reversible = of["Tsit5", "ReversibleAdjoint"]
        coupled = of["UReversible(Tsit5)", "ReversibleAdjoint"]
        failed = coupled["error"] is None
        cells.append(
            [
                label,
                f"{reversible['steps']:,}",
                _error(reversible),
                f"{reversible['time_ratio']:.2f}",
                f"{reversible['temp_bytes'] / recursive['temp_bytes']:.2f}",
                f"{reversible['undone']:.0%}",
                f"{reversible['replays']:.2f}",
                _error(coupled),
                "" if failed else f"{coupled['time_ratio']:.2f}",
            ]
        )
    head = ["Problem", "Steps", "Error", "Time", "Memory", "Undone", "Made again"]
    return _table([*head, "`UReversible`: error", "time"], cells)


def _evaluations() -> str:
    names = {
        "neural_ode": "Neural ODE",
        "decay": "$y' = -y$",
        "oscillator": "Damped oscillator",
        "fitzhugh_nagumo": "FitzHugh--Nagumo equations",
        "van_der_pol": "Van der Pol's equation",
        "lorenz": "Lorenz's equations",
        "heat": "Heat equation",
    }
    rows = [r for r in _read("evaluations") if r["steps"] == 1000]
    rows = [r for r in rows if r["dtype"] == "float64"]
    of = {(row["problem"], row["checkpoints"]): row for row in rows}
    counts = sorted({row["checkpoints"] for row in rows})
    cells = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        found = [of[problem, k] for k in counts]
        cells.append(
            [
                names[problem],
                *(f"{row['reversible']:.1f} ({row['ratio']:.2f})" for row in found),
            ]
        )
    return _table(["`checkpoints`", *map(str, counts)], cells)


def _replays() -> str:
    """How often each step is made again where none can be undone."""
    rows = _read("replays")
    of = {(row["checkpoints"], row["steps"]): row["replays"] for row in rows}
    steps = sorted({row["steps"] for row in rows})
    cells = [
        [str(k), *(f"{of[k, n]:.1f}" for n in steps)]
        for k in sorted({row["checkpoints"] for row in rows})
    ]
    first, *others = (f"{n:,}" for n in steps)
    return _table(["`checkpoints`", f"{first} steps", *others], cells)


def _peer_name(row: dict[str, Any]) -> str:
    tool = "" if row["tool"] == "diffrax" else f"{row['tool']}: "
    solver, gradient = _code(row["solver"]), _code(row["gradient"])
    noise = f", {_code(row['noise'])}" if row["noise"] else ""
    return f"{tool}{gradient}, {solver}{noise}"


def _peer_mebibytes(row: dict[str, Any]) -> str:
    return f"{row['peak_bytes'] / 2**20:,.1f}"


def _peers() -> str:
    """For each case `ReversibleAdjoint()`, and the others that do best at no more than
    twice its error."""
    cases: dict[Any, list[dict[str, Any]]] = {}
    for row in _read("peers"):
        key = tuple(row[name] for name in ("problem", "unknowns", "steps", "tol"))
        cases.setdefault(key, []).append(row)
    cells = []
    for (problem, unknowns, steps, tol), rows in cases.items():
        ours = next(
            row
            for row in rows
            if row["gradient"] == _ours and row["solver"] in ("Tsit5", "ReversibleHeun")
        )
        others = [
            row
            for row in rows
            if not row["gradient"].startswith(_ours)
            and row["error"] is not None
            and row["error"] <= 2 * ours["error"]
        ]
        quickest = min(others, key=lambda row: row["time_ratio"])
        leanest = min(others, key=lambda row: row["peak_bytes"])
        cells.append(
            [
                f"{_peer_problems[problem]}, {unknowns:,}",
                f"{steps:,} steps" if tol is None else f"{tol:.0e}",
                f"{ours['error']:.0e}",
                f"{ours['time_ratio']:.2f}",
                _peer_mebibytes(ours),
                f"{quickest['time_ratio']:.2f}: {_peer_name(quickest)}",
                f"{_peer_mebibytes(leanest)}: {_peer_name(leanest)}",
            ]
        )
    head = ["Problem, unknowns", "Steps or tolerance", "Error", "Time", "MiB"]
    return _table([*head, "Quickest other", "Least MiB of others"], cells)


def _ratio(row: dict[str, Any], what: str, of: str, to: str) -> str:
    if of not in row or to not in row:
        return ""
    return f"{row[of][what] / row[to][what]:.2f}"


def _ratios() -> str:
    head = ["Problem", "Time", "To the loop", "Not certified", "Solve alone"]
    cells = [
        [
            row["case"],
            _ratio(row, "seconds", "ours", "recursive"),
            _ratio(row, "seconds", "ours", "limit"),
            _ratio(row, "seconds", "uncertified", "limit"),
            _ratio(row, "seconds", "solve", "stock_solve"),
            _ratio(row, "compile_seconds", "ours", "recursive"),
            _ratio(row, "temp_bytes", "ours", "recursive"),
            _ratio(row, "temp_bytes", "nothing_stored", "limit"),
        ]
        for row in _read("ratios")
    ]
    table = _table([*head, "Compiling", "Memory", "Memory to the loop"], cells)
    repeats = {row["repeats"] for row in _read("ratios")}
    more = " or more" if len(repeats) > 1 else ""
    return f"{table}\n\nTimes are medians of {min(repeats)} runs{more}."


def _equal_memory() -> str:
    cells = []
    rows = _read("equal_memory")
    for row in rows:
        line = [row["case"]]
        for kind in ("ours", "recursive"):
            of = row[kind]
            line.append(f"{of['temp_bytes'] / 2**20:.3g} ({of['checkpoints']})")
        cells.append([*line, f"{row['time_ratio']:.2f}"])
    head = ["Problem", "`ReversibleAdjoint`", "`RecursiveCheckpointAdjoint`", "Time"]
    repeats = min(row["repeats"] for row in rows)
    return f"{_table(head, cells)}\n\nTimes are medians of {repeats} runs."


def _small_loops() -> str:
    """Relative to `RecursiveCheckpointAdjoint` without the option."""
    kinds = {
        "recursive": "`RecursiveCheckpointAdjoint()`",
        "ours": "`ReversibleAdjoint()`",
        "limit": "a loop written by hand",
    }
    before = {row["case"]: row for row in _read("ratios")}
    rows = _read("small_loops")
    cells = []
    for row in rows:
        without = before[row["case"]]
        unit = without["recursive"]["seconds"]
        for kind, name in kinds.items():
            times = [f"{x[kind]['seconds'] / unit:.2g}" for x in (without, row)]
            cells.append([row["case"], name, *times])
    head = ["Problem", "Gradient by", "By default", "With the option"]
    repeats = min(row["repeats"] for row in rows)
    return (
        f"{_table(head, cells)}\n\nTimes are medians of {repeats} runs. The option is "
        "for all of a process, so that the two columns are from two of them, one after "
        "the other."
    )


def _least() -> str:
    cells = []
    for row in _read("least"):
        line = [_code(row["solver"])]
        for kind, least in row["least"].items():
            line.append(f"{row['reached'][kind]:.1f} ({least})")
        certified = row["certified"]["backward"] - row["reached"]["backward"]
        cells.append([*line, f"{certified:.1f}"])
    head = ["Solver", "Solve", "Way back", "Transposed", "Certificate"]
    return _table(head, cells)


def _counts(row: dict[str, Any]) -> str:
    # Those of implicit methods are not counted.
    return " / ".join(f"{x:.3g}" for x in (row["evaluations"] or {}).values())


def _interval(x: float | None) -> str:
    if x is None:
        return ""
    if x < 1e-4:
        return "0"
    # As far as was looked.
    return "all" if x >= 20 else f"{x:.3g}"


def _solvers() -> str:
    problems = "pendulum", "Kepler", "Henon-Heiles"
    cells = []
    for row in _read("solvers"):
        line = [_code(row["solver"]), str(row["claimed"]), f"{row['order']:.1f}"]
        line += [_counts(row), _interval(row["real"]), _interval(row["imaginary"])]
        line += [f"{row['missed']:.0e}", f"{row['gradient']:.0e}"]
        for problem in problems:
            of = row[problem]
            if "seconds" not in of:
                line.append("–")
                continue
            ratio = of["seconds"] / of["stock_seconds"]
            line.append(f"{ratio:.2g} ({of['steps']:,})")
        cells.append(line)
    head = ["Solver", "Order", "Measured", "Evaluations", "Real", "Imaginary"]
    head += ["Going back", "Gradient", "Pendulum", "Kepler", "Hénon–Heiles"]
    return _table(head, cells)


def _solvers_machine() -> str:
    return _machine("solvers")


def _with_error(order: float | None, error: float | None) -> str:
    return "" if order is None else f"{order:.2f} ± {error:.1g}"


def _sde_orders() -> str:
    rows = _read("sde_orders")
    of = {(row["problem"], row["solver"]): row for row in rows}
    cells = []
    for solver in dict.fromkeys(row["solver"] for row in rows):
        found = [of[problem, solver] for problem in ("commutative", "general")]
        cells.append([_code(solver), f"{found[0]['claimed']:g}"])
        for row in found:
            error = dict(zip(row["strong_steps"], row["strong_errors"]))[64]
            for kind in ("strong", "weak"):
                order, order_error = row[f"{kind}_order"], row[f"{kind}_order_error"]
                cells[-1].append(_with_error(order, order_error))
            cells[-1].insert(-1, f"{error:.1e}")
    head = ["Solver", "Claimed", "Commutative: strong", "Error", "Weak"]
    return _table([*head, "General: strong", "Error", "Weak"], cells)


def _corrections() -> str:
    rows = _read("corrections")
    ways = [x for x, of in rows[0].items() if isinstance(of, dict)]

    def cell(of: dict[str, Any]) -> str:
        evaluations = of["evaluations"]
        return "–" if evaluations is None else f"{evaluations:.1f}"

    cells = [
        [row["problem"].replace("_", " "), f"{row['size']:g}"]
        + [cell(row[way]) for way in ways]
        + [f"{row['found']:.0%}"]
        for row in rows
    ]
    return _table(["Problem", "$h L$", *ways, "found"], cells)


def _bit_exact() -> str:
    cells = []
    for row in _read("bit_exact"):
        exact, plain = row["exact"], row.get("plain")
        if plain is None:
            missed = "–"
        elif plain["missed"] is None:
            missed = "overflows"
        else:
            missed = f"{plain['missed']:.0e}"
        cells.append(
            [
                f"`{row['solver']}`, {row['dtype']}",
                "every bit" if exact["exact"] else "not every bit",
                missed,
                f"{exact['stored_bits']:.2g}" if exact["stored_bits"] > 0 else "0",
                *(
                    f"{row[problem][what]:.2g}"
                    for problem in ("small", "network")
                    for what in ("solve", "gradient")
                ),
                f"{row['network']['compiling']:.2g}",
            ]
        )
    head = ["", "Back came", "Without it: missed by", "Stored bits"]
    head += ["Small: solve", "Gradient", "Network: solve", "Gradient", "Compiling"]
    return _table(head, cells)


def _bit_exact_machine() -> str:
    return _machine("bit_exact")


def _peers_machine() -> str:
    return _machine("peers")


def _machine(name: str = "gradient") -> str:
    """With what, and on what, the times were measured."""
    row = _read(name)[-1]
    versions = ", ".join(f"{name} {v}" for name, v in row["versions"].items())
    cores = "1 core" if row.get("threads") == 1 else "2 cores"
    return (
        f"Measured on {row['date']}, on {cores} of a CPU ({row['machine']}), with "
        f"{versions}, Python {row['python']}."
    )


tables = {
    "features": _features,
    "refusals": _refusals,
    "memory": _memory,
    "cost": _cost,
    "by problem": _by_problem,
    "evaluations": _evaluations,
    "replays": _replays,
    "machine": _machine,
    "ratios": _ratios,
    "equal memory": _equal_memory,
    "small loops": _small_loops,
    "least": _least,
    "corrections": _corrections,
    "sde orders": _sde_orders,
    "solvers": _solvers,
    "solvers machine": _solvers_machine,
    "bit exact": _bit_exact,
    "bit exact machine": _bit_exact_machine,
    "peers": _peers,
    "peers machine": _peers_machine,
}
