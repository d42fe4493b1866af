"""What the devices have of the global tensors, where a lossy codec keeps that apart from what the server has.

Devices train from the broadcast x^, and the server folds their updates into the exact x. After each fold

    x^' = x^ + decode(encode(x' - x^)),

so what a step lost is part of the next difference: the server needs no other feedback. With exact differences, or whole
tensors, x^ = x. What the fold leaves in the server's state is enough to go on after a restart: x where it differs from
x^, and the step, which devices that hold x^ are sent.

Source: specs/federated.md section 19 (down-link differences).
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from wearfleet_protos.codecs import FLOAT32, MOST_STEPS, DownloadFormat, Turn, frozen_bytes
from wearfleet_protos.errors import AggregationError, ShapeError
from wearfleet_protos.tensors import TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Contribution
from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.privacy.central import fold

__all__ = ["SimulatedDownloads", "difference", "download_format", "fold_broadcast", "frozen_of", "step_of"]

_OWN: Final = "broadcast/"
_EXACT: Final = _OWN + "exact/"
_STEP: Final = _OWN + "step"


def fold_broadcast(  # noqa: PLR0917 - those of fold
    strategy: Strategy,
    specs: Sequence[TensorSpec],
    shown: Arrays,
    state: Arrays,
    contributions: Iterable[Contribution],
    turn: Turn,
    *,
    generator: np.random.Generator | None = None,
) -> Averaged:
    """``privacy.central.fold``, and what the devices will have of its result: how every caller folds updates.

    Args:
        strategy: with its options.
        specs: ``Plan.tensors``.
        shown: global tensors as the clients have them.
        state: what the last fold left.
        contributions: any order.
        turn: the plan's seed and the round's number.
        generator: of the noise of privacy.

    Returns:
        Tensors as the clients will have them, and the state, with the exact ones in it where they differ.

    Raises:
        AggregationError: as ``Strategy.server``; or the result is not finite and cannot be coded.
    """
    own = {name: array for name, array in state.items() if not name.startswith(_OWN)}
    exact = {n.removeprefix(_EXACT): array for n, array in state.items() if n.startswith(_EXACT)}
    averaged = fold(strategy, specs, {**shown, **exact}, own, contributions, generator=generator)
    codec = strategy.downlink.codec
    if codec is None or codec == FLOAT32:
        return averaged
    try:
        step, after = download_format(strategy, specs, turn.seed).step(
            shown, averaged.tensors, turn.round_number
        )
    except ShapeError as error:
        raise AggregationError(f"the average cannot be sent: {error}; use a smaller learning rate") from error
    kept = {
        _EXACT + name: array
        for name, array in averaged.tensors.items()
        if not np.array_equal(array, after[name])
    }
    return replace(
        averaged, tensors=after, state={**averaged.state, **kept, _STEP: np.frombuffer(step, np.uint8)}
    )


def download_format(strategy: Strategy, specs: Iterable[TensorSpec], seed: int) -> DownloadFormat:
    """As ``Plan.download_format``."""
    sent = (s for s in specs if s.origin in ("global", "local") and not s.copy_of)
    return DownloadFormat(tuple(sorted(sent, key=lambda s: s.name)), strategy.downlink.codec, seed)


def step_of(state: Arrays) -> bytes:
    """The step that led to the tensors of this state; b"" where steps are exact and so need not be kept."""
    return np.asarray(state[_STEP]).tobytes() if _STEP in state else b""


def frozen_of(specs: Iterable[TensorSpec], tensors: Arrays) -> Arrays:
    """The tensors that never change."""
    return {spec.name: tensors[spec.name] for spec in specs if spec.role == TensorRole.FROZEN}


def difference(
    form: DownloadFormat, held: Arrays, new: Arrays, steps: Sequence[bytes], whole_bytes: int
) -> bytes:
    """What is sent to a device that holds some tensors; b"" when all tensors as they are would be less.

    Args:
        form: of the run.
        held: all tensors of a version, or some of them.
        new: all tensors.
        steps: coded ones from ``held`` to ``new``; empty when not all of them are known.
        whole_bytes: of all tensors.
    """
    ways = [form.join([form.exact(held, new)])]
    if 0 < len(steps) <= MOST_STEPS and all(steps):
        ways.append(form.join(steps))
    best = min(ways, key=len)
    return best if len(best) < whole_bytes else b""


@dataclass(slots=True)
class SimulatedDownloads:
    """Bytes that go down in a simulation, by what each client holds. Clients lose nothing.

    Args:
        form: of the run.
    """

    form: DownloadFormat
    _versions: deque[tuple[int, Arrays, bytes]] = field(default_factory=lambda: deque(maxlen=MOST_STEPS + 1))
    _held: dict[str, int] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)
    _frozen: bool | None = None

    def publish(self, tensors: Arrays, state: Arrays) -> None:
        """The tensors that clients get from now on, and the state beside them."""
        number = self._versions[-1][0] + 1 if self._versions else 1
        if self.form.codec is None:
            self._versions.clear()  # nobody keeps whole tensors
        self._versions.append((number, tensors, step_of(state)))
        self._sizes = {}
        if self._frozen is None:
            self._frozen = bool(frozen_bytes(self.form.specs, tensors))

    def given(self, clients: Sequence[str], received: Callable[[str], Arrays]) -> int:
        """Bytes of the tasks that are given to some clients.

        Args:
            clients: whoever gets a task, as often as it gets one.
            received: the tensors of a client.
        """
        total = 0
        for client in clients:
            held = self._held.get(client, 0)
            tensors = received(client)
            if tensors is not self._versions[-1][1]:  # a model of its own
                total += self._bytes(held, tensors)
            else:
                if held not in self._sizes:
                    self._sizes[held] = self._bytes(held, tensors)
                total += self._sizes[held]
            self._held[client] = self._versions[-1][0]
        return total

    def _bytes(self, held: int, new: Arrays) -> int:
        whole = sum(spec.size_bytes for spec in self.form.specs)
        if not held:
            return whole
        newest = self._versions[-1][0]
        if self.form.codec is not None and held == newest:
            return 0
        known: Mapping[int, Arrays] = {number: tensors for number, tensors, _ in self._versions}
        if self.form.codec is not None and held in known:
            steps = [step for number, _, step in self._versions if number > held]
            sent = difference(self.form, known[held], new, steps, whole)
            if sent:
                return len(sent)
        if not self._frozen:
            return whole
        return len(difference(self.form, frozen_of(self.form.specs, new), new, (), whole)) or whole
