"""The table of federated requirements names tests that exist, and leaves no requirement out."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENTRY = re.compile(r"`([\w/]+\.py)::(\w+)`")


def test_every_requirement_has_a_test_that_exists_or_a_reason() -> None:
    text = (ROOT / "docs" / "federated-requirements.md").read_text()
    table, reasons = text.split("## What is not built, and why")
    rows = [line for line in table.splitlines() if line.startswith("| R")][1:]
    for row in rows:
        ((file, name),) = ENTRY.findall(row)
        assert re.search(rf"^(async )?def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), row
    shown = set(re.findall(r"^\| (R\d+) ", table, re.MULTILINE))
    explained = set(re.findall(r"^- \*\*(R\d+)\*\*", reasons, re.MULTILINE))
    assert shown | explained == {f"R{number}" for number in range(1, 25)}
