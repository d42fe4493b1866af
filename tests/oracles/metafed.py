"""MetaFed in plain torch: modules, loops and if-statements, for a small ring."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from oracles.torch_clients import batches_of
from wearfleet_models.classifier import Classifier
from wearfleet_protos.windowing import LabelledWindows

Norms = ("norm1", "norm2")


@dataclass
class Member:
    """A client: its model and whether it was good enough."""

    model: Classifier
    good: bool = False


def hits(model: Classifier, windows: LabelledWindows) -> float:
    """Share of the windows that the model recognises."""
    with torch.no_grad():
        said = model.eval()(torch.from_numpy(windows.x)).argmax(dim=1).numpy()
    return float((said == windows.y).mean())


@dataclass
class Ring:
    """Rounds of MetaFed as specs/federated.md section 6 tells them, with SGD."""

    members: Mapping[str, Member]
    windows: Mapping[str, LabelledWindows]
    threshold: float
    personal_threshold: float
    strength: float
    share_norm: bool
    rate: float
    batch: int
    seed: int
    number: int = 0

    def warm(self) -> None:
        """Everybody alone."""
        self.number += 1
        for name in self.members:
            self._turn(name, None, personal=False)

    def turn(self, name: str, teacher: Classifier | None) -> Classifier:
        """One client with its predecessor's model; returns a copy of its own."""
        self.number += 1
        self._turn(name, teacher, personal=False)
        return copy.deepcopy(self.members[name].model)

    def personal(self, teacher: Classifier) -> None:
        """Everybody with the last model."""
        self.number += 1
        for name in self.members:
            self._turn(name, teacher, personal=True)

    def _turn(self, name: str, teacher: Classifier | None, *, personal: bool) -> None:
        member, windows = self.members[name], self.windows[name]
        rows = list(range(len(windows)))
        select = windows.select([r for r in rows if r % 5 == 4])  # type: ignore[arg-type]
        fit = windows.select([r for r in rows if r % 5 != 4])  # type: ignore[arg-type]
        weight = 0.0
        if teacher is not None:
            if member.good:
                weight = self._weight(hits(member.model, select), hits(teacher, select), personal=personal)
            else:
                self._take_over(member.model, teacher)
        self._train(member.model, teacher, fit, weight)
        member.good = member.good or hits(member.model, select) > self.threshold

    def _weight(self, own: float, theirs: float, *, personal: bool) -> float:
        if not personal:
            return self.strength
        if theirs <= own and theirs < self.personal_threshold:
            return 0.0
        return float(self.strength * 10.0 ** min(1.0, 5.0 * (theirs - own)) / 10.0)

    def _take_over(self, model: Classifier, teacher: Classifier) -> None:
        own = model.state_dict()
        for name, tensor in teacher.state_dict().items():
            norm = any(part in name for part in Norms)
            if "num_batches_tracked" not in name and (self.share_norm or not norm):
                own[name].copy_(tensor)

    def _train(
        self, model: Classifier, teacher: Classifier | None, fit: LabelledWindows, weight: float
    ) -> None:
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), lr=self.rate)
        for x, y in batches_of(fit, self.batch, 1, seed=self.seed, round_number=self.number):
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


def ring_of(model: Classifier, names: Sequence[str]) -> dict[str, Member]:
    """All begin with the same model."""
    return {name: Member(copy.deepcopy(model)) for name in names}
