# ruff: noqa: N802  gRPC methods have the names of the protocol
"""Stand-ins for what an agent talks to: a cloud in memory, the same cloud behind real gRPC, a certificate authority."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from wearfleet_edge.identity import Broker, Enrolment, make_key, make_signing_request, save_enrolment
from wearfleet_edge.state import StateDirectory
from wearfleet_edge.transport.cloud import Desired, HeartbeatReply, PollReply, Receipt, ReceiptStatus
from wearfleet_protos.chunks import CHUNK_BYTES, crc32c
from wearfleet_protos.errors import NotFoundError, TransportError
from wearfleet_protos.manifest import MANIFEST_MEDIA_TYPE
from wearfleet_protos.plan import PLAN_MEDIA_TYPE
from wearfleet_protos.signing import key_id_of, sign
from wearfleet_protos.tensors import digest_of
from wearfleet_protos.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    enrolment_pb2,
    enrolment_pb2_grpc,
    federation_pb2,
    federation_pb2_grpc,
    fleet_pb2,
    fleet_pb2_grpc,
)

DEVICE = "anna-1f3a"


class Signer:
    """An Ed25519 key with the trust store that goes with it."""

    def __init__(self):
        self.key = Ed25519PrivateKey.generate()
        raw = self.key.public_key().public_bytes_raw()
        self.keys = {key_id_of(raw): raw}

    def manifest(self, manifest):
        return sign(manifest.to_bytes(), self.key, MANIFEST_MEDIA_TYPE)

    def plan(self, plan):
        return sign(plan.to_bytes(), self.key, PLAN_MEDIA_TYPE)


@dataclass
class SimulatedCloud:
    """The service in memory. ``broken`` calls raise; ``cut_after`` ends each download after so many bytes."""

    blobs: dict = field(default_factory=dict)
    tasks: list = field(default_factory=list)
    desired: Desired = field(default_factory=lambda: Desired("", 0, 0))
    submissions: list = field(default_factory=list)
    declined: list = field(default_factory=list)
    reported: list = field(default_factory=list)
    stages: list = field(default_factory=list)
    receipt: Receipt = field(default_factory=lambda: Receipt(ReceiptStatus.ACCEPTED, ""))
    broken: set = field(default_factory=set)
    cut_after: int = 0
    renew: object = None
    held: tuple = ()

    def add(self, data):
        digest = digest_of(data)
        self.blobs[digest] = data
        return digest

    def want(self, signed_manifest, version):
        self.desired = Desired(self.add(signed_manifest), len(signed_manifest), version)

    def _maybe_fail(self, call):
        if call in self.broken:
            raise TransportError(f"{call} is broken")

    def heartbeat(self, reported):
        self._maybe_fail("heartbeat")
        self.reported.append(reported)
        return HeartbeatReply(self.desired, time.time_ns(), 0.2)

    def poll_task(self, wait_s, manifest_digest, held=()):
        self._maybe_fail("poll_task")
        self.held = tuple(held)
        return PollReply(self.tasks[0] if self.tasks else None, 0.1)

    def report_stage(self, task, stage):
        self._maybe_fail("report_stage")
        self.stages.append((task.attempt_id, stage))
        return True

    def submit(self, submission, update):
        self._maybe_fail("submit")
        if update:
            self.add(update)
        self.submissions.append(submission)
        self.tasks = [t for t in self.tasks if t.attempt_id != submission.attempt_id]
        if "submit_reply" in self.broken:
            raise TransportError("the reply was lost")
        return self.receipt

    def decline(self, task, reason):
        self.declined.append((task.attempt_id, reason))
        self.tasks = [t for t in self.tasks if t.attempt_id != task.attempt_id]

    def download(self, digest, partial: Path, max_bytes):
        self._maybe_fail("download")
        if digest not in self.blobs:
            raise NotFoundError(f"no artifact {digest}")
        data = self.blobs[digest]
        have = partial.stat().st_size if partial.exists() else 0
        part = data[have:]
        if self.cut_after:
            part = part[: self.cut_after]
        with partial.open("ab") as file:
            file.write(part)
        if have + len(part) < len(data):
            raise TransportError("the connection was cut")

    def receive(self, digest, parts, max_bytes):
        self._maybe_fail("download")
        if digest not in self.blobs:
            raise NotFoundError(f"no artifact {digest}")
        have = sum(map(len, parts))
        part = self.blobs[digest][have:]
        if self.cut_after:
            part = part[: self.cut_after]
        parts.append(part)
        if have + len(part) < len(self.blobs[digest]):
            raise TransportError("the connection was cut")

    def upload(self, digest, data):
        self._maybe_fail("upload")
        assert digest_of(data) == digest
        self.blobs[digest] = data

    def renew_certificate(self, csr_der):
        return self.renew(csr_der)


class Authority:
    """A certificate authority for tests."""

    def __init__(self, name="test authority"):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(self.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=400))
            .not_valid_after(now + timedelta(days=400))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def pem(self):
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def der(self):
        return self.certificate.public_bytes(serialization.Encoding.DER)

    def issue(self, public_key, name, *, begin=None, end=None, server=False):
        now = datetime.now(UTC)
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin or now - timedelta(minutes=5))
            .not_valid_after(end or now + timedelta(days=30))
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        if server:
            names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue_for_request(self, csr_der, name, **dates):
        return self.issue(x509.load_der_x509_csr(csr_der).public_key(), name, **dates)

    def server_identity(self):
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return pem, self.issue(key.public_key(), "server", server=True)


class GrpcService(
    artifact_pb2_grpc.ArtifactServiceServicer,
    enrolment_pb2_grpc.EnrolmentServiceServicer,
    federation_pb2_grpc.FederationServiceServicer,
    fleet_pb2_grpc.FleetServiceServicer,
):
    """A :class:`SimulatedCloud` behind the real protocol; ``fault`` damages the next transfer in one way."""

    def __init__(self, cloud, authority, signer, broker_port=1883):
        self.cloud = cloud
        self.authority = authority
        self.signer = signer
        self.broker_port = broker_port
        self.codes = {"right-code"}
        self.fault = ""
        self.partial = {}
        self.address = ""
        self.downloads = []
        self.uploads = []
        self.polls = []
        self.streams = 0
        self.end_stream = lambda: None
        self.when_silent = lambda: None

    def Enrol(self, request, context):
        if request.code not in self.codes:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "the code is wrong, used or expired")
        self.codes.discard(request.code)
        keys = [enrolment_pb2.SigningKey(key_id=k, public_key=v) for k, v in self.signer.keys.items()]
        return enrolment_pb2.EnrolResponse(
            tenant="home",
            device_id=DEVICE,
            certificate_chain_pem=self.authority.issue_for_request(request.csr_der, DEVICE),
            broker=enrolment_pb2.BrokerAddress(host="127.0.0.1", port=self.broker_port, tls=False),
            signing_keys=keys,
            cloud_address=self.address,
        )

    def RenewCertificate(self, request, context):
        chain = self.authority.issue_for_request(request.csr_der, DEVICE)
        return enrolment_pb2.RenewCertificateResponse(certificate_chain_pem=chain)

    def Heartbeat(self, request, context):
        reply = self.cloud.heartbeat(request.reported)
        wanted = self.cloud.desired
        return fleet_pb2.HeartbeatResponse(
            desired=fleet_pb2.DesiredState(
                manifest_digest=wanted.manifest_digest,
                manifest_bytes=wanted.manifest_bytes,
                model_version=wanted.model_version,
            ),
            server_unix_ns=reply.server_unix_ns,
            next_after_seconds=reply.next_after_s,
        )

    def Work(self, request_iterator, context):
        self.streams += 1
        self.end_stream = context.cancel
        for request in request_iterator:
            if request.HasField("poll"):
                yield from self._poll(request.poll, context)
            else:
                yield self._submit(request, request_iterator, context)

    def _poll(self, request, context):
        self.polls.append(request)
        if self.fault == "silent":
            self.when_silent()
            time.sleep(0.3)
            return
        reply = self.cloud.poll_task(request.wait_seconds, request.manifest_digest, request.held_digests)
        if reply.task is None:
            poll = federation_pb2.PollTaskResponse(retry_after_seconds=reply.retry_after_s)
            yield federation_pb2.WorkResponse(poll=poll)
            return
        task = reply.task
        kind = federation_pb2.TASK_KIND_PERSONALISE if task.personalise else federation_pb2.TASK_KIND_TRAIN
        data = self.cloud.blobs.get(task.difference_digest or task.tensors_digest, b"")
        sent = data if len(data) <= request.max_streamed_bytes or self.fault == "size" else b""
        message = federation_pb2.FederatedTask(
            run_id=task.run_id,
            round=task.round_number,
            attempt_id=task.attempt_id,
            kind=kind,
            plan_digest=task.plan_digest,
            plan_bytes=task.plan_bytes,
            tensors_digest=task.tensors_digest,
            tensors_bytes=task.tensors_bytes,
            remaining_seconds=task.remaining_seconds,
            streamed_bytes=len(sent),
            held_digest=task.held_digest,
            difference_digest=task.difference_digest,
            difference_bytes=task.difference_bytes,
        )
        first = federation_pb2.PollTaskResponse(task=message)
        fault, self.fault = self.fault, ""
        if not sent:
            yield federation_pb2.WorkResponse(poll=first)
        for at in range(0, len(sent), CHUNK_BYTES):
            part = sent[at : at + CHUNK_BYTES]
            chunk = artifact_pb2.Chunk(
                offset=at + (fault == "offset"), data=part, crc32c=crc32c(part) ^ (fault == "crc")
            )
            yield federation_pb2.WorkResponse(chunk=chunk, poll=None if at else first)
            if fault == "cut":
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    def _submit(self, request, requests, context):
        submit, data = request.submit, bytearray()
        if self.fault == "refuse":
            self.fault = ""
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "revoked")
        while len(data) < submit.streamed_bytes:
            assert request.chunk.offset == len(data)
            assert request.chunk.crc32c == crc32c(request.chunk.data)
            data += request.chunk.data
            if self.fault == "cut":
                self.fault = ""
                self.partial[submit.update_digest] = data
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            if len(data) < submit.streamed_bytes:
                request = next(requests)
        digest = submit.update_digest
        if digest and not submit.streamed_bytes and digest not in self.cloud.blobs:
            context.abort(grpc.StatusCode.NOT_FOUND, "not uploaded")
        self.cloud.submit(submit, bytes(data))
        receipt = federation_pb2.SubmitUpdateResponse(status=federation_pb2.RECEIPT_STATUS_ACCEPTED)
        return federation_pb2.WorkResponse(receipt=receipt)

    def ReportStage(self, request, context):
        self.cloud.stages.append((request.attempt_id, request.stage))
        return federation_pb2.ReportStageResponse(wanted=True)

    def DeclineTask(self, request, context):
        self.cloud.decline(request, request.reason)
        return federation_pb2.DeclineTaskResponse()

    def StatArtifact(self, request, context):
        data = self.cloud.blobs.get(request.digest)
        if data is not None:
            return artifact_pb2.StatArtifactResponse(complete=True, size_bytes=len(data))
        return artifact_pb2.StatArtifactResponse(committed_offset=len(self.partial.get(request.digest, b"")))

    def DownloadArtifact(self, request, context):
        data = self.cloud.blobs.get(request.digest)
        if data is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no artifact {request.digest}")
        fault, self.fault = self.fault, ""
        self.downloads.append(request.offset)
        for at in range(request.offset, len(data), CHUNK_BYTES):
            part = data[at : at + CHUNK_BYTES]
            checksum = crc32c(part) ^ (fault == "crc")
            chunk = artifact_pb2.Chunk(offset=at + (fault == "offset"), data=part, crc32c=checksum)
            yield artifact_pb2.DownloadArtifactResponse(chunk=chunk)
            if fault == "cut":
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    def UploadArtifact(self, request_iterator, context):
        start = next(request_iterator).start
        self.uploads.append(start.offset)
        if start.digest in self.cloud.blobs:
            return artifact_pb2.UploadArtifactResponse(committed_offset=start.size_bytes, complete=True)
        stored = self.partial.setdefault(start.digest, bytearray())
        if start.offset != len(stored):
            context.abort(grpc.StatusCode.ABORTED, f"the upload stands at {len(stored)}")
        for message in request_iterator:
            assert crc32c(message.chunk.data) == message.chunk.crc32c
            assert message.chunk.offset == len(stored)
            stored += message.chunk.data
            if self.fault == "cut":
                self.fault = ""
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        complete = len(stored) == start.size_bytes and digest_of(bytes(stored)) == start.digest
        if complete:
            self.cloud.blobs[start.digest] = bytes(stored)
        return artifact_pb2.UploadArtifactResponse(committed_offset=len(stored), complete=complete)


def enrolled_state(root, authority, address, **dates):
    """The state of a device that this authority has enrolled, and its enrolment."""
    state = StateDirectory(root)
    state.create()
    make_key(state)
    chain = authority.issue_for_request(make_signing_request(state, "device"), DEVICE, **dates)
    enrolment = Enrolment("home", DEVICE, address, Broker("127.0.0.1", 1, tls=False), {})
    save_enrolment(state, enrolment, chain_pem=chain, authority_der=authority.der)
    return state, enrolment


@contextmanager
def serve(service, *, require_certificate=True):
    """Serve on an ephemeral loopback port; sets ``service.address``."""
    key, chain = service.authority.server_identity()
    server = grpc.server(ThreadPoolExecutor(4))
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(service, server)
    enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(service, server)
    federation_pb2_grpc.add_FederationServiceServicer_to_server(service, server)
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(service, server)
    roots = service.authority.pem if require_certificate else None
    credentials = grpc.ssl_server_credentials([(key, chain)], roots, require_certificate)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    service.address = f"127.0.0.1:{port}"
    try:
        yield service
    finally:
        server.stop(0).wait()


@dataclass
class Mosquitto:
    """A real broker that can be stopped and started on the same port."""

    folder: Path
    port: int
    extra: str = ""
    process: subprocess.Popen | None = None

    def start(self):
        config = self.folder / "mosquitto.conf"
        config.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\nuser root\n{self.extra}\n")
        program = shutil.which(
            "mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin:/opt/homebrew/sbin"
        )
        assert program is not None
        self.process = subprocess.Popen([program, "-c", str(config)], stdout=-3, stderr=-3)
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        pytest.fail("mosquitto did not start")

    def stop(self):
        if self.process is not None:
            self.process.terminate()  # it writes its sessions when persistence is on
            self.process.wait()
            self.process = None


def wait_until(condition, timeout_s=30.0):
    """True as soon as ``condition()`` holds, False when it never does."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())
