"""What `benchmarks/papers/` has of its own: the methods that Diffrax has not, and the
format in which the authors' data is."""

import importlib
import pathlib
import sys
from typing import Any

import numpy as np
import pytest


_folder = pathlib.Path(__file__).parents[1] / "benchmarks" / "papers"


def _load(name: str) -> Any:
    sys.path.append(str(_folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(_folder))


def _order_conditions(tableau: Any) -> dict[int, list[tuple[float, float]]]:
    """By order: what the trees of this order come to, and what that has to be."""
    num_stages = len(tableau.b_sol)
    a = np.zeros((num_stages, num_stages))
    for i, row in enumerate(tableau.a_lower):
        a[i + 1, : i + 1] = row
    b, c = tableau.b_sol, np.concatenate([[0.0], tableau.c])
    assert np.allclose(np.sum(a, axis=1), c, rtol=0, atol=1e-15)
    return {
        1: [(np.sum(b), 1)],
        2: [(b @ c, 1 / 2)],
        3: [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)],
        4: [
            (b @ c**3, 1 / 4),
            ((b * c) @ a @ c, 1 / 8),
            (b @ a @ c**2, 1 / 12),
            (b @ a @ a @ c, 1 / 24),
        ],
    }


@pytest.mark.parametrize("name, order", (("Ralston3", 3), ("RK4", 4)))
def test_order_of_runge_kutta_method(name, order):
    solver = getattr(_load("_runge_kutta"), name)()
    assert solver.order(None) == order
    conditions = _order_conditions(solver.tableau)
    for i in range(1, order + 1):
        for found, expected in conditions[i]:
            assert abs(found - expected) < 1e-15
    if order < 4:
        assert any(abs(x - y) > 1e-3 for x, y in conditions[order + 1])


_lines = "% trial t x1 x2 v1 v2", "0 0.0 1 2 3 4", "0 0.5 -1 2e1 3 4", "1 9 9 9 9 9"


@pytest.mark.parametrize("separator", (" ", "\t", ","))
def test_recording_is_read(separator):
    """Only its first trial."""
    text = "\n".join(_lines).replace(" ", separator)
    times, values = _load("_mccallum_systems").read_recording(text)
    assert np.array_equal(times, [0, 0.5])
    assert np.array_equal(values, [[1, 2, 3, 4], [-1, 20, 3, 4]])


@pytest.mark.parametrize("text", ("", "trial t\n", "0 0.5 1 2 3", "0 0.5 1 2 3 4 5"))
def test_recording_of_another_format_is_refused(text):
    with pytest.raises(ValueError, match="must have 6 columns"):
        _load("_mccallum_systems").read_recording(text)


def test_simulated_recording_is_of_this_format():
    """As many rows, and at the same times, as the published ones."""
    systems = _load("_mccallum_systems")
    for laboratory, num_rows, end in (
        (systems._OSCILLATORS, 495, 16.52),
        (systems._PENDULUM, 819, 8.86),
    ):
        text, noise = laboratory.record()
        times, values = systems.read_recording(text)
        assert values.shape == (num_rows, 4)
        assert times[-1] == end
        # Of thousands of draws, the mean square is that to a few percent.
        assert abs(noise / np.mean(laboratory.noise**2) - 1) < 0.1
