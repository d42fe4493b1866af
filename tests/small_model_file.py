"""A small valid model file and its manifest, for tests of the service."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from wearfleet_protos.manifest import MODEL_INPUT, MODEL_OUTPUTS, ModelManifest, metadata_of
from wearfleet_protos.plan import InputContract
from wearfleet_protos.recording import Channel
from wearfleet_protos.tensors import digest_of

SHAPES_OF_A_MODEL = {"scale": (2,)}
"""Shapes of the tensors of ``named_model`` that training would change."""

CONTRACT = InputContract((Channel("ax", "m/s2"), Channel("ay", "m/s2")), 50.0, 16, 8, ("walk", "rest"))


def named_model(version: int) -> tuple[bytes, ModelManifest]:
    """A small valid ONNX model: sums of a window as scores of two classes."""
    value = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("ReduceMean", [MODEL_INPUT, "axes"], ["embedding"], keepdims=0),
        onnx.helper.make_node("Mul", ["embedding", "scale"], ["logits"]),
        onnx.helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        onnx.helper.make_node("ReduceMax", ["logits", "last"], ["ood_score"], keepdims=0),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "model",
        [value(MODEL_INPUT, onnx.TensorProto.FLOAT, ["n", 2, 16])],
        [
            value(name, onnx.TensorProto.FLOAT, ["n"] if name == "ood_score" else ["n", 2])
            for name in MODEL_OUTPUTS
        ],
        [
            onnx.numpy_helper.from_array(np.array([2], np.int64), "axes"),
            onnx.numpy_helper.from_array(np.array([1], np.int64), "last"),
            onnx.numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "scale"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    values: dict[str, Any] = {
        "model_id": "har", "version": version, "contract": CONTRACT, "ood_method": "energy", "ood_threshold": 0.5,
        "tensors": (), "train_run": "t", "license": "none", "created_ns": 1, "simulated": True,
    }  # fmt: skip
    draft = ModelManifest(digest=digest_of(b"draft"), size_bytes=1, **values)
    onnx.helper.set_model_props(model, metadata_of(draft))
    data = model.SerializeToString(deterministic=True)
    return data, ModelManifest(digest=digest_of(data), size_bytes=len(data), **values)
