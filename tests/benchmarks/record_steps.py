"""Time of a local round of a device with and without noised steps (dp=record), a step of 32 windows, on one thread.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/record_steps.py`` from the repository root. Plans run on the agent's
own engine, for windows of HAPT's shape with random numbers in them; batches are full (rate 1 of 32 windows), so both
do the same number of windows. What a round costs apart from its steps is measured by rounds of one step and taken
off. Rounds alternate between the two; a figure is the median of ten differences.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.plan_builder import build_plan
from wearfleet_edge.trainer import Limits, TrainingData, run_plan, start_state
from wearfleet_models.classifier import Classifier, ModelSpec, build_classifier
from wearfleet_protos.plan import InputContract
from wearfleet_protos.recording import Channel
from wearfleet_protos.windowing import LabelledWindows

CHANNELS, WINDOW, CLASSES, BATCH, STEPS, TIMES = 6, 128, 12, 32, 11, 10
CONTRACT = InputContract(
    tuple(Channel(f"c{i}", "m/s2") for i in range(CHANNELS)), 50.0, WINDOW, 64, tuple("abcdefghijkl")
)
LIMITS = Limits(600.0, 1e12, lambda: 0, time.monotonic, lambda: False)


def windows(count: int) -> LabelledWindows:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(count, CHANNELS, WINDOW)).astype(np.float32)
    rows = np.arange(count, dtype=np.int64)
    return LabelledWindows(x, generator.integers(0, CLASSES, count), rows, np.zeros_like(rows))


def round_of(model: Classifier, options: dict[str, object]):
    """A function that runs a round and tells its seconds."""
    plan, graphs = build_plan(create_strategy("fedavg", options), model, CONTRACT, plan_id="bench")
    start = start_state(plan, {name: t.detach().numpy() for name, t in model.state_dict().items()}, {})
    data = TrainingData(windows(BATCH), windows(8))
    return lambda: run_plan(plan, graphs, start, data, round_number=1, limits=LIMITS).seconds


def main() -> None:
    print("backbone,parameters,plain_ms,noised_ms")
    for backbone in ("cnn-plain", "transformer"):
        model = build_classifier(ModelSpec(backbone, CHANNELS, WINDOW, CLASSES), 0)
        noised = {"dp": "record", "sampling_rate": 1.0, "batch_size": BATCH}
        rounds = {
            (kind, steps): round_of(model, {**options, length: steps})
            for kind, options, length in (
                ("plain", {"batch_size": BATCH}, "epochs"),
                ("noised", noised, "record_steps"),
            )
            for steps in (1, STEPS)
        }
        seconds = [{key: run() for key, run in rounds.items()} for _ in range(TIMES)]
        step = {
            kind: 1e3 * np.median([s[kind, STEPS] - s[kind, 1] for s in seconds]) / (STEPS - 1)
            for kind in ("plain", "noised")
        }
        size = sum(p.numel() for p in model.parameters())
        print(f"{backbone},{size},{step['plain']:.2f},{step['noised']:.2f}")


if __name__ == "__main__":
    main()
