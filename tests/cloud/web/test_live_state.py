"""Laws of the picture of the fleet: versions, deltas, bounds, who is online, what a row says."""

from __future__ import annotations

import asyncio
import json

import pytest
from wearfleet_cloud.service import live as live_module
from wearfleet_cloud.service.live import FinishedRound, LiveState, Participant, RibbonCell, RoundView, Stage
from wearfleet_protos.errors import NotFoundError, ProtocolError

SECOND = 1_000_000_000
LABELS = ("walking", "sitting")


class Clock:
    def __init__(self) -> None:
        self.now = 1_000 * SECOND

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(clock: Clock) -> LiveState:
    return LiveState("HAPT", clock_ns=clock, ribbon_length=5)


def say(live: LiveState, sequence: int, *, device: str = "d1", activity: int = 0, **more: object) -> bool:
    model = {"model_version": 1, "labels": LABELS, **more}
    at = RibbonCell(sequence, live.now_ns, activity, 0.9, 0.1, False, "boot")
    return live.on_prediction(device, device.upper(), at, **model)


def merged(pictures: list[dict]) -> dict[str, list]:
    """What a reader holds after applying the pictures one by one."""
    ribbons: dict[str, list] = {}
    for picture in pictures:
        if picture["since"] < 0:
            ribbons.clear()
        for row in picture["devices"]:
            cells = ribbons.get(row["id"], []) + row["ribbon"]
            ribbons[row["id"]] = sorted(cells)[-picture["fleet"]["ribbon_length"] :]
    return ribbons


def test_every_change_raises_the_version(live: LiveState) -> None:
    changes = (
        lambda: say(live, 0),
        lambda: say(live, 0),
        lambda: live.on_status("d1", False, 0),
        lambda: live.on_health("d1", now_ns=0, outbox_depth=3),
        lambda: live.on_accuracy("d1", 0.5, 0.6),
        lambda: live.on_round(RoundView("r", "FedAvg", 1, 5, "collecting")),
        lambda: live.on_source("WISDM", simulated=False),
        lambda: live.on_removed("d1"),
    )
    for change in changes:
        before = live.version
        change()
        assert live.version > before


def test_deltas_applied_in_turn_give_the_snapshot(live: LiveState) -> None:
    pictures = [live.delta(-1)]
    for step, sequence in enumerate([0, 1, 5, 3, 3, 2, 9, 8, 4, 12]):
        say(live, sequence, device=f"d{step % 2}")
        if step % 3 == 0:
            pictures.append(live.delta(pictures[-1]["version"]))
    pictures.append(live.delta(pictures[-1]["version"]))
    assert merged(pictures) == merged([live.snapshot()])


def test_a_delta_holds_only_what_changed(live: LiveState) -> None:
    say(live, 0, device="d1")
    live.on_round(RoundView("r", "FedAvg", 1, 5, "collecting"))
    before = live.version
    say(live, 0, device="d2")
    delta = live.delta(before)
    assert [row["id"] for row in delta["devices"]] == ["d2"]
    assert "round" not in delta


def test_a_removed_device_makes_the_next_delta_a_whole_picture(live: LiveState) -> None:
    say(live, 0, device="d1")
    say(live, 0, device="d2")
    before = live.version
    live.on_removed("d1")
    delta = live.delta(before)
    assert delta["since"] == -1
    assert [row["id"] for row in delta["devices"]] == ["d2"]
    assert live.delta(live.version)["since"] == live.version


def test_a_reader_from_the_future_gets_the_whole_picture(live: LiveState) -> None:
    say(live, 0)
    assert live.delta(live.version + 7)["since"] == -1


def test_a_snapshot_is_json(live: LiveState) -> None:
    say(live, 0)
    live.on_round(RoundView("r", "FedAvg", 1, 5, "collecting", 5, {"d1": Participant(Stage.TRAINING, 0.5)}))
    assert json.loads(json.dumps(live.snapshot(), allow_nan=False)) == live.snapshot()


def test_a_duplicate_is_counted_and_not_shown(live: LiveState) -> None:
    assert say(live, 3)
    assert not say(live, 3)
    row = live.device_json("d1")
    assert (row["received"], row["duplicated"], len(row["ribbon"])) == (1, 1, 1)


def test_a_backfilled_window_does_not_change_what_the_device_does_now(live: LiveState) -> None:
    say(live, 5, activity=1, model_version=2)
    say(live, 4, activity=0, model_version=1)
    row = live.device_json("d1")
    assert (row["activity"], row["model_version"]) == ("sitting", 2)


def test_cells_keep_their_names_when_a_later_model_orders_its_labels_otherwise(live: LiveState) -> None:
    say(live, 0, activity=0)
    say(live, 1, activity=0, labels=("sitting", "walking"))
    legend = live.snapshot()["legend"]
    names = [legend[cell[3]] for cell in live.device_json("d1")["ribbon"]]
    assert names == ["walking", "sitting"]


def test_an_activity_that_the_model_does_not_have_is_refused(live: LiveState) -> None:
    with pytest.raises(ProtocolError, match="2 labels"):
        say(live, 0, activity=2)
    assert live.version == 0


def test_too_many_different_activities_are_refused(live: LiveState) -> None:
    say(live, 0, labels=[f"activity {i}" for i in range(64)])
    with pytest.raises(ProtocolError, match="64"):
        say(live, 1, labels=LABELS)
    assert len(live.legend) == 64


def test_a_window_brings_a_device_online_and_only_its_status_takes_it_off(
    live: LiveState, clock: Clock
) -> None:
    say(live, 0)
    clock.now += 600 * SECOND
    assert live.device("d1").online
    live.on_status("d1", False, clock.now)
    assert not live.device("d1").online


def test_rows_seeded_with_old_times_are_not_online(live: LiveState, clock: Clock) -> None:
    say(live, 0, now_ns=clock.now - 300 * SECOND)
    row = live.device("d1")
    assert not row.online
    assert row.last_seen_ns == clock.now - 300 * SECOND
    assert live.windows_per_second() == 0.0


def test_a_device_that_only_reported_its_birth_has_a_row(live: LiveState, clock: Clock) -> None:
    live.on_status("d9", True, clock.now, display_name="Ines")
    row = live.device_json("d9")
    assert (row["name"], row["online"], row["activity"]) == ("Ines", True, None)


def test_windows_per_second_count_the_last_ten_seconds(live: LiveState, clock: Clock) -> None:
    for second in range(30):
        for k in range(4):
            say(live, 4 * second + k)
        clock.now += SECOND
    clock.now -= SECOND
    assert live.windows_per_second() == 4.0
    clock.now += 60 * SECOND
    assert live.windows_per_second() == 0.0


def test_the_least_recently_seen_device_makes_room(
    live: LiveState, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "MAX_DEVICES", 3)
    for device in ("d1", "d2", "d3"):
        say(live, 0, device=device)
        clock.now += SECOND
    say(live, 1, device="d1")
    say(live, 0, device="d4")
    assert set(live.devices) == {"d1", "d3", "d4"}


def test_names_are_bounded(live: LiveState) -> None:
    live.on_status("d1", True, 0, display_name="x" * 5000)
    assert len(live.device("d1").display_name) == 60


def test_a_row_pairs_the_accuracies_of_one_round_until_the_next_pair_is_there(live: LiveState) -> None:
    say(live, 0)
    live.on_round(
        RoundView("r", "FedBN", 1, 5, "done", None, {"d1": Participant(Stage.SUBMITTED, 0.5, 0.75)})
    )
    live.on_round(RoundView("r", "FedBN", 2, 5, "collecting", 7, {"d1": Participant(Stage.TRAINING, 0.25)}))
    row = live.device_json("d1")
    assert (row["accuracy_before"], row["accuracy_after"]) == (0.5, 0.75)


def test_a_round_keeps_its_last_two_hundred_finished_ones() -> None:
    view = RoundView("r", "FedAvg", 301, 999, "done", history=tuple(FinishedRound(n, 1) for n in range(300)))
    assert [done.number for done in view.history] == list(range(100, 300))


def test_a_round_names_its_participants_as_their_rows_do(live: LiveState) -> None:
    say(live, 0)
    live.on_round(
        RoundView(
            "r", "FedBN", 1, 5, "collecting", 7, dict.fromkeys(("d1", "d2"), Participant(Stage.INVITED))
        )
    )
    assert [who["name"] for who in live.round_json()["participants"]] == ["D1", "d2"]


def test_an_unknown_device_is_not_found(live: LiveState) -> None:
    with pytest.raises(NotFoundError, match="d7"):
        live.device("d7")


async def test_waiting_ends_with_the_next_change(live: LiveState) -> None:
    waiting = [asyncio.create_task(live.changed(0)) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    say(live, 0)
    assert await asyncio.gather(*waiting) == [1, 1, 1]


async def test_waiting_for_a_past_version_ends_at_once(live: LiveState) -> None:
    say(live, 0)
    assert await asyncio.wait_for(live.changed(0), 1) == 1
