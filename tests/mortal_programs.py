"""The agent and the service as processes that kill themselves, once at each of the points they are told.

``write_program`` makes an executable for ``fleet_processes.Fleet``. Nothing of this is in the programs themselves:
functions that mark the points are wrapped before the command line runs. ``skew`` moves the wall clock that the
agent's own modules see (gRPC's deadlines and TLS keep the right one); it jumps to the future when training begins.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

_SMALL_CHUNK = 1024


def write_program(file: Path, kind: str, points: tuple[str, ...] = (), skew: float = 0.0) -> str:
    """An executable that runs ``wearfleet-<kind>``; markers of deaths are beside it."""
    file.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from mortal_programs import {kind}\n{kind}({str(file)!r}, {points!r}, {skew!r})\n"
    )
    file.chmod(0o755)
    return str(file)


def deaths(program: str) -> list[str]:
    """Points at which a program has died."""
    return sorted(path.name.split(".")[-1] for path in Path(program).parent.glob(Path(program).name + ".*"))


class Fate:
    """Dies with ``kill -9`` at its points, at each of them once."""

    def __init__(self, program: str, points: tuple[str, ...]) -> None:
        self._program, self._points = program, points

    def at(self, point: str) -> None:
        """Die here, if it is one of the points and the first time."""
        marker = Path(f"{self._program}.{point}")
        if point in self._points and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, function: Callable[..., Any], point: str) -> Callable[..., Any]:
        """The function, and death when it has returned."""

        def wrapped(*args: Any, **keywords: Any) -> Any:
            result = function(*args, **keywords)
            self.at(point)
            return result

        return wrapped


def edge(program: str, points: tuple[str, ...], skew: float) -> None:
    """The agent; points: ``fetched``, ``training``, ``uploading``, ``submitted``."""
    from wearfleet_edge import agent, cli, own_windows, process  # noqa: F401 - the agent imports all that it is made of
    from wearfleet_edge.transport import rpc, work_stream

    fate, clock = Fate(program, points), _Clock(skew)
    for name, module in tuple(sys.modules.items()):
        if name.startswith("wearfleet_edge.") and getattr(module, "time", None) is time:
            module.time = clock  # type: ignore[attr-defined]
    poll, run, chunks = rpc.RpcCloud.poll_task, own_windows.run_plan, work_stream.update_messages

    def polled(self: Any, *args: Any) -> Any:
        reply = poll(self, *args)
        if reply.task is not None:
            fate.at("fetched")
        return reply

    def trained(*args: Any, **keywords: Any) -> Any:
        clock.jump()
        threading.Timer(0.3, fate.at, ("training",)).start()
        return run(*args, **keywords)

    def sent(*args: Any) -> Iterator[bytes]:
        for number, message in enumerate(chunks(*args)):
            if number == 3:
                time.sleep(0.2)  # what was sent is under way
                fate.at("uploading")
            yield message

    def become(arguments: process.ProcessArguments) -> None:
        """As ``process.become_agent``, but without a new interpreter, which would know nothing of the points."""
        sys.argv[1:] = [arguments.to_json()]
        sys.exit(process.main())

    process.become_agent = become  # type: ignore[assignment]
    rpc.RpcCloud.poll_task = polled  # type: ignore[method-assign]
    rpc.RpcCloud._submit = fate.after(rpc.RpcCloud._submit, "submitted")  # type: ignore[method-assign]
    own_windows.run_plan = trained  # type: ignore[assignment]
    work_stream.CHUNK_BYTES = _SMALL_CHUNK  # type: ignore[misc]
    work_stream.update_messages = rpc.update_messages = sent  # type: ignore[assignment]
    cli.main()


class _Clock:
    """The module ``time`` with a wall clock that is ``skew`` seconds wrong, and that far in the future after a jump."""

    def __init__(self, skew: float) -> None:
        self._skew = skew

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def jump(self) -> None:
        self._skew = abs(self._skew)

    def time_ns(self) -> int:
        return time.time_ns() + int(self._skew * 1e9)

    def time(self) -> float:
        return self.time_ns() * 1e-9


def cloud(program: str, points: tuple[str, ...], _: float) -> None:
    """The service; points: states of a round right after they were stored, and others named below."""
    from wearfleet_cloud import cli
    from wearfleet_cloud.service import coordinator, folding
    from wearfleet_cloud.storage.run_records import insert_submissions

    fate = Fate(program, points)
    act, carry_out = coordinator.Coordinator._act, coordinator._carry_out

    def acted(self: Any, keeper: Any, effects: Any) -> None:
        fate.at(f"{keeper.round.state}{'-with-an-update' if keeper.round.receipts else ''}")
        act(self, keeper, effects)

    def carried_out(connection: Any, works: list[Any]) -> None:
        carry_out(connection, works)
        if any(isinstance(work, partial) and work.func is insert_submissions for work in works):
            fate.at("before-the-commit-of-an-update")

    coordinator.Coordinator._act = acted  # type: ignore[method-assign]
    coordinator._carry_out = carried_out
    folding.Folding.fold = fate.after(folding.Folding.fold, "folded")  # type: ignore[method-assign]
    cli.main()
