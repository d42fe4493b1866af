"""Forward passes of networks on given tensors."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from wearfleet_models import Classifier, randomness
from wearfleet_models.layers import domains_apart

from wearfleet_cloud.algorithms.base import Batch, Tensors

__all__ = [
    "call",
    "call_around",
    "call_part",
    "embed",
    "features_before_neck",
    "features_of_domains",
    "head",
    "pooled",
    "reverse_gradient",
]


def call(model: nn.Module, params: Tensors, buffers: Tensors, *args: object) -> tuple[Tensor, Tensors]:
    """Run the network on given tensors.

    Args:
        model: in training mode; its own tensors are not read.
        params: named parameters; those of parts are passed over.
        buffers: named buffers; not changed.
        args: of ``model.forward``.

    Returns:
        What ``model`` returns, and the buffers after the pass (those of parts as they were).
    """
    tensors = {name: t for name, t in (*params.items(), *buffers.items()) if "/" not in name}
    output: Tensor = functional_call(model, tensors, args)
    return output, {name: tensors.get(name, buffer) for name, buffer in buffers.items()}


def call_part(
    part: str, module: nn.Module, params: Tensors, buffers: Tensors, *args: object
) -> tuple[Tensor, Tensors]:
    """Run a module that only training needs, on the tensors called ``<part>/...``.

    Args:
        part: its name.
        module: its own tensors are not read.
        params: named parameters of everything.
        buffers: named buffers of everything; not changed.
        args: of ``module.forward``.

    Returns:
        What it returns, and all buffers after the pass.
    """
    prefix = f"{part}/"
    tensors = {
        name.removeprefix(prefix): t
        for name, t in (*params.items(), *buffers.items())
        if name.startswith(prefix)
    }
    output: Tensor = functional_call(module, tensors, args)
    after = {
        name: tensors[name.removeprefix(prefix)] if name.startswith(prefix) else buffer
        for name, buffer in buffers.items()
    }
    return output, after


def call_around(
    module: nn.Module, params: Tensors, buffers: Tensors, *args: object
) -> tuple[Tensor, Tensors]:
    """Run a module that uses the network its own way and holds it as its only part, ``model``.

    Args:
        module: its own tensors are not read.
        params: named parameters of the network; those of parts of training are passed over.
        buffers: named buffers; not changed.
        args: of ``module.forward``.

    Returns:
        What ``module`` returns, and the buffers after the pass.
    """
    tensors = {f"model.{name}": t for name, t in (*params.items(), *buffers.items()) if "/" not in name}
    output: Tensor = functional_call(module, tensors, args)
    return output, {name: tensors.get(f"model.{name}", buffer) for name, buffer in buffers.items()}


def pooled(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """The windows of all domains as one batch: x (D*B, C, T), y (D*B,), weight (D*B,) or None."""
    weight = None if batch.weight is None else batch.weight.flatten()
    return batch.x.flatten(0, 1), batch.y.flatten(), weight


def embed(
    model: Classifier, params: Tensors, buffers: Tensors, x: Tensor, weight: Tensor | None, rng: Tensor | None
) -> tuple[Tensor, Tensors]:
    """What the head of the network takes, in one pass over all windows together.

    Args:
        model: its mode decides between batch and running statistics.
        params: named parameters.
        buffers: named buffers; not changed.
        x: (B, C, T) raw windows.
        weight: (B,) weights or None.
        rng: () int64 key of dropout masks, None for none.

    Returns:
        (B, F), and the buffers after the pass.
    """
    return call_around(_Embedding(model), params, buffers, x, weight, rng)


def features_before_neck(
    model: Classifier, params: Tensors, buffers: Tensors, x: Tensor, weight: Tensor | None, rng: Tensor | None
) -> tuple[Tensor, Tensors]:
    """What the backbone gives to the neck, in one pass over all windows; arguments and result as for ``embed``."""
    return call_around(_Backbone(model), params, buffers, x, weight, rng)


def head(params: Tensors, features: Tensor) -> Tensor:
    """Logits (..., K) of features (..., F) by the network's linear head."""
    return features @ params["head.weight"].T + params["head.bias"]


def features_of_domains(
    model: Classifier, params: Tensors, buffers: Tensors, batch: Batch, rng: Tensor
) -> tuple[Tensor, Tensor, Tensors]:
    """As one pass a domain, each normalised by its own statistics; the running ones see the domains in turn.

    What does not look across windows is computed for all domains together.

    Args:
        model: in training mode.
        params: named parameters.
        buffers: named buffers; not changed.
        batch: (D, B) windows.
        rng: () int64 key; every domain gets a key of its own.

    Returns:
        features (D, B, F), logits (D, B, K), buffers after the passes.
    """
    domains = batch.y.shape[0]
    if domains == 1:
        key = randomness.derive(rng, 0)
    else:
        key = randomness.derive(rng, torch.arange(domains, device=rng.device))
        model = _apart(model, domains)
    x, _, weight = pooled(batch)
    features, after = embed(model, params, buffers, x, weight, key)
    together = features.reshape(domains, -1, features.shape[1])
    return together, head(params, together), after


def reverse_gradient(features: Tensor, alpha: Tensor) -> Tensor:
    """The features themselves; their gradient is multiplied by ``-alpha``.

    Source: Ganin et al. 2016, arXiv:1505.07818, equation 4.4 (gradient reversal layer).
    """
    fixed = features.detach()
    return fixed - alpha * (features - fixed)


_APART: WeakKeyDictionary[Classifier, dict[int, Classifier]] = WeakKeyDictionary()


def _apart(model: Classifier, domains: int) -> Classifier:
    """The network for batches of several domains; made once, since of its own tensors none is ever read."""
    copies = _APART.setdefault(model, {})
    if domains not in copies:
        copies[domains] = domains_apart(model, domains)
    return copies[domains]


class _Embedding(nn.Module):
    """A classifier up to its head."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, weight: Tensor | None, rng: Tensor | None) -> Tensor:
        return self.model.features(x, weight, rng)


class _Backbone(nn.Module):
    """A classifier up to its neck."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, weight: Tensor | None, rng: Tensor | None) -> Tensor:
        return self.model.backbone(self.model.standardise(x), weight, rng)
