"""What an algorithm is: a pure step over named tensors.

``step(state, batch, hyper, rng)`` returns a new state and scalars, reads and writes nothing else, and has
no Python control flow that depends on values. The same function therefore runs as it stands, stacked over
many runs with ``torch.func.vmap``, and traced into a graph. What must look at all training windows at once
(centres, radii, labels of clusters, a teacher) is ``refresh``, another pure function, called between steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from wearfleet_models import Classifier, ModelSpec
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.training.optimisers import Optimiser

__all__ = [
    "CORRECTED",
    "MODES",
    "Algorithm",
    "AlgorithmInfo",
    "Batch",
    "Need",
    "State",
    "Step",
    "Tensors",
    "TrainingWindows",
    "initial_state",
]

Tensors = dict[str, Tensor]
Need = Literal[
    "domain labels", "unlabelled target data", "per-domain gradients", "per-sample gradients", "full pass"
]
CORRECTED = "corrected"
MODES = (CORRECTED, "strict")
"""Choices of the option "mode": without the defects of published code, or with them to compare with its numbers."""


class State(NamedTuple):
    """All that a training step carries to the next.

    Names of the network's tensors are those of the classifier; tensors of a module that only training needs
    are called ``<part>/<name in the module>``.
    """

    params: Tensors
    buffers: Tensors
    slots: Tensors
    extras: Tensors


class Batch(NamedTuple):
    """One mini-batch of every source domain.

    Args:
        x: (D, B, C, T) float32 raw units.
        y: (D, B) int64 class.
        weight: (D, B) float32 weight of each window, 0 for padding; None for all ones.
        number: (D, B) int64 number of each window among the training windows; None when nobody asks.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None
    number: Tensor | None = None


Step = Callable[[State, Batch, Mapping[str, Tensor], Tensor], tuple[State, dict[str, Tensor]]]


class TrainingWindows(Protocol):
    """All training windows of the source domains on one device, as ``refresh`` sees them."""

    @property
    def y(self) -> Tensor:
        """(N,) int64 class."""

    @property
    def domain(self) -> Tensor:
        """(N,) int64 number of the source domain."""

    @property
    def count(self) -> Tensor:
        """(D,) int64 windows of each domain."""

    def windows(self, part: slice) -> Tensor:
        """Raw windows (n, C, T) of a part of the N."""


@dataclass(frozen=True, slots=True)
class AlgorithmInfo:
    """What a reader wants to know before choosing an algorithm.

    Args:
        name: in the registry.
        title: as people write it.
        paper: where it comes from.
        family: group of ideas it belongs to.
        needs: beyond labels.
        forward: "joint" normalises all domains together, "per-domain" each by its own batch statistics.
        inference: network that is exported.
        hyper: defaults of the hyper-parameters ``step`` reads besides "lr".
        options: choices that change the form of the step, the default first; fields of the algorithm's class.
        neck: that the algorithm works on, a key of ``wearfleet_models.NECKS``; "none" takes the one asked for.
        sampling: "per-domain" draws from each source domain with replacement, "pooled" goes through all windows
            of all domains in random order, pass after pass.
        alone: why runs of it cannot be stacked; empty when they can.
    """

    name: str
    title: str
    paper: str
    family: str
    needs: tuple[Need, ...]
    forward: Literal["joint", "per-domain"]
    inference: str
    hyper: Mapping[str, float]
    options: Mapping[str, tuple[str, ...]]
    neck: str = "none"
    sampling: Literal["per-domain", "pooled"] = "per-domain"
    alone: str = ""


@dataclass(frozen=True, slots=True)
class Algorithm(ABC):
    """A training algorithm bound to a network and an optimiser.

    Args:
        model: the network, in training mode; its tensors become the initial state.
        optimiser: makes the updates.
        domains: D, number of source domains.
        parts: modules that only training needs, from :meth:`modules`.
    """

    model: Classifier
    optimiser: Optimiser
    domains: int = 1
    parts: Mapping[str, nn.Module] = field(init=False, repr=False)
    info: ClassVar[AlgorithmInfo]

    def __post_init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            object.__setattr__(self, "parts", self.modules())

    @classmethod
    def network(cls, spec: ModelSpec, domains: int, options: Mapping[str, str]) -> ModelSpec:
        """The network this algorithm trains, from the one that was asked for.

        Args:
            spec: backbone and sizes.
            domains: D, number of source domains.
            options: choices that differ from the default.

        Raises:
            ConfigError: another neck was asked for than the algorithm's own.
        """
        own = cls.info.neck
        if own == "none":
            return spec
        if spec.neck not in {"none", own}:
            raise ConfigError(f"{cls.info.name} works on a {own}, not on neck {spec.neck!r}; leave neck out")
        return replace(spec, neck=own)

    def modules(self) -> dict[str, nn.Module]:
        """Freshly initialised modules that only training needs, by part name; in training mode."""
        return {}

    def init(self, seed: int = 0) -> State:
        """The state before the first step: a copy of the network's tensors, fresh modules and slots.

        Args:
            seed: of the initial weights of the modules that only training needs.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = self.modules()
        device = next(self.model.parameters()).device
        return initial_state(self.model, self.optimiser, {n: m.to(device) for n, m in fresh.items()})

    @abstractmethod
    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """One update.

        Args:
            state: of ``init`` or the step before; not changed.
            batch: windows of every source domain, of the shape that ``shape`` asks for.
            hyper: "lr" and those named in ``info.hyper``, () float32 each.
            rng: () int64 key of this step's random numbers.

        Returns:
            New state and scalars: "loss" and "accuracy" at least.
        """

    def step_at(self, number: int, pass_steps: int) -> Step:
        """The step to make as number ``number`` (from 0), where ``pass_steps`` steps see all windows once."""
        return self.step

    def shape(self, batch: int) -> tuple[int, int]:
        """(D, B) of the batches it takes when ``batch`` windows a source domain are asked for."""
        return self.domains, batch

    def refresh_at(self, number: int, pass_steps: int) -> bool:
        """Whether ``refresh`` comes before step ``number``."""
        return False

    def refresh(self, state: State, data: TrainingWindows, hyper: Mapping[str, Tensor], rng: Tensor) -> State:
        """The state after a look at all training windows.

        Args:
            state: not changed.
            data: all training windows.
            hyper: as for ``step``.
            rng: () int64 key.
        """
        return state

    def transduce(
        self, tensors: Tensors, data: TrainingWindows, target: Tensor, hyper: Mapping[str, Tensor]
    ) -> Tensor | None:
        """The classes of all windows of the target, found together; None when the network predicts each by itself.

        An algorithm that gives them needs "unlabelled target data": its scores on the target say nothing of windows
        that were not there, and what is exported is the network alone.

        Args:
            tensors: of :meth:`inference`.
            data: all training windows.
            target: (N, C, T) raw windows.
            hyper: as for ``step``.

        Returns:
            (N,) int64 on the device of ``target``, or None.
        """
        return None

    def inference(self, state: State) -> Tensors:
        """Parameters and buffers of the network that predicts: the classifier's names, nothing else."""
        return {name: t for name, t in (*state.params.items(), *state.buffers.items()) if "/" not in name}


def initial_state(
    model: nn.Module, optimiser: Optimiser, parts: Mapping[str, nn.Module] | None = None
) -> State:
    """Copies of parameters and buffers of a network and of the parts of training, with fresh optimiser slots."""
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    for part, module in (parts or {}).items():
        params |= {f"{part}/{name}": p.detach().clone() for name, p in module.named_parameters()}
        buffers |= {f"{part}/{name}": b.detach().clone() for name, b in module.named_buffers()}
    return State(params, buffers, optimiser.init(params), {})
