"""Where the real data sets are, raw and prepared, for tests that carry the marker ``data``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def cache_of_run(factory: pytest.TempPathFactory) -> Path:
    """One cache of prepared data sets for all processes of this test run; a large one is not prepared by each."""
    base = factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "prepared"


def data_root() -> Path:
    """The folder with the real data sets; skips the test without it, and fails it where CI demands it."""
    root = Path(os.environ.get("WEARFLEET_DATA_ROOT", ROOT.parent / "shared" / "data"))
    if root.is_dir():
        return root
    message = f"no data sets at {root}: set WEARFLEET_DATA_ROOT"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
