"""A PostgreSQL server of our own, in a temporary folder, for tests."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import pytest
from ports import free_port

__all__ = ["postgres_server"]


@contextmanager
def postgres_server(folder: Path) -> Iterator[str]:
    """URL of an empty database; skips the test where PostgreSQL is not installed, fails it where CI demands it."""
    programs = _programs()
    if programs is None:
        message = "PostgreSQL is not installed: apt-get install postgresql"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    user = _user(folder)
    data, port = folder / "pg", free_port()
    quiet = {"stdout": subprocess.DEVNULL, "cwd": "/", "user": user}
    subprocess.run(
        [programs / "initdb", "-D", data, "-A", "trust", "-U", "wearfleet", "-E", "UTF8"], check=True, **quiet
    )
    options = f"-c listen_addresses=127.0.0.1 -p {port} -c fsync=off -c unix_socket_directories={folder}"
    subprocess.run(
        [programs / "pg_ctl", "-D", data, "-w", "-o", options, "-l", folder / "pg.log", "start"],
        check=True,
        **quiet,
    )
    try:
        yield f"postgresql+psycopg://wearfleet@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([programs / "pg_ctl", "-D", data, "-m", "immediate", "stop"], check=True, **quiet)


def _programs() -> Path | None:
    for folder in sorted(glob("/usr/lib/postgresql/*/bin"), reverse=True):  # noqa: PTH207 - an absolute pattern
        return Path(folder)
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found and shutil.which("postgres") else None


def _user(folder: Path) -> str | None:
    """PostgreSQL refuses to run as root: give the folder to another user then."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        for parent in folder.parents:
            if parent.stat().st_uid == 0 and str(parent).startswith(("/tmp/", "/var/")):
                parent.chmod(parent.stat().st_mode | 0o011)
        return name
    pytest.skip("no user to run PostgreSQL as")
