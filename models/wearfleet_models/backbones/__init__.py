"""Backbones: from a standardised window to a feature vector."""

from wearfleet_models.backbones.cnn import Cnn
from wearfleet_models.backbones.deep_conv_lstm import DeepConvLstm
from wearfleet_models.backbones.lag import lag_cnn, lag_transformer, patch_count
from wearfleet_models.backbones.multimodal_transformer import MultimodalTransformer
from wearfleet_models.backbones.patch_transformer import PatchTransformer
from wearfleet_models.backbones.resnet import ResNet
from wearfleet_models.backbones.transformer import Transformer

__all__ = [
    "Cnn",
    "DeepConvLstm",
    "MultimodalTransformer",
    "PatchTransformer",
    "ResNet",
    "Transformer",
    "lag_cnn",
    "lag_transformer",
    "patch_count",
]
