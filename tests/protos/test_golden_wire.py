"""Old bytes decode forever, and equal values give the same bytes.

``WEARFLEET_WRITE_GOLDEN=1 pytest tests/protos/test_golden_wire.py`` writes the vectors; review the difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

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
EXPECTED = {
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
