"""The command group ``data``: what it prints, writes and refuses."""

from __future__ import annotations

import hashlib
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner
from wearfleet_cloud.cli import data
from wearfleet_cloud.data import DATASETS
from wearfleet_protos.errors import ConfigError, DataError, TransportError
from wearfleet_protos.recording import load_recordings


def run(*arguments: str | Path) -> str:
    app = typer.Typer()
    data.register(app)
    result = CliRunner(env={"WEARFLEET_DATA_ROOT": None}).invoke(app, ["data", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def run_json(*arguments: str | Path) -> Any:
    return json.loads(run(*arguments, "--json"))


def test_list_names_every_data_set_and_whether_it_is_there(tmp_path: Path) -> None:
    rows = {row["name"]: row for row in run_json("list", "--data-root", tmp_path)}
    joined = {"har-common", "har-common-strict"}
    apart = {
        "dsads",
        "emg",
        "hapt",
        "mhealth",
        "pamap2",
        "simulator",
        "uci-har",
        "usc-had",
        "wesad",
        "wisdm-51",
    }
    ddlearn = {f"{name}-ddlearn" for name in ("dsads", "pamap2", "usc-had")}
    assert rows.keys() == DATASETS.keys() == apart | joined | ddlearn
    assert [name for name, row in rows.items() if row["found"]] == ["simulator"]
    assert [name for name, row in rows.items() if row["simulated"]] == ["simulator"]
    assert all(name in run("list") for name in DATASETS)


def test_describe_counts_what_was_found(tmp_path: Path) -> None:
    few = tmp_path / "few.py"
    few.write_text(
        "from wearfleet_cloud.data.simulator import Simulation, simulated_dataset\n"
        "DATASET = simulated_dataset(Simulation(persons=2, bouts=1, bout_s=10.0))\n"
    )
    report = run_json("describe", few, "--cache-dir", tmp_path)
    assert report["counts"]["recordings"] == 4
    assert report["counts"]["samples_by_label"]["0"] == 4 * 500
    assert report["prepared"]["subjects"] == 2
    assert sum(report["prepared"]["windows_by_class"].values()) == report["prepared"]["windows"]
    text = run("describe", few, "--cache-dir", tmp_path)
    assert "(simulated)" in text
    assert str(report["prepared"]["windows"]) in text


def test_describe_refuses_a_missing_set_and_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data root"):
        run("describe", "hapt", "--cache-dir", tmp_path)
    with pytest.raises(ConfigError, match="known: dsads"):
        run("describe", "hapd", "--data-root", tmp_path, "--cache-dir", tmp_path)


def test_simulate_writes_one_replay_file_a_person(tmp_path: Path) -> None:
    arguments = ["--persons", "2", "--bout-seconds", "5", "--seed", "7"]
    report = run_json("simulate", "--out", tmp_path, *arguments)
    assert report["simulated"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["simulator-01.npz", "simulator-02.npz"]
    recordings, labels = load_recordings(Path(report["files"][1]["file"]))
    assert {r.subject for r in recordings} == {"02"}
    assert [r.session for r in recordings] == ["day-1", "day-2"]
    assert len(labels) == 6


def test_fetch_downloads_below_the_data_root_and_reports_the_digest(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "USC-HAD.zip").write_bytes(b"archive")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="fetch-site")
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/USC-HAD.zip"
        report = run_json("fetch", "usc-had", "--data-root", tmp_path, "--url", url)
        text = run("fetch", "usc-had", "--data-root", tmp_path, "--url", url)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert (tmp_path / "usc-had" / "USC-HAD.zip").read_bytes() == b"archive"
    assert report["sha256"] == hashlib.sha256(b"archive").hexdigest()
    assert report["verified"] is False
    assert "no published digest" in " ".join(text.split())


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_fetch_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no official address"):
        run("fetch", "simulator", "--data-root", tmp_path)
    with pytest.raises(ConfigError, match="--data-root"):
        run("fetch", "hapt")
    with pytest.raises(TransportError, match="check the network"):
        run("fetch", "hapt", "--data-root", tmp_path, "--url", "http://127.0.0.1:9/x.zip")


def test_every_official_address_is_https_and_its_archive_would_be_found(tmp_path: Path) -> None:
    """What fetch writes, the reader looks for."""
    from wearfleet_cloud.data.file_reader import FileReader

    for dataset in DATASETS.values():
        if dataset.download is None:
            continue
        assert dataset.download.address.startswith("https://")
        place = tmp_path / dataset.name
        place.mkdir()
        (place / dataset.download.file_name).write_bytes(b"")
        assert isinstance(dataset.reader, FileReader)
        assert dataset.reader.layout.locate(tmp_path).path == place / dataset.download.file_name
