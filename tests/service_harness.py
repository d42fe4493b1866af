"""A real service on free ports, and devices that speak its protocols, for tests and benchmarks."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import paho.mqtt.client as mqtt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray
from paho.mqtt.enums import CallbackAPIVersion
from ports import free_port
from small_model_file import CONTRACT
from wearfleet_cloud.config import Settings, load_settings
from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.federated.round import RoundPolicy
from wearfleet_cloud.service.enrolment import make_ticket
from wearfleet_cloud.service.run_context import RunSettings
from wearfleet_cloud.service.run_setup import start_run
from wearfleet_cloud.service.serve import Service
from wearfleet_cloud.service.state import State, open_state
from wearfleet_cloud.storage.run_records import find_run
from wearfleet_protos.chunks import CHUNK_BYTES, crc32c
from wearfleet_protos.codecs import FLOAT32, PARAMETERS, UpdateCodec
from wearfleet_protos.messages import ClockQuality, Header, Prediction, SensorWindow
from wearfleet_protos.plan import (
    Budget,
    InputBinding,
    Loop,
    OutputBinding,
    Phase,
    Plan,
    UploadSpec,
)
from wearfleet_protos.tensors import (
    TensorGroup,
    TensorRole,
    TensorSpec,
    decode_tensors,
    digest_of,
    encode_tensors,
    schema_hash,
)
from wearfleet_protos.ticket import EnrolmentTicket
from wearfleet_protos.topics import Topic, TopicKind
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

Tensors = dict[str, NDArray[np.generic]]

GRAPH = b"not a graph: the devices of these tests do not run it"


def service_settings(folder: Path, **sections: Mapping[str, Any]) -> Settings:
    """Settings of a service whose state is in ``folder``, on ports that it finds free again when it comes back."""
    ports = {name: free_port() for name in ("port", "enrol_port", "web_port")}
    flags: dict[str, dict[str, Any]] = {
        "service": {"state_dir": folder, **ports},
        "broker": {"port": free_port()},
    }
    for section, keys in sections.items():
        flags.setdefault(section, {}).update(keys)
    return load_settings(None, flags)


@asynccontextmanager
async def running_service(settings: Settings) -> AsyncIterator[Service]:
    """A started service, stopped at the end."""
    service = Service(settings)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


def enrolment_ticket(
    settings: Settings, address: str, name: str = "anna", hours: float = 1.0
) -> EnrolmentTicket:
    """A ticket made the way the command line makes one."""
    state = open_state(settings)
    try:
        return make_ticket(
            state.database,
            state.authority,
            address,
            name=name,
            tenant="default",
            now_ns=time.time_ns(),
            hours=hours,
        )
    finally:
        state.database.close()


def signing_request(key: ec.EllipticCurvePrivateKey, name: str = "anything") -> bytes:
    """A PKCS #10 request in DER."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


@dataclass
class Device:
    """An enrolled device: its certificate, one gRPC channel, and what it needs to publish."""

    device_id: str
    tenant: str
    key_pem: bytes
    chain_pem: bytes
    ca_pem: bytes
    cloud_address: str
    broker: enrolment_pb2.BrokerAddress
    keys: dict[str, bytes]
    boot_id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    _channel: grpc.aio.Channel | None = None

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel with mutual TLS."""
        if self._channel is None:
            credentials = grpc.ssl_channel_credentials(self.ca_pem, self.key_pem, self.chain_pem)
            self._channel = grpc.aio.secure_channel(self.cloud_address, credentials)
        return self._channel

    async def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def ask(self, *requests: federation_pb2.WorkRequest) -> list[federation_pb2.WorkResponse]:
        """Messages on a work stream of their own, and all that is answered."""
        stub: Any = federation_pb2_grpc.FederationServiceStub(self.channel)
        return [response async for response in stub.Work(iter(requests))]

    async def poll(
        self, wait_s: float = 60.0, held: Sequence[str] = ()
    ) -> federation_pb2.FederatedTask | None:
        """Ask for a task without its tensors."""
        poll = federation_pb2.PollTaskRequest(wait_seconds=wait_s, held_digests=held)
        question = federation_pb2.WorkRequest(poll=poll)
        (response,) = await self.ask(question)
        return response.poll.task if response.poll.HasField("task") else None

    async def task(self, *held: str) -> federation_pb2.FederatedTask:
        """Ask for a task that must come, from tensors that are held."""
        task = await self.poll(held=held)
        assert task is not None, "no task came"
        return task

    async def download(self, digest: str, offset: int = 0) -> bytes:
        """Fetch an artifact and check every chunk."""
        stub: Any = artifact_pb2_grpc.ArtifactServiceStub(self.channel)
        data = bytearray()
        async for message in stub.DownloadArtifact(
            artifact_pb2.DownloadArtifactRequest(digest=digest, offset=offset)
        ):
            assert message.chunk.offset == offset + len(data)
            assert message.chunk.crc32c == crc32c(message.chunk.data)
            data += message.chunk.data
        return bytes(data)

    async def stat(self, digest: str) -> artifact_pb2.StatArtifactResponse:
        """Ask how much of an artifact is there."""
        stub: Any = artifact_pb2_grpc.ArtifactServiceStub(self.channel)
        response: artifact_pb2.StatArtifactResponse = await stub.StatArtifact(
            artifact_pb2.StatArtifactRequest(digest=digest)
        )
        return response

    async def upload(
        self, data: bytes, *, digest: str = "", offset: int = 0, stop_at: int | None = None
    ) -> artifact_pb2.UploadArtifactResponse:
        """Send an artifact, or a part of it."""
        stub: Any = artifact_pb2_grpc.ArtifactServiceStub(self.channel)
        messages = upload_messages(
            data, digest or digest_of(data), offset, len(data) if stop_at is None else stop_at
        )
        response: artifact_pb2.UploadArtifactResponse = await stub.UploadArtifact(messages)
        return response

    async def submit(
        self, task: federation_pb2.FederatedTask, update_digest: str, update: bytes = b"", **changes: Any
    ) -> federation_pb2.SubmitUpdateResponse:
        """Hand an update in; with its bytes, or after :meth:`upload`."""
        (response,) = await self.ask(*submission_messages(task, update_digest, update, **changes))
        return response.receipt

    async def answer(
        self, task: federation_pb2.FederatedTask, shift: float
    ) -> federation_pb2.SubmitUpdateResponse:
        """Do a whole task: every tensor moves by ``shift``; a personalisation only reports."""
        if task.kind == federation_pb2.TASK_KIND_PERSONALISE:
            return await self.submit(
                task, "", metrics={"evaluate_after/correct": 9.0, "evaluate_after/count": 10.0}
            )
        tensors = decode_tensors(await self.download(task.tensors_digest))
        update = encode_tensors({name: np.full_like(array, shift) for name, array in tensors.items()})
        await self.upload(update)
        return await self.submit(task, digest_of(update))

    async def answer_late(self, task: federation_pb2.FederatedTask) -> federation_pb2.SubmitUpdateResponse:
        """Hand in an update that could not be uploaded any more."""
        return await self.submit(task, digest_of(b"too late"))

    async def report(
        self,
        task: federation_pb2.FederatedTask,
        stage: federation_pb2.TaskStage = federation_pb2.TASK_STAGE_TRAINING,
    ) -> bool:
        """Tell how far a task is; whether the work is still wanted."""
        stub: Any = federation_pb2_grpc.FederationServiceStub(self.channel)
        response = await stub.ReportStage(
            federation_pb2.ReportStageRequest(
                run_id=task.run_id, round=task.round, attempt_id=task.attempt_id, stage=stage
            )
        )
        return bool(response.wanted)

    async def decline(self, task: federation_pb2.FederatedTask, reason: str) -> None:
        """Turn a task down."""
        stub: Any = federation_pb2_grpc.FederationServiceStub(self.channel)
        await stub.DeclineTask(
            federation_pb2.DeclineTaskRequest(
                run_id=task.run_id, round=task.round, attempt_id=task.attempt_id, reason=reason
            )
        )

    async def heartbeat(self) -> fleet_pb2.HeartbeatResponse:
        """Report and learn what to run."""
        stub: Any = fleet_pb2_grpc.FleetServiceStub(self.channel)
        reported = fleet_pb2.ReportedState(agent_version="1", model_version=3)
        response: fleet_pb2.HeartbeatResponse = await stub.Heartbeat(
            fleet_pb2.HeartbeatRequest(reported=reported)
        )
        return response

    def header(self, sequence: int, device_id: str = "") -> Header:
        """Header of a message of this start."""
        return Header(
            device_id or self.device_id,
            self.boot_id,
            sequence,
            uuid.uuid4().hex,
            time.time_ns(),
            ClockQuality.REPLAY,
        )

    def window(self, sequence: int, device_id: str = "") -> SensorWindow:
        """A window of noise."""
        samples = np.random.default_rng(sequence).normal(size=(2, 16)).astype(np.float32)
        return SensorWindow(self.header(sequence, device_id), sequence * 8, 50.0, samples)

    def prediction(self, sequence: int, model_digest: str = "") -> Prediction:
        """What a model may say of that window."""
        return Prediction(
            header=self.header(sequence),
            sample_index=sequence * 8,
            model_digest=model_digest,
            model_version=1,
            personalised=False,
            label=0,
            probabilities=np.array([0.75, 0.25], np.float32),
            ood_score=0.5,
            out_of_distribution=False,
            inference_ns=40_000,
        )

    def topic(self, kind: TopicKind) -> str:
        """Topic of this device."""
        return str(Topic(self.tenant, self.device_id, kind))

    def mqtt(self, folder: Path) -> mqtt.Client:
        """A connected MQTT client with this device's certificate."""
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=self.device_id, clean_session=False)
        client.max_inflight_messages_set(1000)
        if self.broker.tls:
            client.tls_set_context(self.tls_context(folder))
        client.connect(self.broker.host, self.broker.port)
        client.loop_start()
        wait_until(client.is_connected)
        return client

    def tls_context(self, folder: Path) -> ssl.SSLContext:
        """TLS with this device's certificate."""
        (folder / f"{self.device_id}.pem").write_bytes(self.chain_pem)
        (folder / f"{self.device_id}.key").write_bytes(self.key_pem)
        context = ssl.create_default_context(cadata=self.ca_pem.decode())
        context.load_cert_chain(folder / f"{self.device_id}.pem", folder / f"{self.device_id}.key")
        return context


def upload_messages(
    data: bytes, digest: str, offset: int, stop_at: int
) -> Iterator[artifact_pb2.UploadArtifactRequest]:
    """The messages of an upload."""
    start = artifact_pb2.UploadStart(digest=digest, size_bytes=len(data), offset=offset)
    yield artifact_pb2.UploadArtifactRequest(start=start)
    for begin in range(offset, stop_at, CHUNK_BYTES):
        part = data[begin : min(begin + CHUNK_BYTES, stop_at)]
        yield artifact_pb2.UploadArtifactRequest(
            chunk=artifact_pb2.Chunk(offset=begin, data=part, crc32c=crc32c(part))
        )


def submission_messages(
    task: federation_pb2.FederatedTask, update_digest: str, update: bytes = b"", **changes: Any
) -> list[federation_pb2.WorkRequest]:
    """The messages that hand an update in, its bytes in chunks beside it."""
    values = {
        "run_id": task.run_id,
        "round": task.round,
        "attempt_id": task.attempt_id,
        "update_digest": update_digest,
        "base_digest": task.tensors_digest,
        "num_examples": 10,
        "num_steps": 1,
        "streamed_bytes": len(update),
        **changes,
    }
    chunks = [
        artifact_pb2.Chunk(offset=at, data=part, crc32c=crc32c(part))
        for at in range(0, len(update), CHUNK_BYTES)
        if (part := update[at : at + CHUNK_BYTES])
    ]
    submit = federation_pb2.SubmitUpdateRequest(**values)
    first = federation_pb2.WorkRequest(submit=submit, chunk=chunks[0] if chunks else None)
    return [first, *(federation_pb2.WorkRequest(chunk=chunk) for chunk in chunks[1:])]


async def call_enrol(ticket: EnrolmentTicket, csr: bytes) -> enrolment_pb2.EnrolResponse:
    """The call without a client certificate."""
    ca_pem = x509.load_der_x509_certificate(ticket.ca_der).public_bytes(serialization.Encoding.PEM)
    async with grpc.aio.secure_channel(ticket.cloud_address, grpc.ssl_channel_credentials(ca_pem)) as channel:
        stub: Any = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
        response: enrolment_pb2.EnrolResponse = await stub.Enrol(
            enrolment_pb2.EnrolRequest(code=ticket.code, csr_der=csr, agent_version="test")
        )
        return response


async def enrolled_device(service: Service, name: str = "anna") -> Device:
    """Enrol a new device the way a real one does."""
    assert service.running is not None
    ticket = await asyncio.to_thread(enrolment_ticket, service.settings, service.running.enrol, name)
    key = ec.generate_private_key(ec.SECP256R1())
    response = await call_enrol(ticket, signing_request(key))
    return Device(
        device_id=response.device_id,
        tenant=response.tenant,
        key_pem=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        chain_pem=response.certificate_chain_pem,
        ca_pem=x509.load_der_x509_certificate(ticket.ca_der).public_bytes(serialization.Encoding.PEM),
        cloud_address=response.cloud_address,
        broker=response.broker,
        keys={key.key_id: key.public_key for key in response.signing_keys},
    )


def echo_plan(
    shapes: Mapping[str, tuple[int, ...]], codec: UpdateCodec = FLOAT32, downlink: UpdateCodec | None = None
) -> Plan:
    """A plan of FedAvg over some float32 tensors; its graph is never run."""
    specs = tuple(
        TensorSpec(name, "float32", shape, TensorRole.SHARED, TensorGroup.PARAM)
        for name, shape in shapes.items()
    )
    phase = Phase(
        "train",
        digest_of(GRAPH),
        len(GRAPH),
        (InputBinding("x", "batch", "x"),),
        (OutputBinding("loss_sum", "metric", "loss_sum", "sum"),),
        Loop("train", 8, 1, 0, shuffle=True),
        (),
    )
    return Plan(
        plan_id=f"echo-{hashlib.sha256(str(shapes).encode()).hexdigest()[:8]}",
        strategy="fedavg",
        strategy_version=1,
        model_schema_hash=schema_hash(specs),
        contract=CONTRACT,
        tensors=specs,
        phases=(phase,),
        upload=UploadSpec((TensorRole.SHARED,), (TensorGroup.PARAM,), "delta", codec),
        keep_local=(),
        budget=Budget(60.0, 64 * 1024 * 1024, 1),
        seed=1,
        downlink=downlink,
    )


def codec_options(codec: UpdateCodec) -> dict[str, object]:
    """The options of a run that choose a codec."""
    own = {f"codec_{name}": getattr(codec, name) for name in PARAMETERS[codec.name]}
    return {"codec": codec.name, **own}


def begin_run(
    settings: Settings,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rounds: int,
    min_clients: int,
    deadline_s: float = 30.0,
    quorum: int = 1,
    personalise: bool = False,
    codec: UpdateCodec = FLOAT32,
    downlink: UpdateCodec | None = None,
    options: Mapping[str, object] | None = None,
) -> str:
    """Start an echo run."""
    run = RunSettings(
        rounds=rounds,
        cohort=CohortPolicy(0, min_clients),
        policy=RoundPolicy(quorum=quorum, deadline_s=deadline_s),
        options={**codec_options(codec), **(options or {})},
        personalise=personalise,
    )
    return begin_plan(settings, echo_plan(shapes, codec, downlink), run)


def begin_plan(settings: Settings, plan: Plan, run: RunSettings) -> str:
    """Start a run of zeros the way the command line does."""
    state = open_state(settings)
    try:
        return start_run(
            state.database,
            state.blobs,
            state.keys,
            plan=plan,
            graphs={digest_of(GRAPH): GRAPH},
            tensors={spec.name: np.zeros(spec.shape, spec.dtype) for spec in plan.download_specs()},
            settings=run,
            now_ns=time.time_ns(),
        )
    finally:
        state.database.close()


def global_tensors(state: State, run_id: str) -> Tensors:
    """The newest global tensors of a run."""
    with state.database.read() as connection:
        digest = find_run(connection, run_id).tensors_digest
    return decode_tensors(state.blobs.read(digest))  # type: ignore[arg-type]


def wait_until(true: Any, timeout_s: float = 30.0) -> None:
    """Wait for a condition, or fail."""
    until = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until, "it did not become true in time"
        time.sleep(0.01)


async def until(true: Any, timeout_s: float = 30.0) -> None:
    """Wait for a condition without blocking the loop, or fail."""
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "it did not become true in time"
        await asyncio.sleep(0.01)
