"""Clients of federated algorithms in plain torch: a module, its ``grad`` fields, and loops over batches."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from wearfleet_models.classifier import Classifier
from wearfleet_protos.batching import batches
from wearfleet_protos.plan import Loop
from wearfleet_protos.windowing import LabelledWindows

Arrays = dict[str, np.ndarray]
Batch = tuple[torch.Tensor, torch.Tensor]


def loaded(network: Classifier, tensors: Arrays) -> Classifier:
    """A network with these tensors (others in ``tensors`` are ignored)."""
    names = network.state_dict().keys()
    network.load_state_dict({name: torch.from_numpy(np.array(tensors[name])) for name in names})
    return network


def batches_of(
    windows: LabelledWindows, size: int, epochs: int, *, seed: int, round_number: int, most: int = 0
) -> Iterator[Batch]:
    """The batches of local epochs, the last one short instead of padded."""
    loop = Loop("train", size, epochs, most, shuffle=True)
    for rows in batches(loop, seed, round_number, len(windows.y)):
        yield torch.from_numpy(windows.x[rows]), torch.from_numpy(windows.y[rows])


def gradients(network: Classifier, batch: Batch) -> dict[str, torch.Tensor]:
    """Of the mean cross-entropy, by name; the network's mode says whether its statistics move."""
    network.zero_grad()
    F.cross_entropy(network(batch[0]), batch[1]).backward()
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def descend(network: Classifier, rate: float, direction: dict[str, torch.Tensor]) -> None:
    """Every named parameter moves against its direction."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in direction:
                parameter.sub_(rate * direction[name])


def epochs_of_sgd(
    network: Classifier, parts: Iterable[Batch], rate: float, momentum: float, names: Iterable[str]
) -> None:
    """SGD on some parameters only."""
    chosen = [p for n, p in network.named_parameters() if n in set(names)]
    optimiser = torch.optim.SGD(chosen, lr=rate, momentum=momentum)
    for x, y in parts:
        optimiser.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimiser.step()
