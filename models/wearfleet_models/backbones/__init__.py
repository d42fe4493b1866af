"""Backbones: from a standardised window to a feature vector."""

from wearfleet_models.backbones.cnn import Cnn
from wearfleet_models.backbones.transformer import Transformer

__all__ = ["Cnn", "Transformer"]
