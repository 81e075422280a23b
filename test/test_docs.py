"""The documentation: the code on its pages runs, and its site builds."""

import functools as ft
import importlib.util
import operator
import pathlib
import re
import subprocess
import sys
from typing import Any

import diffrax
import diffrax._upstream_init as upstream
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest


root = pathlib.Path(__file__).parent.parent
docs = root / "docs"
_block = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_pages = [
    page
    for page in [root / "README.md", *sorted(docs.rglob("*.md"))]
    if page.exists() and _block.search(page.read_text())
]
_our_names = sorted(
    {name for name in vars(diffrax).keys() - vars(upstream).keys() if name[0] != "_"}
    | {"LeapfrogMidpoint", "ReversibleHeun", "SemiImplicitEuler"}
)


def _blocks(page):
    """The code blocks of a page, ready to be executed in order. Their tracebacks show
    the lines of the page."""
    text = page.read_text()
    for block in _block.finditer(text):
        lines_before = text.count("\n", 0, block.start(1))
        yield compile("\n" * lines_before + block[1], str(page), "exec")


@ft.cache
def _extending() -> dict[str, Any]:
    """The names that the page on extending defines in its first two blocks: the solver
    and the check of the law."""
    namespace: dict[str, Any] = {"__name__": "extending"}
    example, law, *_ = _blocks(docs / "extending.md")
    exec(example, namespace)
    exec(law, namespace)
    return namespace


@pytest.mark.parametrize("page", _pages, ids=lambda page: page.stem)
def test_code_runs(page):
    namespace = {"__name__": page.stem}
    for block in _blocks(page):
        exec(block, namespace)


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
# The API pages.
#


def test_our_names():
    assert {"AbstractReversibleSolver", "ReversibleAdjoint", "UReversible"} <= set(
        _our_names
    )


@pytest.mark.parametrize("name", _our_names)
def test_api_entry(name):
    entry = re.compile(rf"^::: diffrax\.{name}$", re.MULTILINE)
    assert any(entry.search(page.read_text()) for page in docs.glob("api/*.md"))


def test_names_from_upstream():
    text = (docs / "api" / "upstream.md").read_text()
    names = re.findall(r"\{#diffrax\.(\S+)\} `(\S+)` \|", text)
    assert len(names) == text.count("[](){") > 0
    assert len(set(names)) == len(names)
    for anchor, label in names:
        assert anchor == label
        assert operator.attrgetter(anchor)(diffrax) is not None


#
# The site.
#


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for module in ("mkdocs", "material", "mkdocstrings_handlers", "ziamath"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"Needs `pip install '.[docs]'`: there is no `{module}`.")
    folder = tmp_path_factory.mktemp("site")
    out = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stdout
    return folder


def test_site_has_entries(site):
    text = "".join(page.read_text() for page in site.glob("api/*/index.html"))
    for name in _our_names:
        assert f'id="diffrax.{name}"' in text
    for method in ("backward_step", "record_state", "restore_state"):
        assert f'id="diffrax.AbstractReversibleSolver.{method}"' in text


def test_site_mathematics(site):
    """The LaTeX has become MathML."""
    with_mathematics = 0
    for page in site.rglob("*.html"):
        text = page.read_text()
        with_mathematics += "<math" in text
        text = re.sub(r"<(code|pre|script)\b.*?</\1>", "", text, flags=re.DOTALL)
        text = re.sub(r"<[^>]*>", "", text)
        assert re.search(r"\$|\\[a-z(\[]", text) is None, page
    assert with_mathematics >= 3


def test_site_loads_nothing_from_elsewhere(site):
    load = re.compile(
        r"<(?:script|img|iframe|source|video)\b[^>]*\bsrc=[\"']?(?:https?:)?//"
        r"|<link\b(?![^>]*rel=[\"']?canonical)[^>]*\bhref=[\"']?(?:https?:)?//"
        r"|url\([\"']?(?:https?:)?//"
    )
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(files) > 0
    for file in files:
        found = load.search(file.read_text())
        assert found is None, (file, found)
