"""The agent on one thread: one recognition, sample to publish, resident memory, start of the command line.

    python tests/benchmarks/bench_edge.py [--out FILE.json]

Sample to publish is the time from the moment at which a window's last sample reaches the pipeline until the broker's
socket has been handed the message: cut, recognise, encode, commit to the outbox, wake the sender, publish.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

ROUNDS = 3000
AGENT = Path(__file__).with_name("edge_memory.py")


def quantiles(times_ns):
    """Microseconds at 50, 95 and 99 per cent."""
    return {f"p{q}": round(float(np.percentile(times_ns, q)) / 1e3, 2) for q in (50, 95, 99)}


def release(folder):
    """A CNN for UCI-HAR windows (6, 128), its manifest, and a compiled training plan, as files."""
    import torch
    from wearfleet_cloud.export.scored_classifier import fit_ood
    from wearfleet_cloud.export.to_onnx import ReleaseInfo, export_bytes
    from wearfleet_cloud.federated import create_strategy
    from wearfleet_cloud.federated.plan_builder import build_plan
    from wearfleet_models import ModelSpec, build_classifier
    from wearfleet_protos.labels import UCI_HAR6
    from wearfleet_protos.plan import InputContract
    from wearfleet_protos.recording import Channel
    from wearfleet_protos.tensors import encode_tensors

    torch.set_num_threads(1)
    names = [f"{s}_{a}" for s in ("acc", "gyr") for a in "xyz"]
    channels = tuple(Channel(n, "m/s^2" if n.startswith("acc") else "rad/s") for n in names)
    contract = InputContract(channels, 50.0, 128, 64, UCI_HAR6)
    model = build_classifier(ModelSpec("cnn", 6, 128, 6), seed=0)
    generator = np.random.default_rng(0)
    x = generator.normal(0, 1, (300, 6, 128)).astype(np.float32)
    ood = fit_ood(model, x, generator.integers(0, 6, 300), x[:100])
    data, manifest = export_bytes(model, contract, ood, ReleaseInfo("bench", 1, "r", "Apache-2.0", True, 1))
    plan, graphs = build_plan(
        create_strategy("fedbn", {"epochs": 2, "batch_size": 32}), model, contract, plan_id="b"
    )
    values = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    (folder / "model.onnx").write_bytes(data)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    (folder / "plan.json").write_bytes(plan.to_bytes())
    (folder / "tensors").write_bytes(encode_tensors({s.name: values[s.name] for s in plan.download_specs()}))
    for digest, graph in graphs.items():
        (folder / digest.removeprefix("sha256:")).write_bytes(graph)
    return data, manifest


def bench_recognition(data, manifest):
    from wearfleet_edge.runtime import Recogniser

    recogniser = Recogniser(data, manifest)
    windows = np.random.default_rng(1).normal(0, 1, (64, 6, 128)).astype(np.float32)
    return quantiles([recogniser.recognise(windows[i % 64]).inference_ns for i in range(ROUNDS)])


def bench_sample_to_publish(data, manifest, folder, *, raw):
    """Through the real pipeline, outbox and MQTT link, over a real Mosquitto."""
    from edge.simulators import Mosquitto, wait_until
    from ports import free_port
    from wearfleet_edge.identity import Broker
    from wearfleet_edge.outbox import Outbox
    from wearfleet_edge.pipeline import HeaderFactory, Pipeline
    from wearfleet_edge.policy import SharingPolicy
    from wearfleet_edge.runtime import Recogniser
    from wearfleet_edge.sensors.replay import Chunk
    from wearfleet_edge.transport import mqtt
    from wearfleet_edge.transport.backoff import Backoff
    from wearfleet_protos.messages import ClockQuality

    broker = Mosquitto(folder, free_port())
    broker.start()
    headers = HeaderFactory(
        "bench", "00000001", ClockQuality.REPLAY, time.time_ns, lambda: os.urandom(16).hex()
    )
    outbox = Outbox(
        folder / f"outbox-{raw}",
        boot="00000001",
        clock_ns=time.time_ns,
        max_messages=10**6,
        max_bytes=1 << 30,
    )
    session = mqtt.Session("home", "bench", Broker("127.0.0.1", broker.port, tls=False), None, "1")
    link = mqtt.MqttLink(session, outbox, headers, Backoff(0.1, 1.0, lambda: 0.5))
    published = []
    publish = mqtt._Connection._publish

    def timed(self, kind, payload, row_id):
        message = publish(self, kind, payload, row_id)
        published.append(time.perf_counter_ns())
        return message

    mqtt._Connection._publish = timed
    link.start()
    wait_until(lambda: link.connected)
    recogniser = Recogniser(data, manifest)
    pipeline = Pipeline(lambda: recogniser, headers, SharingPolicy(raw_windows=raw, annotations=True))
    samples = np.random.default_rng(2).normal(0, 1, (64, 6)).astype(np.float32)
    labels, times = np.zeros(64, np.int16), []
    for index in range(600):
        outbox.wait_below(1, 1.0)
        published.clear()
        begin = time.perf_counter_ns()
        for _, messages in pipeline.push(Chunk(samples, labels, index == 0)):
            outbox.append(messages)
        wanted = (2 if raw else 1) if index else 0
        while len(published) < wanted:
            time.sleep(0.00002)
        if wanted:
            times.append(published[-1] - begin)
    mqtt._Connection._publish = publish
    link.stop()
    broker.stop()
    return quantiles(times)


def bench_memory(folder):
    """Resident megabytes of a process that streams and trains, imports included, in the agent's environment."""
    from wearfleet_edge.process import _ENVIRONMENT

    command = [sys.executable, str(AGENT), str(folder)]
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, env=dict(os.environ) | _ENVIRONMENT
    )
    return json.loads(result.stdout)


def bench_start():
    times = []
    for _ in range(7):
        begin = time.perf_counter_ns()
        subprocess.run(
            [sys.executable, "-m", "wearfleet_edge.cli", "--help"], check=True, capture_output=True
        )
        times.append(time.perf_counter_ns() - begin)
    return round(float(np.median(times)) / 1e6, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, manifest = release(folder)
        result = {
            "recognise_us": bench_recognition(data, manifest),
            "sample_to_publish_us": {
                "prediction": bench_sample_to_publish(data, manifest, folder, raw=False),
                "prediction_and_window": bench_sample_to_publish(data, manifest, folder, raw=True),
            },
            "memory_mb": bench_memory(folder),
            "help_ms": bench_start(),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
