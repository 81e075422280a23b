"""Each feature that `benchmarks/features.py` tries, and so each row of the page on
features, with `ReversibleAdjoint`: exact, or refused in these words; and in memory that
does not grow with the number of steps, but for the record of their times."""

import importlib.util
import json
import pathlib

import jax
import pytest


_root = pathlib.Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location(
    "features", _root / "benchmarks" / "features.py"
)
assert _spec is not None and _spec.loader is not None
features = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(features)
_rows = [json.loads(line) for line in features.STORED.read_text().splitlines()]
_stored = {(row["group"], row["feature"]): row for row in _rows}


@pytest.fixture(autouse=True)
def _promotion():
    # It is a program of a user's, with JAX's defaults.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax")
@pytest.mark.parametrize(
    "feature", features.FEATURES, ids=lambda f: f"{f.group}: {f.name}"
)
def test_feature(feature):
    row = features.measure(feature, smoke=True)
    assert not features.differs(row, _stored[feature.group, feature.name])
    if not isinstance(row["results"][features.OURS], str):
        row["step_bytes"] = features.step_bytes(feature)
        assert not features.grows(row, feature)
