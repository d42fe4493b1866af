"""Start values of a run: the model's initialisers, and zeros for what a strategy adds."""

import numpy as np
import onnx
import pytest
from wearfleet_cloud.service.run_setup import tensors_of_model
from wearfleet_protos.errors import IntegrityError
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

WEIGHT = TensorSpec("w", "float32", (2, 3), TensorRole.SHARED, TensorGroup.PARAM)
COUNTER = TensorSpec("n", "int64", (), TensorRole.COUNTER, TensorGroup.BUFFER)
CONTROL = TensorSpec("control/w", "float32", (2, 3), TensorRole.AUX, TensorGroup.ANCHOR, "global")


def graph(**initialisers: np.ndarray) -> bytes:
    made = [onnx.numpy_helper.from_array(array, name) for name, array in initialisers.items()]
    return bytes(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], made)).SerializeToString())


def test_control_variates_and_counters_begin_at_zero() -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = tensors_of_model(graph(w=weight), (WEIGHT, COUNTER, CONTROL))
    np.testing.assert_array_equal(tensors["w"], weight)
    np.testing.assert_array_equal(tensors["control/w"], np.zeros((2, 3), np.float32))
    assert tensors["n"] == 0


def test_a_model_without_one_of_its_tensors_is_refused() -> None:
    with pytest.raises(IntegrityError, match="initialiser 'w'"):
        tensors_of_model(graph(), (WEIGHT,))
