"""The demonstration as a user starts it: what it measures, what it leaves, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from browser import open_page, picture
from fleet_processes import wait_for
from selenium.webdriver.common.by import By

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.broker, pytest.mark.browser]

NUMBER = (int, float)
SUMMARY = {
    "dataset": str, "simulated": bool, "source_subjects": list, "device_subjects": list, "central": dict,
    "selected_algorithm": str, "export": dict, "devices": list, "federated": dict, "seconds": dict,
}  # fmt: skip
DEVICE = {
    "device": str, "subject": str, "accuracy_before": float, "accuracy_after": float, "windows_sent": int,
    "windows_ingested": int, "windows_lost": int, "windows_duplicated": int, "inference_ms_p50": float,
    "inference_ms_p99": float, "rss_mb": float, "private_mb": float, "torch_imported": bool,
}  # fmt: skip
FEDERATED = {
    "strategy": str, "rounds": int, "bytes_down": int, "bytes_up": int, "round_seconds_median": float,
}  # fmt: skip


def start_demo(out: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start ``wearfleet-cloud demo`` in a session of its own, as a terminal does.

    A shell that runs the tests in the background makes them, and what they start, deaf to Ctrl-C; a terminal does not.
    """
    program = Path(sys.executable).with_name("wearfleet-cloud")
    with (out.parent / "demo.log").open("wb") as log:
        return subprocess.Popen(
            [program, "demo", "--out", out, *options],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - no threads here
        )  # fmt: skip


def alive(out: Path) -> set[int]:
    """Processes that name the demonstration's folder: its commands, its agents, its Mosquitto."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(out) in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def end(demo: subprocess.Popen[bytes], out: Path) -> None:
    """Leave nothing behind, whatever the test found."""
    demo.kill()
    demo.wait()
    for pid in alive(out):
        os.kill(pid, signal.SIGKILL)


def has_types(values: dict[str, Any], wanted: dict[str, type]) -> None:
    for name, kind in wanted.items():
        assert type(values[name]) is kind, name


def test_the_whole_loop_runs_and_every_number_is_there(tmp_path: Path, output_dir: Path) -> None:
    out = tmp_path / "demo"
    demo = start_demo(out, "--steps", "150", "--rounds", "5", "--stream-seconds", "12")
    try:
        assert demo.wait(240) == 0, (tmp_path / "demo.log").read_text()
        assert alive(out) == set()
    finally:
        end(demo, out)
    summary = json.loads((out / "summary.json").read_text())
    assert_summary(summary)
    shutil.copy(out / "summary.json", output_dir / "demo-summary.json")
    assert_report_opens(out / "report.html", summary)


def assert_summary(summary: dict[str, Any]) -> None:
    has_types(summary, SUMMARY)
    assert (summary["dataset"], summary["simulated"]) == ("simulator", True)
    assert len(summary["device_subjects"]) == len(summary["devices"]) == 4
    assert set(summary["source_subjects"]).isdisjoint(summary["device_subjects"])
    for algorithm in ("erm", "coral"):
        assert 0.0 < summary["central"][algorithm]["target_accuracy"] <= 1.0
    assert summary["selected_algorithm"] in summary["central"]
    assert 0.0 <= summary["export"]["max_abs_difference"] < 1e-3
    assert summary["export"]["argmax_agreement"] == 1.0
    has_types(summary["federated"], FEDERATED)
    assert summary["federated"]["strategy"] == "fedbn"
    assert summary["federated"]["rounds"] >= 5
    assert min(summary["federated"][name] for name in ("bytes_down", "bytes_up", "round_seconds_median")) > 0
    for part in ("total", "train", "export", "stream", "federate"):
        assert isinstance(summary["seconds"][part], NUMBER)
    for device, subject in zip(summary["devices"], summary["device_subjects"], strict=True):
        assert_device(device, subject)
    before, after = (
        statistics.fmean(device[name] for device in summary["devices"])
        for name in ("accuracy_before", "accuracy_after")
    )
    assert after > before


def assert_device(device: dict[str, Any], subject: str) -> None:
    has_types(device, DEVICE)
    assert device["subject"] == subject
    assert device["windows_sent"] == device["windows_ingested"] > 100
    assert device["windows_lost"] == device["windows_duplicated"] == 0
    assert device["torch_imported"] is False
    assert 0.0 < device["inference_ms_p50"] <= device["inference_ms_p99"]
    assert 0.0 < device["private_mb"] < 60.0 < device["rss_mb"]


def assert_report_opens(report: Path, summary: dict[str, Any]) -> None:
    with open_page(report.as_uri(), size=(1280, 1600)) as page:
        text = page.find_element(By.TAG_NAME, "body").text
        assert "simulated data" in text
        for device in summary["devices"]:
            assert device["device"] in text
        assert len(page.find_elements(By.TAG_NAME, "svg")) >= len(summary["devices"])
        addresses = page.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
        assert addresses == []
        assert page.get_log("browser") == []
        picture(page, "demo-report")


def test_ctrl_c_ends_everything_that_was_started(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    demo = start_demo(out, "--steps", "100", "--stream-seconds", "60")
    try:
        replaying = (
            out / "logs" / "federation-status.log"
        )  # by now the service, Mosquitto and four agents run
        wait_for("the federated run begins", lambda: replaying.exists() or demo.poll() is not None, 240, 0.1)
        assert demo.poll() is None, (tmp_path / "demo.log").read_text()
        assert len(alive(out)) >= 7
        demo.send_signal(signal.SIGINT)
        assert demo.wait(120) == 130, (tmp_path / "demo.log").read_text()
        assert alive(out) == set()
    finally:
        end(demo, out)
