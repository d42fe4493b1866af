"""Processes of a demonstration: none is left behind, whenever Ctrl-C comes."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wearfleet_cloud.demo_processes import CommandError, Processes

WAITS = ["wearfleet-edge", "--version"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[str]]]:
    """Every process that was started; each sleeps, and Ctrl-C comes while it is being started.

    Tests that a shell runs in the background are deaf to Ctrl-C, unless they say otherwise.
    """
    processes: list[subprocess.Popen[str]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, _command: list[str], **options: Any) -> None:
            super().__init__(["sleep", "600"], **options)
            processes.append(self)
            if threading.current_thread() is threading.main_thread():
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("wearfleet_cloud.demo_processes.subprocess.Popen", Interrupted)
    monkeypatch.setattr("wearfleet_cloud.demo_processes._STOP_S", 60.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield processes
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_process_is_started_leaves_none_behind(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    processes = Processes(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        processes.start("one", WAITS)
    assert started[0].poll() is None
    processes.stop_all()
    assert started[0].returncode == -signal.SIGTERM


def test_a_second_ctrl_c_waits_until_everything_has_ended(
    tmp_path: Path, started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = Processes(tmp_path)
    for name in ("one", "two"):
        with pytest.raises(KeyboardInterrupt):
            processes.start(name, WAITS)
    stop = Processes.stop

    def stop_impatiently(self: Processes, names: list[str]) -> None:
        signal.raise_signal(signal.SIGINT)
        stop(self, names)

    monkeypatch.setattr(Processes, "stop", stop_impatiently)
    with pytest.raises(KeyboardInterrupt):
        processes.stop_all()
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2


def test_ctrl_c_while_processes_are_stopped_leaves_them_to_the_end(
    tmp_path: Path, started: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = Processes(tmp_path)
    for name in ("one", "two"):
        with pytest.raises(KeyboardInterrupt):
            processes.start(name, WAITS)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "send_signal", interrupted)
        with pytest.raises(KeyboardInterrupt):
            processes.stop(["one", "two"])
    assert [process.poll() for process in started] == [None, None]
    processes.stop_all()
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2


def test_another_thread_starts_processes_too(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    processes = Processes(tmp_path)
    thread = threading.Thread(target=processes.start, args=("one", WAITS))
    thread.start()
    thread.join()
    processes.stop_all()
    assert started[0].returncode == -signal.SIGTERM


def test_a_command_that_fails_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    with pytest.raises(CommandError, match=r"broken ended with code 2: .*no-such-option"):
        processes.call("broken", ["wearfleet-edge", "--no-such-option"])
    processes.stop_all()
