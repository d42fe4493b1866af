"""Processor time of encoding and decoding an update in each codec: ``python tests/benchmarks/codec_times.py``.

One matrix of 1 024 x 1 024 float32; the median of 9 runs in milliseconds of processor time, so other processes matter
little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
from wearfleet_protos.codecs import Residual, UpdateCodec, UpdateFormat
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

CODECS = (
    UpdateCodec("float32"),
    UpdateCodec("fp16"),
    UpdateCodec("bf16"),
    UpdateCodec("int8"),
    UpdateCodec("int4"),
    UpdateCodec("topk", fraction=0.01),
    UpdateCodec("randk", fraction=0.01),
    UpdateCodec("sign"),
    UpdateCodec("powersgd", rank=2),
)


def milliseconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(9):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return 1e3 * median(times)


def main() -> None:
    specs = (TensorSpec("w", "float32", (1024, 1024), TensorRole.SHARED, TensorGroup.PARAM),)
    update = {"w": np.random.default_rng(0).normal(0, 1e-3, (1024, 1024)).astype(np.float32)}
    print("| codec | bytes | encode, ms | decode, ms |\n|---|---:|---:|---:|")
    for codec in CODECS:
        way = UpdateFormat(specs, codec, 0)
        data = way.encode(update, Residual(), round_number=1, client="x").data
        encode = milliseconds(lambda: way.encode(update, Residual(), round_number=1, client="x"))  # noqa: B023
        decode = milliseconds(lambda: way.decode(data))  # noqa: B023
        print(f"| {codec.name} | {len(data):,} | {encode:.1f} | {decode:.1f} |")


if __name__ == "__main__":
    main()
