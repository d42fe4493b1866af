"""What the cloud exports, the agent's own runtime loads, recognises with and personalises."""

from __future__ import annotations

import numpy as np
from wearfleet_cloud.export.quantize import quantize
from wearfleet_cloud.export.scored_classifier import fit_ood, outputs_of, scored_classifier
from wearfleet_edge.runtime import Personal, Recogniser


def test_device_recognises_as_torch_does(example):
    manifest = example.release.manifest
    device = Recogniser(example.release.data, manifest)
    ood = fit_ood(
        example.model, example.x, example.y, example.x_validation, method=manifest.ood_method, rank=8
    )
    expected = outputs_of(scored_classifier(example.model, ood), example.x_validation[:20])
    for index, window in enumerate(example.x_validation[:20]):
        answer = device.recognise(window)
        np.testing.assert_allclose(answer.probabilities, expected["probabilities"][index], atol=2e-4)
        np.testing.assert_allclose(answer.ood_score, expected["ood_score"][index], rtol=1e-3, atol=1e-3)
        assert answer.out_of_distribution == (answer.ood_score > manifest.ood_threshold)


def test_whole_state_dict_personalises_a_device_and_the_same_values_change_nothing(cnn):
    tensors = {name: tensor.numpy() for name, tensor in cnn.model.state_dict().items()}
    plain = Recogniser(cnn.release.data, cnn.release.manifest)
    same = Recogniser(cnn.release.data, cnn.release.manifest, Personal(tensors, 1.0))
    changed = Recogniser(
        cnn.release.data,
        cnn.release.manifest,
        Personal(
            {"backbone.norm1.running_mean": tensors["backbone.norm1.running_mean"] + np.float32(1.0)}, 1.0
        ),
    )
    window = cnn.x_validation[0]
    np.testing.assert_array_equal(same.recognise(window).probabilities, plain.recognise(window).probabilities)
    assert np.abs(changed.recognise(window).ood_score - plain.recognise(window).ood_score) > 1e-2


def test_device_loads_the_int8_model(example):
    small = quantize(
        example.release.data,
        example.release.manifest,
        x=example.x,
        y=example.y,
        x_validation=example.x_validation,
        y_validation=example.y_validation,
        budget=0.05,
    )
    answer = Recogniser(small.data, small.manifest).recognise(example.x_validation[0])
    assert abs(float(answer.probabilities.sum()) - 1.0) < 1e-5
