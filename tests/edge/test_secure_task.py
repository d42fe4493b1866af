"""A device whose task asks for secure aggregation: the agent's worker against the service's machine and real peers."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
from edge.device_bench import Bench
from edge.tiny_graphs import make_plan
from secure_rounds import Conversation, Group, names, parameters
from wearfleet_cloud.federated.privacy.secagg_server import InputMasked, Stage, unmask
from wearfleet_protos.errors import ConflictError, DataError, TransportError
from wearfleet_protos.secagg.vectors import flat, size_of
from wearfleet_protos.secagg.words import words_of, words_spec
from wearfleet_protos.tensors import decode_tensors

SPECS = make_plan().plan.upload_specs()
SIZE = size_of(SPECS)
MEMBERS = names(4)
OWN = MEMBERS[0]


@dataclass
class Peers:
    """The service's machine and three other members, who answer as soon as the device does."""

    bench: Bench
    round: Conversation
    answers: list = field(default_factory=list)
    lost_replies: int = 0
    instead: object = None

    def exchange(self, task, answer, wait_s):
        self.answers.append(answer)
        if self.lost_replies:
            self.lost_replies -= 1
            raise TransportError("the reply was lost")
        if self.instead is not None:
            return self.instead(answer)
        if answer is None:
            self._hand_in()
        else:
            self.round.happen(answer)
        last = self.round.round.stage == Stage.UNMASK and type(answer).__name__ == "Revealed"
        self._others()
        return None if last else self.round.notices[OWN]

    def _hand_in(self):
        (submission,) = self.bench.cloud.submissions
        words = words_of(
            decode_tensors(self.bench.cloud.blobs[submission.update_digest], (words_spec(SIZE),))
        )
        self.round.happen(InputMasked(OWN, words))

    def _others(self):
        for name in MEMBERS[1:]:
            if name in self.round.round.awaited():
                self.round.happen(self.round.answer(name))


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    group = Group.of(MEMBERS)
    made.member = group.member(OWN, 3)
    made.peers = Peers(made, Conversation(secure_parameters(), group))
    made.cloud.exchange = made.peers.exchange
    return made


def secure_parameters(**changes):
    return parameters(4, SIZE, run_id="run-1", clip=1.0, **changes)


def offer(bench, **changes):
    return bench.offer(secure=secure_parameters(**changes), without_figures=True)


def test_a_masked_update_and_no_figure_leaves_the_device_and_the_sum_is_right(bench):
    offer(bench)
    bench.worker.step()
    (submission,) = bench.cloud.submissions
    assert (submission.num_examples, submission.num_steps, submission.metrics) == (1, 0, {})
    assert submission.train_seconds == 0.0
    peers = bench.peers.round
    assert peers.round.stage == Stage.COMPLETE
    total = unmask(peers.round)
    assert total.members == MEMBERS
    own, count = plain_update(bench)
    weights = [peers.chosen.weight(count), *(peers.chosen.weight(peers.updates[n][1]) for n in MEMBERS[1:])]
    cut = [np.clip(values, -1, 1) for values in (own, *(peers.updates[n][0] for n in MEMBERS[1:]))]
    expected = np.average(cut, axis=0, weights=weights)
    assert total.weight == sum(weights)
    assert np.abs(total.mean - expected).max() < 2 / peers.chosen.levels  # one step of the quantiser
    assert np.abs(own).max() > 0
    assert bench.worker.progress.rounds == 1


def plain_update(bench):
    """What the same device would send in the clear, and its windows: training is the same."""
    plain = Bench(bench.state.root.parent / "plain")
    plain.offer()
    plain.worker.step()
    (submission,) = plain.cloud.submissions
    update = decode_tensors(plain.cloud.blobs[submission.update_digest], SPECS)
    return flat(SPECS, update), submission.num_examples


def test_no_secret_of_the_round_is_written_to_disk(bench):
    offer(bench)
    secrets = []
    entropy = bench.member.entropy

    def noted(size):
        secrets.append(entropy(size))
        return secrets[-1]

    from dataclasses import replace

    bench.member = replace(bench.member, entropy=noted)
    bench.cloud.broken.add("submit")  # what waits for its receipt lies on disk
    with pytest.raises(TransportError):
        bench.worker.step()
    assert bench.local.pending() is not None
    stored = b"".join(path.read_bytes() for path in bench.state.root.rglob("*") if path.is_file())
    assert len(secrets) > 4
    assert not any(secret in stored or secret.hex().encode() in stored for secret in secrets)


def test_a_lost_reply_repeats_the_same_answer(bench):
    bench.peers.lost_replies = 2
    offer(bench)
    bench.worker.step()
    first, second, third, *_ = bench.peers.answers
    assert first == second == third
    assert bench.peers.round.round.stage == Stage.COMPLETE


def test_a_cohort_below_the_devices_own_minimum_is_declined(bench):
    from dataclasses import replace

    bench.member = replace(bench.member, minimum_cohort=5)
    offer(bench)
    bench.worker.step()
    assert bench.peers.answers == []
    ((_, reason),) = bench.cloud.declined
    assert "secure_minimum_cohort" in reason


def test_the_same_round_is_joined_once_whatever_the_service_says(bench):
    """A second set of keys for one round would give the service two sums, and their difference."""
    bench.cloud.broken.add("submit")
    offer(bench)
    with pytest.raises(TransportError):
        bench.worker.step()
    bench.local.discard()
    bench.cloud.broken.clear()
    bench.restart()  # not even after the agent was started again
    count = len(bench.peers.answers)
    bench.worker.step()
    assert len(bench.peers.answers) == count
    ((_, reason),) = bench.cloud.declined
    assert "shared keys" in reason


def test_another_round_or_size_than_the_tasks_is_declined(bench):
    bench.offer(round_number=2, secure=secure_parameters())
    bench.worker.step()
    bench.offer(round_number=3, secure=parameters(4, SIZE + 1, run_id="run-1", round=3))
    bench.worker.step()
    assert [("the task is run-1/2" in r, "sums" in r) for _, r in bench.cloud.declined] == [
        (True, False),
        (False, True),
    ]
    assert bench.cloud.submissions == []


def test_a_round_that_goes_on_without_the_device_is_declined(bench):
    def refuse(_):
        raise ConflictError("the secure round goes on without you")

    bench.peers.instead = refuse
    offer(bench)
    bench.worker.step()
    ((_, reason),) = bench.cloud.declined
    assert "goes on without" in reason
    assert bench.cloud.submissions == []


def test_whatever_fails_after_the_input_was_accepted_the_device_goes_on(bench):
    exchange = bench.peers.exchange

    def break_at_the_end(task, answer, wait_s):
        if answer is None:
            raise ConflictError("the round was skipped")
        return exchange(task, answer, wait_s)

    bench.cloud.exchange = break_at_the_end
    offer(bench)
    assert bench.worker.step() == 0.0
    assert bench.worker.progress.rounds == 1
    assert bench.local.pending() is None


def test_a_device_that_asks_for_secure_sums_sends_nothing_else(bench):
    bench.secure_only = True
    bench.restart()
    bench.offer()
    bench.worker.step()
    ((_, reason),) = bench.cloud.declined
    assert "secure_only" in reason
    bench.offer(round_number=2, personalise=True)
    bench.worker.step()
    (submission,) = bench.cloud.submissions
    assert (submission.metrics, submission.num_examples, submission.update_digest) == ({}, 1, "")


def test_a_device_that_stops_while_it_waits_for_the_others_stops(bench):
    bench.peers.instead = lambda _: None
    offer(bench)
    threading.Timer(0.2, lambda: setattr(bench, "stopping", True)).start()
    with pytest.raises(TransportError, match="stopping"):
        bench.worker.step()
    assert bench.cloud.declined == []


def test_the_last_rounds_of_the_latest_runs_are_remembered_and_a_damaged_file_is_named(bench, monkeypatch):
    monkeypatch.setattr("wearfleet_edge.local_state._NOTED_RUNS", 3)
    for run_id in ("a", "b", "c", "a", "d"):
        bench.local.joined.note(run_id, bench.local.joined.last(run_id) + 1)
    assert [bench.local.joined.last(run_id) for run_id in "abcd"] == [2, 0, 1, 1]
    (bench.state.federated / "joined.json").write_text('{"rounds": 3}')
    with pytest.raises(DataError, match="delete it"):
        bench.local.joined.last("a")
