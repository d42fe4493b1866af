"""The whole agent as its own process, against a real broker and real gRPC: stream, learn, be killed, come back."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack

import paho.mqtt.client as paho
import pytest
from edge.simulators import (
    Authority,
    GrpcService,
    Mosquitto,
    Signer,
    SimulatedCloud,
    serve,
    wait_until,
)
from edge.tiny_graphs import LABELS, TENSORS, make_plan, make_recording, make_release
from paho.mqtt.enums import CallbackAPIVersion
from ports import free_port
from wearfleet_edge.enrolment import enrol_device
from wearfleet_edge.outbox import inspect_outbox
from wearfleet_edge.state import StateDirectory, read_json
from wearfleet_edge.transport.cloud import Task
from wearfleet_protos.codec import decode_prediction, decode_window
from wearfleet_protos.recording import save_recordings
from wearfleet_protos.tensors import encode_tensors
from wearfleet_protos.ticket import EnrolmentTicket
from wearfleet_protos.windowing import WindowSpec, cut_labelled

pytestmark = [pytest.mark.broker, pytest.mark.e2e]


class Fleet:
    """Cloud, broker and one enrolled device with a recording."""

    def __init__(self, root, stack):
        self.root = root
        self.broker = Mosquitto(root, free_port(), "max_queued_messages 0")
        self.broker.start()
        stack.callback(self.broker.stop)
        self.signer, self.cloud = Signer(), SimulatedCloud()
        service = GrpcService(self.cloud, Authority(), self.signer, self.broker.port)
        stack.enter_context(serve(service, require_certificate=False))
        self.state = StateDirectory(root / "device")
        enrol_device(
            self.state, EnrolmentTicket(service.address, "right-code", service.authority.der).encode()
        )
        data, manifest = make_release()
        self.cloud.add(data)
        self.cloud.want(self.signer.manifest(manifest), 1)
        self.recording = make_recording(seconds=400.0)
        save_recordings(root / "anna.npz", [self.recording], LABELS)
        self.windows = cut_labelled(self.recording, WindowSpec(8, 4, 20.0))
        self.predictions, self.raw = [], []
        self._lock = threading.Lock()
        self._subscriber = paho.Client(CallbackAPIVersion.VERSION2, client_id="cloud")
        self._subscriber.on_message = self._on_message
        self._subscriber.connect("127.0.0.1", self.broker.port)
        self._subscriber.subscribe("wearfleet/v1/home/anna-1f3a/tele/+", qos=1)
        self._subscriber.loop_start()
        stack.callback(self._subscriber.loop_stop)
        stack.callback(self._subscriber.disconnect)

    def _on_message(self, _client, _userdata, message):
        with self._lock:
            if message.topic.endswith("prediction"):
                self.predictions.append(decode_prediction(message.payload))
            elif message.topic.endswith("window"):
                self.raw.append(decode_window(message.payload))

    def start(self, command, *options):
        program = [sys.executable, "-m", "wearfleet_edge.cli", command, *options]
        program += ["--state", str(self.state.root), "--json"]
        return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def offer(self, number, *, personalise):
        tiny = make_plan()
        for graph in tiny.graphs.values():
            self.cloud.add(graph)
        document, body = self.signer.plan(tiny.plan), encode_tensors(TENSORS)
        self.cloud.tasks.append(
            Task(
                "run-1",
                number,
                f"attempt-{number}",
                personalise,
                self.cloud.add(document),
                len(document),
                self.cloud.add(body),
                len(body),
                60.0,
            )
        )

    def status(self):
        return read_json(self.state.status) if self.state.status.exists() else {}


@pytest.fixture
def fleet(tmp_path):
    with ExitStack() as stack:
        yield Fleet(tmp_path, stack)


def _finish(process, code=0):
    out, err = process.communicate(timeout=90)
    assert process.returncode == code, err
    return json.loads(out.splitlines()[-1])


def test_replay_streams_a_recording_once_and_ends_when_all_is_acknowledged(fleet):
    status = _finish(fleet.start("replay", str(fleet.root / "anna.npz"), "--speed", "0"))
    count = len(fleet.windows)
    assert wait_until(lambda: len(fleet.predictions) == count)
    assert [p.header.sequence for p in fleet.predictions] == list(range(count))
    assert [p.sample_index for p in fleet.predictions] == fleet.windows.start.tolist()
    stated = [-1 if p.annotated_label is None else p.annotated_label for p in fleet.predictions]
    assert stated == fleet.windows.y.tolist()
    assert fleet.raw == []  # raw windows stay on the device unless the wearer says otherwise
    assert status["windows_sent"] == status["windows_acknowledged"] == count
    assert status["windows_lost"] == 0
    assert status["torch_imported"] is False
    assert not status["running"]


def test_raw_windows_are_sent_only_when_the_wearer_allows(fleet):
    _finish(fleet.start("replay", str(fleet.root / "anna.npz"), "--speed", "0", "--share-raw-windows"))
    assert wait_until(lambda: len(fleet.raw) == len(fleet.windows))
    sent = fleet.raw[7].samples
    assert abs(sent - fleet.windows.x[7]).max() < 1e-3


def test_an_agent_learns_while_it_streams_and_stays_small(fleet):
    fleet.offer(1, personalise=False)
    agent = fleet.start("run", "--recording", str(fleet.root / "anna.npz"), "--speed", "20")
    assert wait_until(lambda: len(fleet.cloud.submissions) == 1)
    fleet.offer(2, personalise=True)
    assert wait_until(lambda: fleet.status().get("personalised"))
    agent.send_signal(signal.SIGTERM)
    status = _finish(agent)
    assert status["federated_rounds"] == 2
    assert status["accuracy_before"] is not None
    assert status["accuracy_after"] is not None
    assert status["windows_lost"] == status["outbox_depth"] == 0
    assert 0 < status["private_mb"] < 60
    assert status["private_mb"] < status["rss_mb"]
    assert wait_until(lambda: len(fleet.predictions) == status["windows_sent"])
    assert any(p.personalised for p in fleet.predictions)
    assert inspect_outbox(fleet.state.outbox).depth == 0


def test_a_killed_agent_comes_back_and_nothing_is_missing(fleet):
    for _ in range(3):
        seen = len(fleet.predictions)
        agent = fleet.start("run", "--recording", str(fleet.root / "anna.npz"), "--speed", "0", "--repeat")
        assert wait_until(lambda seen=seen: len(fleet.predictions) > seen + 150)
        agent.kill()
        agent.communicate()
    status = _finish(fleet.start("replay", str(fleet.root / "anna.npz"), "--speed", "0"))
    appended = inspect_outbox(fleet.state.outbox).appended["tele/prediction"]
    by_boot = {}
    assert wait_until(
        lambda: len({(p.header.boot_id, p.header.sequence) for p in fleet.predictions}) == appended
    )
    for prediction in fleet.predictions:
        by_boot.setdefault(prediction.header.boot_id, set()).add(prediction.header.sequence)
    assert len(by_boot) == 4
    for sequences in by_boot.values():
        assert sequences == set(range(len(sequences)))
    assert status["windows_acknowledged"] == appended
    assert status["windows_lost"] == 0


def test_the_agent_recognises_without_a_network_once_it_has_a_model(fleet):
    _finish(fleet.start("replay", str(fleet.root / "anna.npz"), "--speed", "0"))
    fleet.broker.stop()
    agent = fleet.start("run", "--recording", str(fleet.root / "anna.npz"), "--speed", "0")
    assert wait_until(lambda: fleet.status().get("running") and fleet.status().get("stream_finished"))
    agent.send_signal(signal.SIGTERM)
    status = _finish(agent)
    assert status["windows_sent"] == 2 * len(fleet.windows)
    assert status["windows_acknowledged"] == len(fleet.windows)
    assert status["windows_lost"] == 0
    fleet.broker.start()


def test_a_second_agent_with_the_same_directory_is_refused_and_the_first_goes_on(fleet):
    first = fleet.start("run", "--recording", str(fleet.root / "anna.npz"), "--speed", "5")
    assert wait_until(lambda: len(fleet.predictions) > 3)
    second = fleet.start("run", "--recording", str(fleet.root / "anna.npz"))
    _, err = second.communicate(timeout=90)
    assert second.returncode == 5
    assert "another agent runs" in err
    seen = len(fleet.predictions)
    assert wait_until(lambda: len(fleet.predictions) > seen)
    first.send_signal(signal.SIGTERM)
    assert _finish(first)["windows_lost"] == 0


def test_an_agent_without_enrolment_says_what_to_do(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "wearfleet_edge.cli", "run", "--state", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert result.returncode == 3
    assert "wearfleet-edge enrol" in result.stderr


def test_a_recording_that_does_not_fit_the_model_ends_the_agent_with_the_reason(fleet):
    recording = make_recording()
    renamed = type(recording)(
        recording.samples[:, :2], recording.labels, 20.0, recording.channels[:2], "anna", "wrist", "test", "0"
    )
    save_recordings(fleet.root / "two.npz", [renamed], LABELS)
    agent = fleet.start("run", "--recording", str(fleet.root / "two.npz"))
    _, err = agent.communicate(timeout=90)
    assert agent.returncode == 1
    assert "acc_z" in err
