"""Where the real data sets are, for tests that carry the marker ``data``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def data_root() -> Path:
    """The folder with the real data sets; skips the test without it, and fails it where CI demands it."""
    root = Path(os.environ.get("WEARFLEET_DATA_ROOT", ROOT.parent / "shared" / "data"))
    if root.is_dir():
        return root
    message = f"no data sets at {root}: set WEARFLEET_DATA_ROOT"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
