"""Export: one ONNX file that is the whole model, checked against torch, optionally in int8."""

from wearfleet_cloud.export.release import Release, export_classifier
from wearfleet_cloud.export.to_onnx import ReleaseInfo, write_release

__all__ = ["Release", "ReleaseInfo", "export_classifier", "write_release"]
