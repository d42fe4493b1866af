"""A device that protects its own update: what it sends, that noise is drawn once, and what it turns down."""

from dataclasses import replace

import numpy as np
import pytest
from edge.device_bench import Bench
from edge.tiny_graphs import make_plan
from wearfleet_edge.config import parse_config
from wearfleet_edge.policy import PlanDemands, plan_demands
from wearfleet_protos.errors import ConfigError, TransportError
from wearfleet_protos.privacy import joint_norm
from wearfleet_protos.tensors import TensorRole, decode_tensors

CLIP = 1e-3


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def plan(noise: float):
    tiny = make_plan()
    upload = replace(tiny.plan.upload, clip=CLIP, noise=noise)
    bare = tuple(r for r in upload.roles if r not in (TensorRole.NORM_STAT, TensorRole.COUNTER))
    return replace(tiny, plan=replace(tiny.plan, upload=replace(upload, roles=bare)))


def sent(bench, tiny):
    submission = bench.cloud.submissions[-1]
    return decode_tensors(bench.cloud.blobs[submission.update_digest], tiny.plan.upload_specs())


def test_an_update_is_clipped_and_its_figures_told_while_there_is_no_noise(bench):
    bench.offer(tiny := plan(0.0))
    bench.worker.step()
    assert CLIP * (1.0 - 2.0**-21) <= joint_norm(sent(bench, tiny)) <= CLIP
    assert bench.cloud.submissions[0].metrics["base/correct"] == 3.0


def test_with_noise_the_device_tells_no_figures_about_its_wearer(bench):
    bench.offer(tiny := plan(50.0))
    bench.worker.step()
    (submission,) = bench.cloud.submissions
    assert (
        joint_norm(sent(bench, tiny)) > 10.0
    )  # about 50 sqrt(coordinates); below 10 with probability under 0.2^n
    assert (submission.metrics, submission.num_examples, submission.num_steps) == ({}, 1, 0)
    assert (submission.train_seconds, submission.local_state_reset) == (0.0, False)


def test_with_noised_steps_it_tells_how_many_windows_there_are_and_nothing_else(bench):
    tiny = make_plan()
    train = next(phase for phase in tiny.plan.phases if phase.name == "train")
    secret = replace(train.loop, epochs=1, max_steps=3, shuffle=False, sampling_rate=0.1)
    noised = replace(train, loop=secret, noise=1)
    phases = tuple(noised if phase is train else phase for phase in tiny.plan.phases)
    bench.offer(replace(tiny, plan=replace(tiny.plan, phases=phases)))
    bench.worker.step()
    (submission,) = bench.cloud.submissions
    assert (submission.metrics, submission.train_seconds, submission.local_state_reset) == ({}, 0.0, False)
    windows = len(bench.wearer.training_data(tiny.plan.contract).train)
    assert (submission.num_examples, submission.num_steps) == (windows, 3)


def test_a_submission_that_is_repeated_holds_the_same_noise(bench):
    """Noise that is drawn anew for every try would average out."""
    bench.offer(plan(1.0))
    bench.cloud.broken = {"submit_reply"}
    with pytest.raises(TransportError):
        bench.worker.step()
    first = bench.local.pending()
    bench.cloud.broken = set()
    bench.restart()
    bench.worker.step()
    assert bench.cloud.submissions[-1].update_digest == first.submission.update_digest


def test_a_round_has_one_noised_update_however_often_it_is_asked_for(bench):
    """A service that turns updates down to get others must not have several."""
    tiny = plan(1.0)
    bench.offer(tiny)
    bench.worker.step()
    bench.restart()
    bench.offer(tiny)
    bench.worker.step()
    assert len(bench.cloud.submissions) == 1
    assert "noised update" in bench.cloud.declined[-1][1]
    bench.offer(tiny, round_number=2)
    bench.worker.step()
    assert len(bench.cloud.submissions) == 2


def test_two_rounds_have_noise_of_their_own(bench):
    tiny = plan(1.0)
    updates = []
    for number in (1, 2):
        bench.offer(tiny, round_number=number)
        bench.worker.step()
        updates.append(sent(bench, tiny))
    assert all(np.all(updates[0][name] != updates[1][name]) for name in updates[0])


def test_a_plan_that_is_weaker_than_the_settings_allow_is_declined(bench):
    settings = parse_config('[federation]\nmax_epsilon = 4.0\nstrategies = "tiny, fedavg"\n').federation
    assert plan_demands(settings) == PlanDemands(4.0, frozenset({"tiny", "fedavg"}))
    bench.worker._device = replace(bench.worker._device, demands=PlanDemands(4.0))
    bench.offer(plan(2.0 * CLIP))  # multiplier 1: epsilon 4.38
    bench.worker.step()
    assert "federation.max_epsilon allows 4" in bench.cloud.declined[0][1]
    assert bench.cloud.submissions == []
    bench.offer(plan(2.4 * CLIP), round_number=2)  # multiplier 1.2: epsilon 3.5
    bench.worker.step()
    assert len(bench.cloud.submissions) == 1


def test_settings_without_sense_are_refused():
    with pytest.raises(ConfigError, match="max_epsilon"):
        parse_config("[federation]\nmax_epsilon = 0.0\n")
