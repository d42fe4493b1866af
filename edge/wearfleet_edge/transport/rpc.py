"""The cloud over gRPC with mutual TLS: a synchronous client, deadlines on every call, typed errors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc
from wearfleet_protos.chunks import CHUNK_BYTES, RECEIVED_CHUNK, split_chunk
from wearfleet_protos.errors import (
    ConflictError,
    DeniedError,
    IntegrityError,
    NotFoundError,
    ProtocolError,
    TransportError,
    WearfleetError,
)
from wearfleet_protos.tensors import Digest, parse_digest
from wearfleet_protos.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    enrolment_pb2,
    enrolment_pb2_grpc,
    federation_pb2,
    federation_pb2_grpc,
    fleet_pb2,
    fleet_pb2_grpc,
    secagg_pb2,
)

from wearfleet_edge.identity import Broker, Enrolment
from wearfleet_edge.transport.cloud import (
    STREAMED_BYTES,
    Bytes,
    Desired,
    Enrolled,
    HeartbeatReply,
    PollReply,
    Receipt,
    ReceiptStatus,
    Reported,
    Stage,
    Submission,
    Task,
)
from wearfleet_edge.transport.work_stream import WorkStream, next_offset, update_messages

if TYPE_CHECKING:
    from pathlib import Path

    from wearfleet_protos.secagg.messages import Answer, Notice
    from wearfleet_protos.secagg.parameters import SecureParameters

    from wearfleet_edge.state import StateDirectory

    _Download = grpc.UnaryStreamMultiCallable[artifact_pb2.DownloadArtifactRequest, bytes]
    _UploadCall = grpc.StreamUnaryMultiCallable[bytes, artifact_pb2.UploadArtifactResponse]

__all__ = ["RpcCloud", "enrol", "translate_error"]

T = TypeVar("T")

_CALL_SECONDS: Final = 15.0
_TRANSFER_GRACE_SECONDS: Final = 30.0
_SLOWEST_BYTES_PER_SECOND: Final = 32 * 1024
_DOWNLOAD: Final = "/wearfleet.v1.ArtifactService/DownloadArtifact"
_UPLOAD: Final = "/wearfleet.v1.ArtifactService/UploadArtifact"
_RETRY_POLICY: Final = json.dumps(
    {
        "methodConfig": [
            {
                "name": [
                    {"service": "wearfleet.v1.FleetService"},
                    {"service": "wearfleet.v1.FederationService", "method": "ReportStage"},
                    {"service": "wearfleet.v1.FederationService", "method": "DeclineTask"},
                    {"service": "wearfleet.v1.ArtifactService", "method": "StatArtifact"},
                ],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
        "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
    }
)
_OPTIONS: Final[list[tuple[str, Any]]] = [
    ("grpc.keepalive_time_ms", 150_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.service_config", _RETRY_POLICY),
    ("grpc.enable_retries", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.max_frame_size", 1024 * 1024),
]
_STAGES: Final = {
    Stage.FETCHED: federation_pb2.TASK_STAGE_FETCHED,
    Stage.TRAINING: federation_pb2.TASK_STAGE_TRAINING,
    Stage.UPLOADING: federation_pb2.TASK_STAGE_UPLOADING,
}
_CLASSES: Final = {
    "gateway": federation_pb2.DEVICE_CLASS_GATEWAY,
    "phone": federation_pb2.DEVICE_CLASS_PHONE,
    "wearable": federation_pb2.DEVICE_CLASS_WEARABLE,
}
_RECEIPTS: Final = {
    federation_pb2.RECEIPT_STATUS_ACCEPTED: ReceiptStatus.ACCEPTED,
    federation_pb2.RECEIPT_STATUS_DUPLICATE: ReceiptStatus.DUPLICATE,
    federation_pb2.RECEIPT_STATUS_STALE: ReceiptStatus.STALE,
    federation_pb2.RECEIPT_STATUS_REJECTED: ReceiptStatus.REJECTED,
}


class RpcCloud:
    """All calls but enrolment, authenticated by the device's certificate; safe to use from several threads.

    Args:
        address: ``host:port``.
        credentials: reads the device's identity; called again by :meth:`reopen`.
        device_class: gateway, phone or wearable.
    """

    def __init__(
        self, address: str, credentials: Callable[[], grpc.ChannelCredentials], device_class: str = "wearable"
    ) -> None:
        self._address, self._class = address, _CLASSES[device_class]
        self._credentials = credentials
        self._streamed_bytes = STREAMED_BYTES
        self._open()

    @classmethod
    def of_device(
        cls, state: StateDirectory, enrolment: Enrolment, device_class: str = "wearable"
    ) -> RpcCloud:
        """The cloud that a device enrolled with, by the files of its identity."""
        return cls(
            enrolment.cloud_address,
            lambda: grpc.ssl_channel_credentials(
                state.authority.read_bytes(), state.key.read_bytes(), state.certificate.read_bytes()
            ),
            device_class,
        )

    def _open(self) -> None:
        self._channel = grpc.secure_channel(self._address, self._credentials(), options=_OPTIONS)
        self._fleet = fleet_pb2_grpc.FleetServiceStub(self._channel)
        self._federation = federation_pb2_grpc.FederationServiceStub(self._channel)
        self._artifacts = artifact_pb2_grpc.ArtifactServiceStub(self._channel)
        self._downloads: _Download = self._channel.unary_stream(
            _DOWNLOAD, request_serializer=artifact_pb2.DownloadArtifactRequest.SerializeToString
        )
        self._uploads: _UploadCall = self._channel.stream_unary(
            _UPLOAD, response_deserializer=artifact_pb2.UploadArtifactResponse.FromString
        )
        self._work = WorkStream(self._channel)
        self._enrolment = enrolment_pb2_grpc.EnrolmentServiceStub(self._channel)

    def reopen(self) -> None:
        """Use a renewed certificate from now on; calls under way fail as retryable."""
        old, stream = self._channel, self._work
        self._open()
        stream.close()
        old.close()

    def close(self) -> None:
        """End the connection; running calls are cancelled."""
        self._work.close()
        self._channel.close()

    def heartbeat(self, reported: Reported) -> HeartbeatReply:
        """See :class:`wearfleet_edge.transport.cloud.Cloud`."""
        request = fleet_pb2.HeartbeatRequest(
            reported=fleet_pb2.ReportedState(
                agent_version=reported.agent_version,
                manifest_digest=reported.manifest_digest,
                model_version=reported.model_version,
                personalised=reported.personalised,
                refusal=reported.refusal,
            )
        )
        reply = self._call("heartbeat", lambda: self._fleet.Heartbeat(request, timeout=_CALL_SECONDS))
        desired = reply.desired
        return HeartbeatReply(
            Desired(desired.manifest_digest, desired.manifest_bytes, desired.model_version),
            reply.server_unix_ns,
            reply.next_after_seconds,
        )

    def poll_task(self, wait_s: float, manifest_digest: str, held: Sequence[str] = ()) -> PollReply:
        """See :class:`wearfleet_edge.transport.cloud.Cloud`.

        After a failure the next task comes without its tensors: a bad network gets them as a resumable download.
        """
        request = federation_pb2.PollTaskRequest(
            wait_seconds=wait_s,
            manifest_digest=manifest_digest,
            max_streamed_bytes=self._streamed_bytes,
            device_class=self._class,
            held_digests=held,
        )
        timeout = wait_s + _transfer_seconds(CHUNK_BYTES)
        self._streamed_bytes = 0
        reply, tensors = self._call("poll for a task", lambda: self._work.poll(request, timeout))
        self._streamed_bytes = STREAMED_BYTES
        task = _task_from_pb(reply.task, tensors) if reply.HasField("task") else None
        return PollReply(task, reply.retry_after_seconds)

    def report_stage(self, task: Task, stage: Stage) -> bool:
        """See :class:`wearfleet_edge.transport.cloud.Cloud`."""
        request = federation_pb2.ReportStageRequest(
            run_id=task.run_id, round=task.round_number, attempt_id=task.attempt_id, stage=_STAGES[stage]
        )
        reply = self._call(
            "report a stage", lambda: self._federation.ReportStage(request, timeout=_CALL_SECONDS)
        )
        return bool(reply.wanted)

    def submit(self, submission: Submission, update: bytes) -> Receipt:
        """See :class:`wearfleet_edge.transport.cloud.Cloud`.

        After a failure the update does not travel along: perhaps it is there already, and on a bad network an
        upload can go on where it stopped.
        """
        streamed = update if len(update) <= self._streamed_bytes else b""
        try:
            return self._submit(submission, streamed)
        except NotFoundError:
            if streamed or not update:
                raise
        self.upload(parse_digest(submission.update_digest), update)
        return self._submit(submission, b"")

    def _submit(self, submission: Submission, streamed: bytes) -> Receipt:
        request = federation_pb2.SubmitUpdateRequest(
            run_id=submission.run_id,
            round=submission.round_number,
            attempt_id=submission.attempt_id,
            update_digest=submission.update_digest,
            base_digest=submission.base_digest,
            num_examples=submission.num_examples,
            num_steps=submission.num_steps,
            metrics=submission.metrics,
            train_seconds=submission.train_seconds,
            local_state_reset=submission.local_state_reset,
        )
        timeout = _transfer_seconds(len(streamed))
        self._streamed_bytes = 0
        reply = self._call("submit an update", lambda: self._work.submit(request, streamed, timeout))
        self._streamed_bytes = STREAMED_BYTES
        status = _RECEIPTS.get(reply.status)
        if status is None:
            raise ProtocolError(f"unknown receipt status {reply.status}; update the agent")
        return Receipt(status, reply.reason)

    def exchange(self, task: Task, answer: Answer | None, wait_s: float) -> Notice | None:
        """See :class:`wearfleet_edge.transport.cloud.Cloud`."""
        from wearfleet_protos.secagg.codec import fill_answer, notice_from_pb  # noqa: PLC0415  slow to import

        request = secagg_pb2.SecureRequest(
            run_id=task.run_id, round=task.round_number, attempt_id=task.attempt_id, wait_seconds=wait_s
        )
        if answer is not None:
            fill_answer(request, answer)
        timeout = wait_s + _transfer_seconds(request.ByteSize())
        return notice_from_pb(
            self._call("answer secure aggregation", lambda: self._work.exchange(request, timeout))
        )

    def decline(self, task: Task, reason: str) -> None:
        """See :class:`wearfleet_edge.transport.cloud.Cloud`."""
        request = federation_pb2.DeclineTaskRequest(
            run_id=task.run_id, round=task.round_number, attempt_id=task.attempt_id, reason=reason[:500]
        )
        self._call("decline a task", lambda: self._federation.DeclineTask(request, timeout=_CALL_SECONDS))

    def download(self, digest: Digest, partial: Path, max_bytes: int) -> None:
        """See :class:`wearfleet_edge.transport.cloud.Cloud`."""
        with partial.open("ab") as file:
            self._receive(digest, file.tell(), max_bytes, file.write)
            file.flush()
            os.fsync(file.fileno())

    def receive(self, digest: Digest, parts: list[Bytes], max_bytes: int) -> None:
        """See :class:`wearfleet_edge.transport.cloud.Cloud`."""
        self._receive(digest, sum(map(len, parts)), max_bytes, parts.append)

    def _receive(
        self, digest: Digest, offset: int, max_bytes: int, write: Callable[[memoryview], object]
    ) -> None:
        request = artifact_pb2.DownloadArtifactRequest(digest=digest, offset=offset)
        timeout = _transfer_seconds(max_bytes - offset)

        def work() -> None:
            at = offset
            for message in self._downloads(request, timeout=timeout):
                _, chunk = split_chunk(RECEIVED_CHUNK, message)
                if chunk is None:
                    raise ProtocolError(f"a message of the download of {digest} holds no chunk")
                at = next_offset(chunk, at, max_bytes)
                write(chunk.data)

        self._call(f"download {digest}", work)

    def upload(self, digest: Digest, data: bytes) -> None:
        """See :class:`wearfleet_edge.transport.cloud.Cloud`.

        Nearly always nothing was sent before, so it begins at once, and asks only when the service disagrees.
        """
        try:
            self._send(digest, data, 0)
        except ConflictError:
            stat = artifact_pb2.StatArtifactRequest(digest=digest)
            found = self._call(
                "ask for an upload", lambda: self._artifacts.StatArtifact(stat, timeout=_CALL_SECONDS)
            )
            if found.committed_offset > len(data):
                raise ProtocolError(
                    f"the service holds {found.committed_offset} of {len(data)} bytes of {digest}"
                ) from None
            if not found.complete:
                self._send(digest, data, found.committed_offset)

    def _send(self, digest: Digest, data: bytes, offset: int) -> None:
        start = artifact_pb2.UploadStart(digest=digest, size_bytes=len(data), offset=offset)
        opening = artifact_pb2.UploadArtifactRequest(start=start).SerializeToString()
        messages = chain((opening,), update_messages(data, offset, b""))
        timeout = _transfer_seconds(len(data))
        reply = self._call(f"upload {digest}", lambda: self._uploads(messages, timeout=timeout))
        if not reply.complete:
            raise TransportError(
                f"the upload of {digest} stopped at {reply.committed_offset} of {len(data)} bytes"
            )

    def renew_certificate(self, csr_der: bytes) -> bytes:
        """See :class:`wearfleet_edge.transport.cloud.Cloud`."""
        request = enrolment_pb2.RenewCertificateRequest(csr_der=csr_der)
        reply = self._call(
            "renew the certificate", lambda: self._enrolment.RenewCertificate(request, timeout=_CALL_SECONDS)
        )
        return bytes(reply.certificate_chain_pem)

    def _call(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except grpc.RpcError as error:
            raise translate_error(error, what, self._address) from error
        except ValueError as error:  # grpc's way to say that the channel was closed
            raise TransportError(f"{what}: the connection to {self._address} was closed ({error})") from error


def enrol(address: str, *, authority_pem: bytes, code: str, csr_der: bytes, agent_version: str) -> Enrolled:
    """Exchange a one-time code for a certificate.

    Args:
        address: of the enrolment service, ``host:port``.
        authority_pem: from the ticket; the only authority that is trusted.
        code: one-time secret.
        csr_der: signing request.
        agent_version: for the operator.

    Raises:
        DeniedError: the code is wrong, used or expired.
        TransportError: the service cannot be reached.
    """
    request = enrolment_pb2.EnrolRequest(code=code, csr_der=csr_der, agent_version=agent_version)
    credentials = grpc.ssl_channel_credentials(authority_pem)
    with grpc.secure_channel(address, credentials, options=_OPTIONS) as channel:
        try:
            reply = enrolment_pb2_grpc.EnrolmentServiceStub(channel).Enrol(request, timeout=_CALL_SECONDS)
        except grpc.RpcError as error:
            raise translate_error(error, "enrol", address) from error
    enrolment = Enrolment(
        tenant=reply.tenant,
        device_id=reply.device_id,
        cloud_address=reply.cloud_address,
        broker=Broker(reply.broker.host, reply.broker.port, reply.broker.tls),
        signing_keys={key.key_id: key.public_key for key in reply.signing_keys},
    )
    return Enrolled(enrolment, reply.certificate_chain_pem)


_REFUSALS: Final[dict[grpc.StatusCode, type[WearfleetError]]] = {
    grpc.StatusCode.UNAUTHENTICATED: DeniedError,
    grpc.StatusCode.PERMISSION_DENIED: DeniedError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ABORTED: ConflictError,
    grpc.StatusCode.FAILED_PRECONDITION: ConflictError,
    grpc.StatusCode.ALREADY_EXISTS: ConflictError,
    grpc.StatusCode.INVALID_ARGUMENT: ProtocolError,
    grpc.StatusCode.OUT_OF_RANGE: ProtocolError,
    grpc.StatusCode.DATA_LOSS: IntegrityError,
}


def translate_error(error: grpc.RpcError, what: str, address: str) -> WearfleetError:
    """Our error for a failed call.

    Args:
        error: from grpc.
        what: what was tried.
        address: of the service.
    """
    code, details = error.code(), error.details() or ""
    if code in _REFUSALS:
        return _REFUSALS[code](f"{what}: {details}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(
            f"{what}: the service at {address} does not offer this; it is older than this agent"
        )
    if code is grpc.StatusCode.UNAVAILABLE and "CERTIFICATE_VERIFY_FAILED" in details:
        return TransportError(
            f"{what}: the service at {address} showed a certificate that is expired or of another authority "
            f"({details})",
            retryable=False,
        )
    if code is grpc.StatusCode.CANCELLED:
        return TransportError(f"{what}: the connection to {address} was closed")
    name = code.name if code is not None else "unknown"
    return TransportError(f"{what}: {address} does not answer as it should ({name}: {details})")


def _transfer_seconds(size: int) -> float:
    return _TRANSFER_GRACE_SECONDS + max(size, 0) / _SLOWEST_BYTES_PER_SECOND


def _task_from_pb(task: federation_pb2.FederatedTask, tensors: bytearray) -> Task:
    kinds = {
        federation_pb2.TASK_KIND_TRAIN: False,
        federation_pb2.TASK_KIND_PERSONALISE: True,
        federation_pb2.TASK_KIND_TRAIN_SECURELY: False,
    }
    if task.kind not in kinds:
        raise ProtocolError(f"unknown task kind {task.kind}; update the agent")
    return Task(
        run_id=task.run_id,
        round_number=task.round,
        attempt_id=task.attempt_id,
        personalise=kinds[task.kind],
        plan_digest=parse_digest(task.plan_digest),
        plan_bytes=task.plan_bytes,
        tensors_digest=parse_digest(task.tensors_digest),
        tensors_bytes=task.tensors_bytes,
        remaining_seconds=task.remaining_seconds,
        tensors=tensors,
        secure=_secure_from_pb(task),
        without_figures=task.without_figures,
        lease_s=task.lease_seconds,
        held_digest=task.held_digest,
        difference_digest=task.difference_digest,
        difference_bytes=task.difference_bytes,
    )


def _secure_from_pb(task: federation_pb2.FederatedTask) -> SecureParameters | None:
    if task.kind != federation_pb2.TASK_KIND_TRAIN_SECURELY:
        return None
    from wearfleet_protos.secagg.codec import setup_from_pb  # noqa: PLC0415  slow to import

    return setup_from_pb(task.secure, task.run_id, task.round)
