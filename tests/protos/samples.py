"""One fixed example of every document and message; the golden vectors are made of these."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from wearfleet_protos.codecs import Residual, UpdateCodec, UpdateFormat
from wearfleet_protos.manifest import ModelManifest
from wearfleet_protos.messages import (
    ClockQuality,
    DeviceStatus,
    Header,
    Health,
    Prediction,
    SensorWindow,
)
from wearfleet_protos.plan import (
    Budget,
    InputBinding,
    InputContract,
    Loop,
    OutputBinding,
    Phase,
    Plan,
    UploadSpec,
)
from wearfleet_protos.recording import Channel
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec, digest_of

HEADER = Header(
    "anna-1f3a",
    "0123456789abcdef",
    7,
    "00112233445566778899aabbccddeeff",
    1_700_000_000_000_000_000,
    ClockQuality.REPLAY,
)
WINDOW = SensorWindow(
    HEADER, 448, 50.0, np.array([[0.0, 1.0, -1.0, 0.5], [9.75, 9.5, 10.0, 9.8125]], np.float32)
)
PREDICTION = Prediction(
    HEADER,
    448,
    "sha256:" + "ab" * 32,
    3,
    True,
    1,
    np.array([0.25, 0.5, 0.25], np.float32),
    -1.5,
    False,
    21_000,
    2,
)
HEALTH = Health(HEADER, 12.5, 80_000_000, 3, 0, 448, 21.0, 38.0, "sha256:" + "ab" * 32, 3)
STATUS = DeviceStatus(HEADER, online=True, reason="birth", agent_version="0.1.0")

CONTRACT = InputContract((Channel("acc_x", "m/s^2"), Channel("acc_y", "m/s^2")), 50.0, 4, 2, ("walk", "sit"))
TENSORS = (
    TensorSpec("head.weight", "float32", (2, 3), TensorRole.HEAD, TensorGroup.PARAM),
    TensorSpec("norm.running_mean", "float32", (3,), TensorRole.NORM_STAT, TensorGroup.BUFFER, "local"),
    TensorSpec("momentum/head.weight", "float32", (2, 3), TensorRole.AUX, TensorGroup.OPTIMISER, "zeros"),
    TensorSpec(
        "anchor/head.weight", "float32", (2, 3), TensorRole.AUX, TensorGroup.ANCHOR, "copy", "head.weight"
    ),
)
PHASE = Phase(
    name="train",
    graph=digest_of(b"graph"),
    graph_bytes=5,
    inputs=(
        InputBinding("p0", "state", "head.weight"),
        InputBinding("x", "batch", "x"),
        InputBinding("lr", "scalar", "lr"),
    ),
    outputs=(
        OutputBinding("p0_new", "state", "head.weight"),
        OutputBinding("loss", "metric", "loss_sum", "sum"),
    ),
    loop=Loop("train", 32, 1, 0, shuffle=True),
    scalars=(("lr", 0.01),),
)
PLAN = Plan(
    plan_id="demo-1",
    strategy="fedbn",
    strategy_version=1,
    model_schema_hash=digest_of(b"schema"),
    contract=CONTRACT,
    tensors=TENSORS,
    phases=(PHASE,),
    upload=UploadSpec((TensorRole.SHARED, TensorRole.HEAD), (TensorGroup.PARAM,), "delta"),
    keep_local=(TensorRole.NORM_STAT,),
    budget=Budget(60.0, 1_000_000, 1),
    seed=11,
)
MANIFEST = ModelManifest(
    model_id="har",
    version=2,
    digest=digest_of(b"model"),
    size_bytes=5,
    contract=CONTRACT,
    ood_method="energy",
    ood_threshold=1.25,
    tensors=TENSORS[:1],
    train_run="run-1",
    license="research",
    created_ns=1_700_000_000_000_000_000,
    simulated=True,
)

CODECS = {
    "fp16": UpdateCodec("fp16"),
    "bf16": UpdateCodec("bf16"),
    "int8": UpdateCodec("int8"),
    "int4": UpdateCodec("int4"),
    "topk": UpdateCodec("topk", fraction=0.05, warmup_rounds=2),
    "randk": UpdateCodec("randk", fraction=0.05),
    "sign": UpdateCodec("sign"),
    "powersgd": UpdateCodec("powersgd", rank=1),
}
UPDATE_SPECS = (
    TensorSpec("b", "float32", (3,), TensorRole.SHARED, TensorGroup.PARAM),
    TensorSpec("n", "int64", (), TensorRole.COUNTER, TensorGroup.BUFFER),
    TensorSpec("w", "float32", (20, 16), TensorRole.SHARED, TensorGroup.PARAM),
)
UPDATE = {
    "b": np.array([1.5, -2.0, 0.25], np.float32),
    "n": np.array(7, np.int64),
    "w": np.outer(np.arange(20) - 9, np.arange(16) - 4).astype(np.float32) / 1024,
}
"""An update whose matrix has rank 1."""


def plan_with(codec: str) -> Plan:
    return replace(PLAN, upload=replace(PLAN.upload, codec=CODECS[codec]))


def update_format(codec: str) -> UpdateFormat:
    return UpdateFormat(UPDATE_SPECS, CODECS[codec], 11)


def encoded_update(codec: str) -> bytes:
    return update_format(codec).encode(UPDATE, Residual(), round_number=2, client="attempt-1").data
