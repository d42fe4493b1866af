"""Model updates under attack: what is refused, what is said, and what stays in use."""

from random import Random

import pytest
from edge.simulators import Signer, SimulatedCloud
from edge.tiny_graphs import make_release
from wearfleet_edge.artifacts import ArtifactStore
from wearfleet_edge.heartbeat import Heartbeat
from wearfleet_edge.models import ActiveModel
from wearfleet_edge.slots import Slots
from wearfleet_edge.transport.backoff import Backoff
from wearfleet_edge.transport.cloud import Desired
from wearfleet_edge.update import Updater
from wearfleet_protos.errors import IntegrityError, NotFoundError, TransportError


class Bench:
    def __init__(self, root):
        self.root = root
        self.signer = Signer()
        self.cloud = SimulatedCloud()
        self.active = ActiveModel()
        (root / "models").mkdir()
        self.slots = Slots(root / "models", self.signer.keys)
        backoff = Backoff(0.001, 0.002, Random(0).random)
        artifacts = ArtifactStore(root / "artifacts", self.cloud, backoff, lambda _: False)
        self.updater = Updater(artifacts, self.slots, self.active, self.signer.keys)
        self.heartbeat = Heartbeat(
            cloud=self.cloud, updater=self.updater, active=self.active, agent_version="1", wall_ns=lambda: 0
        )

    def publish(self, version, signer=None, **faults):
        data, manifest = make_release(version, **faults)
        self.cloud.add(data)
        signed = (signer or self.signer).manifest(manifest)
        self.cloud.want(signed, version)
        return data, manifest

    def in_use(self):
        return self.active.installed.manifest.version


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    bench.publish(2)
    bench.heartbeat.step()
    assert bench.in_use() == 2
    return bench


def _assert_refused(bench, words):
    bench.heartbeat.step()
    assert bench.in_use() == 2
    assert words in bench.updater.refusal
    bench.heartbeat.step()
    assert words in bench.cloud.reported[-1].refusal
    assert Slots(bench.root / "models", bench.signer.keys).current().manifest.version == 2


def test_a_new_version_is_installed_and_reported(bench):
    bench.publish(3)
    assert bench.heartbeat.step() == 0.0
    assert bench.in_use() == 3
    bench.heartbeat.step()
    assert bench.cloud.reported[-1].model_version == 3
    assert bench.cloud.reported[-1].manifest_digest == bench.cloud.desired.manifest_digest


def test_the_current_and_the_previous_model_stay_on_disk_and_older_ones_go(bench):
    for version in (3, 4):
        bench.publish(version)
        bench.heartbeat.step()
    assert len([p for p in (bench.root / "models").iterdir() if p.is_dir()]) == 2
    assert list((bench.root / "artifacts").iterdir()) == []


def test_an_older_version_is_refused(bench):
    bench.publish(1)
    _assert_refused(bench, "not newer than version 2")


def test_a_manifest_signed_by_another_key_is_refused(bench):
    bench.publish(3, signer=Signer())
    _assert_refused(bench, "unknown key")


def test_a_tampered_manifest_is_refused(bench):
    bench.publish(3)
    digest = bench.cloud.desired.manifest_digest
    changed = bench.cloud.blobs[digest].replace(b"Apache-2.0", b"Apache-9.0")
    bench.cloud.want(changed, 3)
    _assert_refused(bench, "signature")


def test_a_tampered_model_is_refused_and_not_kept(bench):
    data, manifest = bench.publish(3)
    bench.cloud.blobs[manifest.digest] = data[:-1] + bytes([data[-1] ^ 1])
    _assert_refused(bench, "damaged or tampered")
    assert [p.name for p in (bench.root / "artifacts").iterdir() if p.name.endswith(".part")] == []


def test_a_version_other_than_the_announced_one_is_refused(bench):
    bench.publish(3)
    bench.cloud.desired = Desired(bench.cloud.desired.manifest_digest, 1, 4)
    _assert_refused(bench, "version 4 was wanted")


def test_a_model_that_breaks_its_contract_is_refused(bench):
    bench.publish(3, drop_output="ood_score")
    _assert_refused(bench, "ood_score")


def test_a_refused_model_is_not_fetched_again_but_a_better_one_is(bench):
    bench.publish(3, drop_output="ood_score")
    _assert_refused(bench, "ood_score")
    bench.cloud.broken = {"download"}
    bench.heartbeat.step()
    bench.cloud.broken = set()
    bench.publish(4)
    bench.heartbeat.step()
    assert bench.in_use() == 4
    assert bench.updater.refusal == ""


def test_a_network_failure_is_not_a_refusal(bench):
    bench.publish(3)
    bench.cloud.broken = {"download"}
    with pytest.raises(TransportError):
        bench.heartbeat.step()
    assert bench.updater.refusal == ""
    bench.cloud.broken = set()
    bench.heartbeat.step()
    assert bench.in_use() == 3


def test_a_model_that_was_changed_on_disk_is_not_loaded(bench):
    for path in (bench.root / "models").rglob("model.onnx"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(IntegrityError, match="changed on disk"):
        bench.slots.current()


def test_without_a_model_recognition_says_how_to_get_one(tmp_path):
    with pytest.raises(NotFoundError, match="models publish"):
        _ = ActiveModel().recogniser


def test_a_device_without_a_model_asks_again_soon(tmp_path):
    bench = Bench(tmp_path)
    assert bench.heartbeat.step() <= 1.0
