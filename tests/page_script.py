"""A scripted fleet for tests and pictures of the live page: believable streams from a seed."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from wearfleet_cloud.service.live import FinishedRound, Participant, RibbonCell, RoundView, Stage
from wearfleet_protos.labels import UCI_HAR6

if TYPE_CHECKING:
    from wearfleet_cloud.service.live import LiveState

PEOPLE = ("Amina", "Björn", "Chiara", "Deniz")
WINDOW_NS = 1_280_000_000


class Wearer:
    """One device that recognises a random walk through activities."""

    def __init__(self, live: LiveState, device_id: str, name: str, seed: int) -> None:
        self._live = live
        self.device_id = device_id
        self.name = name
        self._random = random.Random(seed)
        self._activity = seed % len(UCI_HAR6)
        self.sequence = 0

    def step(self, now_ns: int, *, unfamiliar: bool = False) -> None:
        """Recognise the next window at ``now_ns``."""
        rng = self._random
        if rng.random() < 0.07:
            self._activity = rng.randrange(len(UCI_HAR6))
        confidence = rng.uniform(0.3, 0.6) if unfamiliar else min(1.0, rng.betavariate(9, 1.2))
        score = 4.0 + rng.random() if unfamiliar else rng.random()
        cell = RibbonCell(self.sequence, now_ns, self._activity, confidence, score, unfamiliar, "boot-1")
        self.sequence += 1
        self._live.on_prediction(
            self.device_id,
            self.name,
            cell,
            3,
            UCI_HAR6,
            model_id="har-cnn",
            personalised=self.device_id != "watch-1",
            now_ns=now_ns,
        )


def fleet(live: LiveState, now_ns: int, people: tuple[str, ...] = PEOPLE, windows: int = 160) -> list[Wearer]:
    """Enrol ``people`` and let each wear its device for ``windows`` windows that end at ``now_ns``."""
    wearers = [Wearer(live, f"watch-{i}", name, seed=11 + 7 * i) for i, name in enumerate(people)]
    for k in range(windows):
        at_ns = now_ns - (windows - 1 - k) * WINDOW_NS
        for i, wearer in enumerate(wearers):
            late = i % 4 == 2 and k >= windows - 5
            bout = i % 4 == 1 and windows - 60 < k < windows - 52
            wearer.step(at_ns, unfamiliar=late or bout)
    return wearers


def running_round(now_ns: int, wearers: list[Wearer], number: int = 4) -> RoundView:
    """A round in which the devices stand at different stages, after ``number - 1`` finished ones."""
    stages = (Stage.SUBMITTED, Stage.TRAINING, Stage.FETCHED, Stage.INVITED)
    accuracies = ((0.78, 0.93), (0.84, None), (None, None), (None, None))
    participants = {
        wearer.device_id: Participant(stages[i % 4], *accuracies[i % 4]) for i, wearer in enumerate(wearers)
    }
    history = tuple(
        FinishedRound(n, len(wearers), 0.74 + 0.03 * n, 0.86 + 0.015 * n, 8.0) for n in range(1, number)
    )
    return RoundView(
        "run-1", "FedBN", number, 6, "collecting", now_ns + 42_000_000_000, participants, history
    )
