"""The site of the documentation, as it is built."""

import contextlib
import functools as ft
import html.parser
import http.server
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from urllib.parse import unquote

import pytest

from .test_docs import notebooks, public_names, root


def _skip_without(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"Needs `pip install '.[docs,dev]'`: there is no `{module}`.")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    _skip_without("mkdocs", "material", "mkdocstrings_handlers", "ziamath", "nbconvert")
    folder = tmp_path_factory.mktemp("site")
    out = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert out.returncode == 0, out.stdout
    return folder


def _as_text(text: str) -> str:
    text = re.sub(r"<(code|pre|script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    return re.sub(r"<[^>]*>", "", text)


def test_site_has_entries(site):
    text = "".join(page.read_text() for page in site.glob("api/*/index.html"))
    for name in public_names:
        assert f'id="diffrax.{name}"' in text
    for method in ("backward_step", "record_state", "restore_state"):
        assert f'id="diffrax.AbstractReversibleSolver.{method}"' in text


def test_site_has_notebooks(site):
    for notebook in notebooks:
        page = (site / "notebooks" / notebook.stem / "index.html").read_text()
        assert f'href="../{notebook.name}"' in page
        assert page.count("<img") == notebook.read_text().count('"image/png"')


def test_downloaded_notebook_stands_alone(site):
    """It is the one that is stored, but for links that lead somewhere only from within
    the site."""
    for notebook in notebooks:
        stored = json.loads(notebook.read_text())
        downloaded = json.loads((site / "notebooks" / notebook.name).read_text())
        text = ""
        for cell, expected in zip(downloaded["cells"], stored["cells"], strict=True):
            if cell["cell_type"] == "markdown":
                text += "".join(cell.pop("source"))
                expected.pop("source")
            assert cell == expected
        assert re.search(r"`\]\[|\.md\b|\]\(#", text) is None
        assert "](http" in text or "](http" not in notebook.read_text()


@pytest.mark.parametrize(
    "link, expected",
    (
        ("[`diffrax.Heun`][]", "`diffrax.Heun`"),
        (
            "[how\nto](../choosing.md#memory)",
            "[how\nto](https://a.b/c/choosing/#memory)",
        ),
        ("[a](b.md)", "[a](https://a.b/c/notebooks/b/)"),
        ("[a](#b)", "[a](https://a.b/c/notebooks/pde/#b)"),
        ("[a](https://arxiv.org/)", "[a](https://arxiv.org/)"),
        ("$[0, 1](t)$", "$[0, 1](t)$"),
    ),
)
def test_links_of_downloaded_notebook(link, expected):
    _skip_without("mkdocs", "nbconvert")
    path = root / "docs" / "_hooks" / "notebooks.py"
    spec = importlib.util.spec_from_file_location("notebooks_hook", path)
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    text = json.dumps({"cells": [{"cell_type": "markdown", "source": [link]}]})
    changed = hook._to_download(text, "notebooks/pde.ipynb", "https://a.b/c/")
    (cell,) = json.loads(changed)["cells"]
    assert "".join(cell["source"]) == expected


def test_site_has_licence_of_font(site):
    """Which the font itself names, and has to go along with it."""
    assert (site / "fonts" / "STIXTwoMath.ttf").is_file()
    licence = (site / "fonts" / "OFL.txt").read_text()
    assert "The STIX Fonts Project Authors" in licence
    assert "SIL OPEN FONT LICENSE" in licence


def test_site_mathematics(site):
    """The LaTeX has become MathML."""
    with_mathematics = 0
    for page in site.rglob("*.html"):
        text = page.read_text()
        with_mathematics += "<math" in text
        assert re.search(r"\$|\\[a-z(\[]", _as_text(text)) is None, page
    assert with_mathematics >= 10


_marks = "table", "paper"


def test_site_tables(site):
    """What was measured stands in the place of each of their marks."""
    pages = [page.read_text() for page in site.rglob("*.html")]
    assert not any(f"<!-- {mark}:" in page for page in pages for mark in _marks)
    features = (site / "features" / "index.html").read_text()
    assert features.count("✓") > 50


def test_site_figures_have_texts(site):
    images = 0
    for page in site.rglob("*.html"):
        for image in re.findall(r"<img\b[^>]*>", page.read_text()):
            images += 1
            assert re.search(r'alt="[^"]{15,}"', image), (page, image)
    assert images > 15


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


class _Links(html.parser.HTMLParser):
    """The anchors of a page, and what it refers to."""

    def __init__(self, page: pathlib.Path):
        super().__init__()
        self.anchors = set()
        self.targets = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors |= {attributes.get("id"), attributes.get("name")}
        self.targets |= {attributes.get("href"), attributes.get("src")} - {None}


def test_site_links(site):
    """Those within the site, with their anchors."""
    pages = {page: _Links(page) for page in site.rglob("*.html")}
    checked = 0
    for page, links in pages.items():
        for target in links.targets:
            url = urllib.parse.urlsplit(target)
            # The page of errors does not know where it is, and has absolute ones.
            if url.scheme or url.netloc or page.name == "404.html":
                continue
            checked += 1
            path = page if url.path == "" else page.parent / unquote(url.path)
            path = pathlib.Path(os.path.normpath(path))
            path = path / "index.html" if path.is_dir() else path
            assert path.is_file(), (page, target)
            if url.fragment and path in pages:
                assert unquote(url.fragment) in pages[path].anchors, (page, target)
    assert checked > 1000


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@contextlib.contextmanager
def _served(folder: pathlib.Path):
    """The address of the folder, as any static host would serve it: below a path."""
    handler = ft.partial(_Quiet, directory=str(folder.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{folder.name}/"
        server.shutdown()


#
# In a browser.
#


@pytest.fixture(scope="module")
def browser():
    _skip_without("playwright")
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if path is None:
        pytest.skip("Needs Chromium: `apt-get install chromium`.")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def address(site):
    with _served(site) as address:
        yield address


@contextlib.contextmanager
def _page(browser, address, width=1280, scheme="light"):
    """A page that may load nothing from elsewhere, and must not complain."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    problems = []
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("requestfailed", lambda r: problems.append(r.url))
    page.on(
        "request",
        lambda r: (
            None
            if r.url.startswith((address, "data:", "blob:"))
            else problems.append(f"leaves the site: {r.url}")
        ),
    )
    yield page
    context.close()
    assert problems == []


def _paths(site):
    return sorted(
        "" if page.parent == site else f"{page.parent.relative_to(site)}/"
        for page in site.rglob("index.html")
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ("light", "dark"))
@pytest.mark.parametrize("width", (1280, 360))
def test_pages_in_browser(site, browser, address, width, scheme):
    """Every page shows all of its figures and mathematics, and is no wider than the
    screen."""
    with _page(browser, address, width, scheme) as page:
        for path in _paths(site):
            page.goto(address + path)
            page.wait_for_load_state("networkidle")
            assert page.locator("h1").first.is_visible(), path
            widths = page.evaluate(
                "[document.documentElement.scrollWidth, window.innerWidth]"
            )
            assert widths[0] <= widths[1], path
            missing = page.evaluate(
                "Promise.all([...document.images].map(i => {"
                " i.loading = 'eager'; return i.decode().then(() => '', () => i.src);"
                "})).then(urls => urls.filter(url => url != ''))"
            )
            assert missing == [], path
            flat = page.evaluate(
                "[...document.querySelectorAll('article math')].filter(m =>"
                " m.checkVisibility() && m.getBoundingClientRect().height < 5).length"
            )
            assert flat == 0, path
            background = page.evaluate(
                "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
            )
            assert (sum(background) > 384) == (scheme == "light"), path


@pytest.mark.slow
@pytest.mark.parametrize("width", (1280, 360))
def test_navigation_in_browser(browser, address, width):
    with _page(browser, address, width) as page:
        page.goto(address)
        if width < 600:
            page.locator("label.md-header__button[for=__drawer]").click()
            menu = page.locator("nav.md-nav--primary")
            menu.locator("label.md-nav__title[for=__nav_1]").click()  # Back, one up.
            page.wait_for_timeout(500)
            menu.locator("label.md-nav__link", has_text="API").first.click()
            menu.get_by_role("link", name="Adjoints").first.click()
        else:
            page.get_by_role("link", name="API", exact=True).first.click()
        page.wait_for_url("**/api/adjoints/")
        assert page.locator("h1").first.inner_text().startswith("Adjoints")


@pytest.mark.slow
@pytest.mark.parametrize("width", (1280, 360))
def test_search_in_browser(browser, address, width):
    with _page(browser, address, width) as page:
        page.goto(address)
        page.wait_for_load_state("networkidle")
        if width < 600:
            page.locator("label.md-header__button[for=__search]").click()
        # Key by key: it looks at what has been typed when a key is released.
        page.locator(".md-search__input").press_sequentially("certificate")
        first = page.locator(".md-search-result__link").first
        first.wait_for(state="visible")
        first.click()
        page.wait_for_load_state("networkidle")
        assert "certificate" in page.locator("article").inner_text().lower()


@pytest.mark.slow
def test_code_can_be_copied_in_browser(browser, address):
    with _page(browser, address) as page:
        page.goto(address + "getting-started/")
        block = page.locator("div.highlight").nth(1)
        block.hover()
        block.locator("button[data-md-type=copy], .md-clipboard").first.click()
        page.wait_for_timeout(300)
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.strip() == block.locator("code").inner_text().strip()
        assert "import" in copied
