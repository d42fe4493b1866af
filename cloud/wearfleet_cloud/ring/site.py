"""A site's turns as runs of its own service, which is another process: begun in its database, and waited for there.

A turn's run is found again by its plan, which carries the turn's attempt: whoever is killed in between goes on with the
run that it began, and takes its result if it has ended.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from wearfleet_protos.errors import DeniedError
from wearfleet_protos.plan import PLAN_MEDIA_TYPE, Plan
from wearfleet_protos.tensors import Digest, decode_tensors, digest_of

from wearfleet_cloud.federated.aggregate import Arrays
from wearfleet_cloud.ring.sealing import Route, Sealer, is_sealed
from wearfleet_cloud.ring.turns import check_teacher, closing, opening, plan_of_turn
from wearfleet_cloud.service.run_context import RunSettings
from wearfleet_cloud.service.run_setup import start_run
from wearfleet_cloud.service.state import State
from wearfleet_cloud.storage.audit import append_audit
from wearfleet_cloud.storage.run_records import (
    RunRow,
    Submission,
    find_run,
    list_runs,
    list_submissions,
    stop_run,
)

__all__ = ["Site", "SiteTurn", "TurnResult"]

_POLL_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class SiteTurn:
    """What the ring asks of a site.

    Args:
        plan: the ring's.
        before: state that the turn starts from, of the ring's plan.
        attempt: the turn's name; the same when it is asked for again.
        route: run, plan and round of the ring.
        personal: the last stage, whose result stays in the site.
    """

    plan: Plan
    before: Arrays
    attempt: str
    route: Route
    personal: bool


@dataclass(frozen=True, slots=True)
class TurnResult:
    """What a turn left behind: the state, the site's run, and sums over its devices.

    Args:
        state: of the ring's plan.
        run_id: of the site's run.
        metrics: ``phase/metric`` to the sum; ``base`` of the released model, ``evaluate_before`` of the first round,
            ``evaluate_after`` of the last one.
        num_examples: training windows of the devices that were there last.
        num_steps: of all devices in all rounds.
        seconds: that it took.
    """

    state: dict[str, np.ndarray]
    run_id: str
    metrics: dict[str, float]
    num_examples: int
    num_steps: int
    seconds: float


class Site:
    """The site's service, as its ring sees it.

    Args:
        state: of the service.
        plan: of ``metafed-site``, for the ring's model.
        graphs: bytes of every graph that the plan names.
        settings: of a turn's run.
        sealer: opens and seals the hops of a sealed ring.
        wait: waits the given seconds and tells whether this process is to stop.
    """

    def __init__(
        self,
        state: State,
        plan: Plan,
        graphs: Mapping[Digest, bytes],
        settings: RunSettings,
        *,
        sealer: Sealer,
        wait: Callable[[float], bool],
    ) -> None:
        self._state, self._plan, self._graphs, self._settings = state, plan, graphs, settings
        self._sealer, self._wait = sealer, wait

    def turn(self, turn: SiteTurn, stopped: Callable[[], bool]) -> TurnResult:
        """Take a turn; as long as the site's devices need.

        Args:
            turn: what is asked.
            stopped: True when nobody waits for it any more; the run is stopped then, unless this process is to stop:
                then it goes on, and is found again.

        Raises:
            IntegrityError: the ring's plan does not fit, a hop cannot be opened, or the teacher is refused.
            DeniedError: it was stopped, or ended too early.
        """
        begin = time.monotonic()
        plan = plan_of_turn(turn.plan, self._plan, turn.attempt, turn.route.round_number)
        sealed = is_sealed(turn.plan)
        if sealed:
            turn = replace(turn, before=self._sealer.opened(turn.plan, turn.before, turn.route))
        check_teacher(turn.before, turn.plan)
        run = self._ended(self._begun(plan) or self._begin(turn, plan), stopped)
        made = decode_tensors(self._state.blobs.read(Digest(run.tensors_digest)), plan.download_specs())
        after = closing(turn.before, made, turn.plan)
        if sealed and not turn.personal:
            after = self._sealer.sealed(turn.plan, after, turn.route)
        return self._result(after, run.run_id, time.monotonic() - begin)

    def _ended(self, run: RunRow, stopped: Callable[[], bool]) -> RunRow:
        while run.state == "running":
            if self._wait(_POLL_S):
                raise DeniedError("the site is stopping; its turn goes on when it is back")
            if stopped():
                self._stop(run.run_id)
                raise DeniedError(f"nobody waits for {run.run_id} any more")
            with self._state.database.read() as connection:
                run = find_run(connection, run.run_id)
        if run.state != "done":
            raise DeniedError(f"the site's run {run.run_id} was stopped: {run.reason}")
        return run

    def _result(self, state: dict[str, np.ndarray], run_id: str, seconds: float) -> TurnResult:
        with self._state.database.read() as connection:
            submissions = list_submissions(connection, run_id)
        last = [s for s in submissions if s.update_digest and s.round == self._settings.rounds]
        examples, steps = sum(s.num_examples for s in last), sum(s.num_steps for s in submissions)
        return TurnResult(state, run_id, _sums(submissions, last), examples, steps, seconds)

    def _begun(self, plan: Plan) -> RunRow | None:
        digest = digest_of(self._state.keys.sign(plan.to_bytes(), PLAN_MEDIA_TYPE))
        with self._state.database.read() as connection:
            return next((run for run in list_runs(connection) if run.plan_digest == digest), None)

    def _begin(self, turn: SiteTurn, plan: Plan) -> RunRow:
        run_id = start_run(
            self._state.database,
            self._state.blobs,
            self._state.keys,
            plan=plan,
            graphs=self._graphs,
            tensors=opening(turn.before, plan, personal=turn.personal),
            settings=replace(self._settings, personalise=turn.personal),
            now_ns=time.time_ns(),
        )
        with self._state.database.read() as connection:
            return find_run(connection, run_id)

    def _stop(self, run_id: str) -> None:
        reason = "the ring goes on without this turn"
        with self._state.database.write() as connection:
            if stop_run(connection, run_id, time.time_ns(), reason):
                append_audit(connection, time.time_ns(), "federation.stop", run_id, reason)


def _sums(submissions: Sequence[Submission], last: Sequence[Submission]) -> dict[str, float]:
    first = [s for s in submissions if s.round == 1]
    return {
        **_sum(first, "base/"),
        **_sum(first, "evaluate_before/"),
        **_sum(last, "evaluate_after/"),
    }


def _sum(submissions: Sequence[Submission], prefix: str) -> dict[str, float]:
    names = {name for s in submissions for name in s.metrics if name.startswith(prefix)}
    return {name: sum(s.metrics.get(name, 0.0) for s in submissions) for name in sorted(names)}
