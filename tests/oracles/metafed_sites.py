"""A ring of federations in plain torch: modules, loops and if-statements; each site averages over its own devices."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from oracles.torch_clients import batches_of
from wearfleet_models.classifier import Classifier
from wearfleet_protos.windowing import LabelledWindows

NORMS = ("norm1", "norm2")
Devices = Mapping[str, LabelledWindows]


@dataclass
class Site:
    """A site: its model, whether that was good enough, and the training windows of its devices by name."""

    model: Classifier
    devices: Devices
    good: bool = False


@dataclass
class SiteRing:
    """Turns of sites as specs/federated.md section 6 tells them, with SGD.

    ``seed(n)`` is of the shuffles in round n of the ring; a turn's rounds of training have the numbers 2, 3, ...
    """

    sites: Mapping[str, Site]
    threshold: float
    personal_threshold: float
    strength: float
    share_norm: bool
    passes: int
    rate: float
    batch: int
    seed: Callable[[int], int]
    taught: list[tuple[int, str, str]] = field(default_factory=list)

    def turn(self, number: int, name: str, teacher: Classifier | None, stage: int) -> Classifier:
        """One site's turn in round ``number``; returns a copy of its model. ``taught`` notes what became of it."""
        site = self.sites[name]
        weight, what = 0.0, "alone"
        if teacher is not None and stage:
            what = "distilled" if site.good else "took over"
            if site.good:
                own, theirs = self._accuracy(site, site.model), self._accuracy(site, teacher)
                weight = self.strength if stage == 1 else self._rate(own, theirs)
            else:
                self._take_over(site.model, teacher)
        self.taught.append((number, name, what))
        for step in range(self.passes):
            models = []
            for windows in site.devices.values():
                model = copy.deepcopy(site.model)
                self._train(model, teacher, _fit(windows), weight, self.seed(number), step + 2)
                models.append((len(windows), model))
            _average(site.model, models)
        site.good = site.good or self._accuracy(site, site.model) > self.threshold
        return copy.deepcopy(site.model)

    def _rate(self, own: float, theirs: float) -> float:
        if theirs <= own and theirs < self.personal_threshold:
            return 0.0
        return float(self.strength * 10.0 ** min(1.0, 5.0 * (theirs - own)) / 10.0)

    def _accuracy(self, site: Site, model: Classifier) -> float:
        hits = count = 0
        for windows in site.devices.values():
            chosen = windows.select(np.arange(4, len(windows), 5))
            with torch.no_grad():
                said = model.eval()(torch.from_numpy(chosen.x)).argmax(dim=1).numpy()
            hits, count = hits + int((said == chosen.y).sum()), count + len(chosen)
        return hits / count

    def _take_over(self, model: Classifier, teacher: Classifier) -> None:
        own = model.state_dict()
        for name, tensor in teacher.state_dict().items():
            norm = any(part in name for part in NORMS)
            if "num_batches_tracked" not in name and (self.share_norm or not norm):
                own[name].copy_(tensor)

    def _train(
        self,
        model: Classifier,
        teacher: Classifier | None,
        fit: LabelledWindows,
        weight: float,
        seed: int,
        number: int,
    ) -> None:
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), lr=self.rate)
        for x, y in batches_of(fit, self.batch, 1, seed=seed, round_number=number):
            optimiser.zero_grad()
            features = model.features(x)
            loss = F.cross_entropy(model.head(features), y)
            if weight:
                assert teacher is not None
                with torch.no_grad():
                    theirs = teacher.eval().features(x)
                loss = loss + weight * F.mse_loss(features, theirs)
            loss.backward()
            optimiser.step()


def _fit(windows: LabelledWindows) -> LabelledWindows:
    return windows.select(np.asarray([row for row in range(len(windows)) if row % 5 != 4]))


def _average(into: Classifier, models: list[tuple[int, Classifier]]) -> None:
    """By windows; variances as those of the mixture."""
    total = sum(count for count, _ in models)
    states = [(count / total, model.state_dict()) for count, model in models]
    own = into.state_dict()
    for name, tensor in own.items():
        if not tensor.is_floating_point():
            continue
        mean = sum(share * state[name].double() for share, state in states)
        if name.endswith("running_var"):
            middle = name.replace("running_var", "running_mean")
            centre = sum(share * state[middle].double() for share, state in states)
            mean = mean + sum(share * (state[middle].double() - centre) ** 2 for share, state in states)
        tensor.copy_(mean)
