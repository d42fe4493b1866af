"""DP-SGD as a slow loop: one backward pass a window in float64, clipped and added up by hand; and plain Poisson SGD."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from oracles.torch_clients import Arrays
from wearfleet_models.classifier import Classifier
from wearfleet_protos.windowing import LabelledWindows


def poisson_rows(count: int, rate: float, largest: int, steps: int, source) -> list[np.ndarray]:
    """The batches of every step; drawn anew when there are too many windows in one."""
    taking_part = np.arange(count)
    if count > int(largest / rate):
        taking_part = np.sort(np.argsort(source.random(count), kind="stable")[: int(largest / rate)])
    batches = []
    while len(batches) < steps:
        rows = taking_part[source.random(len(taking_part)) < rate]
        if len(rows) <= largest:
            batches.append(rows)
    return batches


def window_gradients(network: Classifier, windows: LabelledWindows, rows: np.ndarray) -> np.ndarray:
    """(len(rows), P) float64: the gradient of the cross-entropy of each window by itself, in evaluation mode."""
    found = [np.zeros((0, sum(p.numel() for p in network.parameters())))]
    for row in rows:
        network.zero_grad()
        x, y = torch.from_numpy(windows.x[[row]]), torch.from_numpy(windows.y[[row]])
        F.cross_entropy(network(x), y).backward()
        flat = torch.cat([p.grad.reshape(-1) for p in network.parameters()])
        found.append(flat.numpy().astype(np.float64)[None])
    return np.concatenate(found)


def dp_sgd(
    network: Classifier,
    windows: LabelledWindows,
    *,
    rate: float,
    clip: float,
    noise_multiplier: float,
    sampling_rate: float,
    largest: int,
    steps: int,
    source,
) -> Arrays:
    """Trained tensors. The network is used up; it draws batches first, then noise step by step."""
    network.eval()
    count = len(windows.y)
    expected = sampling_rate * min(count, int(largest / sampling_rate))
    for rows in poisson_rows(count, sampling_rate, largest, steps, source):
        gradients = window_gradients(network, windows, rows)
        total = np.zeros(gradients.shape[1])
        for gradient in gradients:
            total += gradient * min(1.0, clip / max(float(np.linalg.norm(gradient)), 1e-30))
        total += noise_multiplier * clip * source.standard_normal(len(total))
        begin = 0
        with torch.no_grad():
            for parameter in network.parameters():
                part = total[begin : begin + parameter.numel()].reshape(tuple(parameter.shape)) / expected
                parameter.sub_(rate * torch.from_numpy(part.astype(np.float32)))
                begin += parameter.numel()
    return {name: tensor.detach().numpy().copy() for name, tensor in network.state_dict().items()}


def poisson_sgd(
    network: Classifier,
    windows: LabelledWindows,
    *,
    rate: float,
    sampling_rate: float,
    largest: int,
    steps: int,
    source,
) -> Arrays:
    """Ordinary gradient descent on the same batches: one backward pass a batch, sums over the expected size."""
    network.eval()
    count = len(windows.y)
    for rows in poisson_rows(count, sampling_rate, largest, steps, source):
        source.standard_normal(sum(p.numel() for p in network.parameters()))  # a private client draws it here
        network.zero_grad()
        x, y = torch.from_numpy(windows.x[rows]), torch.from_numpy(windows.y[rows])
        (F.cross_entropy(network(x), y, reduction="sum") / (sampling_rate * count)).backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.sub_(rate * parameter.grad)
    return {name: tensor.detach().numpy().copy() for name, tensor in network.state_dict().items()}
