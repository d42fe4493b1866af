"""Old bytes decode forever, and equal values give the same bytes.

``WEARFLEET_WRITE_GOLDEN=1 pytest tests/protos/test_golden_wire.py`` writes the vectors; review the difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from wearfleet_protos import codec
from wearfleet_protos.manifest import MANIFEST_MEDIA_TYPE, ModelManifest
from wearfleet_protos.plan import Plan
from wearfleet_protos.signing import key_id_of, sign, verify
from wearfleet_protos.ticket import EnrolmentTicket

from protos import samples

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "wire"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
TICKET = EnrolmentTicket("127.0.0.1:7443", "code", b"certificate")

CASES: dict[str, tuple[Callable[[], bytes], Callable[[bytes], object]]] = {
    "window_int16_v1.bin": (lambda: codec.encode(samples.WINDOW), codec.decode_window),
    "window_float32_v1.bin": (lambda: codec.encode(samples.WINDOW, "float32"), codec.decode_window),
    "prediction_v1.bin": (lambda: codec.encode(samples.PREDICTION), codec.decode_prediction),
    "health_v1.bin": (lambda: codec.encode(samples.HEALTH), codec.decode_health),
    "status_v1.bin": (lambda: codec.encode(samples.STATUS), codec.decode_status),
    "plan_v1.json": (samples.PLAN.to_bytes, Plan.from_bytes),
    "manifest_v1.json": (samples.MANIFEST.to_bytes, ModelManifest.from_bytes),
    "signed_manifest_v1.bin": (
        lambda: sign(samples.MANIFEST.to_bytes(), KEY, MANIFEST_MEDIA_TYPE),
        lambda data: ModelManifest.from_bytes(
            verify(
                data,
                {key_id_of(KEY.public_key().public_bytes_raw()): KEY.public_key().public_bytes_raw()},
                MANIFEST_MEDIA_TYPE,
            )
        ),
    ),
    "ticket_v1.txt": (lambda: TICKET.encode().encode(), lambda data: EnrolmentTicket.decode(data.decode())),
}
EXACT = sorted(samples.CODECS.keys() - {"powersgd"})
"""The bytes of powersgd depend on how a machine rounds matrix products; what they decode to is tested below."""
CASES |= {
    f"update_{name}_v1.bin": (partial(samples.encoded_update, name), samples.update_format(name).decode)
    for name in EXACT
}
CASES |= {
    f"plan_{name}_v1.json": (samples.plan_with(name).to_bytes, Plan.from_bytes)
    for name in ("topk", "powersgd")
}
EXPECTED = {
    "plan_topk_v1.json": samples.plan_with("topk"),
    "plan_powersgd_v1.json": samples.plan_with("powersgd"),
    "plan_v1.json": samples.PLAN,
    "manifest_v1.json": samples.MANIFEST,
    "ticket_v1.txt": TICKET,
    "signed_manifest_v1.bin": samples.MANIFEST,
    "health_v1.bin": samples.HEALTH,
    "status_v1.bin": samples.STATUS,
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_bytes_on_the_wire_never_change(name: str) -> None:
    write, read = CASES[name]
    path = GOLDEN / name
    if os.environ.get("WEARFLEET_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(write())
    assert path.read_bytes() == write()
    decoded = read(path.read_bytes())
    if name in EXPECTED:
        assert decoded == EXPECTED[name]


@pytest.mark.parametrize("name", sorted(samples.CODECS))
def test_old_updates_decode_to_what_they_were(name: str) -> None:
    path = GOLDEN / f"update_{name}_v1.bin"
    if os.environ.get("WEARFLEET_WRITE_GOLDEN") and not path.exists():
        path.write_bytes(samples.encoded_update(name))
    found = samples.update_format(name).decode(path.read_bytes())
    for exact in ("b", "n"):
        np.testing.assert_array_equal(found[exact], samples.UPDATE[exact])
    wanted = samples.UPDATE["w"]
    largest = float(np.abs(wanted).max())
    # one level of int8 and int4; the others are exact here (11 and 8 bits hold these products of small integers), keep
    # some numbers only, or have rank 1
    level = {"int8": largest / 127, "int4": largest / 7}.get(name, 1e-6 * largest)
    if name in ("topk", "randk"):
        sent = found["w"] != 0
        assert 0 < sent.sum() <= samples.CODECS[name].count(wanted.size, 2)
        np.testing.assert_array_equal(found["w"][sent], wanted[sent])
    elif name == "sign":
        np.testing.assert_array_equal(found["w"] >= 0, wanted >= 0)
    else:
        assert np.abs(found["w"] - wanted).max() <= level * (1 + 1e-6)
