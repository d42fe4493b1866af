"""One pass over several domains is one pass a domain."""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import CLASSES, DOMAINS
from wearfleet_cloud.algorithms import Batch
from wearfleet_cloud.algorithms.passes import embed, features_of_domains, head
from wearfleet_models import ModelSpec, build_classifier, randomness


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "backbone",
    ["cnn", "cnn-plain", "lag-cnn", "transformer", "patch-transformer", "deep-conv-lstm", "resnet"],
)
def test_domains_are_normalised_and_dropped_out_one_by_one(backbone: str, weighted: bool) -> None:
    spec = ModelSpec(backbone, 3, 40, CLASSES, kernel=5, feedforward=16, neck="bottleneck", neck_width=8)
    model = build_classifier(spec).train()
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(DOMAINS, 6, 40, 3, generator=generator).transpose(-1, -2)
    x = x + torch.arange(DOMAINS)[:, None, None, None]
    weight = torch.rand(DOMAINS, 6, generator=generator) if weighted else None
    rng, expected, after = torch.tensor(5), [], buffers
    for domain in range(DOMAINS):
        own = None if weight is None else weight[domain]
        key = randomness.derive(rng, domain)
        features, after = embed(model, params, after, x[domain], own, key)
        expected.append(features)
    batch = Batch(x, torch.zeros(DOMAINS, 6, dtype=torch.int64), weight)
    found, logits, kept = features_of_domains(model, params, buffers, batch, rng)
    # The same numbers; a convolution of a larger batch may sum in another order.
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept, after, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, head(params, torch.stack(expected)), rtol=1e-4, atol=1e-5)
    joint, _ = embed(model, params, buffers, x.flatten(0, 1), None, None)
    assert (joint.reshape(found.shape) - found).abs().max() > 0.1  # together they are something else
