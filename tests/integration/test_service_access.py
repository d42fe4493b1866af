"""Who gets in: enrolment, certificates, revocation, the model on offer, and how calls fail."""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
from typing import Any

import grpc
import onnx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from service_harness import (
    call_enrol,
    enrolled_device,
    enrolment_ticket,
    running_service,
    service_settings,
    signing_request,
)
from small_model_file import named_model
from wearfleet_cloud.fleet.identity import Authority
from wearfleet_cloud.fleet.registry import Registry
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.audit import verify_audit
from wearfleet_cloud.storage.device_records import find_device
from wearfleet_protos.errors import ConflictError, IntegrityError, ModelContractError
from wearfleet_protos.manifest import MANIFEST_MEDIA_TYPE, ModelManifest, metadata_of
from wearfleet_protos.signing import verify
from wearfleet_protos.tensors import digest_of
from wearfleet_protos.ticket import EnrolmentTicket
from wearfleet_protos.v1 import artifact_pb2, enrolment_pb2, enrolment_pb2_grpc, federation_pb2

pytestmark = pytest.mark.broker


@pytest.fixture
async def service(tmp_path):
    async with running_service(service_settings(tmp_path)) as started:
        yield started


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


async def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    code: grpc.StatusCode = caught.value.code()
    return code


async def test_a_ticket_works_once_for_one_key_but_a_lost_answer_can_be_repeated(service):
    ticket = await asyncio.to_thread(enrolment_ticket, service.settings, service.running.enrol)
    key = new_key()
    first = await call_enrol(ticket, signing_request(key))
    again = await call_enrol(ticket, signing_request(key))
    assert again.device_id == first.device_id
    assert first.cloud_address == service.running.cloud
    assert await code_of(call_enrol(ticket, signing_request(new_key()))) == grpc.StatusCode.PERMISSION_DENIED
    state = open_state(service.settings)
    with state.database.read() as connection:
        assert find_device(connection, first.device_id).name == "anna"
        assert verify_audit(connection) == 3
    state.database.close()


async def test_an_unknown_or_expired_ticket_and_a_broken_request_are_refused(service):
    ticket = await asyncio.to_thread(enrolment_ticket, service.settings, service.running.enrol, "anna", 1e-9)
    made_up = EnrolmentTicket(ticket.cloud_address, "made up", ticket.ca_der)
    for bad in (ticket, made_up):
        assert await code_of(call_enrol(bad, signing_request(new_key()))) == grpc.StatusCode.PERMISSION_DENIED
    good = await asyncio.to_thread(enrolment_ticket, service.settings, service.running.enrol)
    assert await code_of(call_enrol(good, b"junk")) == grpc.StatusCode.DATA_LOSS
    assert (await call_enrol(good, signing_request(new_key()))).device_id.startswith("anna-")


async def test_a_renewed_certificate_works_and_the_name_stays(service):
    anna = await enrolled_device(service)
    stub: Any = enrolment_pb2_grpc.EnrolmentServiceStub(anna.channel)
    key = new_key()
    renewed = await stub.RenewCertificate(
        enrolment_pb2.RenewCertificateRequest(csr_der=signing_request(key, "eve"))
    )
    await anna.close()
    anna.key_pem, anna.chain_pem = pem(key), renewed.certificate_chain_pem
    await anna.heartbeat()
    state = open_state(service.settings)
    with state.database.read() as connection:
        assert find_device(connection, anna.device_id).model_version == 3
    state.database.close()
    await anna.close()


@pytest.mark.parametrize("kind", ["expired", "foreign", "none"])
async def test_a_certificate_that_is_expired_foreign_or_missing_gets_nowhere(service, tmp_path, kind):
    anna = await enrolled_device(service)
    key = new_key()
    past = dt.datetime.now(dt.UTC) - dt.timedelta(days=60)
    folder = service.settings.service.state_dir / "keys" if kind == "expired" else tmp_path / "other"
    authority = Authority(folder)
    chain = authority.issue(signing_request(key), anna.device_id, "default", past).chain_pem
    if kind == "foreign":
        chain = authority.issue(
            signing_request(key), anna.device_id, "default", dt.datetime.now(dt.UTC)
        ).chain_pem
    with_certificate = grpc.ssl_channel_credentials(anna.ca_pem, pem(key), chain)
    credentials = grpc.ssl_channel_credentials(anna.ca_pem) if kind == "none" else with_certificate
    async with grpc.aio.secure_channel(service.running.cloud, credentials) as channel:
        anna._channel = channel
        assert await code_of(anna.heartbeat()) == grpc.StatusCode.UNAVAILABLE
        anna._channel = None
    if kind != "none":
        anna.key_pem, anna.chain_pem = pem(key), chain
        context = anna.tls_context(tmp_path)
        assert not await asyncio.to_thread(_mqtt_accepts, context, service.running.broker)
    await anna.close()


def _mqtt_accepts(context: ssl.SSLContext, broker: Any) -> bool:
    import socket

    try:
        with (
            socket.create_connection((broker.host, broker.port), timeout=5) as raw,
            context.wrap_socket(raw, server_hostname=broker.host) as secure,
        ):
            secure.sendall(b"\x10\x10\x00\x04MQTT\x04\x02\x00\x3c\x00\x04anna")
            return len(secure.recv(4)) == 4
    except OSError:
        return False


async def test_a_certificate_of_our_authority_for_a_device_that_was_never_enrolled_is_denied(service):
    anna = await enrolled_device(service)
    authority = Authority(service.settings.service.state_dir / "keys")
    key = new_key()
    issued = authority.issue(signing_request(key), "ghost-0000", "default", dt.datetime.now(dt.UTC))
    anna.key_pem, anna.chain_pem = pem(key), issued.chain_pem
    assert await code_of(anna.heartbeat()) == grpc.StatusCode.PERMISSION_DENIED
    await anna.close()


async def test_junk_requests_are_invalid_arguments_and_unknown_artifacts_are_not_found(service):
    anna = await enrolled_device(service)
    junk = anna.channel.unary_unary("/wearfleet.v1.FederationService/DeclineTask")
    assert await code_of(junk(b"\xff\xff\xff")) == grpc.StatusCode.INVALID_ARGUMENT
    assert await code_of(anna.download(digest_of(b"nothing"))) == grpc.StatusCode.NOT_FOUND
    assert await code_of(anna.stat("../../etc/passwd")) == grpc.StatusCode.DATA_LOSS
    upload = anna.channel.stream_unary("/wearfleet.v1.ArtifactService/UploadArtifact")
    chunk = artifact_pb2.UploadArtifactRequest(chunk=artifact_pb2.Chunk(offset=0, data=b"x", crc32c=1))
    assert await code_of(upload(iter([chunk.SerializeToString()]))) == grpc.StatusCode.INVALID_ARGUMENT
    too_large = federation_pb2.DeclineTaskRequest(reason="x" * 5_000_000).SerializeToString()
    decline = anna.channel.unary_unary("/wearfleet.v1.FederationService/DeclineTask")
    assert await code_of(decline(too_large)) == grpc.StatusCode.RESOURCE_EXHAUSTED
    await anna.close()


async def test_an_error_carries_its_kind_and_whether_to_try_again(service):
    from google.rpc.error_details_pb2 import ErrorInfo
    from google.rpc.status_pb2 import Status

    anna = await enrolled_device(service)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anna.download(digest_of(b"nothing"))
    details = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
    info = ErrorInfo()
    assert Status.FromString(details).details[0].Unpack(info)
    assert (info.reason, info.domain, info.metadata["retryable"]) == ("NotFoundError", "wearfleet", "false")
    await anna.close()


async def test_health_says_not_serving_before_the_service_stops(tmp_path):
    async with running_service(service_settings(tmp_path)) as service:
        anna = await enrolled_device(service)
        stub: Any = health_pb2_grpc.HealthStub(anna.channel)
        check = health_pb2.HealthCheckRequest(service="wearfleet.v1.FederationService")
        assert (await stub.Check(check)).status == health_pb2.HealthCheckResponse.SERVING
        waiting = asyncio.create_task(anna.poll(30.0))
        watch = stub.Watch(check)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.create_task(service.stop())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        assert await waiting is None  # a waiting device gets its answer, not an error
        await stopping
        await anna.close()


async def test_a_published_model_reaches_the_devices_and_only_newer_versions_follow(service):
    anna = await enrolled_device(service)
    assert (await anna.heartbeat()).desired.manifest_digest == ""
    state = open_state(service.settings)
    registry = Registry(state.database, state.blobs, state.keys)
    model, manifest = named_model(2)
    await asyncio.to_thread(registry.publish, model, manifest, 1)
    wanted = (await anna.heartbeat()).desired
    while not wanted.manifest_digest:  # the service looks twice a second; the test has a time limit
        await asyncio.sleep(0.05)
        wanted = (await anna.heartbeat()).desired
    assert wanted.model_version == 2
    document = await anna.download(wanted.manifest_digest)
    assert len(document) == wanted.manifest_bytes
    received = ModelManifest.from_bytes(verify(document, anna.keys, MANIFEST_MEDIA_TYPE))
    assert received == manifest
    assert await anna.download(received.digest) == model
    with pytest.raises(ConflictError, match="version 2"):
        await asyncio.to_thread(registry.publish, *named_model(2), 2)
    state.database.close()
    await anna.close()


async def test_a_tampered_model_is_refused_when_it_is_published_and_when_it_is_read(tmp_path):
    state = open_state(service_settings(tmp_path))
    model, manifest = named_model(1)
    with pytest.raises(ModelContractError):
        state.registry.publish(model[:-1] + b"!", manifest, 1)
    other = onnx.load_model_from_string(model)
    onnx.helper.set_model_props(other, metadata_of(manifest) | {"wearfleet.rate_hz": "51.0"})
    data = other.SerializeToString()
    lying = ModelManifest(**{**_fields(manifest), "digest": digest_of(data), "size_bytes": len(data)})
    with pytest.raises(ModelContractError, match="rate_hz"):
        state.registry.publish(data, lying, 1)
    published = state.registry.publish(model, manifest, 1)
    name = published.manifest_digest.removeprefix("sha256:")
    file = tmp_path / "artifacts" / "complete" / name[:2] / name[2:]
    file.write_bytes(file.read_bytes().replace(b"har", b"hat"))
    with pytest.raises(IntegrityError, match="changed"):
        state.registry.current()
    state.database.close()


def _fields(manifest: ModelManifest) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in ModelManifest.__dataclass_fields__}
