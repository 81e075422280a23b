"""The documentation: the code on its pages and in the docstrings runs, and what it
lists is what there is."""

import functools as ft
import inspect
import json
import pathlib
import re
import shlex
import tomllib
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from diffrax._adjoint import _choose_reversal
from diffrax._reversal import AlgebraicReversal, NoReversal, NumericalReversal
from sybil import Sybil
from sybil.document import Document, PythonDocStringDocument
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser


root = pathlib.Path(__file__).parent.parent
docs = root / "docs"
pages = [root / "README.md", root / "CONTRIBUTING.md", *sorted(docs.rglob("*.md"))]
notebooks = sorted(docs.glob("notebooks/*.ipynb"))
public_names = sorted(
    name
    for name, value in vars(diffrax).items()
    if name[0] != "_" and not inspect.ismodule(value)
)


def _our_modules() -> list[pathlib.Path]:
    """Those of our files in which there is code, without those of upstream's, which the
    build has placed beside them."""
    placed = (root / "diffrax" / ".gitignore").read_text().splitlines()
    placed_files = {root / "diffrax" / line.lstrip("/") for line in placed}
    modules = set((root / "diffrax").rglob("*.py")) - placed_files
    return sorted(m for m in modules if "```python" in m.read_text())


_sybil = Sybil(
    parsers=[PythonCodeBlockParser()],
    document_types={".py": PythonDocStringDocument, ".md": Document},
)


def _examples(path: pathlib.Path):
    """The blocks of Python code of a page or of the docstrings of a module. Those of a
    page share a namespace, and their tracebacks show its lines."""
    return list(_sybil.parse(path))


def _name(path: pathlib.Path) -> str:
    return str(path.relative_to(root))


@ft.cache
def _extending() -> dict[str, Any]:
    """The names that the page on extending defines in its first two blocks: the solver
    and the check of the law."""
    document = _sybil.parse(docs / "extending.md")
    example, law, *_ = document
    example.evaluate()
    law.evaluate()
    return document.namespace


def _with_code(paths):
    return [path for path in paths if "```python" in path.read_text()]


# These take from a quarter of a minute to a whole one: `.ci/run` has a step for them.
_long = {
    "bit-exact",
    "coming-from-torch",
    "extending",
    "faq",
    "getting-started",
    "how-it-works",
    "index",
}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow if path.stem in _long else ())
        for path in _with_code(pages)
    ],
    ids=_name,
)
def test_code_of_page_runs(path):
    examples = _examples(path)
    assert len(examples) == path.read_text().count("```python")
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("path", _our_modules(), ids=_name)
def test_code_of_docstrings_runs(path):
    examples = _examples(path)
    # Also of those that are assigned to `X.__init__.__doc__`, of which there is none.
    assert len(examples) == path.read_text().count("```python")
    for example in examples:
        example.evaluate()


#
# The example of the page on extending.
#


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
@pytest.mark.parametrize("made_jump", (False, True))
@pytest.mark.parametrize("h", (1e-4, 0.1, 2.0))
def test_example_law(h, made_jump, dtype, getkey):
    solver = _extending()["AsynchronousLeapfrog"]()

    def vector_field(t, y, args):
        q, p = y
        return jnp.tanh(p["a"] + args * t), {"a": jnp.sin(q), "b": -(p["b"] ** 2)}

    def random_state():
        q, a, b = jr.uniform(getkey(), (3, 4), dtype, minval=-1, maxval=1)
        return q, {"a": a, "b": b}

    t0 = jnp.asarray(0.3, dtype)
    back, expected = _extending()["undo_one_step"](
        solver,
        diffrax.ODETerm(vector_field),
        t0,
        t0 + jnp.asarray(h, dtype),
        random_state(),
        jnp.asarray(0.7, dtype),
        random_state(),
        made_jump,
    )
    # About 10 operations on values of at most 20 (at `h = 2`, as `y1 = y0 + h u`, and
    # `u` is at most 4), each of which rounds by half an epsilon of that. The Jacobian
    # of the vector field multiplies some of these errors by `h * 2 * 4` at most.
    tol = 10 * 20 * (1 + 8 * h) * jnp.finfo(dtype).eps
    assert eqx.tree_equal(back, expected, rtol=0, atol=tol)


@pytest.mark.parametrize("jump", (False, True))
def test_example_order(jump):
    def vector_field(t, y, args):
        del args
        q, p = y
        force = jnp.where(t < 1, 0.0, 2.0 + q) if jump else 0.0
        return p, force - jnp.sin(q)

    @eqx.filter_jit
    def solve(solver, dt0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            solver,
            t0=0,
            t1=2,
            dt0=dt0,
            y0=(jnp.array(1.0), jnp.array(0.3)),
            adjoint=diffrax.ForwardMode(),
            max_steps=None,
        )
        assert sol.ys is not None
        return jnp.stack(sol.ys)

    # All step sizes are powers of two, so that the jump is exactly at the end of a step
    # (that it is one need not be told to this solver, which ignores `made_jump`), and
    # neither solver evaluates the vector field of a step at its end.
    dt0s = 2.0 ** np.array([-5, -6, -7])
    exact = solve(diffrax.Midpoint(), jnp.array(2.0**-12))
    solver = _extending()["AsynchronousLeapfrog"]()
    errors = [jnp.max(jnp.abs(solve(solver, jnp.array(dt0)) - exact)) for dt0 in dt0s]
    slope, _ = np.polyfit(np.log(dt0s), np.log(np.array(errors)), 1)
    assert 1.8 < slope < 2.2


def test_example_gradient():
    """Adaptive steps, a jump, and backward in time. (The page itself has constant
    steps.)"""
    solver = _extending()["AsynchronousLeapfrog"]()

    def vector_field(t, y, args):
        q, p = y
        return p, jnp.where(t < 1.3, 0.0, 0.2 + 0.1 * q) - args * jnp.sin(q)

    @eqx.filter_jit
    @ft.partial(eqx.filter_value_and_grad, has_aux=True)
    def run(y0__args, adjoint):
        y0, args = y0__args
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            solver,
            t0=2.5,
            t1=0.5,
            dt0=None,
            y0=y0,
            args=args,
            saveat=diffrax.SaveAt(ts=jnp.array([2.2, 1.3, 0.7]), t1=True),
            stepsize_controller=diffrax.ClipStepSizeController(
                diffrax.PIDController(rtol=1e-2, atol=1e-3), jump_ts=jnp.array([1.3])
            ),
            adjoint=adjoint,
        )
        assert sol.ys is not None
        q, p = sol.ys
        return jnp.sum(q**2) + jnp.sum(p), sol.stats

    y0__args = ((jnp.array([0.5, 1.2]), jnp.array([-0.3, 0.7])), jnp.array([0.5, 2.0]))
    (value, stats), grads = run(y0__args, diffrax.ReversibleAdjoint())
    (exact_value, _), exact_grads = run(y0__args, diffrax.RecursiveCheckpointAdjoint())
    assert stats["num_rejected_steps"] > 0
    # 28 steps or so, each of which adds rounding errors of about 1e-16.
    assert eqx.tree_equal(value, exact_value, rtol=1e-13, atol=0)
    assert eqx.tree_equal(grads, exact_grads, rtol=1e-10, atol=0)
    # Nothing that agrees because it vanishes.
    assert all(jnp.min(jnp.abs(g)) > 1e-2 for g in jtu.tree_leaves(grads))


#
# Commands.
#


def _commands():
    """The lines of all blocks of shell commands."""
    parse = Sybil(parsers=[CodeBlockParser(language="bash", evaluator=lambda _: None)])
    for page in pages:
        for example in parse.parse(page):
            lines = re.sub(r"\\\n", " ", str(example.parsed)).splitlines()
            for line in lines:
                if line.strip():
                    yield pytest.param(line, id=f"{page.stem}: {line[:50]}")


@pytest.mark.parametrize("line", list(_commands()))
def test_command_is_known(line):
    """What a command runs exists and takes these arguments; `.ci/run` runs the scripts,
    and `test_package.py` does what `pip` is asked to."""
    line = line.replace(".venv/bin/", "")
    for command in line.split("&&"):
        program, *arguments = shlex.split(command, comments=True)
        if program in ("python", "python3") and arguments[0] == "-m":
            assert arguments[1] in _modules
        elif program == "python":
            assert (root / arguments[0]).is_file()
            script = root / arguments[0]
            text = script.read_text()
            for module in re.findall(r"^from (_\w+) import", text, re.MULTILINE):
                path = script.parent / f"{module}.py"
                text += path.read_text() if path.is_file() else ""
            options = [a for a in arguments[1:] if a.startswith("--")]
            assert all(f'"{option}"' in text for option in options)
        elif program == "pip":
            extras = re.findall(r"\[([\w,]+)\]", command)
            known = tomllib.loads((root / "pyproject.toml").read_text())
            known = known["project"]["optional-dependencies"]
            assert set(",".join(extras).split(",")) - {""} <= set(known)
        else:
            assert program in _programs


_modules = {"venv", "pytest", "mkdocs", "test.agreement", "http.server"}
_programs = {".", "mkdocs", "pre-commit", "ruff", "pyright", ".ci/run", "linkchecker"}


#
# Notebooks. `docs/_execute.py --check`, which `.ci/run` runs, executes them.
#


@pytest.mark.parametrize("path", notebooks, ids=lambda path: path.stem)
def test_notebook_is_stored_whole(path):
    text = path.read_text()
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(text) < 300_000
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    # `docs/_execute.py` executes them: here it is that there is something to fail.
    assert sum("assert" in "".join(cell["source"]) for cell in code) >= 3
    for cell in code:
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr"
            if "image/png" in output.get("data", {}):
                assert len(cell["metadata"]["alt"]) > 20
    # The last one prints the versions, of what is installed if it is up to date.
    (printed,) = (o for o in code[-1]["outputs"] if "text" in o)
    assert f"{diffrax.__version__}" in "".join(printed["text"])


def test_there_are_notebooks():
    assert len(notebooks) >= 8


#
# Lists: of names, of versions, of solvers, of features.
#


def _api_entries():
    text = "".join(page.read_text() for page in docs.glob("api/*.md"))
    return re.findall(r"^::: diffrax\.(\S+)$", text, re.MULTILINE)


def test_api_has_every_public_name_once():
    assert sorted(_api_entries()) == public_names


def test_version_is_told():
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    upstream, _ = project["version"].split("+")
    for page in (docs / "upstream.md", docs / "changelog.md"):
        assert project["version"] in page.read_text()
    for page in (root / "README.md", docs / "index.md", docs / "upstream.md"):
        text = page.read_text()
        assert set(re.findall(r"diffrax===(\d[\w.]*)", text)) == {upstream}


def _solvers():
    """The public solvers which can be used as they are."""
    return [
        name
        for name in public_names
        if inspect.isclass(cls := getattr(diffrax, name))
        and issubclass(cls, diffrax.AbstractSolver)
        and not name.startswith("Abstract")
    ]


@pytest.mark.parametrize("name", _solvers())
def test_solver_is_in_the_table(name):
    """With the way in which the adjoint does reverse it."""
    text = (docs / "solvers.md").read_text()
    table = text[text.index("| Solver | Steps are reversed |") :].split("\n\n")[0]
    rows = [line for line in table.splitlines() if re.search(rf"`{name}[`(]", line)]
    assert rows
    if name in ("BitExact", "HalfSolver", "UReversible", "FixedPointReversible"):
        return  # What they wrap decides: `test_solvers.py`.
    (row,) = (row for row in rows if "HalfSolver" not in row)
    assert row.split("|")[2].strip() == _reversed_how(name)


def _reversed_how(name: str) -> str:
    solver = getattr(diffrax, name)()
    reversal = _choose_reversal(solver, _solver_state(solver))
    return {
        AlgebraicReversal: "in closed form",
        NumericalReversal: "numerically",
        NoReversal: "not at all",
    }[type(reversal)]


def _solver_state(solver):
    """What this solver carries from step to step, on an equation that it takes."""
    path = diffrax.VirtualBrownianTree(
        0, 1, 0.1, (2,), jr.key(0), levy_area=diffrax.SpaceTimeTimeLevyArea
    )
    drift = diffrax.ODETerm(lambda t, y, args: -y)
    noise = diffrax.ControlTerm(lambda t, y, args: jnp.eye(2), path)
    langevin = diffrax.MultiTerm(
        diffrax.UnderdampedLangevinDriftTerm(1.0, 1.0, lambda y, args: y),
        diffrax.UnderdampedLangevinDiffusionTerm(1.0, 1.0, path),
    )
    y = jnp.ones(2)
    for terms, y0 in (
        (langevin, (y, y)),
        (diffrax.MultiTerm(drift, noise), y),
        (diffrax.MultiTerm(drift, drift), y),
        ((drift, drift), (y, y)),
        (drift, y),
    ):
        try:
            return eqx.filter_eval_shape(solver.init, terms, 0.0, 0.1, y0, None)
        except (AssertionError, AttributeError, TypeError, ValueError):
            continue
    raise AssertionError(f"No equation was found for {solver}.")


def test_readme_shows_what_was_measured():
    lines = (docs / "measured" / "gradient.jsonl").read_text().splitlines()
    measured = {
        (f"`{r['solver']}", f"`{r['adjoint']}()`", r["steps"]): r
        for r in map(json.loads, lines)
        if (r["problem"], r["dtype"]) == ("mlp", "float32")
    }
    text = (root / "README.md").read_text()
    rows = re.findall(r"^\| (`.*Adjoint.*) \|$", text, re.MULTILINE)
    assert len(rows) == 3
    for row in rows:
        solver, adjoint, memory, memory_of_many, error, time = row.split(" | ")
        solver = "`UReversible(Tsit5)" if "UReversible" in solver else "`Tsit5"
        few, many = (measured[solver, adjoint, n] for n in (1000, 100_000))
        assert memory == f"{few['temp_bytes'] / 2**20:.2f} MiB"
        assert memory_of_many == f"{many['temp_bytes'] / 2**20:.2f} MiB"
        assert float(error) == float(f"{few['error']:.1e}")
        assert float(time) == float(f"{few['time_ratio']:.2f}")
    # And the text below the table.
    text = " ".join(text.split())
    for solver in ("`Tsit5", "`UReversible(Tsit5)"):
        row = measured[solver, "`ReversibleAdjoint()`", 1000]
        assert f"undoes {round(1000 * row['undone'])} of the 1000 steps" in text
    sizes = {
        (adjoint, n): measured["`Tsit5", f"`{adjoint}()`", n]["temp_bytes"]
        for adjoint in ("RecursiveCheckpointAdjoint", "ReversibleAdjoint")
        for n in (100, 1000, 100_000)
    }
    default, ours, at_1000 = (
        f"{sizes[key] / 2**20:.2f} MiB"
        for key in (
            ("RecursiveCheckpointAdjoint", 100),
            ("ReversibleAdjoint", 100),
            ("ReversibleAdjoint", 1000),
        )
    )
    saved = f"nothing to be saved: {default} in the first row, {ours} in the second"
    assert saved in text
    # A batch of 256, of dimension 16, and 4 bytes for each number.
    room = 32 * 256 * 16 * 4 / 2**20
    assert f"Of the {at_1000}, {room} are room for 32 states" in text
    grown = sizes["ReversibleAdjoint", 100_000] - sizes["ReversibleAdjoint", 1000]
    assert "of 4 bytes for each step" in text
    assert abs(grown / 99_000 - 4) < 0.01


def test_features_are_told_of():
    """Every feature that `benchmarks/features.py` tries is in the file from which the
    table is made."""
    lines = (docs / "measured" / "features.jsonl").read_text().splitlines()
    stored = {json.loads(line)["feature"] for line in lines}
    source = (root / "benchmarks" / "features.py").read_text()
    assert len(lines) == source.count("    Feature(") > 30
    assert all(name in source for name in stored)


def test_levy_areas_are_told_of():
    """The table of which Brownian motion each solver of SDEs needs."""
    text = (docs / "api" / "sde_solvers.md").read_text()
    rows = re.findall(r"^\| (`.*) \| `(\w+)` \|$", text, re.MULTILINE)
    told = {}
    for names, area in rows:
        told |= dict.fromkeys(re.findall(r"`(\w+)`", names), area)
    needed = {}
    for name, value in vars(diffrax).items():
        if name.startswith("Abstract") or not hasattr(value, "minimal_levy_area"):
            continue
        area = value.minimal_levy_area
        if isinstance(area, property):  # It follows from the tableau.
            area = value().minimal_levy_area
        needed[name] = area.__name__.removeprefix("Abstract")
    assert told == needed and len(told) == 9
