"""The service as a process: starting where it cannot, being killed, coming back."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from service_harness import (
    begin_run,
    enrolled_device,
    global_tensors,
    running_service,
    service_settings,
    until,
    wait_until,
)
from service_process import end_broker, start_ready
from wearfleet_cloud.config import BrokerConfig
from wearfleet_cloud.service import broker as broker_module
from wearfleet_cloud.service.serve import Service
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.service.state_dir import read_running
from wearfleet_cloud.storage.device_records import stream_counts
from wearfleet_cloud.storage.run_records import find_run, list_submissions
from wearfleet_edge.transport.cloud import ReceiptStatus, Submission
from wearfleet_edge.transport.rpc import RpcCloud
from wearfleet_protos.codec import encode
from wearfleet_protos.errors import ConfigError, TransportError
from wearfleet_protos.tensors import digest_of, encode_tensors
from wearfleet_protos.topics import TopicKind

pytestmark = pytest.mark.broker


async def failure_of(settings) -> str:
    with pytest.raises(ConfigError) as caught:
        await Service(settings).start()
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "key"),
    [("service", "port"), ("service", "enrol_port"), ("service", "web_port"), ("broker", "port")],
)
async def test_an_occupied_port_is_a_clear_error_and_leaves_nothing_behind(tmp_path, section, key):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        settings = service_settings(tmp_path, **{section: {key: other.getsockname()[1]}})
        message = await failure_of(settings)
    assert f"choose another {section}.{key}" in message
    async with running_service(settings) as service:  # nothing holds the folder or a port
        assert service.running is not None


async def test_port_0_means_any_free_one_and_each_server_has_its_own(tmp_path):
    ports = dict.fromkeys(("port", "enrol_port", "web_port"), 0)
    async with running_service(service_settings(tmp_path, service=ports, broker={"port": 0})) as service:
        running = service.running
        found = {running.cloud_port, running.enrol_port, running.web_port, running.broker.port}
        assert len(found - {0}) == 4
        for port in found:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()


async def test_a_port_that_is_taken_after_the_check_stops_what_listens_already(tmp_path, monkeypatch):
    """What gRPC refuses is an error like any other, and no server is left to run for nobody."""
    monkeypatch.setattr("wearfleet_cloud.service.rpc.free_port", lambda *_: None)
    settings = service_settings(tmp_path)
    service = settings.service
    with socket.create_server(("127.0.0.1", service.enrol_port)):
        assert "choose another service.enrol_port" in await failure_of(settings)
    with socket.create_server(("127.0.0.1", service.port)):
        pass
    async with running_service(settings):
        pass


async def test_without_a_broker_the_service_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("wearfleet_cloud.service.ingest._START_S", 0.3)
    settings = service_settings(tmp_path, broker={"url": "mqtt://127.0.0.1:9"})
    assert "start the broker, or correct --broker" in await failure_of(settings)
    monkeypatch.setattr(broker_module, "find_mosquitto", lambda: None)
    settings = service_settings(tmp_path, broker={"kind": "mosquitto"})
    assert "install it" in await failure_of(settings)
    config = BrokerConfig("external", "http://x", 0, 1000)
    with pytest.raises(ConfigError, match="must look like mqtt"):
        broker_module.create_broker(config, tmp_path, "127.0.0.1", SimpleNamespace())


async def test_a_second_service_on_the_same_folder_is_refused(tmp_path):
    settings = service_settings(tmp_path)
    async with running_service(settings):
        assert "another service runs" in await failure_of(settings)


async def test_every_address_needs_a_public_name(tmp_path):
    assert "public_host" in await failure_of(service_settings(tmp_path, service={"host": "0.0.0.0"}))


@pytest.mark.slow
async def test_mosquitto_is_started_again_when_it_dies(tmp_path):
    settings = service_settings(tmp_path / "state", broker={"kind": "mosquitto"})
    async with running_service(settings) as service:
        anna = await enrolled_device(service)
        pid_file = settings.service.state_dir / "broker" / "mosquitto.pid"
        first = int(pid_file.read_text())
        await until((settings.service.state_dir / "broker" / "mosquitto.db").exists)
        os.kill(first, signal.SIGKILL)
        await until(lambda: int(pid_file.read_text()) != first)
        client = await asyncio.to_thread(anna.mqtt, tmp_path)
        await until(lambda: service.metrics.broker_connected._value.get() == 1)
        await asyncio.to_thread(
            client.publish(anna.topic(TopicKind.WINDOW), encode(anna.window(0)), qos=1).wait_for_publish, 10
        )
        await until(lambda: service.metrics.messages.labels("window")._value.get() == 1, 30.0)
        client.disconnect()
        client.loop_stop()


@pytest.mark.e2e
async def test_a_killed_service_loses_no_window_and_counts_no_update_twice(tmp_path):
    folder = tmp_path / "state"
    settings = service_settings(folder)
    async with running_service(settings) as service:  # only to enrol
        devices = [await enrolled_device(service, name) for name in ("anna", "ben")]
    process = await asyncio.to_thread(start_ready, settings)
    try:
        anna, ben = devices
        client = await asyncio.to_thread(anna.mqtt, tmp_path)
        run_id = await asyncio.to_thread(begin_run, settings, {"a": (300_000,)}, rounds=1, min_clients=2)
        tasks = await asyncio.gather(anna.task(), ben.task())
        await anna.answer(tasks[0], 1.0)
        for number in range(200):
            client.publish(anna.topic(TopicKind.WINDOW), encode(anna.window(number)), qos=1)
            if number == 100:
                process.kill()
                process.wait()
        running = read_running(folder)
        assert running is not None
        assert running.pid == process.pid
        process = await asyncio.to_thread(start_ready, settings)  # takes the same broker over
        for number in range(200, 250):
            client.publish(anna.topic(TopicKind.WINDOW), encode(anna.window(number)), qos=1)
        for device in devices:
            await device.close()
        task = await ben.task()
        assert task.attempt_id == tasks[1].attempt_id
        await ben.answer(task, 3.0)
        state = open_state(settings)

        def settled() -> bool:
            with state.database.read() as connection:
                windows = [(c.received, c.lost) for c in stream_counts(connection)]
                return windows == [(250, 0)] and find_run(connection, run_id).state == "done"

        await until(settled, 30.0)
        with state.database.read() as connection:
            assert len(list_submissions(connection, run_id)) == 2
        assert np.all(global_tensors(state, run_id)["a"] == 2.0)
        state.database.close()
        client.disconnect()
        client.loop_stop()
        for device in devices:
            await device.close()
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert await asyncio.to_thread(process.wait, 35) == 0
        assert time.monotonic() - began < 30
    finally:
        process.kill()
        process.wait()
        end_broker(settings)


@pytest.mark.e2e
async def test_a_device_whose_service_is_killed_in_mid_update_hands_it_in_to_the_next_one_once(tmp_path):
    folder = tmp_path / "state"
    settings = service_settings(folder)
    async with running_service(settings) as service:  # only to enrol
        anna = await enrolled_device(service)
    run_id = await asyncio.to_thread(begin_run, settings, {"a": (600_000,)}, rounds=1, min_clients=1)
    process = await asyncio.to_thread(start_ready, settings)
    cloud = RpcCloud(
        anna.cloud_address, lambda: grpc.ssl_channel_credentials(anna.ca_pem, anna.key_pem, anna.chain_pem)
    )
    try:
        task = (await asyncio.to_thread(cloud.poll_task, 10.0, "")).task
        assert task is not None
        assert digest_of(task.tensors) == task.tensors_digest
        update = encode_tensors({"a": np.full(600_000, 2.0, np.float32)})
        submission = Submission(
            task.run_id, task.round_number, task.attempt_id, digest_of(update), task.tensors_digest, 1, 1, {},
            0.0, local_state_reset=False,
        )  # fmt: skip
        os.kill(process.pid, signal.SIGSTOP)  # it takes what its sockets hold, and no more
        sending = asyncio.create_task(asyncio.to_thread(cloud.submit, submission, update))
        await asyncio.sleep(0.2)
        process.kill()
        process.wait()
        with pytest.raises(TransportError) as caught:
            await sending
        assert caught.value.retryable
        process = await asyncio.to_thread(start_ready, settings)
        receipts = [await asyncio.to_thread(cloud.submit, submission, update) for _ in range(2)]
        assert [receipt.status for receipt in receipts] == [ReceiptStatus.ACCEPTED, ReceiptStatus.DUPLICATE]
        state = open_state(settings)

        def done() -> bool:
            with state.database.read() as connection:
                return find_run(connection, run_id).state == "done"

        await until(done, 30.0)
        with state.database.read() as connection:
            assert len(list_submissions(connection, run_id)) == 1
        assert np.all(global_tensors(state, run_id)["a"] == 2.0)
        state.database.close()
    finally:
        cloud.close()
        process.kill()
        process.wait()
        end_broker(settings)


@pytest.mark.e2e
def test_ctrl_c_ends_the_service_and_its_broker(tmp_path):
    process = start_ready(service_settings(tmp_path))
    pid = int((tmp_path / "broker" / "mosquitto.pid").read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def listening_sockets(pid: int) -> list[str]:
    """``address:port`` in hexadecimal of every TCP socket on which a process listens."""
    inodes = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return [fields[1] for fields in lines if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes]


async def test_mosquitto_listens_on_one_loopback_port_and_nowhere_else(tmp_path):
    settings = service_settings(tmp_path, broker={"kind": "mosquitto"})
    async with running_service(settings) as service:
        pid = int((tmp_path / "broker" / "mosquitto.pid").read_text())
        assert service.running is not None
        assert listening_sockets(pid) == [f"0100007F:{service.running.broker.port:04X}"]
