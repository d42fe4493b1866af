"""The round for the live page, from the state machine's value and the submissions."""

from collections.abc import Mapping

from wearfleet_cloud.federated.round import Round, RoundState
from wearfleet_cloud.service.live import FinishedRound, Participant, RoundView, Stage
from wearfleet_cloud.service.run_context import ActiveRun, RoundKind
from wearfleet_cloud.storage.run_records import Submission

__all__ = ["accuracy", "finished_round", "round_view"]


def accuracy(metrics: Mapping[str, float], phase: str) -> float | None:
    """Share of right windows that a phase reported; None when it reported none."""
    count = metrics.get(f"{phase}/count", 0.0)
    correct = metrics.get(f"{phase}/correct", 0.0)
    return correct / count if count > 0 and 0 <= correct <= count else None


def round_view(
    run: ActiveRun,
    current: Round,
    kind: RoundKind,
    *,
    stages: Mapping[str, Stage],
    submissions: Mapping[str, Submission],
    history: tuple[FinishedRound, ...],
) -> RoundView:
    """What the page shows of a run.

    Args:
        run: the run.
        current: its newest round.
        kind: train or personalise.
        stages: how far devices say they are.
        submissions: what they handed in this round.
        history: rounds before.
    """
    participants = {}
    for device_id in current.invited:
        metrics = submissions[device_id].metrics if device_id in submissions else {}
        participants[device_id] = Participant(
            _stage(current, device_id, stages),
            accuracy(metrics, "evaluate_before"),
            accuracy(metrics, "evaluate_after"),
        )
    state = (
        "personalising"
        if kind == "personalise" and current.state == RoundState.RUNNING
        else str(current.state)
    )
    running = current.state == RoundState.RUNNING
    return RoundView(
        run_id=run.run_id,
        strategy=run.row.strategy,
        number=min(current.number, run.settings.rounds),
        rounds_total=run.settings.rounds,
        state=state,
        deadline_ns=int(current.deadline * 1e9) if running else None,
        participants=participants,
        history=history,
    )


def finished_round(number: int, submissions: Mapping[str, Submission], seconds: float) -> FinishedRound:
    """What is kept of a round: means over the devices that submitted."""
    metrics = [submission.metrics for submission in submissions.values()]
    return FinishedRound(
        number,
        len(metrics),
        _mean([accuracy(m, "evaluate_before") for m in metrics]),
        _mean([accuracy(m, "evaluate_after") for m in metrics]),
        seconds,
    )


def _stage(current: Round, device_id: str, stages: Mapping[str, Stage]) -> Stage:
    if current.accepted(device_id) is not None:
        return Stage.SUBMITTED
    if device_id in dict(current.declined) or device_id in dict(current.rejected):
        return Stage.DECLINED
    if current.state not in (RoundState.PLANNED, RoundState.RUNNING):
        return Stage.LATE
    return stages.get(device_id, Stage.INVITED)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
