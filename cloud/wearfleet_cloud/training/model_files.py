"""A trained model on disk: ``model.safetensors`` (all tensors) and ``model.json`` (how to build the network)."""

import json
from pathlib import Path

import torch
from wearfleet_models import Classifier, ModelSpec, build_classifier, tensor_specs
from wearfleet_protos.errors import ConfigError, IntegrityError, NotFoundError
from wearfleet_protos.tensors import check_finite, decode_tensors, encode_tensors

from wearfleet_cloud.training.checkpoint import write_atomically

__all__ = ["load_model", "save_model"]


def save_model(model: Classifier, folder: Path) -> None:
    """Write a model into a folder, each file whole or not at all."""
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    write_atomically(folder / "model.json", (json.dumps(model.spec.to_dict(), indent=2) + "\n").encode())
    write_atomically(folder / "model.safetensors", encode_tensors(arrays))


def load_model(path: Path) -> Classifier:
    """Read a model, in evaluation mode.

    Args:
        path: ``model.safetensors`` or the folder that holds it; ``model.json`` lies beside it.

    Raises:
        NotFoundError: a file is missing.
        IntegrityError: a file is damaged.
        ShapeError: the tensors do not fit the network.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    description = file.with_name("model.json")
    for needed in (file, description):
        if not needed.is_file():
            raise NotFoundError(f"{needed} does not exist; give a run folder or its model.safetensors")
    try:
        model = build_classifier(ModelSpec(**json.loads(description.read_text())))
    except (ValueError, TypeError, ConfigError) as error:
        raise IntegrityError(f"{description} does not describe a model ({error})") from error
    tensors = decode_tensors(file.read_bytes(), tensor_specs(model))
    check_finite(tensors)
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in tensors.items()})
    return model.eval()
