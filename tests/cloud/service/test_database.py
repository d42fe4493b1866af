"""One contract for every database: SQLite in memory, SQLite on disk, PostgreSQL."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from postgres_server import postgres_server
from wearfleet_cloud.storage.audit import append_audit, verify_audit
from wearfleet_cloud.storage.catalog import (
    PublishedModel,
    current_release,
    insert_artifact,
    insert_model,
    release_model,
)
from wearfleet_cloud.storage.database import Database
from wearfleet_cloud.storage.device_records import (
    Code,
    Device,
    bind_code,
    find_code,
    find_device,
    insert_code,
    insert_device,
    list_devices,
    read_revision,
    revoke_device,
    stream_counts,
)
from wearfleet_cloud.storage.run_records import (
    RoundRow,
    RunRow,
    Submission,
    find_submission,
    finish_run,
    insert_run,
    insert_submissions,
    list_rounds,
    next_running,
    save_round,
    stop_run,
)
from wearfleet_cloud.storage.tables import METADATA, audit, devices
from wearfleet_cloud.storage.telemetry_records import TelemetryBatch, TelemetryStore, recent_predictions
from wearfleet_protos.errors import ConfigError, ConflictError, IntegrityError, NotFoundError
from wearfleet_protos.tensors import digest_of

ANNA = Device("anna-0001", "default", "anna", None, 5, "ff", 9, "1", 5)
STREAM = ("anna-0001", "00112233", "window")


@pytest.fixture(scope="module")
def postgres_url(tmp_path_factory):
    with postgres_server(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(params=["memory", "disk", "postgres"])
def database(request, tmp_path):
    if request.param == "postgres":
        opened = Database(request.getfixturevalue("postgres_url"))
        with opened.write() as connection:
            for table in reversed(METADATA.sorted_tables):
                if table.name != "revision":
                    connection.execute(sa.delete(table))
    else:
        opened = Database("sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path / 'x.db'}")
    yield opened
    opened.close()


def window_row(sequence: int) -> dict[str, object]:
    return {
        "sequence": sequence,
        "received_ns": 100 + sequence,
        "sample_index": 8 * sequence,
        "wall_time_ns": 7,
        "payload": b"\x00\x01",
    }


def batch_of(*sequences: int, boot: str = "00112233") -> TelemetryBatch:
    batch = TelemetryBatch()
    batch.rows["window"] = [(("anna-0001", boot, "window"), window_row(s)) for s in sequences]
    return batch


def test_the_migrations_make_exactly_the_tables_that_the_code_knows(database):
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_opening_a_database_again_changes_and_migrates_nothing(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    first = Database(url)
    with first.write() as connection:
        insert_device(connection, ANNA)
    first.close()
    monkeypatch.setattr("alembic.command.upgrade", None)
    again = Database(url)
    with again.read() as connection:
        assert list_devices(connection) == [ANNA]
    again.close()


def test_a_database_of_an_older_version_is_brought_to_this_one(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    upgrade = command.upgrade
    monkeypatch.setattr("alembic.command.upgrade", lambda config, _: upgrade(config, "0002"))
    Database(url).close()
    monkeypatch.undo()
    database = Database(url)
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    database.close()


def test_a_database_of_a_newer_program_is_refused_and_left_alone(tmp_path):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    database = Database(url)
    with database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(ConfigError, match=r"has version 9999, this program knows \d{4}; use a newer program"):
        Database(url)
    with closing(sqlite3.connect(tmp_path / "x.db")) as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchall() == [("9999",)]


def test_a_transaction_that_raises_leaves_nothing(database):
    def insert_and_fail() -> None:
        with database.write() as connection:
            insert_device(connection, ANNA)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        insert_and_fail()
    with database.read() as connection:
        assert list_devices(connection) == []


def test_a_row_of_an_unknown_device_is_refused(database):
    with database.write() as connection:
        insert_code(connection, Code("h", "default", "anna", 1, 2))
    with pytest.raises(sa.exc.IntegrityError), database.write() as connection:
        bind_code(connection, "h", "nobody-0000", "k")


def test_two_threads_write_one_after_the_other(database):
    def add(first: int) -> None:
        for number in range(first, first + 20):
            with database.write() as connection:
                append_audit(connection, number, "test", str(number))

    threads = [threading.Thread(target=add, args=(start,)) for start in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as connection:
        assert verify_audit(connection) == 40


def test_a_changed_audit_entry_is_found(database):
    with database.write() as connection:
        for number in range(3):
            append_audit(connection, number, "test", str(number))
        connection.execute(sa.update(audit).where(audit.c.entry == 1).values(subject="somebody else"))
    with database.read() as connection, pytest.raises(IntegrityError, match="entry 1"):
        verify_audit(connection)


def test_revoking_a_device_is_noticed_and_is_kept(database):
    with database.write() as connection:
        insert_device(connection, ANNA)
        before = read_revision(connection)
        revoke_device(connection, ANNA.device_id, 77)
        revoke_device(connection, ANNA.device_id, 88)
    with database.read() as connection:
        assert read_revision(connection) > before
        assert find_device(connection, ANNA.device_id).revoked_ns == 77
        with pytest.raises(NotFoundError, match="nobody"):
            find_device(connection, "nobody")


def test_a_code_is_found_by_its_hash_only(database):
    with database.write() as connection:
        insert_code(connection, Code("hash", "default", "anna", 1, 2))
        assert find_code(connection, "hash") == Code("hash", "default", "anna", 1, 2)
        assert find_code(connection, "other") is None


def test_a_message_that_comes_twice_is_stored_once_and_counted(database):
    store = TelemetryStore(database)
    with database.write() as connection:
        insert_device(connection, ANNA)
    assert store.store(batch_of(0, 1, 2)) == 0
    assert store.store(batch_of(2, 4, 4)) == 2
    with database.read() as connection:
        (count,) = stream_counts(connection, "anna-0001")
        stored = connection.exec_driver_sql("select count(*) from windows").scalar()
    assert (count.received, count.duplicated, count.highest_sequence, count.lost) == (4, 2, 4, 1)
    assert stored == 4


def test_a_new_start_of_a_device_counts_from_zero_again(database):
    store = TelemetryStore(database)
    with database.write() as connection:
        insert_device(connection, ANNA)
    store.store(batch_of(0, 1))
    store.store(batch_of(0, 1, boot="99999999"))
    with database.read() as connection:
        assert [(c.received, c.lost) for c in stream_counts(connection)] == [(2, 0), (2, 0)]


def test_a_batch_that_fails_leaves_nothing_and_can_be_stored_again(database):
    store = TelemetryStore(database)
    with pytest.raises(sa.exc.IntegrityError):
        store.store(batch_of(0, 1))  # the device is not known yet
    with database.write() as connection:
        insert_device(connection, ANNA)
    assert store.store(batch_of(0, 1)) == 0


def test_old_telemetry_is_deleted_but_stays_counted(database):
    store = TelemetryStore(database)
    with database.write() as connection:
        insert_device(connection, ANNA)
    store.store(batch_of(0, 1, 2))
    assert store.delete_before(102) == 2
    with database.read() as connection:
        assert stream_counts(connection)[0].received == 3
        assert recent_predictions(connection, "anna-0001", 5) == []


def test_versions_of_a_model_only_grow_and_the_last_release_counts(database):
    digest = digest_of(b"x")
    with database.write() as connection:
        assert current_release(connection) is None
        insert_artifact(connection, digest, 1, "x", 1)
        insert_artifact(connection, digest, 1, "x", 2)
        for version in (1, 3):
            insert_model(connection, PublishedModel("har", version, digest, digest, version))
        release_model(connection, "har", 3, 1)
        release_model(connection, "har", 1, 2)
        with pytest.raises(ConflictError, match="version 3"):
            insert_model(connection, PublishedModel("har", 3, digest, digest, 3))
        found = current_release(connection)
    assert found is not None
    assert found.version == 1


def test_a_submission_exists_once_and_a_run_ends_once(database):
    digest = digest_of(b"x")
    run = RunRow("run-1", "fedavg", "running", digest, digest, {"rounds": 2}, 1)
    row = RoundRow("run-1", 1, "train", "running", digest, 1, {"invited": ["anna-0001"]})
    submission = Submission("run-1", 1, "a", "anna-0001", digest, 3, 1, 0.5, False, 9, {"m": 1.0})
    with database.write() as connection:
        insert_device(connection, ANNA)
        insert_artifact(connection, digest, 1, "x", 1)
        insert_run(connection, run)
        save_round(connection, row)
        save_round(connection, row)
        insert_submissions(connection, [submission])
    with pytest.raises(sa.exc.IntegrityError), database.write() as connection:
        insert_submissions(connection, [submission])
    with database.write() as connection:
        assert next_running(connection) == run
        assert list_rounds(connection, "run-1") == [row]
        assert find_submission(connection, "run-1", "a") == submission
        assert finish_run(connection, "run-1", "done", 5)
        assert not stop_run(connection, "run-1", 6, "too late")
        assert next_running(connection) is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://x", "sqlite or postgresql"),
        ("nonsense", "database.url"),
        ("sqlite:////proc/no/x.db", "cannot create"),
    ],
)
def test_a_wrong_database_url_is_a_clear_error(url, message):
    with pytest.raises(ConfigError, match=message):
        Database(url)


def test_a_file_that_is_no_database_is_a_clear_error(tmp_path):
    (tmp_path / "x.db").write_bytes(b"something else" * 100)
    with pytest.raises((ConfigError, sa.exc.DatabaseError)) as caught:
        Database(f"sqlite:///{tmp_path / 'x.db'}")
    assert isinstance(caught.value, ConfigError)


def test_the_database_file_is_private_and_in_wal_mode(tmp_path):
    path = tmp_path / "x.db"
    opened = Database(f"sqlite:///{path}")
    with opened.write() as connection:
        insert_device(connection, ANNA)
    assert path.stat().st_mode & 0o077 == 0
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    raw.close()
    opened.close()


def test_a_write_during_a_read_does_not_wait(tmp_path):
    opened = Database(f"sqlite:///{tmp_path / 'x.db'}")
    with opened.read() as reader:
        assert reader.execute(sa.select(sa.func.count()).select_from(devices)).scalar() == 0
        with opened.write() as writer:
            insert_device(writer, ANNA)
        assert reader.execute(sa.select(sa.func.count()).select_from(devices)).scalar() == 0
    opened.close()
