"""Codecs of updates and downloads: from tensors to few bytes at one end, and back at the other; NumPy alone.

What a codec loses is either right in the mean (int8) or kept on the device and added to the next update
(``Residual``). Specification: specs/federated.md section 19.
"""

from wearfleet_protos.codecs.declaration import FLOAT32, PARAMETERS, UpdateCodec
from wearfleet_protos.codecs.download import MOST_STEPS, DownloadFormat, frozen_bytes
from wearfleet_protos.codecs.family import Turn
from wearfleet_protos.codecs.residual import Residual
from wearfleet_protos.codecs.update import FEEDBACK, Encoded, UpdateFormat, is_coded

__all__ = [
    "FEEDBACK",
    "FLOAT32",
    "MOST_STEPS",
    "PARAMETERS",
    "DownloadFormat",
    "Encoded",
    "Residual",
    "Turn",
    "UpdateCodec",
    "UpdateFormat",
    "frozen_bytes",
    "is_coded",
]
