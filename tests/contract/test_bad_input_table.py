"""The table of bad input names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"`([\w/]+\.py)::(\w+)`")


def test_every_case_of_bad_input_has_a_test_that_exists() -> None:
    rows = [line for line in (TESTS / "BAD_INPUT.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 40
    for row in rows:
        (file, name), *others = ENTRY.findall(row)
        assert others == []
        assert re.search(rf"^(async )?def {name}\(", (TESTS / file).read_text(), re.MULTILINE), row
