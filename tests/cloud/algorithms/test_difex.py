"""DIFEX: phases, the teacher of them, its loss by loops in float64, and the defects that strict mode keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import CLASSES, DOMAINS, batch, build, data, hyper, started, step
from torch import Tensor
from wearfleet_cloud.algorithms import network_of
from wearfleet_cloud.algorithms.base import Batch, State
from wearfleet_cloud.algorithms.difex import TEACHER, Difex, exploration, phases, teacher_rate
from wearfleet_cloud.kernels.coral import coral_penalty_reference
from wearfleet_cloud.training.loop import Resident
from wearfleet_cloud.training.optimisers import Adam, Sgd
from wearfleet_models import ModelSpec, build_classifier
from wearfleet_protos.errors import ConfigError

DISTANCES = ["2-norm", "norm-2-norm", "norm-1-norm", "cos"]


def _difex(distance: str = "2-norm", mode: str = "corrected", optimiser: Sgd | Adam | None = None) -> Difex:
    given = {"distance": distance, "mode": mode}
    changed = {name: value for name, value in given.items() if value != Difex.info.options[name][0]}
    algorithm = build("difex", optimiser or Sgd(), changed)
    assert isinstance(algorithm, Difex)
    return algorithm


@pytest.mark.parametrize("samples", [1, 2, 7, 8, 125, 128])
def test_phases_are_those_of_the_whole_complex_transform(samples: int) -> None:
    x = torch.randn(3, 2, samples, dtype=torch.float64, generator=torch.Generator().manual_seed(samples))
    expected = np.angle(np.fft.fft(x.numpy(), axis=-1))
    for found in (phases(x), phases(x, 0.0)):
        turned = (found.numpy() - expected + math.pi) % (2 * math.pi) - math.pi  # pi and -pi are one phase
        assert np.abs(turned).max() < 1e-9


def test_frequencies_that_are_not_there_have_no_phase_but_in_strict_mode() -> None:
    """P32: a pure tone of phase 1 in bin 3; all other bins hold rounding noise."""
    time = torch.arange(64) / 64
    tone = torch.cos(2 * math.pi * 3 * time + 1.0)
    quiet, noisy = phases(tone), phases(tone, 0.0)
    expected = torch.zeros(64)
    expected[3], expected[61] = 1.0, -1.0
    torch.testing.assert_close(quiet, expected, rtol=1e-5, atol=1e-5)
    assert float((noisy - expected).abs().max()) > 0.5
    assert torch.equal(phases(torch.zeros(2, 5)), torch.zeros(2, 5))


def test_the_rate_of_the_teacher_falls_twice() -> None:
    rates = [teacher_rate(number, 10) for number in range(10)]
    assert rates == pytest.approx([1.0] * 7 + [0.1] * 2 + [0.01])


@dataclass(frozen=True)
class _Recorder:
    """An optimiser that keeps parameters as they are and notes the learning rates it was asked for."""

    rates: list[float]

    def init(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def update(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        slots: Mapping[str, Tensor],
        lr: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.rates.append(float(lr))
        return dict(params), dict(slots)


def test_the_teacher_is_trained_for_its_steps_at_the_falling_rate() -> None:
    recorder = _Recorder([])
    algorithm = build("difex", recorder)
    given = hyper(algorithm, teacher_steps=10.0, lr=0.5)
    algorithm.refresh(algorithm.init(), data(), given, torch.tensor(3))
    assert recorder.rates == pytest.approx([0.5] * 7 + [0.05] * 2 + [0.005])


def _tones(seed: int) -> Resident:
    """Windows whose class is the phase of a tone alone, a quarter turn a class; the domain is its strength."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(96) % CLASSES
    domain = torch.arange(DOMAINS).repeat_interleave(32)
    time = torch.arange(40)
    tone = torch.cos(2 * math.pi * (4 * time / 40 + y[:, None] / CLASSES))
    x = (1.0 + domain[:, None]) * tone + 0.1 * torch.randn(96, 40, generator=generator)
    count = torch.full((DOMAINS,), 32)
    return Resident(x[:, :, None].repeat(1, 1, 3), y, domain, count.cumsum(0) - count, count, (32,) * 3)


def test_the_teacher_learns_classes_that_differ_in_phase() -> None:
    algorithm = _difex(optimiser=Adam())
    given = hyper(algorithm, teacher_steps=80.0, lr=0.01)
    windows = _tones(1)
    said = algorithm.refresh(algorithm.init(), windows, given, torch.tensor(3)).buffers[TEACHER]
    assert said.shape == (96, algorithm.model.head.in_features // 2)
    assert not said.requires_grad
    means = torch.stack([said[windows.y == k].mean(0) for k in range(CLASSES)])
    nearest = torch.cdist(said, means).argmin(1)
    assert float((nearest == windows.y).float().mean()) > 0.9  # of chance, 1 / 4


def test_the_teacher_depends_on_the_key_and_on_nothing_else() -> None:
    algorithm = _difex()
    given = hyper(algorithm)
    one, again, other = (
        algorithm.refresh(algorithm.init(), data(), given, torch.tensor(key)).buffers[TEACHER]
        for key in (3, 3, 4)
    )
    torch.testing.assert_close(one, again, rtol=0.0, atol=0.0)
    assert not torch.equal(one, other)
    assert algorithm.refresh_at(0, 4)
    assert not algorithm.refresh_at(4, 4)


def _said(windows: Resident, *, mode: str = "corrected", mean: float = 0.0, std: float = 1.0) -> Tensor:
    """What an untrained teacher says of windows, by a network that standardises by ``mean`` and ``std``."""
    algorithm = _difex(mode=mode)
    algorithm.model.standardise.mean.fill_(mean)
    algorithm.model.standardise.std.fill_(std)
    given = hyper(algorithm, teacher_steps=0.0)
    return algorithm.refresh(algorithm.init(), windows, given, torch.tensor(3)).buffers[TEACHER]


def _only(windows: Resident, part: slice) -> Resident:
    """A third of the windows, of one domain."""
    x, y, domain = (t[part] for t in (windows.x, windows.y, windows.domain))
    count = torch.tensor([len(y)])
    return Resident(x, y, domain * 0, count - count, count, (len(y),))


def test_the_teacher_hears_standardised_windows() -> None:
    """Otherwise the phase at frequency 0 would depend on the sensor's units."""
    windows = data()
    raw = replace(windows, x=4.0 * windows.x + 16.0)
    torch.testing.assert_close(_said(raw, mean=16.0, std=4.0), _said(windows), rtol=1e-3, atol=1e-3)
    assert float((_said(raw) - _said(windows)).abs().max()) > 0.01


def test_what_the_teacher_says_of_a_window_does_not_depend_on_the_others() -> None:
    windows = data()
    part = slice(24, 48)
    torch.testing.assert_close(_said(_only(windows, part)), _said(windows)[part], rtol=1e-5, atol=1e-6)


def test_strict_mode_differs_where_frequencies_are_missing_only() -> None:
    full, time = data(), torch.arange(40) / 40
    tones = torch.cos(2 * math.pi * 3 * time + torch.arange(72)[:, None])[:, :, None].expand(-1, -1, 3)
    torch.testing.assert_close(_said(full, mode="strict"), _said(full), rtol=1e-3, atol=1e-3)
    missing = replace(full, x=tones)
    assert float((_said(missing, mode="strict") - _said(missing)).abs().max()) > 0.01


def _exploration_by_loops(first: Tensor, second: Tensor, distance: str) -> Tensor:
    rows = []
    for a, b in zip(first, second, strict=True):
        lengths = a.square().sum().sqrt(), b.square().sum().sqrt()
        if distance == "cos":
            rows.append((a * b).sum() / (lengths[0] * lengths[1]))
            continue
        if distance != "2-norm":
            a, b = a / lengths[0], b / lengths[1]  # noqa: PLW2901 - the equation says so
        entries = [
            abs(u - v) if distance == "norm-1-norm" else (u - v) ** 2 for u, v in zip(a, b, strict=True)
        ]
        rows.append(-torch.stack(entries).mean())
    return torch.stack(rows)


@pytest.mark.parametrize("distance", DISTANCES)
def test_exploration_is_lower_the_more_the_halves_differ(distance: str) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 6, dtype=torch.float64, generator=generator)
    found = exploration(first, second, distance)
    torch.testing.assert_close(found, _exploration_by_loops(first, second, distance), rtol=1e-10, atol=1e-12)
    assert bool((exploration(first, first, distance) > found).all())
    if distance != "2-norm":  # of directions only
        scaled = exploration(3.0 * first, second, distance)
        torch.testing.assert_close(scaled, found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["corrected", "strict"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_loss_and_gradient_are_those_of_the_equations(distance: str, mode: str) -> None:
    algorithm = _difex(distance, mode)
    state, given = started(algorithm), batch(algorithm)
    assert given.number is not None
    twin = build_classifier(algorithm.model.spec, 0).double().train()
    z = twin.features(given.x.double().flatten(0, 1))
    first, second = z[:, :4], z[:, 4:]
    said = torch.stack([state.buffers[TEACHER][int(n)] for n in given.number.flatten()]).double()
    loss = F.cross_entropy(twin.head(z), given.y.flatten())
    loss = loss + 0.7 * (first - said).square().mean()
    loss = loss + 0.2 * _exploration_by_loops(first, second, distance).mean()
    loss = loss + 0.4 * coral_penalty_reference(second.reshape(DOMAINS, -1, 4))
    slopes = torch.autograd.grad(loss, tuple(twin.parameters()))
    after, metrics = step(algorithm, state, given, 1, alpha=0.7, beta=0.2, lam=0.4, lr=1.0)
    torch.testing.assert_close(metrics["loss"].double(), loss.detach(), rtol=1e-5, atol=1e-6)
    for (name, slope), before in zip(
        zip(dict(twin.named_parameters()), slopes, strict=True), state.params.values(), strict=True
    ):
        expected = torch.zeros_like(slope) if mode == "strict" and name.startswith("neck.") else slope
        torch.testing.assert_close((before - after.params[name]).double(), expected, rtol=2e-3, atol=2e-5)


def test_strict_mode_never_trains_the_bottleneck() -> None:
    """P2: nor does weight decay touch it, but its running statistics move."""
    algorithm = _difex(mode="strict", optimiser=Adam(weight_decay=0.1))
    state = started(algorithm)
    after, _ = step(algorithm, state, batch(algorithm), 1)
    still = {n for n, p in state.params.items() if torch.equal(p, after.params[n])}
    assert still == {n for n in state.params if n.startswith("neck.")}
    assert not torch.equal(*(s.buffers["neck.norm.running_mean"] for s in (state, after)))


def test_the_order_of_the_domains_does_not_change_the_loss() -> None:
    algorithm = _difex()
    state, given, order = started(algorithm), batch(algorithm), torch.tensor([2, 0, 1])
    assert given.number is not None
    turned = Batch(given.x[order], given.y[order], None, given.number[order])
    one, other = step(algorithm, state, given), step(algorithm, state, turned)
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one[0].params, other[0].params, rtol=1e-4, atol=1e-5)


def test_padding_does_not_matter() -> None:
    algorithm = _difex("norm-2-norm")
    state, short = started(algorithm), batch(algorithm, windows=4)
    assert short.number is not None
    padded = Batch(
        torch.cat([short.x, torch.full((3, 2, 3, 40), 9.0)], 1),
        torch.cat([short.y, torch.zeros(3, 2, dtype=torch.int64)], 1),
        torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]).expand(3, 6),
        torch.cat([short.number, torch.zeros(3, 2, dtype=torch.int64)], 1),
    )
    one, other = step(algorithm, state, padded), step(algorithm, state, short)
    torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one[0].params, other[0].params, rtol=1e-3, atol=1e-4)


def _alignment(algorithm: Difex, state: State, given: Batch) -> float:
    return float(step(algorithm, state, given)[1]["alignment"])


def test_one_domain_is_aligned_as_two_halves_of_its_batch() -> None:
    algorithm = build("difex", Sgd(), domains=1)
    assert isinstance(algorithm, Difex)
    state, given = algorithm.init(), batch(algorithm, domains=1)
    assert given.number is not None
    said = algorithm.refresh(state, data(domains=1), hyper(algorithm), torch.tensor(3))
    assert _alignment(algorithm, said, given) > 0.0
    mirrored = Batch(*(t[:, [0, 1, 0, 1]] for t in given[:2]), None, given.number[:, :4])
    assert _alignment(algorithm, said, mirrored) < 1e-12


def test_what_cannot_be_done_is_named() -> None:
    algorithm = _difex()
    given = batch(algorithm)
    with pytest.raises(ConfigError, match="numbers of its windows"):
        step(algorithm, started(algorithm), Batch(given.x, given.y))
    with pytest.raises(ConfigError, match="even, got 7"):
        network_of("difex", ModelSpec("cnn", 3, 40, CLASSES, neck_width=7), DOMAINS)
    with pytest.raises(ConfigError, match="distance of difex must be 2-norm or"):
        Difex(algorithm.model, algorithm.optimiser, DOMAINS, "3-norm")
