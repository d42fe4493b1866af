"""ERM++: train as ERM, and predict with the average of the weights along the way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wearfleet_cloud.algorithms.base import (
    CORRECTED,
    MODES,
    Algorithm,
    AlgorithmInfo,
    Batch,
    State,
    Tensors,
)
from wearfleet_cloud.algorithms.erm import Erm

__all__ = ["ErmPlusPlus"]

_AVERAGE = "average/"
"""Prefix of the averaged tensors among the extras."""
_MADE = "updates"
"""Extra that counts the updates made, () float32."""


@dataclass(frozen=True, slots=True)
class ErmPlusPlus(Erm):
    """Steps of ERM on theta; the network that predicts is theta_bar <- theta_bar + c_t (theta - theta_bar).

    Every number of the network is averaged, running statistics as well. Mode "corrected": c_t = (tail + 1) / (t + tail)
    after update t, so that theta_bar is a mean of theta_1 .. theta_t with weights that grow about as k^tail: old
    weights are forgotten, and no step needs to be named at which averaging begins.

    Mode "strict": in updates 0 to ``linear_steps`` only the head moves, then the optimiser starts anew; c_t = 1 in
    updates 1 to ``average_from`` - 1, then 1 / (k + 1) with k = 1, 2, ...: the plain mean.

    Source: Teterwak et al. 2025, arXiv:2304.01973, as reduced by HAROOD; specs/ood.md 2.16. Polynomial decay: Shamir
    and Zhang 2013, arXiv:1212.1824, section 4.
    Differs: "corrected" leaves out the warm-up of the head, which on a random backbone fits noise, and the early
    weights of the plain mean. LARS is a setting of training (``optimiser=lars``).
    """

    mode: str = CORRECTED
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="erm-plus-plus",
        title="ERM++",
        paper="Teterwak et al. 2025, arXiv:2304.01973",
        family="weight averaging",
        needs=(),
        forward="joint",
        inference="average of backbone + head over the updates",
        hyper={"tail": 8.0, "linear_steps": 500.0, "average_from": 600.0},
        options={"mode": MODES},
    )

    def init(self, seed: int = 0) -> State:
        """As ``Algorithm.init``; the average is the initial network."""
        state = Algorithm.init(self, seed)
        average = {f"{_AVERAGE}{n}": t.clone() for n, t in _averaged(state).items()}
        device = next(iter(average.values())).device
        return state._replace(extras={**average, _MADE: torch.zeros((), device=device)})

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """As ``Algorithm.step``; metrics "loss" and "accuracy" of theta, not of the average."""
        made = state.extras[_MADE]
        if self.mode == CORRECTED:
            after, metrics = Erm.step(self, state, batch, hyper, rng)
            share = (hyper["tail"] + 1.0) / (made + 1.0 + hyper["tail"])
        else:
            start = self._start_anew(state, made == hyper["linear_steps"] + 1.0)
            after, metrics = Erm.step(self, start, batch, hyper, rng)
            after = after._replace(params=_head_only(start, after, made <= hyper["linear_steps"]))
            share = 1.0 / ((made + 2.0 - hyper["average_from"]).clamp(min=0.0) + 1.0)
        extras = {f"{_AVERAGE}{n}": t for n, t in self._average(state, after, share).items()}
        return after._replace(extras={**extras, _MADE: made + 1.0}), metrics

    def inference(self, state: State) -> Tensors:
        """As ``Algorithm.inference``: the averaged network."""
        kept = Algorithm.inference(self, state)
        return {name: state.extras.get(f"{_AVERAGE}{name}", t) for name, t in kept.items()}

    def _average(self, before: State, after: State, share: Tensor) -> Tensors:
        averages = {name: before.extras[f"{_AVERAGE}{name}"] for name in _averaged(after)}
        return {name: averages[name] + share * (t - averages[name]) for name, t in _averaged(after).items()}

    def _start_anew(self, state: State, now: Tensor) -> State:
        """The state with fresh slots where it is time."""
        fresh = self.optimiser.init(state.params)
        return state._replace(slots={n: torch.where(now, fresh[n], slot) for n, slot in state.slots.items()})


def _averaged(state: State) -> Tensors:
    """The tensors of the network that are not whole numbers."""
    return {n: t for n, t in (*state.params.items(), *state.buffers.items()) if t.is_floating_point()}


def _head_only(before: State, after: State, now: Tensor) -> Tensors:
    """Parameters after a step that moves the head alone where ``now`` holds."""
    return {
        n: p if n.startswith("head.") else torch.where(now, before.params[n], p)
        for n, p in after.params.items()
    }
