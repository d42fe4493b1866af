"""Layers whose training pass is pure and can become an ONNX graph.

They behave as torch's own layers, but: running statistics are assigned, never changed in place, so that under
``torch.func.functional_call`` the new ones appear in the dictionary of tensors that was passed; windows
carry a weight, so that a short batch can be padded; random masks come from a key, not from a global
generator.

On a CPU the convolution, the normalisation and the pool are a fifth faster when the channels of a sample
lie side by side in memory. Nothing but memory order tells the layers so: they keep the order of the windows
they are given.
"""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn
from wearfleet_protos.errors import ConfigError

from wearfleet_models import randomness

__all__ = ["BatchNorm", "Conv", "Dropout", "MaxPool", "Standardise", "domains_apart"]

_Network = TypeVar("_Network", bound=nn.Module)


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over windows and, where there is one, time, with optional window weights.

    Source:
        Ioffe and Szegedy 2015, arXiv:1502.03167; running variance unbiased, as in torch.
    Differs:
        The mean and variance of a batch weigh each window; a window of weight 0 has no influence on anything.
        A batch of weight 0 altogether leaves the running statistics as they are. A batch may hold the windows of
        ``domains`` domains, one after the other and equally many of each: each is then normalised by its own mean
        and variance, and the running statistics see the domains in turn.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        self.domains = 1
        self._rate = momentum

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Normalise every channel.

        Args:
            x: (B, C, T) or (B, C) float.
            weight: (B,) weight of each window, None for all ones; ignored in evaluation.

        Returns:
            The shape of ``x``.
        """
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if x.ndim == 2:
            return self.forward(x.unsqueeze(2), weight).squeeze(2)
        if self.domains == 1:
            return self._plain(x) if weight is None else self._weighted(x, weight)
        parts = x.reshape(self.domains, -1, *x.shape[1:]).unbind(0)
        if weight is None:
            return _one_after_the_other([self._plain(part) for part in parts])
        weights = weight.reshape(self.domains, -1).unbind(0)
        return _one_after_the_other([self._weighted(*both) for both in zip(parts, weights, strict=True)])

    def _plain(self, x: Tensor) -> Tensor:
        normalised, mean, inverse_std = torch.native_batch_norm(
            x.unsqueeze(2), self.weight, self.bias, None, None, True, 0.0, self.eps
        )
        mean, inverse_std = mean.detach(), inverse_std.detach()
        count = x.shape[0] * x.shape[2]
        unbiased = (inverse_std**-2.0 - self.eps) * (count / max(count - 1, 1))
        self._track(mean, unbiased, self._rate)
        return normalised.squeeze(2)

    def _weighted(self, x: Tensor, weight: Tensor) -> Tensor:
        total = weight.sum()
        share = (weight / torch.clamp(total, min=1e-12))[:, None]
        mean = (x.mean(dim=2) * share).sum(dim=0)
        centred = x - mean[:, None]
        variance = ((centred * centred).mean(dim=2) * share).sum(dim=0)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        count = total * x.shape[2]
        unbiased = variance.detach() * (count / torch.clamp(count - 1.0, min=1.0))
        self._track(mean.detach(), unbiased, self._rate * (total > 0).to(x.dtype))
        return centred * scale[:, None] + self.bias[:, None]

    def see(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Let the running statistics see the domains of a batch in turn.

        Args:
            mean: (D, C) of each domain.
            variance: (D, C), biased.
            count: numbers of which each was made.
        """
        for own, spread in zip(mean.unbind(0), variance.unbind(0), strict=True):
            self._track(own, spread * (count / max(count - 1, 1)), self._rate)

    def _track(self, mean: Tensor, variance: Tensor, rate: float | Tensor) -> None:
        self.running_mean = self.running_mean + rate * (mean - self.running_mean)
        self.running_var = self.running_var + rate * (variance - self.running_var)
        self.num_batches_tracked = self.num_batches_tracked + 1


class Conv(nn.Conv1d):
    """One-dimensional convolution, no padding, that keeps the memory order of its input.

    Under ``torch.func.vmap`` S kernels on S inputs become one convolution of S groups, (B, S C, T) with
    (S O, C, k), and so does the backward pass; S kernels on one shared input become an ordinary convolution of
    S O filters, and only the gradient for the input is grouped. ``tests/benchmarks/bench_stacked_conv.py``
    compares the grouped form with patches and a batched matrix product: on a CPU that product takes 1.5 to 11
    times as long.
    """

    def __init__(self, channels: int, filters: int, kernel: int) -> None:
        super().__init__(channels, filters, kernel)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        """(B, C, T) -> (B, filters, T - kernel + 1)."""
        if not _channels_innermost(input):
            return F.conv1d(input, self.weight, self.bias)
        return F.conv2d(input.unsqueeze(2), self.weight.unsqueeze(2), self.bias).squeeze(2)


class MaxPool(nn.Module):
    """Maximum over neighbouring samples; the incomplete last group is dropped.

    Training picks, member by member of the groups, the larger value by multiplying with a 0/1 choice: its
    gradient is another multiplication, needs no index tensor and no scatter, and is twice as fast as torch's
    pooling. Evaluation is the ordinary operator, which exports as one node. Values and gradients of both are
    equal (on a tie the first member gets the gradient).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T // size)."""
        if not self.training:
            return F.max_pool1d(x, self.size)
        largest, *others = self._members(x)
        for other in others:
            keep = (largest.detach() >= other.detach()).to(x.dtype)
            largest = torch.lerp(other, largest, keep)
        return largest

    def _members(self, x: Tensor) -> tuple[Tensor, ...]:
        """First, second, ... sample of every group: each (B, C, T // size)."""
        batch, channels, length = x.shape
        groups = length // self.size
        x = x if groups * self.size == length else x[:, :, : groups * self.size]
        if not _channels_innermost(x):
            return x.reshape(batch, channels, groups, self.size).unbind(3)
        split = x.transpose(1, 2).reshape(batch, groups, self.size, channels)
        return tuple(member.transpose(1, 2) for member in split.unbind(2))


class Dropout(nn.Module):
    """Sets a share ``p`` of the numbers to zero and scales the rest by 1 / (1 - p).

    The mask is a function of (key, salt, position); every layer of a model has its own salt. Without a key,
    in evaluation, or with p = 0 it is the identity. Of a batch of ``domains`` domains, one after the other, each has
    a key of its own.

    Raises:
        ConfigError: p is not in [0, 1).
    """

    def __init__(self, p: float, salt: int) -> None:
        super().__init__()
        self.domains = 1
        if not 0.0 <= p < 1.0:
            raise ConfigError(f"dropout must be at least 0 and below 1, got {p}")
        self.p = p
        self.salt = salt

    def forward(self, x: Tensor, rng: Tensor | None = None) -> Tensor:
        """Any shape -> the same shape; ``rng`` is a () int64 key, (domains,) where there are several."""
        if not self.training or rng is None or self.p == 0.0:
            return x
        if self.domains == 1:
            drawn = randomness.uniform(rng, self.salt, tuple(x.shape))
        else:
            shape = (x.shape[0] // self.domains, *x.shape[1:])
            drawn = torch.cat([randomness.uniform(key, self.salt, shape) for key in rng.unbind(0)])
        return x * ((drawn >= self.p).to(x.dtype) * (1.0 / (1.0 - self.p)))


class Standardise(nn.Module):
    """Channel-wise (x - mean) / std with the statistics of the training data, in raw units."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) raw units -> (B, C, T) dimensionless."""
        if not _channels_innermost(x):
            return (x - self.mean[:, None]) / self.std[:, None]
        # a row as long as the window, or torch would go over a few channels at a time: a third of the time
        flat = x.transpose(1, 2).flatten(1)
        flat = (flat - self.mean.repeat(x.shape[2])) / self.std.repeat(x.shape[2])
        return flat.reshape(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)


def domains_apart(model: _Network, domains: int) -> _Network:
    """A twin of a network for batches of several domains, one after the other, that normalises each by itself.

    Args:
        model: stays as it is; the twin holds the same tensors.
        domains: D; the twin takes (D B, ...) windows and (D,) keys of the dropout masks.
    """
    twin = copy.copy(model)
    for own in ("_parameters", "_buffers"):
        setattr(twin, own, dict(getattr(model, own)))
    parts = model._modules.items()  # noqa: SLF001 - torch copies modules only together with their tensors
    twin._modules = {name: part and domains_apart(part, domains) for name, part in parts}  # noqa: SLF001 - as above
    if isinstance(twin, (BatchNorm, Dropout)):
        twin.domains = domains
    return twin


def _one_after_the_other(parts: Sequence[Tensor]) -> Tensor:
    """Parts (B, C, T) as one batch, in the memory order of the parts."""
    if not _channels_innermost(parts[0]):
        return torch.cat(tuple(parts))
    return torch.cat([part.transpose(1, 2) for part in parts]).transpose(1, 2)


def _channels_innermost(x: Tensor) -> bool:
    """Whether (B, C, T) lies in memory as (B, T, C)."""
    return x.stride(1) == 1
