"""Puts the package together: upstream's release, and our files over it.

The repository tracks only what this project writes. Upstream's files come from the
build requirement `diffrax===0.7.2`, each to its own path in `diffrax/`. Where a file of
ours has that path, upstream's goes beside it under another name (see `_beside`), so
that ours can import it.

- sdist: our files alone. Whoever builds from it takes upstream from the same pinned
  requirement, so nothing is gained by distributing a second copy.
- wheel: both. Nothing is written to the tree.
- editable: upstream's files are placed in the tree, read-only, and named in
  `diffrax/.gitignore`.

Whether a file in the tree is ours is decided by its contents, not only by its name (see
`_our_files`): a file is replaced or deleted only if it still holds what was placed.
"""

import hashlib
import importlib.metadata
import itertools
import os
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


_upstream_version = "0.7.2"
# What this prints in a folder that holds upstream's `diffrax/` and no `__pycache__`:
# find diffrax -type f | LC_ALL=C sort | xargs sha256sum | sha256sum
_upstream_sha256 = "0d7b3a3568b738e624c525e5f4e0671a2f4f4c3d18b39814172326164da22ad6"
_suffixes = {".py", ".typed"}
_record_header = """\
# Written by `hatch_build.py`: the upstream files it placed here and will replace. Each
# is preceded by its SHA-256; a file that no longer has it is taken to be one of ours.

/.gitignore
"""


class UpstreamBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        tree = Path(self.root, "diffrax")
        upstream, licence = _find_upstream()
        ours = _our_files(tree, upstream)
        layout = _lay_out(upstream, ours)

        include = {}
        if self.target_name == "wheel":
            # Next to ours, where installers and licence scanners look.
            info = f"{self.build_config.builder.artifact_project_id}.dist-info"
            include[str(licence)] = f"{info}/licenses/upstream/{licence.name}"
        if version == "editable":
            _place(tree, layout)
        else:
            # `pyproject.toml` excludes `diffrax/` from what hatchling selects, and all
            # files are named here instead. So a tree with placed files gives the same
            # result as one without.
            include |= {str(tree / path): f"diffrax/{path}" for path in ours}
            if self.target_name == "wheel":
                include |= {str(src): f"diffrax/{dst}" for dst, src in layout.items()}
        build_data["force_include"] |= include


def _find_upstream() -> tuple[dict[str, Path], Path]:
    """Upstream's package files, by their path in the package, and its licence."""
    found = list(importlib.metadata.distributions(name="diffrax"))
    # Our own distribution has this name too, and is what a build without isolation
    # finds in an environment in which this project is installed.
    dist = next((d for d in found if d.version == _upstream_version), None)
    if dist is None:
        versions = ", ".join(d.version for d in found) or "none"
        _refuse(f"needs diffrax {_upstream_version} to build from, found {versions}")
    paths = {PurePosixPath(p): Path(str(p.locate())) for p in dist.files or ()}
    package = {
        str(path.relative_to("diffrax")): src
        for path, src in sorted(paths.items())
        if path.parts[0] == "diffrax" and path.suffix in _suffixes and src.is_file()
    }
    licences = [src for path, src in paths.items() if path.name == "LICENSE"]
    if _digest_package(package) != _upstream_sha256 or len(licences) != 1:
        _refuse(f"the diffrax {dist.version} found is not the one that was released")
    return package, licences[0]


def _refuse(problem: str) -> NoReturn:
    # Not an exception that brings its traceback: what the backend prints is what pip,
    # build and uv show.
    raise SystemExit(
        f"hatch_build.py: {problem}; build with isolation (the default, so without "
        "`--no-build-isolation`), from an index that has upstream's "
        f"diffrax==={_upstream_version}"
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_package(package: dict[str, Path]) -> str:
    lines = [f"{_digest(src)}  diffrax/{path}\n" for path, src in package.items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _beside(path: str) -> str:
    """Where upstream's file goes if there is one of ours at `path`.

    `_adjoint.py` -> `_upstream_adjoint.py`, `_solver/base.py` ->
    `_solver/_upstream_base.py`, `__init__.py` -> `_upstream_init.py`. It stays in its
    folder, so its relative imports mean what they did.
    """
    file = PurePosixPath(path)
    return str(file.with_name(f"_upstream_{file.stem.strip('_')}{file.suffix}"))


def _our_files(tree: Path, upstream: dict[str, Path]) -> list[str]:
    """The files of the package in the tree, without those that were placed there.

    A file was placed if it holds what `diffrax/.gitignore` says was placed at its path,
    or what would be placed there today: the second for a tree whose `.gitignore` is
    gone, or was not written because the build was interrupted. Anything else is ours,
    and so is a placed file that was edited: it is never overwritten, and is left out of
    the next `.gitignore`, so that git shows it.
    """
    placed = {path: {digest} for path, digest in _read_record(tree).items()}
    for path, src in upstream.items():
        for dst in (path, _beside(path)):
            placed.setdefault(dst, set()).add(_digest(src))
    return [
        path for path in _list(tree) if _digest(tree / path) not in placed.get(path, ())
    ]


def _list(tree: Path) -> list[str]:
    paths = (path.relative_to(tree) for path in tree.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in paths
        if path.suffix in _suffixes
        # Caches and the temporary files of editors.
        and not any(part.startswith((".", "__pycache__")) for part in path.parts)
    )


def _lay_out(upstream: dict[str, Path], ours: list[str]) -> dict[str, Path]:
    """Where each of upstream's files goes."""
    layout = {
        (_beside(path) if path in ours else path): src for path, src in upstream.items()
    }
    if taken := sorted(layout.keys() & set(ours)):
        raise SystemExit(
            f"hatch_build.py: diffrax/{taken[0]} is where a file of upstream's goes. "
            "Was it placed, and then edited? Delete it or rename it, then build again"
        )
    if len(layout) < len(upstream):
        raise SystemExit("hatch_build.py: two files of upstream's have one place")
    return layout


def _place(tree: Path, layout: dict[str, Path]) -> None:
    """Brings the placed files in the tree to what `layout` says.

    In an order that may be interrupted anywhere: new files, then the deletion of those
    no longer needed, then the record of it.
    """
    old_record = _read_record(tree)
    record = {path: _digest(src) for path, src in sorted(layout.items())}
    lines = [f"# {digest}\n/{path}\n" for path, digest in record.items()]
    # In the tree, as a rename needs the same file system.
    with tempfile.TemporaryDirectory(dir=tree, prefix=".placing-") as folder:
        staged = Path(folder, "staged")
        for path, src in layout.items():
            _update(tree / path, src.read_bytes(), staged, 0o444)
        for path in old_record.keys() - record.keys():
            if (tree / path).is_file() and _digest(tree / path) == old_record[path]:
                (tree / path).unlink()
        text = _record_header + "".join(lines)
        _update(tree / ".gitignore", text.encode(), staged, 0o644)


def _update(dst: Path, contents: bytes, staged: Path, mode: int) -> None:
    # A file that is right keeps its modification time, which bytecode caches and
    # editors go by.
    if not dst.is_file() or dst.read_bytes() != contents:
        dst.parent.mkdir(parents=True, exist_ok=True)
        staged.write_bytes(contents)
        os.replace(staged, dst)
    dst.chmod(mode)


def _read_record(tree: Path) -> dict[str, str]:
    """The SHA-256 of each placed file, by path, as of the last editable install."""
    record = tree / ".gitignore"
    lines = record.read_text().splitlines() if record.is_file() else []
    return {
        path.removeprefix("/"): digest.removeprefix("# ")
        for digest, path in itertools.pairwise(lines)
        if digest.startswith("# ") and path.startswith("/")
    }
