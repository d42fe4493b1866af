"""Learn from a teacher's logits and from labels at once; the maths is in README.md."""

import torch
from torch import Tensor
from wearfleet_protos.errors import ConfigError, ShapeError

from wearfleet_cloud.kernels.dispatch import takes_triton
from wearfleet_cloud.kernels.distillation.reference import DIVERGENCES, Divergence, distillation_reference

__all__ = ["DIVERGENCES", "Divergence", "distillation", "distillation_reference"]


def distillation(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    divergence: Divergence = "forward",
    temperature: float = 2.0,
    alpha: float = 0.5,
    beta: float = 0.5,
) -> Tensor:
    """(1 - alpha) cross-entropy + alpha tau^2 divergence, mean over windows, nats.

    Works under ``torch.func.grad`` and ``vmap``. Detach ``teacher`` when it is not trained: its gradient is then not
    computed.

    Args:
        student: (N, K) logits, N and K at least 1.
        teacher: (N, K) logits.
        labels: (N,) int64 class, or None: no cross-entropy, the divergence counts with ``alpha`` all the same.
        weight: (N,) of every window, 0 for padding, None for ones; has no gradient.
        divergence: "forward" KL(teacher || student), "reverse" KL(student || teacher), or "jensen-shannon" with the
            mixture beta teacher + (1 - beta) student.
        temperature: above 0, divides both logits in the divergence.
        alpha: 0 to 1.
        beta: above 0 and below 1; of "jensen-shannon".

    Returns:
        (), float32 or wider.

    Raises:
        ShapeError: shapes that do not fit each other.
        ConfigError: an unknown divergence or a number out of its range.
    """
    _check(student, teacher, labels, weight)
    if divergence not in DIVERGENCES:
        raise ConfigError(f"unknown divergence {divergence!r}; known: {', '.join(DIVERGENCES)}")
    if not (temperature > 0.0 and 0.0 <= alpha <= 1.0 and 0.0 < beta < 1.0):
        raise ConfigError(
            "distillation needs temperature > 0, alpha in 0 to 1 and beta between 0 and 1, got "
            f"{temperature}, {alpha}, {beta}"
        )
    if takes_triton(*(tensor for tensor in (student, teacher, labels, weight) if tensor is not None)):
        from wearfleet_cloud.kernels.distillation import kernel  # noqa: PLC0415  only where Triton is

        if student.shape[-1] <= kernel.MOST_CLASSES:
            return kernel.distillation_triton(
                student, teacher, labels, weight, divergence, temperature, alpha, beta
            )
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(wide)
    return distillation_reference(student, teacher, labels, weight, divergence, temperature, alpha, beta)


def _check(student: Tensor, teacher: Tensor, labels: Tensor | None, weight: Tensor | None) -> None:
    if student.dim() != 2 or 0 in student.shape:
        raise ShapeError(f"student must be (windows, classes), at least one each, got {tuple(student.shape)}")
    if teacher.shape != student.shape:
        raise ShapeError(f"teacher must be {tuple(student.shape)} as the student, got {tuple(teacher.shape)}")
    for name, tensor in (("labels", labels), ("weight", weight)):
        if tensor is not None and tensor.shape != student.shape[:1]:
            raise ShapeError(f"{name} must be {tuple(student.shape[:1])}, got {tuple(tensor.shape)}")
