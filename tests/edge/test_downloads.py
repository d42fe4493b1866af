"""Downloads on a device: what it holds need not come again, and whatever is wrong with that, the whole comes."""

from dataclasses import replace

import numpy as np
import pytest
from edge.device_bench import Bench
from edge.tiny_graphs import TENSORS, WIDE, TinyPlan, make_plan
from wearfleet_protos.codecs import FLOAT32, UpdateCodec, frozen_bytes
from wearfleet_protos.plan import Plan
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec, digest_of, encode_tensors

FROZEN = TensorSpec("frozen", "float32", (30, 30), TensorRole.FROZEN, TensorGroup.AUX)


def tiny(downlink, *, frozen=False):
    made = make_plan(codec=FLOAT32)
    tensors = (*made.plan.tensors, FROZEN) if frozen else made.plan.tensors
    return TinyPlan(replace(made.plan, tensors=tensors, downlink=downlink), made.graphs)


def version(number, *, frozen=False):
    generator = np.random.default_rng(number)
    made = {**TENSORS, WIDE.name: generator.normal(0, 1, WIDE.shape).astype(np.float32)}
    return {**made, "frozen": np.full((30, 30), 0.5, np.float32)} if frozen else made


@pytest.fixture(params=["difference", "int8"])
def bench(request, tmp_path):
    bench = Bench(tmp_path)
    bench.made = tiny(FLOAT32 if request.param == "difference" else UpdateCodec("int8"))
    return bench


def difference(bench, old, new):
    """A step from one version to the next, and what it leads to."""
    form = bench.made.plan.download_format()
    step, shown = form.step(old, new, 2)
    return form.join([step]), shown


def offer(bench, number, tensors, *, data=b"", held=""):
    """A task with a difference; the whole tensors are there too."""
    more = {}
    if held:
        more["held_digest"] = held
    if data:
        more |= {"difference_digest": bench.cloud.add(data), "difference_bytes": len(data)}
    return bench.offer(bench.made, round_number=number, tensors=tensors, **more)


def begin(bench):
    """A first round; the digest that the device holds then."""
    offer(bench, 1, version(1))
    bench.worker.step()
    bench.worker.step()
    assert bench.cloud.held == (digest_of(encode_tensors(version(1))),)
    return bench.cloud.held[0]


def received(bench):
    return bench.artifacts.bytes_received


def test_a_difference_is_all_that_comes_and_it_survives_a_restart(bench):
    held, start = begin(bench), version(1)
    bench.restart()
    for number in (2, 3):
        data, shown = difference(bench, start, version(number))
        before = received(bench)
        offer(bench, number, shown, data=data, held=held)
        bench.worker.step()
        assert received(bench) - before == len(data)
        assert bench.cloud.submissions[-1].base_digest == digest_of(encode_tensors(shown))
        start, held = shown, digest_of(encode_tensors(shown))
    assert not bench.cloud.declined
    files = list((bench.state.federated / "held" / "versions").iterdir())
    assert len(files) == 1, "one version a run"


def test_who_holds_the_tensors_already_gets_nothing(bench):
    held = begin(bench)
    before = received(bench)
    offer(bench, 2, version(1), held=held)
    bench.worker.step()
    assert received(bench) == before
    assert bench.cloud.submissions[-1].base_digest == held


def tampered(bench, data, shown):
    """Another difference than the one that leads to the tensors: well formed, cut, oversized, or gone."""
    other = difference(bench, version(1), version(7))[0]
    whole = len(encode_tensors(shown))
    return {"other": other, "cut": data[:-5], "noise": b"wfd1" + bytes(40), "oversized": data + bytes(whole)}


@pytest.mark.parametrize("kind", ["other", "cut", "noise", "oversized", "gone", "changed on the way"])
def test_whatever_is_wrong_with_a_difference_the_whole_comes(bench, kind, caplog):
    held = begin(bench)
    data, shown = difference(bench, version(1), version(2))
    task = offer(bench, 2, shown, data=tampered(bench, data, shown).get(kind, data), held=held)
    if kind == "gone":
        del bench.cloud.blobs[task.difference_digest]
    elif kind == "changed on the way":
        bench.cloud.blobs[task.difference_digest] = data[:-1] + bytes([data[-1] ^ 1])
    bench.worker.step()
    assert not bench.cloud.declined
    assert bench.cloud.submissions[-1].base_digest == digest_of(encode_tensors(shown))
    assert "comes whole" in caplog.text
    bench.worker.step()
    assert bench.cloud.held == (digest_of(encode_tensors(shown)),)


@pytest.mark.parametrize("restart", [False, True])
def test_a_held_copy_that_was_damaged_or_lost_is_not_trusted(bench, restart):
    held = begin(bench)
    (file,) = (bench.state.federated / "held" / "versions").iterdir()
    bad = bytearray(file.read_bytes())
    bad[-1] ^= 1
    file.write_bytes(bytes(bad))
    if restart:
        bench.restart()
    data, shown = difference(bench, version(1), version(2))
    offer(bench, 2, shown, data=data, held=held)
    bench.worker.step()
    assert bench.cloud.submissions[-1].base_digest == digest_of(encode_tensors(shown))
    if restart:
        assert held not in bench.cloud.held, "the service is told what is there"
    file.unlink()
    offer(bench, 3, version(3), data=data, held=digest_of(encode_tensors(shown)))
    bench.worker.step()
    assert bench.cloud.submissions[-1].base_digest == digest_of(encode_tensors(version(3)))


def test_a_fallback_counts_against_the_bytes_that_a_task_may_move(bench):
    held = begin(bench)
    data, shown = difference(bench, version(1), version(2))
    whole = len(encode_tensors(shown))
    up = bench.made.plan.update_format().most_bytes(2)
    bench.max_bytes = len(data) + up
    bench.restart()
    offer(bench, 2, shown, data=data, held=held)
    bench.worker.step()
    assert not bench.cloud.declined, "whole tensors would be too much, the difference is not"
    offer(bench, 3, version(3), data=data[:-1], held=digest_of(encode_tensors(shown)))
    bench.worker.step()
    assert f"{len(data) - 1 + whole + up} bytes" in bench.cloud.declined[0][1]


def test_frozen_tensors_are_held_without_any_option_and_by_every_run(tmp_path):
    bench = Bench(tmp_path)
    bench.made = tiny(None, frozen=True)
    offer(bench, 1, version(1, frozen=True))
    bench.worker.step()
    bench.worker.step()
    digest = digest_of(frozen_bytes(bench.made.plan.download_specs(), version(1, frozen=True)))
    assert bench.cloud.held == (digest,)
    assert not list((bench.state.federated / "held" / "versions").iterdir()), "nothing else is kept"
    new = version(2, frozen=True)
    form = bench.made.plan.download_format()
    data = form.join([form.exact({"frozen": new["frozen"]}, new)])
    assert len(data) < len(encode_tensors(new)) - FROZEN.size_bytes
    before = received(bench)
    task = offer(bench, 2, new, data=data, held=digest)
    bench.cloud.tasks = [replace(task, run_id="run-2")]
    bench.worker.step()
    assert received(bench) - before == len(data)
    assert bench.cloud.submissions[-1].base_digest == digest_of(encode_tensors(new))


def test_the_plan_says_how_differences_are_coded_and_is_otherwise_as_it_was():
    plan = tiny(None).plan
    assert b"downlink" not in plan.to_bytes()
    for codec in (FLOAT32, UpdateCodec("topk", fraction=0.1, warmup_rounds=3)):
        declared = replace(plan, downlink=codec)
        assert Plan.from_bytes(declared.to_bytes()) == declared
