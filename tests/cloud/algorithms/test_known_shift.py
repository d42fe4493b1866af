"""T16 of specs/ood.md: methods beside ERM on a shift that is known. A guard against regressions, not a claim.

Every seed makes data, network and draws of its own; a method and ERM share all three, so what is judged is the mean of
their differences on the target over four seeds. In 200 steps on 5 400 windows with noise 2 nobody learns the windows by
heart (0.86 of the sources are right): with fewer windows all risks vanish, and with them what VREx and GroupDRO see.
ERM follows the spurious channel and gets 0.26 of the target, less than the third that guessing gets. A method that
learns nothing would pass as better, so accuracy on the sources must be kept too.

``_CASES`` holds mean and standard deviation s of the difference over seeds 0 to 5, as measured. Asserted: GroupDRO,
which is 0.03 above ERM, is above it; the others are not further below it than 3 s / sqrt(4), three deviations of a mean
of four, or 0.01 if that is more, the deviation of one share of 1 800 windows.

Not asserted, because it is not so: that CORAL and DANN win. They make the domains' features alike, and the spurious
channel is alike in all domains as long as nobody asks for the class, so that they lean on it more: CORAL at weight 1 is
0.025 (s = 0.016) below ERM, DANN at 0.1 is 0.023 (0.015). They are judged at weights that leave them beside ERM.
"""

from __future__ import annotations

from functools import cache
from statistics import fmean

import numpy as np
import pytest
import torch
from shifted_sinusoids import CHANNELS, FREQUENCIES_HZ, ShiftedDomain, shifted_sinusoids
from torch.func import functional_call
from wearfleet_cloud.algorithms import build_algorithm
from wearfleet_cloud.data.standardisation import standardisation_of
from wearfleet_cloud.training.loop import advance, resident
from wearfleet_cloud.training.optimisers import Adam
from wearfleet_models import ModelSpec, build_classifier

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # six seconds of a processor each

_SEEDS = range(4)
_LENGTH, _STEPS = 64, 200
_CASES = {
    "group-dro": ({"eta": 0.1}, 0.030, 0.030),
    "vrex": ({"lam": 1.0, "anneal_steps": 0.0}, 0.001, 0.012),
    "coral": ({"gamma": 0.1}, -0.002, 0.011),
    "dann": ({"alpha": 0.01}, -0.001, 0.003),
}
"""Method -> hyper-parameters, mean and standard deviation of its difference to ERM over six seeds."""
_PLANTED = {
    "group-dro": {"eta": -1.0},
    "vrex": {"lam": -3.0},
    "coral": {"gamma": 30.0},
    "dann": {"alpha": 1.0},
}
"""Faults: a sign turned round; a weight out of proportion."""


@cache
def _domains(seed: int) -> tuple[ShiftedDomain, ...]:
    return shifted_sinusoids(windows=600, length=_LENGTH, noise=2.0, seed=seed)


@cache
def _accuracies(method: str, seed: int, **hyper: float) -> tuple[float, float]:
    """Shares of the target's and of the sources' windows that are recognised after training on the sources."""
    *sources, target = _domains(seed)
    model = build_classifier(ModelSpec("cnn", CHANNELS, _LENGTH, len(FREQUENCIES_HZ)), seed)
    mean, std = standardisation_of(np.concatenate([domain.x for domain in sources]))
    model.standardise.mean.copy_(torch.from_numpy(mean))
    model.standardise.std.copy_(torch.from_numpy(std))
    algorithm = build_algorithm(method, model, Adam(weight_decay=1e-4), domains=len(sources))
    state, _ = advance(
        algorithm,
        algorithm.init(seed),
        resident([(domain.x, domain.y) for domain in sources], torch.device("cpu")),
        {n: torch.tensor(float(v)) for n, v in {"lr": 1e-3, **algorithm.info.hyper, **hyper}.items()},
        key=torch.tensor(seed),
        steps=range(_STEPS),
        batch=32,
        on_step=lambda _: None,
    )
    shares = []
    for domains in ([target], sources):
        x, y = (np.concatenate([getattr(domain, part) for domain in domains]) for part in ("x", "y"))
        with torch.no_grad():
            logits = functional_call(model.eval(), algorithm.inference(state), (torch.from_numpy(x),))
        shares.append(float((logits.argmax(dim=1).numpy() == y).mean()))
    return shares[0], shares[1]


def _holds(method: str, hyper: dict[str, float]) -> bool:
    pairs = [(_accuracies(method, seed, **hyper), _accuracies("erm", seed)) for seed in _SEEDS]
    gain, kept = (fmean(ours[k] - erm[k] for ours, erm in pairs) for k in range(2))
    _, mean, deviation = _CASES[method]
    least = 0.0 if mean > deviation / 2 else -max(3.0 * deviation / len(_SEEDS) ** 0.5, 0.01)
    return gain > least and kept > -0.03


@pytest.mark.parametrize("method", _CASES)
def test_a_method_is_not_below_erm_on_the_target(method: str) -> None:
    assert _holds(method, _CASES[method][0])


@pytest.mark.parametrize("method", _PLANTED)
def test_the_statement_finds_a_method_that_is_broken(method: str) -> None:
    assert not _holds(method, {**_CASES[method][0], **_PLANTED[method]})
