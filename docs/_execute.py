"""Executes the notebooks, and stores what they print and draw in them.

    python docs/_execute.py                    # all of them, one after another
    python docs/_execute.py neural-cde pde     # these
    python docs/_execute.py --check            # stores nothing: do they run?

A notebook fails if one of its cells does, and so if something that its text says, and
that the cell after it asserts, is not true. It fails as well if there is a warning, if
a figure has no text for those who do not see it (`alt` in the metadata of its cell), or
if it comes to more than 300 kB. What is stored holds nothing that changes from one
machine to another but for what the notebook itself has measured.
"""

import argparse
import base64
import concurrent.futures
import pathlib
import sys
import time

import nbformat
from _png import compress
from nbclient import NotebookClient


folder = pathlib.Path(__file__).parent / "notebooks"
most_bytes = 300_000
longest_cell = 600  # seconds


def execute(path: pathlib.Path) -> str:
    """The text of the notebook at `path`, executed."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=longest_cell,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
    )
    client.execute()
    normalise(notebook)
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    problems = problems_of(notebook, text)
    if problems:
        raise ValueError("; ".join(problems))
    return text


def normalise(notebook: nbformat.NotebookNode) -> None:
    """Drops what depends on who executed it, where and how."""
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    notebook.nbformat_minor = 5
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
        kept = {"alt", "tags"} & set(cell.metadata)
        cell.metadata = {key: cell.metadata[key] for key in sorted(kept)}
        if cell.cell_type != "code":
            continue
        cell.outputs = merge_streams(cell.outputs)
        for output in cell.outputs:
            # The `repr` of a figure.
            if "image/png" in output.get("data", {}):
                png = compress(base64.b64decode(output.data["image/png"]))
                output.data = {"image/png": base64.b64encode(png).decode()}
                output.metadata = {}


def merge_streams(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """What was printed in one go, which arrives in pieces that depend on timing."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        is_stream = output.output_type == "stream"
        if merged and is_stream and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def problems_of(notebook: nbformat.NotebookNode, text: str) -> list[str]:
    problems = []
    if len(text) > most_bytes:
        problems.append(f"it comes to {len(text)} bytes, of at most {most_bytes}")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        problems.append("its cells were not executed one after another")
    for cell in code:
        for output in cell.outputs:
            if output.output_type == "error":
                problems.append(f"{cell.id} raises {output.ename}")
            if output.get("name") == "stderr":
                problems.append(f"{cell.id} warns: {output.text[:500]}")
            if "image/png" in output.get("data", {}) and not cell.metadata.get("alt"):
                problems.append(f"{cell.id} draws a figure without `alt`")
    return problems


def attempt(path: pathlib.Path, check: bool) -> tuple[bool, str]:
    """Executes a notebook, and stores it if not `check`. Returns whether that went
    well, and a line about it."""
    start = time.monotonic()
    try:
        text = execute(path)
    except Exception as e:
        success, result = False, f"FAILED\n{e}"
    else:
        success, result = True, f"{len(text) / 1000:.0f} kB"
        if not check:
            path.write_text(text)
    seconds = time.monotonic() - start
    return success, f"{path.stem:30} {seconds:5.0f} s  {result}"


def main(names: list[str], check: bool, jobs: int) -> int:
    paths = [folder / f"{name}.ipynb" for name in names] or sorted(
        folder.glob("*.ipynb")
    )
    failed = False
    with concurrent.futures.ProcessPoolExecutor(jobs) as executor:
        for success, line in executor.map(attempt, paths, [check] * len(paths)):
            failed = failed or not success
            print(line, flush=True)
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="notebooks, without `.ipynb`")
    parser.add_argument("--check", action="store_true", help="store nothing")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="how many to execute at a time (times that they print are then longer)",
    )
    arguments = parser.parse_args()
    sys.exit(main(arguments.names, arguments.check, arguments.jobs))
