"""The life of federated runs: one at a time, each round a state machine in the database.

Every transition is one transaction, written before anything acts on it. What is in memory only (who waits for a task,
how far a device says it is) can be lost at any time; a killed service reads the round back and goes on.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from wearfleet_protos.errors import TransportError, WearfleetError
from wearfleet_protos.secagg.identity import Verifier
from wearfleet_protos.tensors import Digest

from wearfleet_cloud.config import FederationConfig
from wearfleet_cloud.federated.cohort import cohort_of
from wearfleet_cloud.federated.privacy.secagg_fold import secure_contribution
from wearfleet_cloud.federated.robust.options import TooFewUpdatesError
from wearfleet_cloud.federated.round import TERMINAL, Round, RoundState, advance
from wearfleet_cloud.federated.round_events import (
    Aborted,
    Aggregated,
    AggregationFailed,
    Answer,
    AnswerStatus,
    ArmDeadline,
    ClientDeclined,
    CohortSelected,
    DeadlinePassed,
    Effect,
    Event,
    InviteClients,
    SelectCohort,
    ServiceRestarted,
    SlotsGivenAway,
    StartAggregation,
    TaskFetched,
)
from wearfleet_cloud.fleet.signing import SigningKeys
from wearfleet_cloud.service.directory import Directory
from wearfleet_cloud.service.folding import Folded, Folding
from wearfleet_cloud.service.leases import DeviceClass, Leases
from wearfleet_cloud.service.live import LiveState
from wearfleet_cloud.service.metrics import Metrics
from wearfleet_cloud.service.privacy_budget import PrivacyBudget
from wearfleet_cloud.service.round_display import RoundDisplay
from wearfleet_cloud.service.round_keeper import RoundKeeper, first_round, kept_round, successor
from wearfleet_cloud.service.run_context import ActiveRun, load_run
from wearfleet_cloud.service.secure_rounds import SecureRounds
from wearfleet_cloud.service.updates import UpdateStore
from wearfleet_cloud.service.waiting_room import WaitingRoom
from wearfleet_cloud.storage.blobs import Blobs
from wearfleet_cloud.storage.database import Database
from wearfleet_cloud.storage.privacy_records import read_ledger
from wearfleet_cloud.storage.run_records import (
    RunRow,
    Submission,
    find_run,
    finish_run,
    insert_submissions,
    list_rounds,
    list_submissions,
    next_running,
    set_run_tensors,
)
from wearfleet_cloud.storage.suspicions import note_suspects

__all__ = ["Coordinator", "FederationParts"]

_LOGGER: Final = logging.getLogger(__name__)
_RETRY_S: Final = 1.0
_GATHER_S: Final = 0.005
"""A submission that is not the last one waits so long for others, because a transaction costs as much for all."""

Work = Callable[[Connection], None]
Submitted = tuple[RoundKeeper, Event, Submission, "asyncio.Future[Answer | None]"]


@dataclass(frozen=True, slots=True)
class FederationParts:
    """What federated runs need of the service; ``on_tensors`` gets new global tensors to serve from memory.

    ``verifier`` checks what devices sign in secure aggregation.
    """

    config: FederationConfig
    database: Database
    blobs: Blobs
    keys: SigningKeys
    updates: UpdateStore
    directory: Directory
    live: LiveState
    metrics: Metrics
    verifier: Verifier
    on_tensors: Callable[[Digest, bytes], None]


class Coordinator:
    """Runs, the oldest first, and the present round. ``happen`` wants its caller to hold ``lock``.

    Args:
        parts: what it needs of the service.
    """

    def __init__(self, parts: FederationParts) -> None:
        self.run: ActiveRun | None = None
        self.keeper: RoundKeeper | None = None
        self.lock = asyncio.Lock()
        self.room = WaitingRoom(parts.config.recent_s)
        self.leases = Leases(
            {
                DeviceClass.GATEWAY: parts.config.gateway_lease_s,
                DeviceClass.PHONE: parts.config.phone_lease_s,
                DeviceClass.WEARABLE: parts.config.wearable_lease_s,
            }
        )
        self.stopping = False
        self._parts = parts
        self.secure = SecureRounds(parts.verifier, parts.updates, self._leave_out)
        self._folding = Folding(parts.blobs, parts.updates, parts.on_tensors)
        self._budget = PrivacyBudget()
        self._took_part: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._submitted: list[Submitted] = []
        self.display = RoundDisplay(parts.live, self._present)

    async def stop(self) -> None:
        """Let go: waiting devices get their answer, aggregation under way is done again after the next start."""
        self.stopping = True
        self.display.stop()
        if self._timer is not None:
            self._timer.cancel()
        self.room.wake_all()
        self.secure.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def refresh(self) -> None:
        """Notice runs that were started or stopped, and devices that were shut out, by a command."""
        async with self.lock:
            if self.run is None:
                await self._adopt()
                return
            run_id = self.run.run_id
            row = await self._parts.database.run(lambda connection: find_run(connection, run_id))
            if row.state != "running":
                await self.happen(Aborted(row.reason or "stopped"))
                return
            for device_id, reason in self._parts.directory.outside_rounds.items():
                if self.keeper is not None and self.keeper.open_for(device_id):
                    await self.happen(ClientDeclined(device_id, reason))

    async def give_up_lost(self) -> None:
        """Give the places of devices whose lease has run out to others.

        A personalisation waits for everybody, and secure aggregation has deadlines of its own for each stage.
        """
        keeper = self.keeper
        if keeper is None or keeper.kind != "train" or keeper.round.state != RoundState.RUNNING:
            return
        if self.run is not None and self.run.secure:
            return
        if not self.leases.lost(keeper.round.at_work):
            return
        async with self.lock:
            if keeper is not self.keeper or keeper.round.state != RoundState.RUNNING:
                return
            lost = self.leases.lost(keeper.round.at_work)
            assert self.run is not None
            self._budget.begin()
            slots = keeper.round.free_slots + len(lost)
            others = self._folding.substitutes(self.run, keeper.round, self._connected(), slots)
            if lost:
                _LOGGER.info("round %d goes on without %s", keeper.round.number, ", ".join(lost))
                await self.happen(SlotsGivenAway(lost, others))

    async def choose_clients(self) -> None:
        """Choose the clients of a planned round if enough are there now, or those for free slots of a running one."""
        if self.keeper is not None and self.keeper.wants_clients:
            async with self.lock:
                if self.keeper is not None and self.keeper.wants_clients:
                    self._budget.begin()
                    event = self._choice(self.keeper)
                    if event is not None:
                        await self.happen(event)

    def _choice(self, keeper: RoundKeeper) -> CohortSelected | SlotsGivenAway | None:
        assert self.run is not None
        current = keeper.round
        if current.state == RoundState.PLANNED:
            return self._cohort(keeper)
        chosen = self._folding.substitutes(self.run, current, self._connected(), current.free_slots)
        return SlotsGivenAway((), chosen) if chosen else None

    def _connected(self) -> set[str]:
        """Devices that can be asked now: they are there, and their privacy budget allows it."""
        assert self.run is not None
        return set(self._budget.allowed(self.run.strategy.privacy, self.room.connected() & self._active()))

    def _active(self) -> set[str]:
        directory = self._parts.directory
        return set(directory.devices) - directory.outside_rounds.keys()

    async def happen(self, event: Event, *works: Work) -> None:
        """One transition: decide, write, act. The caller holds the lock.

        Raises:
            TransportError: the database is busy or away; nothing has changed.
            ProtocolError: the event cannot happen now.
        """
        assert self.keeper is not None
        await self._transit(self.keeper, [(event, None)], works)

    async def submit(self, keeper: RoundKeeper, event: Event, submission: Submission) -> Answer | None:
        """Take a submission in, together with others that come meanwhile: one transaction for all of them.

        Returns:
            The answer; None when the round is over.

        Raises:
            TransportError: the database is busy or away; nothing has changed.
        """
        future: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._submitted.append((keeper, event, submission, future))
        if len(keeper.submissions) + len(self._submitted) < len(keeper.round.invited):
            await asyncio.sleep(_GATHER_S)
        async with self.lock:
            mine, self._submitted = self._submitted, []
            try:
                await self._take_in(mine)
            except WearfleetError as error:
                for *_, other in mine:
                    if not other.done():
                        other.set_exception(error)
        return await future

    async def _take_in(self, submitted: list[Submitted]) -> None:
        present = [entry for entry in submitted if entry[0] is self.keeper]
        if present:
            events = [(event, submission) for _, event, submission, _ in present]
            answers = await self._transit(present[0][0], events, ())
            for (*_, future), answer in zip(present, answers, strict=True):
                future.set_result(answer)
        for *_, future in submitted:
            if not future.done():
                future.set_result(None)

    async def _transit(
        self, keeper: RoundKeeper, events: Sequence[tuple[Event, Submission | None]], works: Sequence[Work]
    ) -> list[Answer | None]:
        self._budget.begin()
        todo, answers, all_effects = list(works), [], list[Effect]()
        current, accepted = keeper.round, list[Submission]()
        for event, submission in events:
            current, effects = advance(current, event, time.time())
            answer = next((effect for effect in effects if isinstance(effect, Answer)), None)
            if submission is not None and answer is not None and answer.status == AnswerStatus.ACCEPTED:
                accepted.append(submission)
                keeper.submissions[submission.device_id] = submission
            answers.append(answer)
            all_effects += effects
        if accepted:
            todo.append(partial(insert_submissions, accepted=accepted))
        fetched_only = all(isinstance(event, TaskFetched) for event, _ in events)
        if current is not keeper.round and not fetched_only:  # who fetched is written with the next change
            todo.append(keeper.save(current))
            todo += self._entries(keeper, current)
        ended = current.state in TERMINAL and not keeper.closed
        following = self._prepare_next(keeper, current, todo) if ended else None
        if todo:
            await self._parts.database.run(lambda connection: _carry_out(connection, todo))
        self._budget.commit()
        keeper.round = current
        for event, _ in events:
            if isinstance(event, ClientDeclined):
                self.secure.lose(event.client)
        self._act(keeper, all_effects)
        if ended:
            await self._go_on(keeper, following)
        self.display.soon()
        return answers

    def _present(self) -> tuple[ActiveRun, RoundKeeper] | None:
        return None if self.run is None or self.keeper is None else (self.run, self.keeper)

    def _entries(self, keeper: RoundKeeper, current: Round) -> list[Work]:
        """What a round's new state writes into the ledger of privacy."""
        assert self.run is not None
        train = keeper.kind == "train"
        return self._budget.enter(self.run.strategy.privacy, current) if train else []

    def _cohort(self, keeper: RoundKeeper) -> CohortSelected | None:
        """The clients of a planned round; None while too few are there."""
        assert self.run is not None
        if keeper.kind == "personalise":
            chosen = tuple(sorted(self._took_part & self._active()))
            return CohortSelected(chosen, len(chosen)) if chosen else None
        settings, eligible = self.run.settings, self._connected()
        named = self._folding.cohort(self.run, keeper.round, eligible)
        if named is not None:
            return CohortSelected(named, len(named)) if named else None
        return cohort_of(keeper.round, eligible, settings.cohort, settings.seed)

    def _prepare_next(self, keeper: RoundKeeper, closed: Round, todo: list[Work]) -> RoundKeeper | None:
        """The next round, with its writes (or the end of the run) added to those of the closed one."""
        run = self.run
        assert run is not None
        self._took_part |= set(closed.invited)
        if closed.state == RoundState.PUBLISHED:
            todo.append(lambda connection: set_run_tensors(connection, run.run_id, closed.result))
        following = successor(run, closed, keeper.kind)
        event = None if following is None else self._cohort(following)
        if following is not None and event is not None:
            following.round, _ = following.after(event)
        if following is None or (event is None and following.kind == "personalise"):
            state = "stopped" if closed.state == RoundState.ABORTED else "done"
            todo.append(_finishing(run.run_id, state, closed.reason))
            return None
        todo.append(following.save(following.round))
        todo += self._entries(following, following.round)
        return following

    async def _go_on(self, closed: RoundKeeper, following: RoundKeeper | None) -> None:
        self._parts.metrics.rounds.labels(str(closed.round.state)).inc()
        self._parts.metrics.round_seconds.observe(self.display.close(closed))
        if self._timer is not None:
            self._timer.cancel()
        self.secure.close()
        if following is None:
            _LOGGER.info("run %s ended: %s", closed.round.run_id, closed.round.reason or "done")
            self.run = self.keeper = None
            await self._adopt()
            return
        self.keeper = following
        self._enter(following)

    def _enter(self, keeper: RoundKeeper) -> None:
        """Begin to act on a round that comes from the database or was just written there."""
        tag = f"{keeper.round.run_id}-{keeper.round.number}"
        self._parts.updates.begin(tag, {task.client for task in keeper.round.carried})
        self._spawn(asyncio.to_thread(self._parts.updates.sweep))
        _, effects = keeper.after(ServiceRestarted())
        self._act(keeper, effects)

    def _act(self, keeper: RoundKeeper, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case InviteClients():
                    for client in effect.clients:
                        self.leases.renew(client)
                    if self.run is not None:
                        self.secure.open(self.run, keeper)
                    self.room.wake(effect.clients)
                case SelectCohort():
                    self.room.wake_all()  # the first one that looks again chooses the cohort
                case ArmDeadline():
                    self._arm(keeper, effect.at)
                case StartAggregation():
                    self._spawn(self._aggregate(keeper, effect.updates))
                case _:  # answers go back to the caller, releases are told by report()
                    pass

    def _arm(self, keeper: RoundKeeper, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        delay = max(0.0, at - time.time())
        self._timer = loop.call_later(delay, lambda: self._spawn(self._surely(keeper, DeadlinePassed())))

    async def _surely(self, keeper: RoundKeeper, event: Event, works: tuple[Work, ...] = ()) -> None:
        """An event that nobody would repeat: try until the database takes it or the round is over."""
        while True:
            async with self.lock:
                aborted = keeper.round.state == RoundState.ABORTED
                if keeper is not self.keeper or aborted:
                    return
                try:
                    await self.happen(event, *works)
                except TransportError as error:
                    _LOGGER.warning("round %d of %s: %s", keeper.round.number, keeper.round.run_id, error)
                else:
                    return
            await asyncio.sleep(_RETRY_S)

    async def _aggregate(self, keeper: RoundKeeper, updates: Mapping[str, Digest]) -> None:
        run = self.run
        assert run is not None
        event: Event
        works: tuple[Work, ...] = ()
        try:
            if keeper.kind == "personalise":
                event = Aggregated(keeper.round.base)
            else:
                folded = await self._fold(run, keeper.round, updates)
                event = Aggregated(folded.digest, folded.state, folded.judged)
                works = (folded.note, note_suspects(keeper.round, folded.judged, time.time_ns()))
        except TooFewUpdatesError as error:
            event = AggregationFailed(str(error)[:400], error.refused)
            works = (note_suspects(keeper.round, error.refused, time.time_ns()),)
        except WearfleetError as error:
            _LOGGER.error("round %d of %s: %s", keeper.round.number, run.run_id, error)  # noqa: TRY400 - says it all
            event = AggregationFailed(str(error)[:400])
        except Exception:  # a strategy may raise anything; the round must end all the same
            _LOGGER.exception("round %d of %s", keeper.round.number, run.run_id)
            event = AggregationFailed("internal error; the service's log tells more")
        await self._surely(keeper, event, works)

    async def _fold(self, run: ActiveRun, current: Round, updates: Mapping[str, Digest]) -> Folded:
        """Average the updates, or what secure aggregation makes of them."""
        contributions = self._folding.contributions(run, current, updates)
        if run.secure:
            total = await self.secure.total(run, current, updates)
            tensors = await asyncio.to_thread(self._folding.tensors, run, current.base)
            contributions = (secure_contribution(run.plan.tensors, run.plan.upload, tensors, total),)
        return await asyncio.to_thread(self._folding.fold, run, current, contributions)

    def _leave_out(self, keeper: RoundKeeper, devices: frozenset[str], reason: str) -> None:
        """Wait no longer for devices that a secure round goes on without."""
        self._spawn(self._decline_all(keeper, sorted(devices), reason))

    async def _decline_all(self, keeper: RoundKeeper, devices: Sequence[str], reason: str) -> None:
        for device_id in devices:
            if keeper.open_for(device_id):
                await self._surely(keeper, ClientDeclined(device_id, reason))

    async def _adopt(self) -> None:
        """Take the oldest run that is not finished. The caller holds the lock."""
        while self.run is None:
            row = await self._parts.database.run(next_running)
            if row is None:
                self._parts.updates.begin("")
                self._spawn(asyncio.to_thread(self._parts.updates.sweep))
                return
            try:
                await self._take(row)
            except WearfleetError as error:
                _LOGGER.error("run %s cannot go on: %s", row.run_id, error)  # noqa: TRY400 - says it all
                self.run = self.keeper = None
                await self._parts.database.run(_finishing(row.run_id, "stopped", str(error)))

    async def _take(self, row: RunRow) -> None:
        run = await asyncio.to_thread(load_run, row, self._parts.blobs, self._parts.keys)
        self._budget.load(await self._parts.database.run(read_ledger))
        rows, handed_in = await self._parts.database.run(
            lambda c: (list_rounds(c, row.run_id), list_submissions(c, row.run_id))
        )
        by_round: dict[int, list[Submission]] = {}
        for submission in handed_in:
            by_round.setdefault(submission.round, []).append(submission)
        keepers = [kept_round(r, by_round.get(r.round, ())) for r in rows]
        self.run = run
        self.keeper = keepers[-1] if keepers else first_round(run)
        self._took_part = {client for keeper in keepers for client in keeper.round.invited}
        self.display.adopt(keepers, rows)
        if not keepers:
            await self._parts.database.run(self.keeper.save(self.keeper.round))
        _LOGGER.info("run %s: round %d of %d", run.run_id, self.keeper.round.number, run.settings.rounds)
        self.secure.adopted(self.keeper)
        self._enter(self.keeper)
        self.display.soon()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # when it was cancelled before it began


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except (WearfleetError, sa.exc.SQLAlchemyError, OSError):
        _LOGGER.exception("federation: work in the background failed")


def _carry_out(connection: Connection, works: list[Work]) -> None:
    for work in works:
        work(connection)


def _finishing(run_id: str, state: str, reason: str) -> Work:
    now_ns = time.time_ns()

    def work(connection: Connection) -> None:
        finish_run(connection, run_id, state, now_ns, reason)

    return work
