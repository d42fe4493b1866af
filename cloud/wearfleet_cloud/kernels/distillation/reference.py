"""Distillation losses by their definitions."""

import math
from typing import Final, Literal

import torch
from torch import Tensor

__all__ = ["DIVERGENCES", "Divergence", "distillation_reference"]

Divergence = Literal["forward", "reverse", "jensen-shannon"]
DIVERGENCES: Final[tuple[Divergence, ...]] = ("forward", "reverse", "jensen-shannon")


def distillation_reference(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    divergence: Divergence,
    temperature: float,
    alpha: float,
    beta: float,
) -> Tensor:
    """mean_i w_i [ (1 - alpha) CE(s_i, y_i) + alpha tau^2 Div(softmax(t_i / tau), softmax(s_i / tau)) ].

    Args:
        student: (N, K) logits s.
        teacher: (N, K) logits t.
        labels: (N,) int64 y, or None for no cross-entropy.
        weight: (N,) w, None for ones; the mean divides by their sum.
        divergence: "forward" KL(p || q), p the teacher's distribution and q the student's; "reverse" KL(q || p);
            "jensen-shannon" beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.
        temperature: tau.
        alpha: share of the divergence.
        beta: share of the teacher in m.

    Returns:
        () nats.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2 (tau^2 keeps the gradient's size); Agarwal et al. 2024,
    arXiv:2306.13649, section 2 (generalised Jensen-Shannon); specs/extended.md 10.1.
    """
    log_p = torch.log_softmax(teacher / temperature, dim=-1)
    log_q = torch.log_softmax(student / temperature, dim=-1)
    if divergence == "forward":
        losses = _kl(log_p, log_q)
    elif divergence == "reverse":
        losses = _kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(
            math.log(beta) + log_p, math.log1p(-beta) + log_q
        )  # two far tails are not log 0
        losses = beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)
    losses = alpha * temperature**2 * losses
    if labels is not None:
        scores = torch.log_softmax(student, dim=-1)
        losses = losses - (1.0 - alpha) * scores.gather(-1, labels[:, None])[:, 0]
    if weight is None:
        return losses.mean()
    return (losses * weight).sum() / weight.sum().clamp(min=1e-12)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of rows of logarithms; 0 log 0 is 0."""
    p = first.exp()
    return torch.where(p > 0, p * (first - second), torch.zeros_like(p)).sum(dim=-1)
