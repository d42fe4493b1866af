"""A device that publishes windows and predictions as fast as the broker takes them; started by ``bench_ingest.py``.

Arguments: state folder, port of the broker, kinds joined by "+" (window, prediction), number of each. Messages are
encoded before the clock starts. Reads a line to begin; prints the seconds until every message was acknowledged.
"""

from __future__ import annotations

import ssl
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from wearfleet_edge.identity import load_enrolment
from wearfleet_edge.state import StateDirectory
from wearfleet_protos.codec import encode
from wearfleet_protos.messages import ClockQuality, Header, Prediction, SensorWindow
from wearfleet_protos.topics import Topic, TopicKind

IN_FLIGHT = 500
CHANNELS, SAMPLES, CLASSES = 6, 128, 6


def messages(device_id: str, kinds: list[str], count: int) -> list[tuple[TopicKind, bytes]]:
    """Windows of (6, 128) as int16, their predictions, or both in turn."""
    rng, boot = np.random.default_rng(0), uuid.uuid4().hex[:16]
    samples = rng.normal(0, 5, (64, CHANNELS, SAMPLES)).astype(np.float32)
    probabilities = np.full(CLASSES, 1 / CLASSES, np.float32)
    made = []
    for number in range(count):
        header = Header(device_id, boot, number, uuid.uuid4().hex, time.time_ns(), ClockQuality.REPLAY)
        index = number * SAMPLES // 2
        if "window" in kinds:
            made.append((TopicKind.WINDOW, encode(SensorWindow(header, index, 50.0, samples[number % 64]))))
        prediction = Prediction(
            header, index, "sha256:" + "0" * 64, 1, False, number % CLASSES, probabilities, 0.5, False, 40_000, None
        )  # fmt: skip
        if "prediction" in kinds:
            made.append((TopicKind.PREDICTION, encode(prediction)))
    return made


def main() -> None:
    state, port = StateDirectory(Path(sys.argv[1])), int(sys.argv[2])
    enrolment = load_enrolment(state)
    context = ssl.create_default_context(cafile=str(state.authority))
    context.load_cert_chain(state.certificate, state.key)
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=enrolment.device_id, clean_session=True)
    client.tls_set_context(context)
    client.max_inflight_messages_set(IN_FLIGHT)
    room = threading.Semaphore(2 * IN_FLIGHT)
    client.on_publish = lambda *_: room.release()
    client.connect(enrolment.broker.host, port)
    client.loop_start()
    topics = {kind: str(Topic(enrolment.tenant, enrolment.device_id, kind)) for kind in TopicKind}
    made = messages(enrolment.device_id, sys.argv[3].split("+"), int(sys.argv[4]))
    ready = [(topics[kind], payload) for kind, payload in made]
    while not client.is_connected():
        time.sleep(0.01)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    for topic, payload in ready:
        room.acquire()
        client.publish(topic, payload, qos=1)
    for _ in range(2 * IN_FLIGHT):
        room.acquire()
    print(time.perf_counter() - began, flush=True)
    client.disconnect()


if __name__ == "__main__":
    main()
