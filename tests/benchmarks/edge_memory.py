"""Child of bench_edge.py: everything an agent loads, in one process; prints resident megabytes stage by stage."""

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import wearfleet_edge.agent  # all parts of the agent
from wearfleet_edge.memory import release_memory, resident_bytes
from wearfleet_edge.runtime import Recogniser
from wearfleet_edge.trainer import Limits, TrainingData, run_plan, start_state
from wearfleet_protos.manifest import ModelManifest
from wearfleet_protos.plan import Plan
from wearfleet_protos.tensors import decode_tensors
from wearfleet_protos.windowing import LabelledWindows

assert wearfleet_edge.agent


def megabytes():
    return round(resident_bytes() / 1e6, 1)


def main():
    from cryptography.hazmat.primitives.asymmetric import ed25519

    assert ed25519
    folder = Path(sys.argv[1])
    report = {"imported": megabytes()}
    release_memory()
    manifest = ModelManifest.from_bytes((folder / "manifest.json").read_bytes())
    plan = Plan.from_bytes((folder / "plan.json").read_bytes())
    recogniser = Recogniser((folder / "model.onnx").read_bytes(), manifest)
    report["model_loaded"] = megabytes()
    release_memory()
    generator = np.random.default_rng(0)
    x, zeros = generator.normal(0, 1, (400, 6, 128)).astype(np.float32), np.zeros(400, np.int64)
    windows = LabelledWindows(x, generator.integers(0, 6, 400), zeros, zeros)
    graphs = {p.graph: (folder / p.graph.removeprefix("sha256:")).read_bytes() for p in plan.phases}
    tensors = decode_tensors((folder / "tensors").read_bytes(), plan.download_specs())
    peak, stop = [0.0], threading.Event()

    def stream():
        while not stop.is_set():
            recogniser.recognise(x[0])
            peak[0] = max(peak[0], megabytes())
            time.sleep(0.002)

    thread = threading.Thread(target=stream)
    thread.start()
    limits = Limits(600.0, 1e12, lambda: 0, time.monotonic, lambda: False)
    seconds = 0.0
    for number in range(5):
        result = run_plan(
            plan,
            graphs,
            start_state(plan, tensors, {}),
            TrainingData(windows, windows),
            round_number=number,
            limits=limits,
        )
        seconds += result.seconds
        release_memory()
    stop.set()
    thread.join()
    report |= {"peak_streaming_and_training": peak[0], "after_training": megabytes()}
    report["milliseconds_a_round_of_400_windows_2_epochs"] = round(seconds / 5 * 1e3, 1)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
