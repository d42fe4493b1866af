"""Models: torch modules only.

``Classifier`` is the whole model (raw window in, logits out), built from a ``ModelSpec``.
"""

from wearfleet_models.classifier import BACKBONES, FROZEN, Classifier, ModelSpec, build_classifier, derived
from wearfleet_models.necks import NECKS
from wearfleet_models.roles import tensor_roles, tensor_specs

__all__ = [
    "BACKBONES",
    "FROZEN",
    "NECKS",
    "Classifier",
    "ModelSpec",
    "build_classifier",
    "derived",
    "tensor_roles",
    "tensor_specs",
]
