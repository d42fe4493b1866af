"""The database: SQLite in WAL mode by default, PostgreSQL by URL. One object hands out transactions.

SQLite runs with ``synchronous=NORMAL``: a killed process loses nothing; a power cut may lose the last transactions,
never consistency.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import StaticPool
from wearfleet_protos.errors import ConfigError, TransportError

from wearfleet_cloud.storage.tables import revision

__all__ = ["Database", "insert_or_skip"]

T = TypeVar("T")

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_VERSION: Final = sa.table("alembic_version", sa.column("version_num", sa.String))
_BUSY_MS: Final = 15_000


class Database:
    """Transactions over one database; safe to use from several threads and processes.

    Args:
        url: SQLAlchemy URL, ``sqlite:///path``, ``sqlite://`` (in memory) or ``postgresql+psycopg://...``.

    Raises:
        ConfigError: the URL is wrong, the database cannot be opened or brought to this version, or is newer.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = _create_engine(url)
        shared = self._engine.pool.__class__ is StaticPool
        self._turn = threading.RLock() if shared else None  # one connection: one transaction at a time
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        self._upgrade()

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self._engine.dialect.name

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction that may write; rolled back when the block raises."""
        with self._transaction("IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One transaction that only reads: a consistent picture."""
        with self._transaction("DEFERRED") as connection:
            yield connection

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Carry out ``work`` in one writing transaction, in the database thread."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._work, work)

    def close(self) -> None:
        """Wait for work under way and close every connection."""
        self._worker.shutdown(wait=True)
        self._engine.dispose()

    def _work(self, work: Callable[[Connection], T]) -> T:
        with self.write() as connection:
            return work(connection)

    @contextmanager
    def _transaction(self, mode: str) -> Iterator[Connection]:
        if self._turn is not None:
            self._turn.acquire()
        try:
            with self._engine.connect().execution_options(begin_mode=mode) as connection, connection.begin():
                yield connection
        except sa.exc.OperationalError as error:
            raise TransportError(f"the database is busy or away: {error.orig}; try again") from error
        finally:
            if self._turn is not None:
                self._turn.release()

    def _upgrade(self) -> None:
        where = sa.make_url(self.url).render_as_string(hide_password=True)
        newest = max(path.stem[1:5] for path in (_MIGRATIONS / "versions").glob("v[0-9]*.py"))
        try:
            found = self._version()
            if found > newest:
                raise ConfigError(
                    f"the database {where} has version {found}, this program knows {newest}; use a newer program"
                )
            if found < newest:
                self._migrate()
        except (sa.exc.SQLAlchemyError, TransportError) as error:
            raise ConfigError(f"cannot open the database {where}: {error}; check database.url") from error

    def _version(self) -> str:
        """Number of the migration that the database stands at; empty when it is new."""
        with self.read() as connection:
            if not sa.inspect(connection).has_table(_VERSION.name):
                return ""
            return connection.execute(sa.select(_VERSION.c.version_num)).scalar() or ""

    def _migrate(self) -> None:
        from alembic import command  # noqa: PLC0415 - slow to load, and seldom needed
        from alembic.config import Config as AlembicConfig  # noqa: PLC0415

        config = AlembicConfig()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self.write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            insert_or_skip(connection, revision, {"id": 1, "value": 0})


def insert_or_skip(
    connection: Connection, table: sa.Table, rows: Mapping[str, object] | Sequence[Mapping[str, object]]
) -> int:
    """Insert rows, leaving those alone whose key exists; the number of new rows."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as insert_postgresql  # noqa: PLC0415 - one dialect only

        counted = insert_postgresql(table).on_conflict_do_nothing().returning(sa.literal(1))
        return len(connection.execute(counted, rows).all())  # its driver does not count what many inserts did
    return connection.execute(sa.insert(table).prefix_with("OR IGNORE"), rows).rowcount


def _create_engine(url: str) -> Engine:
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() == "postgresql":
            return sa.create_engine(parsed, pool_pre_ping=True)
        if parsed.get_backend_name() != "sqlite":
            raise ConfigError(f"database must be sqlite or postgresql, got {parsed.get_backend_name()!r}")
        return _create_sqlite(parsed)
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigError(
            f"database.url is wrong: {error}; expected sqlite:///file or postgresql+psycopg://..."
        ) from error


def _create_sqlite(url: sa.URL) -> Engine:
    memory = url.database in (None, "", ":memory:")
    if not memory:
        _create_private(Path(str(url.database)))
    options: dict[str, Any] = {"poolclass": StaticPool} if memory else {}
    engine = sa.create_engine(url, connect_args={"check_same_thread": False}, **options)
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _create_private(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create the database {path}: {error}; check service.state_dir") from error


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions are begun by _begin_sqlite
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", f"busy_timeout={_BUSY_MS}"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    mode = connection.get_execution_options().get("begin_mode", "DEFERRED")
    connection.exec_driver_sql(f"BEGIN {mode}")
