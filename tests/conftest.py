"""Rules that hold for every test."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path

import pytest

_NEEDS = {
    "broker": ("mosquitto", "apt-get install mosquitto"),
    "browser": ("chromedriver", "apt-get install chromium chromium-driver"),
}


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@pytest.hookimpl(tryfirst=True)  # before markers select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run; with CI=true a missing part fails instead. Integration tests are slow."""
    strict = os.environ.get("CI") == "true"
    for item in items:
        if "integration" in item.path.parts:  # real brokers, servers and processes
            item.add_marker(pytest.mark.slow)
        for marker, (program, install) in _NEEDS.items():
            if item.get_closest_marker(marker) and _find(program) is None and not strict:
                item.add_marker(pytest.mark.skip(reason=f"{program} is not installed: {install}"))


def pytest_collection_finish() -> None:
    """Let torch's trace of every compilation be: pytest would listen to it, at a fifth of a compilation's time."""
    if "torch" in sys.modules:
        # pytest adds a handler of its own to loggers that do not propagate
        logging.getLogger("torch.__trace").propagate = True


@pytest.fixture
def output_dir() -> Path:
    """Folder for pictures and reports that a test leaves for people."""
    path = Path(__file__).resolve().parents[1] / "runs" / "test-output"
    path.mkdir(parents=True, exist_ok=True)
    return path
