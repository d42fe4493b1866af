"""LAG's two views of a window against the two-dimensional convolutions and the tokens of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from wearfleet_models import ModelSpec, build_classifier
from wearfleet_models.backbones import patch_count


@pytest.mark.parametrize(
    ("window", "patches"), [(125, 5), (128, 8), (200, 10), (50, 5), (100, 10), (500, 10), (127, 1), (19, 1)]
)
def test_the_number_of_patches_is_that_of_the_paper_and_follows_one_rule(window: int, patches: int) -> None:
    assert patch_count(window) == patches
    allowed = [n for n in range(1, 11) if window % n == 0 and window // n >= 10]
    assert patches == max(allowed)


@pytest.mark.parametrize(
    ("channels", "window", "kernel", "whole", "local"),
    [(45, 125, 9, 800, 128), (6, 200, 6, 1472, 96), (6, 128, 9, 832, 32), (6, 50, 6, 256, 32)],
)
def test_the_branches_of_the_cnn_have_the_features_of_the_paper(
    channels: int, window: int, kernel: int, whole: int, local: int
) -> None:
    model = build_classifier(ModelSpec("lag-cnn", channels, window, 4, kernel=kernel)).eval()
    assert model.backbone.whole.num_features == whole
    assert model.backbone.local.num_features == local
    assert model.features(torch.randn(2, channels, window)).shape == (2, 512)


@pytest.mark.parametrize(("channels", "window", "patches"), [(45, 125, 5), (6, 128, 8)])
def test_the_branches_of_the_transformer_have_the_features_of_the_paper(
    channels: int, window: int, patches: int
) -> None:
    model = build_classifier(ModelSpec("lag-transformer", channels, window, 4, feedforward=16)).eval()
    assert model.backbone.whole.num_features == 64 * channels
    assert model.backbone.local.num_features == 64 * patches
    assert model.features(torch.randn(2, channels, window)).shape == (2, 512)


def _batch() -> Tensor:
    return torch.randn(4, 6, 200, generator=torch.Generator().manual_seed(1))


def test_the_local_branch_is_the_papers_two_dimensional_network() -> None:
    network = build_classifier(ModelSpec("lag-cnn", 6, 200, 4)).backbone.train()
    local = network.local
    wide = local.conv1.weight.reshape(16, 6, 10, 4)  # kernel (G, k // 2)
    grid = nn.functional.conv2d(_batch().reshape(4, 6, 10, 20), wide, local.conv1.bias)
    for norm in (local.norm1, local.norm2):
        grid = nn.functional.batch_norm(grid, None, None, norm.weight, norm.bias, training=True)
        grid = nn.functional.max_pool2d(torch.relu(grid), (1, 2))
        if norm is local.norm1:
            grid = nn.functional.conv2d(grid, local.conv2.weight.unsqueeze(2), local.conv2.bias)
    expected = network.local_neck(grid.flatten(1))
    actual = network(_batch())[:, 256:]
    # float32, batch normalisation twice over sums of 240 products: eps x sqrt(240) x 10
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def test_the_first_half_of_the_features_sees_the_whole_window() -> None:
    network = build_classifier(ModelSpec("lag-cnn", 6, 200, 4)).backbone.train()
    torch.testing.assert_close(network(_batch())[:, :256], network.whole_neck(network.whole(_batch())))


def test_a_token_of_the_local_transformer_is_one_patch_of_all_channels() -> None:
    network = build_classifier(ModelSpec("lag-transformer", 6, 200, 4, feedforward=16)).backbone.eval()
    taken = []
    network.local.embed.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    network(_batch())
    assert torch.equal(taken[0][:, 3], _batch()[:, :, 60:80].flatten(1))


def test_dropout_masks_of_the_branches_differ() -> None:
    network = build_classifier(ModelSpec("lag-transformer", 6, 64, 4, feedforward=16)).backbone
    salts = [layer.salt for layer in network.modules() if hasattr(layer, "salt")]
    assert len(salts) == len(set(salts)) == 8
