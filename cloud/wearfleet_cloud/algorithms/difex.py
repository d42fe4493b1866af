"""DIFEX: half of the embedding imitates a teacher of Fourier phases, the other half is aligned across domains."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch
from torch import Tensor
from wearfleet_models import ModelSpec, build_classifier, randomness
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.algorithms.base import (
    CORRECTED,
    MODES,
    Algorithm,
    AlgorithmInfo,
    Batch,
    State,
    Tensors,
    TrainingWindows,
)
from wearfleet_cloud.algorithms.erm import Erm
from wearfleet_cloud.algorithms.full_pass import over_all_windows
from wearfleet_cloud.algorithms.losses import accuracy, cross_entropy
from wearfleet_cloud.algorithms.passes import embed, head, pooled
from wearfleet_cloud.algorithms.penalised import Losses, Penalised
from wearfleet_cloud.kernels.coral import coral_penalty
from wearfleet_cloud.training.sampling import sampler

__all__ = ["TEACHER", "Difex", "exploration", "phases", "teacher_rate"]

TEACHER = "difex/teacher"
"""Buffer (N, F / 2): what the teacher says of every training window."""
_WEIGHTS, _INDICES, _STEPS = 1, 2, 3
_TEACHER_BATCH: Final = 32
"""Windows a domain in a step of the teacher, as published."""
_AUDIBLE: Final = 1e-6
"""Share of the largest magnitude of a spectrum below which a phase is noise."""


@dataclass(frozen=True, slots=True)
class Difex(Penalised):
    """L = CE(h(z), y) + alpha * mean (z1 - t)^2 + beta * exploration(z1, z2) + lam * P(z2), one joint pass.

    z = (z1, z2) is the embedding behind a bottleneck, in halves. t is the embedding, half as wide, of a teacher of the
    same backbone that was trained on the Fourier phases of the windows alone; P is CORAL's distance of the domains
    (halves of the batch where there is one domain); the exploration rewards that z1 and z2 differ (``distance``).
    Before the first step ``refresh`` takes the phases of every window once, trains the teacher on them for
    ``teacher_steps`` steps, 32 windows a domain, and keeps what it says of every training window; so neither phases
    nor teacher cost anything in a step, and nothing of them is in the network that predicts.

    Mode "corrected" sets the phase of a frequency that is not there, below 1e-6 of the largest magnitude, to 0, where
    "strict" keeps the phase of the rounding noise (pitfall P32). Both keep the jump of a phase at pi. Mode "strict"
    never trains the bottleneck (pitfall P2).

    Source: Lu et al. 2022, arXiv:2207.12020, equations 1 to 6; specs/ood.md 3.1.
    Differs: ``teacher_steps`` of its own for the teacher, where the published code makes as many as for the student.

    Raises:
        ConfigError: unknown distance or mode.
    """

    distance: str = "2-norm"
    mode: str = CORRECTED
    info: ClassVar[AlgorithmInfo] = AlgorithmInfo(
        name="difex",
        title="DIFEX",
        paper="Lu et al. 2022, arXiv:2207.12020",
        family="alignment",
        needs=("domain labels", "full pass"),
        forward="joint",
        inference="backbone + bottleneck + head",
        hyper={"alpha": 0.1, "beta": 0.01, "lam": 0.1, "teacher_steps": 1000.0},
        options={"distance": ("2-norm", "norm-2-norm", "norm-1-norm", "cos"), "mode": MODES},
        neck="bottleneck",
    )

    def __post_init__(self) -> None:
        Algorithm.__post_init__(self)
        for option, known in self.info.options.items():
            if getattr(self, option) not in known:
                raise ConfigError(
                    f"{option} of difex must be {' or '.join(known)}, got {getattr(self, option)!r}"
                )

    @classmethod
    def network(cls, spec: ModelSpec, domains: int, options: Mapping[str, str]) -> ModelSpec:
        """As ``Algorithm.network``: with a bottleneck.

        Raises:
            ConfigError: an embedding that has no halves.
        """
        if spec.neck_width % 2:
            raise ConfigError(f"difex halves the embedding; neck_width must be even, got {spec.neck_width}")
        return replace(spec, neck=cls.info.neck)

    def refresh_at(self, number: int, pass_steps: int) -> bool:
        """As ``Algorithm.refresh_at``: once, before the first step."""
        return number == 0

    def refresh(self, state: State, data: TrainingWindows, hyper: Mapping[str, Tensor], rng: Tensor) -> State:
        """As ``Algorithm.refresh``: train the teacher and keep what it says."""
        mean, std = (state.buffers[f"standardise.{name}"][:, None] for name in ("mean", "std"))
        audible = 0.0 if self.mode != CORRECTED else _AUDIBLE
        heard = over_all_windows(data, lambda x: phases((x - mean) / std, audible))
        spec = replace(self.model.spec, neck_width=self.model.spec.neck_width // 2)
        seed = int(randomness.derive(rng, _WEIGHTS)) % 2**31
        teacher = Erm(build_classifier(spec, seed).to(heard.device).train(), self.optimiser, self.domains)
        learnt = _taught(teacher, heard, data, hyper, rng)
        with torch.no_grad():
            teacher.model.eval()
            parts = [
                embed(teacher.model, learnt.params, learnt.buffers, part, None, None)[0]
                for part in torch.split(heard, 1024)
            ]
        return state._replace(buffers={**state.buffers, TEACHER: torch.cat(parts)})

    def trained(self) -> Collection[str] | None:
        """As ``Penalised.trained``: all, in strict mode all but the bottleneck."""
        if self.mode == CORRECTED:
            return None
        return [name for name, _ in self.model.named_parameters() if not name.startswith("neck.")]

    def weight(self, state: State, hyper: Mapping[str, Tensor]) -> Tensor:
        """As ``Penalised.weight``: 1, because each term has a weight of its own."""
        return torch.ones_like(hyper["alpha"])

    def losses(
        self, params: Tensors, buffers: Tensors, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> Losses:
        """As ``Penalised.losses``; metrics "imitation", "exploration" and "alignment", not weighed.

        Raises:
            ConfigError: the windows of the batch have no numbers.
        """
        if batch.number is None:
            raise ConfigError(
                "difex looks up what its teacher said; give the batch the numbers of its windows"
            )
        x, y, weight = pooled(batch)
        z, after = embed(self.model, params, buffers, x, weight, rng)
        logits = head(params, z)
        first, second = z.chunk(2, dim=1)
        said = buffers[TEACHER][batch.number.flatten()]
        terms = {
            "imitation": _mean((first - said).square().mean(dim=1), weight),
            "exploration": _mean(exploration(first, second, self.distance), weight),
            "alignment": coral_penalty(*_groups(second.reshape(*batch.y.shape, -1), batch.weight)),
        }
        names = dict(zip(terms, ("alpha", "beta", "lam"), strict=True))
        penalty = torch.stack([hyper[names[name]] * term for name, term in terms.items()]).sum()
        metrics = {"accuracy": accuracy(logits, y, weight), **terms}
        return Losses(cross_entropy(logits, y, weight), penalty, metrics, after)


def phases(x: Tensor, audible: float = _AUDIBLE) -> Tensor:
    """Phases of the discrete Fourier transform over time, all T bins.

    Args:
        x: (..., T) real.
        audible: share of the largest magnitude of the spectrum; a bin below it has phase 0. With 0 the full complex
            transform is made, as published, and the phase of noise is kept.

    Returns:
        (..., T) in [-pi, pi]; odd: bin T - k is minus bin k.
    """
    if audible == 0.0:
        return torch.angle(torch.fft.fft(x, dim=-1))
    spectrum = torch.fft.rfft(x, dim=-1)
    size = spectrum.abs()
    angle = torch.where(size > audible * size.amax(dim=-1, keepdim=True), torch.angle(spectrum), 0.0)
    mirrored = angle[..., 1 : (x.shape[-1] + 1) // 2].flip(-1)
    return torch.cat([angle, -mirrored], dim=-1)


def exploration(first: Tensor, second: Tensor, distance: str) -> Tensor:
    """What is lower the more the halves of an embedding differ, one number a window.

    Args:
        first: (B, F).
        second: (B, F).
        distance: "2-norm" -mean (a - b)^2; "norm-2-norm" the same of rows of length 1; "norm-1-norm" -mean |a - b| of
            such rows; "cos" the cosine.

    Returns:
        (B,).
    """
    if distance == "cos":
        return torch.cosine_similarity(first, second, dim=1)
    if distance != "2-norm":
        first, second = (torch.nn.functional.normalize(half, dim=1) for half in (first, second))
    apart = first - second
    return -(apart.abs() if distance == "norm-1-norm" else apart.square()).mean(dim=1)


def teacher_rate(number: int, steps: int) -> float:
    """Factor of the learning rate in step ``number`` of ``steps``: divided by 10 at 70 % and again at 90 %."""
    return 0.1 ** ((10 * number >= 7 * steps) + (10 * number >= 9 * steps))


def _taught(
    teacher: Erm, heard: Tensor, data: TrainingWindows, hyper: Mapping[str, Tensor], rng: Tensor
) -> State:
    """The teacher's state after ``teacher_steps`` steps of ERM on the phases (N, C, T)."""
    steps, sizes = int(hyper["teacher_steps"]), tuple(data.count.tolist())
    first = data.count.cumsum(0) - data.count
    draws = sampler(
        "per-domain",
        randomness.derive(rng, _INDICES),
        _TEACHER_BATCH,
        first=first,
        count=data.count,
        sizes=sizes,
    )
    keys = randomness.derive(randomness.derive(rng, _STEPS), torch.arange(max(steps, 1), device=rng.device))
    state, y = teacher.init(), data.y
    for number in range(steps):
        index = draws.at(number)
        rate = {"lr": hyper["lr"] * teacher_rate(number, steps)}
        state, _ = teacher.step(state, Batch(heard[index], y[index]), rate, keys[number])
    return state


def _groups(z: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Domains (D, B, F) and weights (D, B), or both halves of the batch of one domain."""
    if len(z) > 1:
        return z, weight
    half = z.shape[1] // 2
    pairs = z[0, : 2 * half].reshape(2, half, -1)
    return pairs, None if weight is None else weight[0, : 2 * half].reshape(2, half)


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over windows (B,) by their weights: ()."""
    if weight is None:
        return values.mean()
    return (values * weight).sum() / weight.sum().clamp(min=1e-12)
