"""How much the classifier's gradient varies over the windows of each domain; the maths is in README.md."""

from torch import Tensor
from wearfleet_protos.errors import ConfigError, ShapeError

from wearfleet_cloud.kernels.dispatch import takes_triton
from wearfleet_cloud.kernels.gradient_variance.closed_form import gradient_variance_closed
from wearfleet_cloud.kernels.gradient_variance.reference import gradient_variance_reference

__all__ = [
    "fishr_penalty",
    "gradient_variance",
    "gradient_variance_closed",
    "gradient_variance_reference",
    "moving_variance",
]


def gradient_variance(
    features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Biased variance, over the windows of a domain, of the cross-entropy's gradient by a linear classifier.

    Differentiable by features and logits; works under ``torch.func.grad`` and ``vmap``.

    Args:
        features: (D, B, F) input of the classifier.
        logits: (D, B, K) its output.
        labels: (D, B) int64.
        weight: (D, B) of every window, 0 for padding, which may hold anything; None for ones; has no gradient.

    Returns:
        (D, K, F + 1), float32 or wider, the last column for the bias; 0 for a domain whose windows all have weight 0.

    Raises:
        ShapeError: shapes that do not fit each other.
    """
    if features.dim() != 3 or logits.dim() != 3 or 0 in features.shape or 0 in logits.shape:
        raise ShapeError(
            "features and logits must be (domains, windows, F) and (domains, windows, classes), at least one of "
            f"each, got {tuple(features.shape)} and {tuple(logits.shape)}"
        )
    for name, tensor in (("logits", logits[..., 0]), ("labels", labels), ("weight", weight)):
        if tensor is not None and tensor.shape != features.shape[:2]:
            raise ShapeError(
                f"{name} must begin with {tuple(features.shape[:2])} as the features, got {tuple(tensor.shape)}"
            )
    if takes_triton(features, logits, labels, *([] if weight is None else [weight])):
        from wearfleet_cloud.kernels.gradient_variance import kernel  # noqa: PLC0415  only where Triton is

        if logits.shape[-1] <= kernel.MOST_CLASSES:
            return kernel.gradient_variance_triton(features, logits, labels, weight)
    return gradient_variance_closed(features, logits, labels, weight)


def moving_variance(previous: Tensor, variances: Tensor, decay: float | Tensor) -> Tensor:
    """One step of the exponential moving average over which Fishr compares domains; the past has no gradient.

    The average starts at 0, so that after t steps it holds 1 - decay^t of its final size. The published algorithm
    divides it by 1 - decay, which makes the derivative by ``variances`` 1 and the steady state 1 / (1 - decay) times
    the variance; divided by 1 - decay^t it is unbiased.

    Args:
        previous: (D, K, F + 1) average of the step before, zeros before the first step.
        variances: (D, K, F + 1) of this step's ``gradient_variance``.
        decay: of the past, 0 to below 1; a () tensor, which is not read and so not checked, works under ``vmap``.

    Returns:
        (D, K, F + 1) decay * previous + (1 - decay) * variances.

    Raises:
        ShapeError: the two differ in shape.
        ConfigError: a decay that is a number and out of its range.

    Source: Rame et al. 2022, arXiv:2109.02934, section 3.3; specs/ood.md 2.14 and pitfall P14.
    """
    if previous.shape != variances.shape:
        raise ShapeError(
            f"previous must be as variances, {tuple(variances.shape)}, got {tuple(previous.shape)}"
        )
    if not isinstance(decay, Tensor) and not 0.0 <= decay < 1.0:
        raise ConfigError(f"decay must be 0 to below 1, got {decay}")
    return decay * previous.detach() + (1.0 - decay) * variances


def fishr_penalty(variances: Tensor) -> Tensor:
    """Mean over domains and entries of the squared distance to the mean of the domains.

    Args:
        variances: (D, ...) of ``gradient_variance``, or their moving averages.

    Returns:
        (); 0 for one domain.

    Source: Rame et al. 2022, arXiv:2109.02934, equation 5, divided by the number of entries; specs/ood.md 2.14.
    """
    return (variances - variances.mean(dim=0)).square().mean()
