"""The gRPC server: thin methods that translate messages and call the handlers.

Two ports, because gRPC in Python can only demand a client certificate or not ask for one: one port for enrolment, with
the server's certificate alone, and one for everything else, with mutual TLS.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]
from wearfleet_protos.chunks import SENT_CHUNK, WireChunk, split_chunk
from wearfleet_protos.errors import ConfigError, ProtocolError
from wearfleet_protos.v1 import artifact_pb2, enrolment_pb2, federation_pb2, fleet_pb2

from wearfleet_cloud.fleet.identity import ServerFiles
from wearfleet_cloud.fleet.signing import SigningKeys
from wearfleet_cloud.service.broker import free_port
from wearfleet_cloud.service.enrolment import Enrolment
from wearfleet_cloud.service.federation import Federation
from wearfleet_cloud.service.handlers import Artifacts, Fleet, Reported
from wearfleet_cloud.service.live import Stage
from wearfleet_cloud.service.rpc_guard import Guard, parse
from wearfleet_cloud.service.state_dir import RunningService
from wearfleet_cloud.service.work_stream import WorkStreams

__all__ = ["RpcParts", "RpcServer"]

_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.max_send_message_length", 4 * 1024 * 1024),
    ("grpc.max_concurrent_streams", 1000),
    ("grpc.http2.max_frame_size", 1024 * 1024),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
    ("grpc.keepalive_time_ms", 180_000),  # a device that is gone without a word holds its stream no longer
    ("grpc.keepalive_timeout_ms", 20_000),
)
_STAGES: Final = {
    federation_pb2.TASK_STAGE_FETCHED: Stage.FETCHED,
    federation_pb2.TASK_STAGE_TRAINING: Stage.TRAINING,
    federation_pb2.TASK_STAGE_UPLOADING: Stage.TRAINING,
}


@dataclass(frozen=True, slots=True)
class RpcParts:
    """What the methods call."""

    guard: Guard
    enrolment: Enrolment
    artifacts: Artifacts
    federation: Federation
    fleet: Fleet
    keys: SigningKeys


class RpcServer:
    """Both gRPC servers.

    Args:
        parts: what the methods call.
        files: certificate, key and authority.
        host: address to bind to.
        port: mutual TLS; 0 means any free one.
        enrol_port: enrolment; 0 means any free one.
    """

    def __init__(self, parts: RpcParts, files: ServerFiles, *, host: str, port: int, enrol_port: int) -> None:
        self._parts, self._host = parts, host
        self._port, self._enrol_port = port, enrol_port
        self._work = WorkStreams(parts.artifacts, parts.federation)
        pair = [(files.key.read_bytes(), files.certificate.read_bytes())]
        self._mutual = grpc.ssl_server_credentials(pair, files.ca.read_bytes(), require_client_auth=True)
        self._plain = grpc.ssl_server_credentials(pair)
        self._running: RunningService | None = None
        self._health = health.aio.HealthServicer()
        self._servers = [grpc.aio.server(options=_OPTIONS), grpc.aio.server(options=_OPTIONS)]

    async def start(self, describe: Callable[[int, int], RunningService]) -> RunningService:
        """Listen on both ports, or on none.

        Args:
            describe: what devices that enrol are told, made from the port of mutual TLS and that of enrolment.

        Raises:
            ConfigError: a port is in use, or the address is not of this machine; names the setting.
        """
        main, enrol = self._servers
        names = self._add_services(main, enrol)
        try:
            port = self._bind(main, self._mutual, self._port, "service.port")
            await main.start()
            enrol_port = self._bind(enrol, self._plain, self._enrol_port, "service.enrol_port")
            self._running = running = describe(port, enrol_port)
            await enrol.start()
        except BaseException:
            await self.stop(0)
            raise
        for name in names:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return running

    def _add_services(self, main: grpc.aio.Server, enrol: grpc.aio.Server) -> tuple[str, ...]:
        """Add what both answer; the names whose health can be asked for ("" is the whole server)."""
        main.add_generic_rpc_handlers(tuple(self._main_services()))
        enrol.add_generic_rpc_handlers((_service("EnrolmentService", {"Enrol": self._enrol_method()}),))
        names = [
            f"wearfleet.v1.{name}"
            for name in ("EnrolmentService", "ArtifactService", "FederationService", "FleetService")
        ]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], main)
        for server in (main, enrol):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        return ("", *names)

    def _bind(
        self, server: grpc.aio.Server, credentials: grpc.ServerCredentials, port: int, setting: str
    ) -> int:
        free_port(self._host, port, setting)  # says why not, which gRPC does not
        try:
            return server.add_secure_port(f"{_bracketed(self._host)}:{port}", credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {self._host}:{port}: {error}; choose another {setting}"
            ) from error

    async def refuse_new(self) -> None:
        """Tell load balancers to go elsewhere; calls still work."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Let calls under way finish, then close."""
        self._parts.guard.end_streams()
        for server in self._servers:
            await server.stop(grace_s)

    def _main_services(self) -> list[grpc.GenericRpcHandler]:
        guard = self._parts.guard
        return [
            _service(
                "EnrolmentService",
                {
                    "RenewCertificate": guard.unary(
                        "RenewCertificate", enrolment_pb2.RenewCertificateRequest, self._renew
                    )
                },
            ),
            _service(
                "ArtifactService",
                {
                    "StatArtifact": guard.unary("StatArtifact", artifact_pb2.StatArtifactRequest, self._stat),
                    "DownloadArtifact": guard.download(
                        "DownloadArtifact", artifact_pb2.DownloadArtifactRequest, self._download
                    ),
                    "UploadArtifact": guard.upload("UploadArtifact", self._upload),
                },
            ),
            _service(
                "FederationService",
                {
                    "Work": guard.stream("Work", self._work.serve),
                    "ReportStage": guard.unary(
                        "ReportStage", federation_pb2.ReportStageRequest, self._report
                    ),
                    "DeclineTask": guard.unary(
                        "DeclineTask", federation_pb2.DeclineTaskRequest, self._decline
                    ),
                },
            ),
            _service(
                "FleetService",
                {"Heartbeat": guard.unary("Heartbeat", fleet_pb2.HeartbeatRequest, self._heartbeat)},
            ),
        ]

    def _enrol_method(self) -> grpc.RpcMethodHandler[Any, Any]:
        return self._parts.guard.anonymous("Enrol", enrolment_pb2.EnrolRequest, self._enrol)

    async def _enrol(self, request: enrolment_pb2.EnrolRequest) -> enrolment_pb2.EnrolResponse:
        assert self._running is not None
        enrolled = await self._parts.enrolment.enrol(request.code, request.csr_der, request.agent_version)
        keys = self._parts.keys.public_keys
        return enrolment_pb2.EnrolResponse(
            tenant=enrolled.device.tenant,
            device_id=enrolled.device.device_id,
            certificate_chain_pem=enrolled.certificate.chain_pem,
            broker=enrolment_pb2.BrokerAddress(
                host=self._running.broker.host,
                port=self._running.broker.port,
                tls=self._running.broker.tls,
            ),
            signing_keys=[
                enrolment_pb2.SigningKey(key_id=name, public_key=raw) for name, raw in keys.items()
            ],
            cloud_address=self._running.cloud,
        )

    async def _renew(
        self, device_id: str, request: enrolment_pb2.RenewCertificateRequest
    ) -> enrolment_pb2.RenewCertificateResponse:
        certificate = await self._parts.enrolment.renew(device_id, request.csr_der)
        return enrolment_pb2.RenewCertificateResponse(certificate_chain_pem=certificate.chain_pem)

    async def _stat(
        self, device_id: str, request: artifact_pb2.StatArtifactRequest
    ) -> artifact_pb2.StatArtifactResponse:
        state = self._parts.artifacts.stat(device_id, request.digest)
        return artifact_pb2.StatArtifactResponse(
            complete=state.complete, size_bytes=state.size_bytes, committed_offset=state.committed_offset
        )

    async def _download(
        self,
        device_id: str,  # noqa: ARG002 - every enrolled device may download what is shared
        request: artifact_pb2.DownloadArtifactRequest,
    ) -> AsyncIterator[bytes]:
        for message in self._parts.artifacts.download(request.digest, request.offset):
            yield message

    async def _upload(
        self, device_id: str, messages: AsyncIterator[bytes]
    ) -> artifact_pb2.UploadArtifactResponse:
        first = parse(artifact_pb2.UploadArtifactRequest, await anext(messages, b""))
        if first.WhichOneof("message") != "start":
            raise ProtocolError("the first message of an upload must be its start")
        start = first.start
        state = await self._parts.artifacts.upload(
            device_id, start.digest, start.size_bytes, start.offset, _chunks(messages)
        )
        return artifact_pb2.UploadArtifactResponse(
            committed_offset=state.committed_offset, complete=state.complete
        )

    async def _report(
        self, device_id: str, request: federation_pb2.ReportStageRequest
    ) -> federation_pb2.ReportStageResponse:
        stage = _STAGES.get(request.stage)
        if stage is None:
            raise ProtocolError(f"unknown stage {request.stage}")
        wanted = await self._parts.federation.report(device_id, request.run_id, request.round, stage)
        return federation_pb2.ReportStageResponse(wanted=wanted)

    async def _decline(
        self, device_id: str, request: federation_pb2.DeclineTaskRequest
    ) -> federation_pb2.DeclineTaskResponse:
        await self._parts.federation.decline(device_id, request.run_id, request.round, request.reason)
        return federation_pb2.DeclineTaskResponse()

    async def _heartbeat(
        self, device_id: str, request: fleet_pb2.HeartbeatRequest
    ) -> fleet_pb2.HeartbeatResponse:
        said = request.reported
        reported = Reported(
            said.agent_version, said.manifest_digest, said.model_version, said.personalised, said.refusal
        )
        digest, size_bytes, version = await self._parts.fleet.heartbeat(device_id, reported)
        return fleet_pb2.HeartbeatResponse(
            desired=fleet_pb2.DesiredState(
                manifest_digest=digest, manifest_bytes=size_bytes, model_version=version
            ),
            server_unix_ns=time.time_ns(),
            next_after_seconds=self._parts.fleet.next_after_s,
        )


async def _chunks(messages: AsyncIterator[bytes]) -> AsyncIterator[WireChunk]:
    async for message in messages:
        _, chunk = split_chunk(SENT_CHUNK, message)
        if chunk is None:
            raise ProtocolError("an upload has one start; after it come chunks")
        yield chunk


def _service(name: str, methods: dict[str, grpc.RpcMethodHandler[Any, Any]]) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler(f"wearfleet.v1.{name}", methods)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
