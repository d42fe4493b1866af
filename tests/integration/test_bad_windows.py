"""Windows that no model could use, sent by an enrolled device through a real broker: refused, counted, harmless."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest
from service_harness import enrolled_device, running_service, service_settings, until
from wearfleet_protos.codec import decode_window, encode
from wearfleet_protos.topics import TopicKind
from wearfleet_protos.v1 import telemetry_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

    from service_harness import Device

pytestmark = pytest.mark.broker


def bad_windows(device: Device) -> list[bytes]:
    """NaN, infinity, a count of samples or channels that the bytes do not have, no samples, no rate."""
    good = encode(device.window(0), "float32")
    decode_window(good)  # without the change it would be stored
    found = []
    for value in (np.nan, np.inf):
        message = pb.SensorWindow.FromString(good)
        samples = np.frombuffer(message.float32.data, np.float32).copy()
        samples[3] = value
        message.float32.data = samples.tobytes()
        found.append(message.SerializeToString())
    for field, value in (
        ("samples", 17),
        ("channels", 3),
        ("samples", 0),
        ("samples", 2**31),
        ("rate_hz", 0.0),
    ):
        message = pb.SensorWindow.FromString(good)
        setattr(message, field, value)
        found.append(message.SerializeToString())
    return found


async def test_windows_of_the_wrong_shape_or_with_nan_are_refused_and_the_next_good_one_is_stored(
    tmp_path: Path,
) -> None:
    async with running_service(service_settings(tmp_path / "state")) as service:
        device = await enrolled_device(service)
        client = await asyncio.to_thread(device.mqtt, tmp_path)
        bad, topic = bad_windows(device), device.topic(TopicKind.WINDOW)
        for payload in (*bad, encode(device.window(1))):
            await asyncio.to_thread(client.publish(topic, payload, qos=1).wait_for_publish, 10)
        refused = service.metrics.rejected.labels("payload")._value
        stored = service.metrics.messages.labels("window")._value
        await until(lambda: (refused.get(), stored.get()) == (len(bad), 1))
        assert service._healthy
        client.disconnect()
        client.loop_stop()
        await device.close()
