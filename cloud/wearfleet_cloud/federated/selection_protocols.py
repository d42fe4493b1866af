"""Which round's accuracy of a client's model is reported: a published number says nothing without its protocol.

``last`` takes the model after the last round and selects nothing. ``personalizedfl``: what clients hold after the round
whose mean validation accuracy, each client counting once, was best; that round's test accuracies. ``fhbench``: every
fifth round, before aggregation, and for each client on its own the round that was best on its validation part.

Source: the code of PersonalizedFL and of FHBench; specs/federated.md sections 0.5 and 9.
Differs: both measure on the device's own engine what its plan measures, ``evaluate_before`` and ``evaluate_after``. For
strategies with a second, personal model the former is the common one.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from wearfleet_protos.errors import ConfigError

__all__ = ["FHBENCH_EVERY", "PROTOCOLS", "VALIDATION", "accuracy_counts", "selected"]

PROTOCOLS: Final = ("last", "personalizedfl", "fhbench")
FHBENCH_EVERY: Final = 5
VALIDATION: Final = "validation/"
"""Before the name of a phase: its metrics on the validation part instead of what is held out."""

Metrics = Mapping[str, float]


def accuracy_counts(metrics: Metrics, phase: str) -> tuple[float, float]:
    """Hits and windows of a phase."""
    return metrics[f"{phase}/correct"], metrics[f"{phase}/count"]


def selected(protocol: str, rounds: Sequence[Mapping[str, Metrics]]) -> list[tuple[float, float]]:
    """Hits and windows of every client's held-out part, of the round that the protocol selects.

    Args:
        protocol: a name of ``PROTOCOLS`` that selects.
        rounds: client -> metrics of its training, round by round, then of one more round of all clients, which says
            what they hold after the last one.

    Returns:
        In the order of the clients' names.

    Raises:
        ConfigError: a client was in no round that could be selected.
    """
    everyone = sorted(rounds[-1])
    if protocol == "personalizedfl":
        return _best_for_all([r for r in rounds[1:] if len(r) == len(everyone)], everyone)
    measured = rounds[FHBENCH_EVERY - 1 : -1 : FHBENCH_EVERY]
    return [_best_of_one([r[client] for r in measured if client in r], client) for client in everyone]


def _best_for_all(
    rounds: Sequence[Mapping[str, Metrics]], everyone: Sequence[str]
) -> list[tuple[float, float]]:
    """The earliest of the rounds with the best mean over clients."""

    def mean(metrics: Mapping[str, Metrics]) -> float:
        return float(np.mean([_validation(metrics[client], "evaluate_before") for client in everyone]))

    best = max(rounds, key=mean)
    return [accuracy_counts(best[client], "evaluate_before") for client in everyone]


def _best_of_one(rounds: Sequence[Metrics], client: str) -> tuple[float, float]:
    if not rounds:
        raise ConfigError(
            f"protocol fhbench measures every {FHBENCH_EVERY}th round and {client} was in none of them; use more rounds"
        )
    best = max(rounds, key=lambda metrics: _validation(metrics, "evaluate_after"))
    return accuracy_counts(best, "evaluate_after")


def _validation(metrics: Metrics, phase: str) -> float:
    hits, windows = accuracy_counts(metrics, VALIDATION + phase)
    return hits / windows
