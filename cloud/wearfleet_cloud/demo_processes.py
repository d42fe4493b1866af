"""The processes of a demonstration: every command is the one that a user would type, run as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from wearfleet_protos.errors import NotFoundError, WearfleetError

__all__ = ["CommandError", "Processes"]

_STOP_S: Final = 40.0


class CommandError(WearfleetError):
    """A process of the demonstration failed; the message holds the end of what it wrote."""


class Processes:
    """Starts processes, each with a log file, and ends them all.

    Args:
        log_dir: made when missing; ``<name>.log`` holds what a process wrote to standard error.
    """

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._files: list[IO[str]] = []

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[str]:
        """Start ``wearfleet-cloud ...`` or ``wearfleet-edge ...`` in the background, one core at most."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log = (self._log_dir / f"{name}.log").open("w")
        self._files.append(log)
        with _ctrl_c_waits():
            process = self._running[name] = subprocess.Popen(  # noqa: S603 - our own programs
                [_program(command[0]), *command[1:]],
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C reaches us alone; we end the others in order
                env=_environment(),
            )
        return process

    def ready_line(self, name: str) -> Mapping[str, Any]:
        """The first line that a process prints, which is JSON.

        Raises:
            CommandError: it ended without one.
        """
        process = self._running[name]
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("{"):
            process.wait()
            raise CommandError(f"{name} did not start: {self._tail(name)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def answer(self, name: str) -> Any:
        """Wait for a process to end well; the JSON that it printed.

        Raises:
            CommandError: it ended with an error.
        """
        process = self._running[name]
        printed, _ = process.communicate()
        del self._running[name]
        if process.returncode != 0:
            raise CommandError(f"{name} ended with code {process.returncode}: {self._tail(name)}")
        return json.loads(printed)

    def ended(self, name: str) -> bool:
        """Whether a process has ended, well or not."""
        return self._running[name].poll() is not None

    def call(self, name: str, command: Sequence[str]) -> Any:
        """Run a command to its end; the JSON that it printed."""
        self.start(name, command)
        return self.answer(name)

    def check(self, names: Sequence[str]) -> None:
        """Raise when a process that should go on has ended.

        Raises:
            CommandError: names it, with the end of its log.
        """
        for name in names:
            code = self._running[name].poll()
            if code is not None:
                raise CommandError(f"{name} ended with code {code}: {self._tail(name)}")

    def stop(self, names: Sequence[str]) -> None:
        """Ask processes to end and wait for them; one that does not is killed, one that has ended is forgotten."""
        chosen = {name: self._running[name] for name in names if name in self._running}
        for process in chosen.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        limit = time.monotonic() + _STOP_S
        for name, process in chosen.items():
            try:
                process.wait(max(0.1, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
            del self._running[name]

    def stop_all(self) -> None:
        """End everything, the youngest first, and close the logs; a second Ctrl-C does not leave any of it behind."""
        with _ctrl_c_waits():
            self.stop(list(reversed(self._running)))
            for log in self._files:
                log.close()

    def _tail(self, name: str) -> str:
        path = self._log_dir / f"{name}.log"
        lines = path.read_text(errors="replace").splitlines()[-6:]
        return (" / ".join(lines) or "it wrote nothing") + f" (all of it: {path})"


@contextlib.contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C that comes meanwhile counts afterwards: a process that was started is never out of our books."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets it
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _program(name: str) -> str:
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        path = Path(sys.executable).parent / name
    if not path.exists():
        raise NotFoundError(
            f"{name} is not installed beside {sys.executable}: pip install 'wearfleet[cloud,edge]'"
        )
    return str(path)


def _environment() -> dict[str, str]:
    """One thread a process: on few cores, spinning threads of several processes slow each other down."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
