"""What is built from this repository, and what an editable install does to a checkout.

All of it happens in scratch copies and environments, so that the install with which the
tests run can hide nothing. It takes half a minute and upstream's release from PyPI, so
`.ci/run` asks for it by itself.
"""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest


_root = Path(__file__).resolve().parents[1]
_replaced = {"SemiImplicitEuler", "LeapfrogMidpoint", "ReversibleHeun"}
_added = {"AbstractReversibleSolver", "ReversibleAdjoint", "UReversible"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (_root / ".git").exists(), reason="git knows which files are ours"
    ),
]


def _run(*command: object, cwd: Path, check: bool = True, path: Path | None = None):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GIT_"))}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [str(x) for x in command],
        cwd=cwd,
        env=env,
        check=check,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _hash(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def _hash_files(tree: Path) -> dict[str, str]:
    return {
        path.relative_to(tree).as_posix(): _hash(path.read_bytes())
        for path in sorted(tree.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _hash_wheel(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: _hash(archive.read(name)) for name in archive.namelist()}


def _known_files() -> list[str]:
    """What a commit of the working tree would hold."""
    out = _run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=_root).stdout
    return sorted(x for x in out.split("\0") if x and (_root / x).is_file())


def _copy(to: Path) -> Path:
    for file in _known_files():
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(_root / file, to / file)
    return to


def _build(kind: str, tree: Path, out: Path, path: Path | None, check: bool = True):
    """What a frontend asks of the backend, in this environment."""
    code = f"from hatchling.build import build_{kind} as build; build({str(out)!r})"
    return _run(sys.executable, "-c", code, cwd=tree, path=path, check=check)


#
# Fixtures
#


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> Path:
    """The interpreter of an environment that has all that this one has, but for what
    is called `diffrax`.

    The packages of this environment come after its own, and as a plain entry of
    `sys.path`, whose `.pth` files (so an editable install) Python does not read.
    """
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(_run(python, "-c", code, cwd=folder).stdout.strip())
    others = [x for x in sys.path if Path(x).name in ("site-packages", "dist-packages")]
    (site_packages / "others.pth").write_text("\n".join(others))
    return python


@pytest.fixture(scope="module")
def stock(env, tmp_path_factory) -> Path:
    """A folder for `sys.path` with upstream's release in it."""
    folder = tmp_path_factory.mktemp("stock")
    pip = (env, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder)
    _run(*pip, "diffrax===0.7.2", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The sdist, and the wheel from the sdist, the way a release is made."""
    tree = _copy(tmp_path_factory.mktemp("tree"))
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--outdir", folder, tree, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (path,) = dist.glob("*.whl")
    return path


# Runs in the scratch environment: `argv[1]` has the classes and functions that each of
# upstream's modules defines, `argv[2]` the public names.
_collect_facts = """
import importlib, json, sys
import diffrax

def where(obj):
    module = getattr(obj, "__module__", None) or ""
    return sys.modules[module].__file__ if module.startswith("diffrax.") else None

defined, public = map(json.loads, sys.argv[1:])
modules = {name: importlib.import_module(name) for name in defined}
print(json.dumps(dict(
    file=diffrax.__file__,
    version=diffrax.__version__,
    all=[name for name in dir(diffrax) if not name.startswith("_")],
    lacking=[name for name in public if not hasattr(diffrax, name)],
    modules={name: module.__file__ for name, module in modules.items()},
    loaded=[
        module.__file__
        for name, module in sys.modules.items()
        if name.split(".")[0] == "diffrax"
    ],
    unequal=[
        f"{module}.{name}"
        for module, names in defined.items()
        for name in names
        if name in public
        and getattr(modules[module], name, None) is not getattr(diffrax, name, None)
    ],
    where={name: where(getattr(diffrax, name, None)) for name in public},
    base_where={
        name: [where(x) for x in getattr(getattr(diffrax, name, None), "__mro__", ())]
        for name in public
    },
)))
"""


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _defined(module: Path) -> list[str]:
    kinds = (ast.ClassDef, ast.FunctionDef)
    body = ast.parse(module.read_text()).body
    return [node.name for node in body if isinstance(node, kinds)]


def _public_names(stock: Path) -> list[str]:
    """Those that upstream's own `__init__.py` imports, as it is written."""
    body = ast.parse((stock / "diffrax" / "__init__.py").read_text()).body
    imports = [node for node in body if isinstance(node, ast.ImportFrom)]
    names = [alias.asname or alias.name for node in imports for alias in node.names]
    return sorted(name for name in names if not name.startswith("_"))


@pytest.fixture(scope="module")
def installed(env, stock, wheel, tmp_path_factory) -> dict:
    """What the wheel is like once it is installed and imported."""
    folder = tmp_path_factory.mktemp("elsewhere")
    _run(env, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=folder)
    sources = sorted(stock.glob("diffrax/**/*.py"))
    defined = {_module(x.relative_to(stock)): _defined(x) for x in sources}
    arguments = json.dumps(defined), json.dumps(_public_names(stock))
    out = _run(env, "-c", _collect_facts, *arguments, cwd=folder).stdout
    return json.loads(out.splitlines()[-1])


#
# Wheel and sdist
#


def test_imports_from_wheel(installed, env):
    assert Path(installed["file"]).is_relative_to(env.parents[1])
    assert installed["version"].startswith("0.7.2+reversible.")


def test_public_names(installed, stock):
    public = _public_names(stock)
    assert len(public) > 100
    assert installed["lacking"] == []
    assert set(installed["all"]) >= {*public, *_added}


def test_public_objects_are_upstreams(installed, stock):
    upstream = set(_hash_files(stock / "diffrax").values())

    def is_upstreams(file):
        return _hash(Path(file).read_bytes()) in upstream

    ours = {k for k, v in installed["where"].items() if v and not is_upstreams(v)}
    assert ours == _replaced
    for name in _replaced:
        own, *bases = installed["base_where"][name]
        stem = Path(own).name
        base = next(x for x in bases if x and Path(x).name == f"_upstream_{stem}")
        assert is_upstreams(base)


def test_private_modules(installed, env):
    # Under upstream's names, from the wheel, and the same objects that are public.
    assert len(installed["modules"]) > 60
    for file in installed["modules"].values():
        assert Path(file).is_relative_to(env.parents[1])
    assert installed["unequal"] == []
    # Nothing is loaded a second time under another name.
    assert len(installed["loaded"]) == len(set(installed["loaded"]))


def test_wheel_holds_each_upstream_file_once(wheel, stock):
    files = _hash_wheel(wheel)
    ours = [x for x in _known_files() if x.startswith("diffrax/")]
    assert "diffrax/__init__.py" in ours
    for path in ours:
        assert files.pop(path) == _hash((_root / path).read_bytes())
    for path, digest in _hash_files(stock / "diffrax").items():
        at = Path("diffrax", path)
        if at.as_posix() in ours:
            at = at.with_name(f"_upstream_{at.stem.strip('_')}{at.suffix}")
        assert files.pop(at.as_posix()) == digest
    assert not [x for x in files if ".dist-info/" not in x]
    assert "diffrax/py.typed" in _hash_wheel(wheel)


def _metadata(text: str) -> Message:
    return Parser().parsestr(text)


def _requirements(metadata: Message) -> set[str]:
    found = metadata.get_all("Requires-Dist", [])
    return {x.replace(" ", "") for x in found if "extra" not in x}


def test_metadata(wheel, stock):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [x for x in archive.namelist() if x.endswith("/METADATA")]
        ours = _metadata(archive.read(name).decode())
    (path,) = stock.glob("diffrax-*.dist-info/METADATA")
    upstreams = _metadata(path.read_text())
    assert ours["Name"] == "diffrax"
    assert ours["Version"].partition("+")[0] == upstreams["Version"]
    assert ours["Requires-Python"] == upstreams["Requires-Python"]
    assert _requirements(ours) == _requirements(upstreams)


def test_licences(wheel, stock):
    files = {k.partition("/")[2]: v for k, v in _hash_wheel(wheel).items()}
    (upstreams,) = stock.glob("diffrax-*.dist-info/licenses/LICENSE")
    assert files["licenses/upstream/LICENSE"] == _hash(upstreams.read_bytes())
    for name in ("LICENSE", "NOTICE"):
        assert files[f"licenses/{name}"] == _hash((_root / name).read_bytes())


def test_sdist_holds_our_files_only(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = [x.name.partition("/")[2] for x in archive.getmembers() if x.isfile()]
    assert sorted(names) == sorted([*_known_files(), "PKG-INFO"])


def _essence(wheel: Path) -> dict[str, str]:
    # These two name the release of hatchling, which may differ between environments.
    skip = ("/WHEEL", "/RECORD")
    return {k: v for k, v in _hash_wheel(wheel).items() if not k.endswith(skip)}


@pytest.mark.parametrize("placed", [False, True], ids=["clean", "placed"])
def test_wheel_does_not_depend_on_where_from(placed, wheel, stock, tmp_path):
    tree, out = _copy(tmp_path / "tree"), tmp_path / "out"
    out.mkdir()
    if placed:
        _build("editable", tree, out, stock)
    before = _hash_files(tree)
    assert ("diffrax/_integrate.py" in before) is placed
    _build("wheel", tree, out, stock)
    assert _essence(out / wheel.name) == _essence(wheel)
    _build("sdist", tree, out, stock)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        assert not [x for x in archive.getnames() if "_integrate.py" in x]
    # And nothing was written to the tree.
    assert _hash_files(tree) == before


@pytest.mark.parametrize("kind", ["wheel", "editable", "sdist"])
def test_other_contents_are_refused(kind, stock, tmp_path):
    tree, other = _copy(tmp_path / "tree"), tmp_path / "stock"
    shutil.copytree(stock, other)
    with (other / "diffrax" / "_event.py").open("a") as file:
        file.write("\n")
    before = _hash_files(tree)
    done = _build(kind, tree, tmp_path, other, check=False)
    assert done.returncode != 0
    (line,) = done.stdout.splitlines()
    assert "diffrax 0.7.2 found is not the one that was released" in line
    assert "build with isolation" in line
    assert _hash_files(tree) == before


def test_our_own_distribution_is_refused(wheel, tmp_path):
    # As a build without isolation would find it.
    tree = _copy(tmp_path / "tree")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "ours")
    done = _build("wheel", tree, tmp_path, tmp_path / "ours", check=False)
    assert done.returncode != 0
    (line,) = done.stdout.splitlines()
    assert "needs diffrax 0.7.2 to build from, found 0.7.2+reversible." in line
    assert "build with isolation" in line


def test_bare_clone_says_what_to_run(tmp_path):
    tree = _copy(tmp_path)
    done = _run(sys.executable, "-c", "import diffrax", cwd=tree, check=False)
    assert done.returncode != 0
    lines = done.stdout.splitlines()
    # One error, not the last of a chain of them, in one line.
    assert [line for line in lines if re.match(r"\w+Error", line)] == lines[-1:]
    assert lines[-1].startswith("ImportError: ")
    assert "pip install" in lines[-1]


#
# Editable installs
#


class _Checkout:
    def __init__(self, folder: Path, stock: Path):
        self.tree = _copy(folder / "tree")
        self.package = self.tree / "diffrax"
        self._stock = stock
        self._out = folder / "out"
        self._out.mkdir()
        _run("git", "init", "--quiet", cwd=self.tree)
        _run("git", "add", "--all", cwd=self.tree)
        self.ours = {f"{x.relative_to(self.package)}" for x in self.package.rglob("*")}

    def install(self, check: bool = True) -> str:
        return _build("editable", self.tree, self._out, self._stock, check=check).stdout

    def status(self) -> list[str]:
        out = _run("git", "status", "--porcelain", "-uall", cwd=self.tree).stdout
        # "A": what was added above, as it was.
        return [line for line in out.splitlines() if not line.startswith("A ")]

    def placed(self) -> dict[str, str]:
        files = _hash_files(self.package)
        return {k: v for k, v in files.items() if k not in self.ours}


@pytest.fixture
def checkout(tmp_path, stock):
    out = _Checkout(tmp_path, stock)
    out.install()
    return out


def test_editable_leaves_git_status_clean(checkout, stock):
    assert checkout.status() == []
    placed = checkout.placed()
    assert placed.pop(".gitignore")
    assert set(_hash_files(stock / "diffrax").values()) == set(placed.values())
    for path in placed:
        assert (checkout.package / path).stat().st_mode & 0o777 == 0o444
    assert not [x for x in checkout.package.iterdir() if "placing" in x.name]


def test_editable_shows_new_file(checkout):
    (checkout.package / "_solver" / "new.py").touch()
    assert checkout.status() == ["?? diffrax/_solver/new.py"]
    checkout.install()
    assert checkout.status() == ["?? diffrax/_solver/new.py"]


def test_editable_again_changes_nothing(checkout):
    def times():
        files = sorted(x for x in checkout.tree.rglob("*") if x.is_file())
        return {
            x: (x.stat().st_mtime_ns, x.stat().st_ino)
            for x in files
            if ".git" not in x.parts and "__pycache__" not in x.parts
        }

    before = times()
    checkout.install()
    assert times() == before


def test_editable_recovers_from_lost_record(checkout):
    before = checkout.placed()
    (checkout.package / ".gitignore").unlink()
    (checkout.package / "_term.py").unlink()
    checkout.install()
    assert checkout.placed() == before
    assert checkout.status() == []


def test_editable_replaces_file_and_gives_it_back(checkout):
    before = checkout.placed()
    ours = checkout.package / "_event.py"
    ours.unlink()
    ours.write_text("from ._upstream_event import *\n")
    checkout.install()
    assert ours.read_text() == "from ._upstream_event import *\n"
    assert _hash_files(checkout.package)["_upstream_event.py"] == before["_event.py"]
    assert checkout.status() == ["?? diffrax/_event.py"]

    ours.unlink()
    checkout.install()
    assert checkout.placed() == before
    assert checkout.status() == []


def test_editable_moves_to_new_release(checkout):
    # Stands for an older release: a file that has since changed, and one that is gone.
    before = checkout.placed()
    record = checkout.package / ".gitignore"
    text = record.read_text()
    for path in ("_event.py", "_gone.py"):
        file = checkout.package / path
        file.unlink(missing_ok=True)
        file.write_text(f"# {path}, once\n")
        text += f"# {_hash(file.read_bytes())}\n/{path}\n"
    record.write_text(text)
    checkout.install()
    assert checkout.placed() == before
    assert checkout.status() == []


def test_editable_never_loses_an_edit(checkout):
    # Both a file at its own path and one beside ours: the first is now ours, for the
    # second there is no other place.
    for path in ("_solver/tsit5.py", "_upstream_init.py"):
        file = checkout.package / path
        file.chmod(0o644)
        with file.open("a") as stream:
            stream.write("# an edit\n")
    before = checkout.placed()
    out = checkout.install(check=False)
    assert len(out.splitlines()) == 1
    assert "diffrax/_upstream_init.py is where a file of upstream's goes" in out
    assert checkout.placed() == before

    (checkout.package / "_upstream_init.py").unlink()
    checkout.install()
    assert checkout.status() == ["?? diffrax/_solver/tsit5.py"]
    assert (
        _hash_files(checkout.package)["_solver/tsit5.py"] == before["_solver/tsit5.py"]
    )
