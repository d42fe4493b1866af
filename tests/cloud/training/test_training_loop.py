"""The loop draws what it should, reads nothing back, and can be cut anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from no_reading import NoReading
from wearfleet_cloud.algorithms import State, build_algorithm
from wearfleet_cloud.training.loop import Resident, advance, resident
from wearfleet_cloud.training.optimisers import Adam
from wearfleet_cloud.training.sampling import draw_block, pass_steps, sampler
from wearfleet_models import ModelSpec, build_classifier
from wearfleet_protos.errors import DataError

_SIZES = (5, 9, 20)


def _data() -> Resident:
    generator = np.random.default_rng(1)
    domains = [
        (generator.standard_normal((n, 3, 40), dtype=np.float32), generator.integers(0, 4, n)) for n in _SIZES
    ]
    return resident(domains, torch.device("cpu"))


def _advance(
    steps: range, state: State | None = None, seed: int = 1
) -> tuple[State, dict[str, torch.Tensor]]:
    algorithm = build_algorithm("mixup", build_classifier(ModelSpec("cnn", 3, 40, 4, kernel=5)), Adam())
    hyper = {"lr": torch.tensor(0.01), "alpha": torch.tensor(0.2)}
    return advance(
        algorithm,
        state or algorithm.init(),
        _data(),
        hyper,
        key=torch.tensor(seed),
        steps=steps,
        batch=4,
        on_step=lambda _: None,
    )


def test_windows_lie_channels_innermost_and_come_out_as_they_went_in() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    data = resident([(x, np.array([1, 0]))], torch.device("cpu"))
    batch = data.batch(torch.tensor([[1, 0, 1]]))
    np.testing.assert_array_equal(batch.x[0].numpy(), x[[1, 0, 1]])
    assert batch.y.tolist() == [[0, 1, 0]]
    assert batch.x.stride(2) == 1


def test_every_window_of_a_domain_is_drawn_equally_often_and_no_other() -> None:
    data, draws = _data(), 40
    drawn = torch.cat(
        [draw_block(torch.tensor(7), block, 8, data.first, data.count) for block in range(draws)]
    )
    begin = 0
    for domain, size in enumerate(_SIZES):
        counts = torch.bincount(drawn[:, domain].flatten() - begin, minlength=size)
        expected = drawn[:, domain].numel() / size
        assert len(counts) == size
        assert float((counts - expected).abs().max()) < 5 * expected**0.5
        begin += size


def test_pooled_passes_see_every_window_once_and_in_another_order_each_time() -> None:
    data = _data()
    draws = sampler("pooled", torch.tensor(3), 8, first=data.first, count=data.count, sizes=data.sizes)
    steps = pass_steps("pooled", data.sizes, 8)
    assert steps == 4  # 34 windows; the last two of a pass are left out
    passes = [torch.cat([draws.at(steps * k + step)[0] for step in range(steps)]) for k in range(2)]
    assert all(len(set(seen.tolist())) == 32 and seen.max() < 34 for seen in passes)
    assert not torch.equal(passes[0], passes[1])
    again = sampler("pooled", torch.tensor(3), 8, first=data.first, count=data.count, sizes=data.sizes)
    assert torch.equal(again.at(5), draws.at(5))


def test_a_run_in_pieces_is_the_same_run() -> None:
    whole, _ = _advance(range(70))
    state = None
    for piece in (range(63), range(63, 64), range(64, 70)):
        state, _ = _advance(piece, state)
    torch.testing.assert_close(tuple(state), tuple(whole), rtol=0.0, atol=0.0)


def test_metrics_are_means_over_the_steps() -> None:
    state, losses = None, []
    for number in range(4):
        state, metrics = _advance(range(number, number + 1), state)
        losses.append(float(metrics["loss"]))
    assert losses[0] != pytest.approx(losses[1])
    assert float(_advance(range(4))[1]["loss"]) == pytest.approx(sum(losses) / 4.0)


def test_another_key_is_another_run() -> None:
    first, second = _advance(range(3))[0], _advance(range(3), seed=2)[0]
    assert not torch.equal(first.params["head.weight"], second.params["head.weight"])


def test_no_step_reads_a_value_back() -> None:
    with NoReading():
        _advance(range(2))


def test_the_reading_detector_detects() -> None:
    with NoReading(), pytest.raises(AssertionError, match="reads a value back"):
        float(torch.zeros(1) + 1)


def test_a_domain_without_windows_is_refused() -> None:
    empty = (np.zeros((0, 3, 40), np.float32), np.zeros(0, np.int64))
    full = (np.zeros((2, 3, 40), np.float32), np.zeros(2, np.int64))
    with pytest.raises(DataError, match="every source domain needs training windows"):
        resident([full, empty], torch.device("cpu"))
    with pytest.raises(DataError, match="no domain"):
        resident([], torch.device("cpu"))
