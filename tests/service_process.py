"""The service as a process on ports that are known: started, and what it leaves behind when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wearfleet_cloud.config import Settings

__all__ = ["end_broker", "start_process", "start_ready"]

_PROGRAM = (sys.executable, "-c", "from wearfleet_cloud.cli import main; main()")


def start_process(
    settings: Settings, program: Sequence[str] = _PROGRAM, output: int = subprocess.DEVNULL
) -> subprocess.Popen[str]:
    """``wearfleet-cloud serve`` with these settings."""
    service, broker = settings.service, settings.broker
    command = [
        *program, "serve", "--json", "--state", str(service.state_dir), "--port", str(service.port),
        "--enrol-port", str(service.enrol_port), "--web-port", str(service.web_port),
        "--broker-port", str(broker.port),
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=output, text=True)


def start_ready(settings: Settings) -> subprocess.Popen[str]:
    """The same, when it is ready."""
    process = start_process(settings, output=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        ready = json.loads(process.stdout.readline())
    assert ready["ready"]
    assert set(ready) == {"ready", "pid", "host", "cloud_port", "enrol_port", "web_port", "broker"}
    return process


def end_broker(settings: Settings) -> None:
    """It outlives a service that was killed."""
    with suppress(OSError, ValueError):
        os.kill(int((settings.service.state_dir / "broker" / "mosquitto.pid").read_text()), signal.SIGTERM)
