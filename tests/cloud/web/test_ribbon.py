"""Laws of one device's ribbon: order, exact counts, bounds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wearfleet_cloud.service.ribbon import Ribbon, RibbonCell, SequenceLedger
from wearfleet_protos.errors import ProtocolError


def cell(sequence: int, *, boot: str = "a", flagged: bool = False) -> RibbonCell:
    return RibbonCell(sequence, 1000 + sequence, 0, 0.9, 0.1, flagged, boot)


def filled(numbers: list[int], length: int = 240) -> Ribbon:
    ribbon = Ribbon(length)
    for version, number in enumerate(numbers):
        ribbon.add(cell(number), "walking", version)
    return ribbon


arrivals = st.lists(st.integers(0, 60), max_size=120)


@given(arrivals)
def test_cells_stand_in_order_of_recording_whatever_the_order_of_arrival(numbers: list[int]) -> None:
    assert [placed.cell.sequence for placed in filled(numbers).cells] == sorted(set(numbers))


@given(arrivals)
def test_every_window_is_received_duplicated_or_lost_exactly_once(numbers: list[int]) -> None:
    ribbon = filled(numbers)
    distinct = set(numbers)
    assert ribbon.received == len(distinct)
    assert ribbon.duplicated == len(numbers) - len(distinct)
    expected = max(distinct) - min(distinct) + 1 - len(distinct) if distinct else 0
    assert ribbon.lost == expected


@given(arrivals, st.integers(1, 10))
def test_a_ribbon_keeps_the_latest_cells_and_no_more(numbers: list[int], length: int) -> None:
    ribbon = filled(sorted(numbers), length)
    assert [placed.cell.sequence for placed in ribbon.cells] == sorted(set(numbers))[-length:]


def test_a_duplicate_of_a_cell_that_fell_off_the_ribbon_is_still_a_duplicate() -> None:
    ribbon = filled(list(range(20)), length=5)
    assert not ribbon.add(cell(0), "walking", 99)
    assert (ribbon.received, ribbon.duplicated) == (20, 1)


def test_a_late_window_reduces_the_lost_ones() -> None:
    ribbon = filled([0, 1, 4])
    assert ribbon.lost == 2
    ribbon.add(cell(2), "walking", 9)
    assert ribbon.lost == 1


def test_a_restarted_device_counts_from_zero_again_and_stands_after_its_former_run() -> None:
    ribbon = filled([5, 6])
    assert ribbon.add(cell(0, boot="b"), "walking", 3)
    ribbon.add(cell(7), "walking", 4)
    assert [(placed.cell.boot_id, placed.cell.sequence) for placed in ribbon.cells] == [
        ("a", 5),
        ("a", 6),
        ("a", 7),
        ("b", 0),
    ]
    assert ribbon.lost == 0


def test_the_losses_of_a_forgotten_start_stay_counted() -> None:
    ribbon = filled([0, 2])
    for boot in range(8):
        ribbon.add(cell(0, boot=f"b{boot}"), "walking", boot)
    assert ribbon.lost == 1


@given(st.lists(st.booleans(), max_size=30))
def test_the_ood_rate_is_that_of_the_kept_cells(flags: list[bool]) -> None:
    ribbon = Ribbon(10)
    for number, flag in enumerate(flags):
        ribbon.add(cell(number, flagged=flag), "walking", number)
    kept = flags[-10:]
    assert ribbon.ood_rate == (sum(kept) / len(kept) if kept else 0.0)


def test_only_cells_that_came_later_are_news() -> None:
    ribbon = filled([0, 3, 1])
    assert [placed.cell.sequence for placed in ribbon.since(0)] == [1, 3]


def test_a_ledger_stays_bounded_and_keeps_what_it_gave_up_as_missing() -> None:
    ledger = SequenceLedger()
    for number in range(0, 2000, 2):
        assert ledger.add(number)
    assert ledger.missing == 999
    assert len(ledger._starts) <= 256
    assert not ledger.add(1)
    assert ledger.add(1997)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sequence", -1),
        ("wall_time_ns", -1),
        ("activity", -1),
        ("confidence", 1.5),
        ("confidence", math.nan),
        ("ood_score", math.inf),
    ],
)
def test_a_cell_refuses_numbers_that_mean_nothing(field: str, value: float) -> None:
    good = {"sequence": 0, "wall_time_ns": 0, "activity": 0, "confidence": 0.5, "ood_score": 0.0}
    with pytest.raises(ProtocolError):
        RibbonCell(**{**good, field: value}, out_of_distribution=False)
