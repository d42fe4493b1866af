"""What the end-to-end tests share: a small model, its plan and recordings, made once."""

from __future__ import annotations

import pytest
from fleet_processes import Kit, make_kit


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """Training for it takes a device a few seconds, so that a test can act in the middle of it."""
    return make_kit(tmp_path_factory.mktemp("kit"), epochs=30)
