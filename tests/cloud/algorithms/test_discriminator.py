"""The discriminator against torch's own layers, and who learns what from its risk."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn
from wearfleet_cloud.algorithms.discriminator import Discriminator, adversarial_risk, domain_labels

ALPHA = 0.3


def _torch_twin(ours: Discriminator) -> nn.Sequential:
    twin = nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)
    )  # fmt: skip
    twin.load_state_dict(dict(zip(twin.state_dict(), ours.state_dict().values(), strict=True)))
    return twin.double()


def _case() -> tuple[Discriminator, dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    ours = Discriminator(5, 3, 7).double()
    params = {f"judge/{n}": p.detach().clone() for n, p in ours.named_parameters()}
    buffers = {f"judge/{n}": b.clone() for n, b in ours.named_buffers()}
    return (
        ours,
        params,
        buffers,
        torch.randn(12, 5, dtype=torch.float64),
        domain_labels(3, 4, torch.device("cpu")),
    )


def test_domain_labels_number_the_windows_of_a_pooled_batch() -> None:
    assert domain_labels(2, 3, torch.device("cpu")).tolist() == [0, 0, 0, 1, 1, 1]


def test_the_discriminator_is_the_same_network_of_torch_layers() -> None:
    ours, params, buffers, features, labels = _case()
    twin = _torch_twin(ours)
    risk, after = adversarial_risk(
        "judge", {"judge": ours}, params, buffers, features, labels, torch.tensor(ALPHA)
    )
    torch.testing.assert_close(risk, F.cross_entropy(twin(features), labels))
    buffers_of_twin = dict(zip(after, twin.buffers(), strict=True))
    torch.testing.assert_close(after, buffers_of_twin)


def test_the_discriminator_descends_and_the_features_ascend_by_alpha() -> None:
    ours, params, buffers, features, labels = _case()
    twin = _torch_twin(ours)
    plain = features.clone().requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(twin(plain), labels), (plain, *twin.parameters()))
    turned = features.clone().requires_grad_()
    moving = {n: p.requires_grad_() for n, p in params.items()}
    risk, _ = adversarial_risk(
        "judge", {"judge": ours}, moving, buffers, turned, labels, torch.tensor(ALPHA, dtype=torch.float64)
    )
    found = torch.autograd.grad(risk, (turned, *moving.values()))
    torch.testing.assert_close(found, (-ALPHA * expected[0], *expected[1:]), rtol=1e-9, atol=1e-12)


def test_windows_without_weight_do_not_count() -> None:
    ours, params, buffers, features, labels = _case()
    weight = torch.tensor([1.0] * 9 + [0.0] * 3, dtype=torch.float64)
    alpha, parts = torch.tensor(ALPHA), {"judge": ours}
    padded = adversarial_risk("judge", parts, params, buffers, features, labels, alpha, weight)
    short = adversarial_risk("judge", parts, params, buffers, features[:9], labels[:9], alpha)
    torch.testing.assert_close(padded, short)
