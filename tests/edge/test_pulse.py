"""Signs of life during training: three times a lease, harmless when they fail, and heeded when work is unwanted."""

from __future__ import annotations

import pytest
from wearfleet_edge.pulse import Pulse
from wearfleet_edge.trainer import Limits
from wearfleet_edge.transport.cloud import Stage, Task
from wearfleet_protos.errors import TransportError
from wearfleet_protos.tensors import digest_of


class Service:
    """Answers in turn: wanted or not, or an error."""

    def __init__(self, *answers: bool | None) -> None:
        self.answers, self.asked = list(answers), 0

    def report_stage(self, task: Task, stage: Stage) -> bool:
        assert stage == Stage.TRAINING
        self.asked += 1
        answer = self.answers.pop(0) if self.answers else True
        if answer is None:
            raise TransportError("away")
        return answer


def beat(service: Service, lease_s: float, *, seconds: int, stopped: bool = False) -> tuple[list[int], Pulse]:
    """Ask at every second whether to stop; the seconds at which a report went out."""
    now = [0.0]
    digest = digest_of(b"")
    task = Task("run", 1, "attempt", False, digest, 1, digest, 1, 600.0, lease_s=lease_s)
    pulse = Pulse(service, task, Limits(600.0, 1e9, lambda: 0, lambda: now[0], lambda: stopped))  # type: ignore[arg-type]
    limits, sent = pulse.limits(), []
    for second in range(seconds):
        now[0], before = float(second), service.asked
        if limits.stopped():
            break
        if service.asked > before:
            sent.append(second)
    return sent, pulse


@pytest.mark.parametrize(
    ("lease_s", "sent"), [(30.0, [10, 20, 30]), (86_400.0, []), (270.0, []), (0.0, []), (60.0, [20])]
)
def test_reports_go_out_three_times_a_lease(lease_s: float, sent: list[int]) -> None:
    assert beat(Service(), lease_s, seconds=35)[0] == sent


def test_a_long_lease_still_hears_every_minute_whether_the_work_is_wanted() -> None:
    assert beat(Service(), 86_400.0, seconds=130)[0] == [60, 120]


def test_work_that_is_not_wanted_any_more_ends_and_a_lost_report_ends_nothing() -> None:
    sent, pulse = beat(Service(None, True, False), 30.0, seconds=100)
    assert (sent, pulse.unwanted) == ([10, 20], True)
    assert not beat(Service(), 30.0, seconds=3, stopped=True)[1].unwanted
