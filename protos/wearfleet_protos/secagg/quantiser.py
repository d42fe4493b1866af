"""Numbers as integers that can be summed under masks, and the weighted mean back from their sum.

u = (cut(x) + c) q / (2 c), rounded up or down at random so that its expectation is u. A member of weight w adds w times
its integers, and w itself as one more coordinate. From the sums S and W the mean is (2 c / q) S / W - c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wearfleet_protos.errors import AggregationError, ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wearfleet_protos.secagg.parameters import SecureParameters

__all__ = ["mean_of", "weighted_words"]


def weighted_words(
    values: NDArray[np.float64], weight: int, parameters: SecureParameters, noise: NDArray[np.float64]
) -> NDArray[np.uint32]:
    """What a member adds, before masks: unbiased, error of a coordinate below one step 2 c / q.

    Args:
        values: (P,) the update, differences.
        weight: w.
        parameters: clip, levels and size.
        noise: (P,) uniform in [0, 1), decides which way a value is rounded.

    Returns:
        (P + 1,) uint32.

    Raises:
        ShapeError: another size, or a value that is not finite.
    """
    if values.shape != (parameters.size,) or noise.shape != values.shape:
        raise ShapeError(f"an update of ({parameters.size},) values was expected, got {values.shape}")
    if not bool(np.isfinite(values).all()):
        raise ShapeError("the update holds NaN or infinity: training diverged")
    c, q = parameters.clip, parameters.levels
    scaled = (np.clip(values, -c, c) + c) * (q / (2.0 * c))
    whole = np.floor(scaled)
    rounded = np.minimum(whole + (noise < scaled - whole), q)
    return np.append(rounded * weight, weight).astype(np.uint32)


def mean_of(
    total: NDArray[np.uint32], members: int, parameters: SecureParameters
) -> tuple[NDArray[np.float64], int]:
    """The weighted mean of so many members' updates, from the sum of what they added.

    Args:
        total: (P + 1,) without masks.
        members: how many added.
        parameters: clip, levels, weights.

    Returns:
        (P,) mean, and the sum of the weights.

    Raises:
        AggregationError: no members can add up to this; somebody added something else, or a mask is still there.
    """
    weight = int(total[-1])
    if not members <= weight <= members * parameters.weight_levels:
        raise AggregationError(
            f"the weights of {members} members add up to {weight}, possible are {members} to "
            f"{members * parameters.weight_levels}; the round is void"
        )
    if int(total[:-1].max()) > weight * parameters.levels:
        raise AggregationError("a sum is larger than its weights allow; the round is void")
    step = 2.0 * parameters.clip / parameters.levels
    return total[:-1].astype(np.float64) * (step / weight) - parameters.clip, weight
