"""The agent as a process of its own: a lean interpreter without the command line's libraries.

The command line replaces itself by ``python -m wearfleet_edge.process '{...}'`` with an environment that keeps the
numerical libraries to one thread and the C library to one memory arena.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from wearfleet_protos.errors import WearfleetError

from wearfleet_edge.config import load_config, with_changes
from wearfleet_edge.state import StateDirectory

__all__ = ["ProcessArguments", "become_agent", "main"]

_ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),  # tensors from the heap: not mapped and unmapped for each use
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),  # release_memory() gives the heap back after a task
    "GRPC_ENABLE_FORK_SUPPORT": "0",
}


@dataclass(frozen=True, slots=True)
class ProcessArguments:
    """What the command line hands over; None keeps the setting of the file."""

    state: str
    recording: str | None
    speed: float | None
    repeat: bool | None
    share_raw_windows: bool | None
    once: bool
    as_json: bool
    verbose: bool

    def to_json(self) -> str:
        """One argument of the new process."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__})


def become_agent(arguments: ProcessArguments) -> None:
    """Replace this process by the agent; the process id stays, so whoever started it can stop it."""
    environment = _ENVIRONMENT | dict(os.environ)
    command = [sys.executable, "-m", "wearfleet_edge.process", arguments.to_json()]
    os.execve(sys.executable, command, environment)  # noqa: S606  no shell, fixed program


def main() -> int:
    """Run the agent; returns the exit code."""
    arguments = ProcessArguments(**json.loads(sys.argv[1]))
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        status = _run(arguments)
    except WearfleetError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    if arguments.as_json:
        sys.stdout.write(json.dumps(status) + "\n")
    else:
        sys.stdout.write(
            f"{status['device']}: {status['windows_sent']} windows, {status['windows_acknowledged']} acknowledged, "
            f"{status['windows_lost']} lost, {status['federated_rounds']} federated rounds\n"
        )
    return 0


def _run(arguments: ProcessArguments) -> dict[str, object]:
    from wearfleet_edge.agent import Agent, AgentOptions  # noqa: PLC0415  after the logging is set up

    state = StateDirectory(Path(arguments.state))
    config = with_changes(
        load_config(state.config),
        "sensor",
        recording=arguments.recording,
        speed=arguments.speed,
        repeat=arguments.repeat,
    )
    config = with_changes(config, "policy", share_raw_windows=arguments.share_raw_windows)
    return Agent(AgentOptions(state, config, once=arguments.once)).run()


if __name__ == "__main__":
    sys.exit(main())
