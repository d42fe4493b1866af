"""The training step on a CUDA device: the same numbers as on the CPU, and nothing read back between evaluations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from wearfleet_cloud.algorithms import ALGORITHMS, build_algorithm, network_of
from wearfleet_cloud.training.loop import advance, resident
from wearfleet_cloud.training.optimisers import Adam
from wearfleet_models import ModelSpec, build_classifier

pytestmark = pytest.mark.gpu

STEPS, LR = 20, 1e-3
SHORT = {"teacher_steps": 2.0}  # hyper-parameters that would make twenty steps a long run


@pytest.fixture(autouse=True)
def exact_arithmetic() -> Iterator[None]:
    """Full float32 products, so that CPU and GPU differ only in the order of sums."""
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _run(name: str, backbone: str, device: str, *, guarded: bool) -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(0)
    domains = [
        (generator.normal(size=(64, 6, 128)).astype(np.float32), generator.integers(0, 6, 64))
        for _ in range(3)
    ]
    network = network_of(name, ModelSpec(backbone, 6, 128, 6), len(domains))
    model = build_classifier(network, 0).to(device)
    algorithm = build_algorithm(
        name, model, Adam(betas=(0.9, 0.999), weight_decay=1e-4), domains=len(domains)
    )
    data = resident(domains, torch.device(device))
    info = ALGORITHMS[name].info
    short = {name: value for name, value in SHORT.items() if name in info.hyper}
    values = {**info.hyper, **short, "lr": LR}
    hyper = {key: torch.tensor(float(value), device=device) for key, value in values.items()}
    state = algorithm.init()
    settings = {"key": torch.tensor(5, device=device), "batch": 16, "on_step": lambda _: None}
    if guarded:
        state, _ = advance(
            algorithm, state, data, hyper, steps=range(1), **settings
        )  # libraries start up here
        torch.cuda.set_sync_debug_mode("error")
    try:
        state, _ = advance(algorithm, state, data, hyper, steps=range(1 if guarded else 0, STEPS), **settings)
    finally:
        if guarded:
            torch.cuda.set_sync_debug_mode("default")
    return {key: value.cpu() for key, value in state.params.items()}


@pytest.mark.parametrize("backbone", ["cnn", "transformer"])
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_twenty_steps_on_the_gpu_agree_with_the_cpu(name: str, backbone: str) -> None:
    cpu, gpu = _run(name, backbone, "cpu", guarded=False), _run(name, backbone, "cuda", guarded=False)
    for key, value in cpu.items():
        # Adam moves a weight by at most lr a step, and by about that in whatever direction the sign of a tiny
        # gradient has, so rounding can part two runs by a few steps where a gradient is near zero, never by more;
        # half of the weights by less than one of twenty steps.
        assert (gpu[key] - value).abs().max() <= 2 * STEPS * LR
        assert (gpu[key] - value).abs().median() <= LR


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_no_step_waits_for_the_host(name: str) -> None:
    _run(name, "cnn", "cuda", guarded=True)
