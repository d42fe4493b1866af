"""From the sum of a secure round to the one contribution that a strategy folds.

The weighted mean stands for all its members. Statistics of normalisation are thereby averaged naively: the spread of
the members' means, which pooling as moments would add to the variances, cannot be seen in a sum. Counters stay.
"""

from collections.abc import Sequence

import numpy as np
from wearfleet_protos.plan import UploadSpec
from wearfleet_protos.secagg.vectors import tensors_of
from wearfleet_protos.tensors import TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Contribution, uploaded
from wearfleet_cloud.federated.privacy.secagg_server import SecureSum

__all__ = ["secure_contribution"]


def secure_contribution(
    specs: Sequence[TensorSpec], upload: UploadSpec, current: Arrays, total: SecureSum
) -> Contribution:
    """The weighted mean of differences as a contribution with the total weight.

    Args:
        specs: ``Plan.tensors``; statistics of normalisation in pairs, mean then variance.
        upload: what of them is uploaded.
        current: global tensors that the members started from.
        total: of the round.
    """
    sent = tuple(sorted(uploaded(specs, upload), key=lambda spec: spec.name))  # as Plan.upload_specs
    tensors = tensors_of(sent, total.mean)
    statistics = [spec for spec in specs if spec in sent and spec.role == TensorRole.NORM_STAT]
    for spec in statistics[1::2]:  # the quantiser's error may carry a variance of nearly 0 below it
        tensors[spec.name] = np.maximum(tensors[spec.name], -np.asarray(current[spec.name], spec.dtype))
    return Contribution("the sum", total.weight, lambda: tensors, members=total.members)
