from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from wearfleet_protos.canonical import canonical_json
from wearfleet_protos.errors import IntegrityError, ProtocolError
from wearfleet_protos.manifest import METADATA_KEYS, ModelManifest, metadata_of
from wearfleet_protos.plan import PLAN_MEDIA_TYPE, InputBinding, Plan
from wearfleet_protos.signing import key_id_of, sign, verify
from wearfleet_protos.tensors import TensorRole
from wearfleet_protos.ticket import EnrolmentTicket

from protos import samples

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = KEY.public_key().public_bytes_raw()
TRUSTED = {key_id_of(PUBLIC): PUBLIC}


def test_a_plan_and_a_manifest_come_back_equal() -> None:
    assert Plan.from_bytes(samples.PLAN.to_bytes()) == samples.PLAN
    assert ModelManifest.from_bytes(samples.MANIFEST.to_bytes()) == samples.MANIFEST


def test_the_upload_holds_only_the_declared_roles_and_groups() -> None:
    assert [t.name for t in samples.PLAN.upload_specs()] == ["head.weight"]
    assert [t.name for t in samples.PLAN.local_specs()] == ["norm.running_mean"]
    assert [t.name for t in samples.PLAN.download_specs()] == ["head.weight", "norm.running_mean"]


def test_a_reordered_document_is_refused_because_its_signature_would_not_be_unique() -> None:
    loose = json.dumps(json.loads(samples.PLAN.to_bytes()), indent=1).encode()
    with pytest.raises(ProtocolError, match="canonical"):
        Plan.from_bytes(loose)


@pytest.mark.parametrize("field", ["phases", "tensors", "budget", "seed", "upload"])
def test_a_plan_without_a_field_is_refused_by_name(field: str) -> None:
    row = json.loads(samples.PLAN.to_bytes())
    del row[field]
    with pytest.raises(ProtocolError, match=field):
        Plan.from_bytes(canonical_json(row))


WRONG = [
    (field, value)
    for field in ("phases", "tensors", "budget", "upload", "contract", "keep_local")
    for value in (None, "x", [], {}, 1.5, [[1]])
    if not (
        field in ("tensors", "keep_local") and value in ([], {})
    )  # empty is another plan, not a wrong type
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_field_of_the_wrong_type_is_a_protocol_error(field: str, value: object) -> None:
    row = json.loads(samples.PLAN.to_bytes())
    row[field] = value
    with pytest.raises(ProtocolError):
        Plan.from_bytes(canonical_json(row))


def test_a_binding_to_an_unknown_tensor_is_refused() -> None:
    phase = replace(samples.PHASE, inputs=(InputBinding("p0", "state", "nothing"),))
    with pytest.raises(ProtocolError, match="nothing"):
        replace(samples.PLAN, phases=(phase,))


def test_a_role_cannot_be_both_private_and_uploaded() -> None:
    upload = replace(samples.PLAN.upload, roles=(TensorRole.NORM_STAT,))
    with pytest.raises(ProtocolError, match="both uploaded and kept local"):
        replace(samples.PLAN, upload=upload)


def test_a_signed_document_opens_with_the_right_key_and_type_only() -> None:
    document = sign(b"{}", KEY, PLAN_MEDIA_TYPE)
    assert verify(document, TRUSTED, PLAN_MEDIA_TYPE) == b"{}"
    with pytest.raises(IntegrityError, match="expected a document of type"):
        verify(document, TRUSTED, "application/other")
    with pytest.raises(IntegrityError, match="unknown key"):
        verify(document, {}, PLAN_MEDIA_TYPE)
    with pytest.raises(IntegrityError, match="at most 10"):
        verify(document, TRUSTED, PLAN_MEDIA_TYPE, max_bytes=10)


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_no_flipped_bit_of_a_signed_document_goes_unnoticed(position: int, bit: int) -> None:
    document = bytearray(sign(samples.MANIFEST.to_bytes(), KEY, PLAN_MEDIA_TYPE))
    document[position % len(document)] ^= 1 << bit
    try:
        payload = verify(bytes(document), TRUSTED, PLAN_MEDIA_TYPE)
    except IntegrityError:
        return
    assert payload == samples.MANIFEST.to_bytes()  # only the framing may differ, never what was signed


def test_the_metadata_of_a_model_has_every_key_of_the_contract() -> None:
    assert set(metadata_of(samples.MANIFEST)) == set(METADATA_KEYS)


def test_a_ticket_cut_short_while_copying_is_refused() -> None:
    text = EnrolmentTicket("127.0.0.1:1", "code", b"der").encode()
    assert EnrolmentTicket.decode(f"  {text}\n").code == "code"
    for broken in (text[:-5], text[5:], "", text + "!!"):
        with pytest.raises(ProtocolError, match="ticket"):
            EnrolmentTicket.decode(broken)
