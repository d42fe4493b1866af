"""The gRPC client against a real server with mutual TLS: transfers that break, refusals, and who is let in."""

import time
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from edge.simulators import (
    DEVICE,
    Authority,
    GrpcService,
    Signer,
    SimulatedCloud,
    enrolled_state,
    serve,
)
from ports import free_port
from wearfleet_edge.artifacts import ArtifactStore
from wearfleet_edge.enrolment import enrol_device
from wearfleet_edge.heartbeat import renew_if_due
from wearfleet_edge.identity import (
    certificate_validity,
    load_enrolment,
    require_valid_certificate,
)
from wearfleet_edge.state import StateDirectory
from wearfleet_edge.transport.backoff import Backoff
from wearfleet_edge.transport.cloud import ReceiptStatus, Reported, Stage, Submission, Task
from wearfleet_edge.transport.rpc import RpcCloud, translate_error
from wearfleet_protos.chunks import CHUNK_BYTES
from wearfleet_protos.errors import (
    ConfigError,
    ConflictError,
    DataError,
    DeniedError,
    IntegrityError,
    NotFoundError,
    ProtocolError,
    TransportError,
)
from wearfleet_protos.tensors import digest_of
from wearfleet_protos.ticket import EnrolmentTicket

BIG = bytes(range(256)) * (2 * CHUNK_BYTES // 256) + b"the end"


@pytest.fixture(scope="module")
def service():
    with serve(GrpcService(SimulatedCloud(), Authority(), Signer())) as running:
        yield running


@pytest.fixture
def cloud(service, tmp_path):
    client = RpcCloud.of_device(*enrolled_state(tmp_path / "device", service.authority, service.address))
    yield client
    client.close()


def test_a_download_in_chunks_gives_the_same_bytes(service, cloud, tmp_path):
    digest = service.cloud.add(BIG)
    cloud.download(digest, tmp_path / "part", len(BIG))
    assert (tmp_path / "part").read_bytes() == BIG


def test_a_download_that_was_cut_goes_on_at_its_offset(service, cloud, tmp_path):
    digest = service.cloud.add(BIG)
    service.fault = "cut"
    with pytest.raises(TransportError) as caught:
        cloud.download(digest, tmp_path / "part", len(BIG))
    assert caught.value.retryable
    assert (tmp_path / "part").stat().st_size == CHUNK_BYTES
    service.downloads.clear()
    cloud.download(digest, tmp_path / "part", len(BIG))
    assert service.downloads == [CHUNK_BYTES]
    assert (tmp_path / "part").read_bytes() == BIG


@pytest.mark.parametrize(("fault", "error"), [("crc", TransportError), ("offset", ProtocolError)])
def test_a_damaged_chunk_is_refused_and_not_written(service, cloud, tmp_path, fault, error):
    digest = service.cloud.add(BIG)
    service.fault = fault
    with pytest.raises(error):
        cloud.download(digest, tmp_path / "part", len(BIG))
    assert (tmp_path / "part").stat().st_size == 0


def test_a_larger_artifact_than_promised_is_refused(service, cloud, tmp_path):
    digest = service.cloud.add(BIG)
    with pytest.raises(IntegrityError, match="larger"):
        cloud.download(digest, tmp_path / "part", CHUNK_BYTES)


def test_an_unknown_artifact_is_not_found(cloud, tmp_path):
    with pytest.raises(NotFoundError):
        cloud.download(digest_of(b"nothing"), tmp_path / "part", 10)


def test_an_upload_that_was_cut_goes_on_where_the_server_stopped(service, cloud):
    data = BIG + b"mine"
    service.fault = "cut"
    with pytest.raises(TransportError):
        cloud.upload(digest_of(data), data)
    cloud.upload(digest_of(data), data)
    assert service.cloud.blobs[digest_of(data)] == data
    cloud.upload(digest_of(data), b"")  # complete already: nothing is sent


def test_a_task_goes_through_all_its_calls(service, cloud):
    digest = digest_of(b"x")
    task = Task("run-9", 4, "attempt-4", True, digest, 1, digest, 2, 30.0)
    service.cloud.tasks.append(task)
    assert cloud.poll_task(0.0, "").task == task
    assert cloud.report_stage(task, Stage.TRAINING)
    submission = Submission("run-9", 4, "attempt-4", "", digest, 7, 3, {"train/count": 7.0}, 0.5, True)
    assert cloud.submit(submission, b"").status is ReceiptStatus.ACCEPTED
    seen = service.cloud.submissions[-1]
    assert (seen.run_id, seen.round, seen.num_examples, dict(seen.metrics)) == (
        "run-9",
        4,
        7,
        {"train/count": 7.0},
    )
    assert cloud.poll_task(0.0, "").task is None
    cloud.decline(task, "r" * 1000)
    assert service.cloud.declined[-1] == ("attempt-4", "r" * 500)


def test_heartbeat_carries_state_both_ways(service, cloud):
    service.cloud.want(b"manifest", 5)
    reply = cloud.heartbeat(Reported("1.0", "sha256:" + "0" * 64, 4, personalised=True, refusal="because"))
    assert reply.desired == service.cloud.desired
    assert abs(reply.server_unix_ns - time.time_ns()) < 5e9
    assert service.cloud.reported[-1].refusal == "because"


def test_a_service_that_is_not_there_is_a_retryable_error(tmp_path):
    cloud = RpcCloud.of_device(*enrolled_state(tmp_path, Authority(), f"127.0.0.1:{free_port()}"))
    with pytest.raises(TransportError, match="UNAVAILABLE") as caught:
        cloud.heartbeat(Reported("1", "", 0, personalised=False, refusal=""))
    assert caught.value.retryable
    cloud.close()


def test_a_closed_client_raises_our_error(service, tmp_path):
    cloud = RpcCloud.of_device(*enrolled_state(tmp_path, service.authority, service.address))
    cloud.close()
    with pytest.raises(TransportError, match="closed"):
        cloud.heartbeat(Reported("1", "", 0, personalised=False, refusal=""))


def test_a_service_of_another_authority_is_not_trusted(service, tmp_path):
    cloud = RpcCloud.of_device(*enrolled_state(tmp_path, Authority("foreign"), service.address))
    with pytest.raises(TransportError, match="another authority") as caught:
        cloud.heartbeat(Reported("1", "", 0, personalised=False, refusal=""))
    assert not caught.value.retryable
    cloud.close()


def test_a_device_with_an_expired_certificate_is_told_before_it_calls(service, tmp_path):
    now = datetime.now(UTC)
    dates = {"begin": now - timedelta(days=60), "end": now - timedelta(days=30)}
    state, enrolment = enrolled_state(tmp_path, service.authority, service.address, **dates)
    with pytest.raises(ConfigError, match=r"expired on .* enrol again"):
        require_valid_certificate(state, now)
    with pytest.raises(ConfigError, match="set the clock"):
        require_valid_certificate(state, now - timedelta(days=90))
    cloud = RpcCloud.of_device(state, enrolment)
    with pytest.raises(TransportError):
        cloud.heartbeat(Reported("1", "", 0, personalised=False, refusal=""))
    cloud.close()


def test_a_certificate_is_renewed_at_half_of_its_life_and_used(service, tmp_path):
    now = datetime.now(UTC)
    state, enrolment = enrolled_state(
        tmp_path,
        service.authority,
        service.address,
        begin=now - timedelta(days=16),
        end=now + timedelta(days=14),
    )
    cloud = RpcCloud.of_device(state, enrolment)
    assert not renew_if_due(cloud, state, DEVICE, now - timedelta(days=2))
    assert renew_if_due(cloud, state, DEVICE, now)
    assert certificate_validity(state)[1] > now + timedelta(days=29)
    cloud.reopen()
    cloud.heartbeat(Reported("1", "", 0, personalised=False, refusal=""))
    cloud.close()


def test_a_renewed_certificate_for_another_key_or_name_is_refused(service, tmp_path):
    now = datetime.now(UTC)
    state, _ = enrolled_state(
        tmp_path,
        service.authority,
        service.address,
        begin=now - timedelta(days=16),
        end=now + timedelta(days=14),
    )
    before = state.certificate.read_bytes()
    other_key = ec.generate_private_key(ec.SECP256R1()).public_key()
    fake = SimulatedCloud(renew=lambda _csr: service.authority.issue(other_key, DEVICE))
    with pytest.raises(IntegrityError, match="another key"):
        renew_if_due(fake, state, DEVICE, now)
    fake.renew = lambda csr: service.authority.issue_for_request(csr, "mallory-0000")
    with pytest.raises(IntegrityError, match="mallory"):
        renew_if_due(fake, state, DEVICE, now)
    assert state.certificate.read_bytes() == before


@pytest.fixture
def enrolment_service():
    service = GrpcService(SimulatedCloud(), Authority(), Signer())
    with serve(service, require_certificate=False):
        yield service


def _ticket(service, code="right-code", authority=None):
    return EnrolmentTicket(service.address, code, (authority or service.authority).der).encode()


def test_enrolment_makes_a_key_here_and_stores_the_identity(enrolment_service, tmp_path):
    state = StateDirectory(tmp_path / "device")
    enrolled = enrol_device(state, _ticket(enrolment_service))
    assert load_enrolment(state) == enrolled
    assert enrolled.device_id == DEVICE
    assert enrolled.signing_keys == enrolment_service.signer.keys
    assert state.key.stat().st_mode & 0o777 == 0o600
    key = serialization.load_pem_private_key(state.key.read_bytes(), None)
    assert isinstance(key.curve, ec.SECP256R1)


def test_a_directory_enrols_only_once(enrolment_service, tmp_path):
    state = StateDirectory(tmp_path / "device")
    enrol_device(state, _ticket(enrolment_service))
    enrolment_service.codes.add("another")
    with pytest.raises(ConflictError, match=DEVICE):
        enrol_device(state, _ticket(enrolment_service, "another"))
    assert "another" in enrolment_service.codes  # the code was not used up


def test_a_wrong_or_used_code_is_denied_and_leaves_the_device_unenrolled(enrolment_service, tmp_path):
    state = StateDirectory(tmp_path / "device")
    with pytest.raises(DeniedError, match="wrong, used or expired"):
        enrol_device(state, _ticket(enrolment_service, "guess"))
    with pytest.raises(NotFoundError, match="not enrolled"):
        load_enrolment(state)
    enrol_device(state, _ticket(enrolment_service))  # the next try works with the same key


def test_a_server_that_is_not_the_tickets_authority_is_not_enrolled_with(enrolment_service, tmp_path):
    with pytest.raises(TransportError, match="another authority"):
        enrol_device(StateDirectory(tmp_path), _ticket(enrolment_service, authority=Authority("foreign")))


def test_a_damaged_ticket_is_said(tmp_path):
    with pytest.raises(ProtocolError, match="ticket"):
        enrol_device(StateDirectory(tmp_path), "wfe1.damaged")


def test_a_damaged_identity_says_to_enrol_again(service, tmp_path):
    state, _ = enrolled_state(tmp_path, service.authority, service.address)
    state.enrolment.write_text('{"tenant": "home"}')
    with pytest.raises(DataError, match="enrol again"):
        load_enrolment(state)


class _Failed(grpc.RpcError):
    def __init__(self, code):
        self._code = code

    def code(self):
        return self._code

    def details(self):
        return "the reason"


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_becomes_an_error_of_ours(code):
    error = translate_error(_Failed(code), "try", "host:1")
    wanted = {
        "UNAUTHENTICATED": DeniedError,
        "PERMISSION_DENIED": DeniedError,
        "NOT_FOUND": NotFoundError,
        "FAILED_PRECONDITION": ConflictError,
        "ALREADY_EXISTS": ConflictError,
        "ABORTED": ConflictError,
        "INVALID_ARGUMENT": ProtocolError,
        "OUT_OF_RANGE": ProtocolError,
        "UNIMPLEMENTED": ProtocolError,
        "DATA_LOSS": IntegrityError,
    }.get(code.name, TransportError)
    assert type(error) is wanted


def test_an_artifact_that_is_needed_once_resumes_in_memory_and_never_touches_the_disk(
    service, cloud, tmp_path
):
    digest = service.cloud.add(BIG)
    store = ArtifactStore(tmp_path / "artifacts", cloud, Backoff(0.0, 0.0, lambda: 0.0), lambda _: False)
    service.fault = "cut"
    service.downloads.clear()
    assert store.fetch_once(digest, len(BIG)) == BIG
    assert service.downloads == [0, CHUNK_BYTES]
    assert list((tmp_path / "artifacts").iterdir()) == []
    with pytest.raises(IntegrityError, match="damaged"):
        store.fetch_once(digest, len(BIG), arrived=b"something else")
