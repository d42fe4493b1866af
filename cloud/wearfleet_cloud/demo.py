"""The demonstration: the whole loop on one machine, with real processes, a real broker and real certificates.

Two algorithms are trained on some people, the one with the better source validation is exported and published, four
agents replay four people whom no training has seen, and federated rounds with a last local training make the model
theirs. Everything that is reported was measured here.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.dataset import UNKNOWN_SUBJECT
from wearfleet_cloud.data.prepared import Prepared, default_cache_dir, prepare, write_replays
from wearfleet_cloud.data.scenarios import person_groups
from wearfleet_cloud.demo_processes import CommandError, Processes
from wearfleet_cloud.demo_results import Stream, read_streams
from wearfleet_cloud.report import PersonReport, render_report
from wearfleet_cloud.service.broker import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DemoSettings", "print_summary", "run_demo"]

ALGORITHMS: Final = ("erm", "coral")
_PEOPLE: Final = 4
_STRATEGY: Final = "fedbn"
_FINISH_S: Final = 240.0


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What to show.

    Args:
        dataset: name of a data set.
        data_root: where its distribution lies; None for the simulator.
        out: folder of all results; what a former demonstration left there is overwritten.
        steps: training steps of each algorithm.
        rounds: federated rounds.
        stream_s: a person's recording is replayed in about so many seconds.
        web_port: of the live page, 0 for any free one.
        keep: leave service and agents running until Ctrl-C.
        seed: of everything random.
    """

    dataset: str
    data_root: Path | None
    out: Path
    steps: int
    rounds: int
    stream_s: float
    web_port: int
    keep: bool
    seed: int


def run_demo(settings: DemoSettings, console: Console) -> dict[str, Any]:
    """Run the whole loop and write ``summary.json`` and ``report.html`` into ``settings.out``.

    Returns:
        The content of ``summary.json``.

    Raises:
        ConfigError: the data set has too few people, or does not say who they are; or the page's port is in use.
        CommandError: one of the processes failed.
        DataError: the data root is wrong.
    """
    processes = Processes(settings.out / "logs")
    try:
        return _Demo(settings, console, processes).run()
    finally:
        console.print("stopping")
        processes.stop_all()


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What the commands answered: by algorithm, by name, by agent."""

    results: Mapping[str, Mapping[str, Any]]
    selected: str
    export: Mapping[str, Any]
    run: Mapping[str, Any]
    statuses: Mapping[str, Mapping[str, Any]]


class _Demo:
    def __init__(self, settings: DemoSettings, console: Console, processes: Processes) -> None:
        self._settings = settings
        self._console = console
        self._processes = processes
        self._seconds: dict[str, float] = {}
        self._state = str(settings.out / "cloud")

    def run(self) -> dict[str, Any]:
        settings, begin = self._settings, time.monotonic()
        dataset = dataset_named(settings.dataset)
        with self._bar(f"preparing {dataset.name}") as show:
            prepared = prepare(
                dataset, settings.data_root, default_cache_dir(), lambda _what, done, total: show(done, total)
            )
        people = _unseen_people(prepared)
        free_port("127.0.0.1", settings.web_port, "--web-port")
        _clear(settings.out)  # not earlier: what cannot begin leaves the former results alone
        with self._timed("train"):
            results = self._train(people)
        selected = max(ALGORITHMS, key=lambda name: float(results[name]["source_validation_accuracy"]))
        self._console.print(f"selected by source validation: [bold]{selected}[/]")
        with self._timed("export"):
            export = self._export(selected)
        agents = self._start_fleet(prepared, people)
        with self._timed("federate"):
            run = self._federate(selected, agents)
        with self._timed("stream"):
            self._finish_streams(agents)
        if settings.keep:
            self._console.print(f"the page stays up: [bold]{self._page}[/]   Ctrl-C ends it")
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
        self._processes.stop(list(agents))
        statuses = {name: self._status(name) for name in agents}
        self._processes.stop(["service"])
        self._seconds["total"] = time.monotonic() - begin
        return self._report(prepared, agents, _Outcome(results, selected, export, run, statuses))

    def _train(self, people: tuple[str, ...]) -> dict[str, Mapping[str, Any]]:
        """Both algorithms at once, a process each."""
        settings = self._settings
        for name in ALGORITHMS:
            command = [
                "wearfleet-cloud", "train", "--dataset", settings.dataset, "--target", ",".join(people) + ",",
                "--algorithm", name, "--steps", str(settings.steps), "--seed", str(settings.seed),
                "--out", str(self._run_dir(name)), "--json", *self._data_root(),
            ]  # fmt: skip
            self._processes.start(f"train-{name}", command)
        with _bars(self._console) as bars:
            tasks = {name: bars.add_task(f"training {name}", total=settings.steps) for name in ALGORITHMS}
            while not all(self._processes.ended(f"train-{name}") for name in ALGORITHMS):
                for name, task in tasks.items():
                    bars.update(task, completed=_last_step(self._run_dir(name) / "metrics.jsonl"))
                time.sleep(0.2)
        results = {name: self._processes.answer(f"train-{name}") for name in ALGORITHMS}
        table = Table("algorithm", "source validation", f"{_PEOPLE} unseen people", "steps/s")
        for name, result in results.items():
            scores = (result["source_validation_accuracy"], result["target_accuracy"])
            table.add_row(name, *(f"{score:.3f}" for score in scores), f"{result['steps_per_second']:.0f}")
        self._console.print(table)
        return results

    def _export(self, selected: str) -> Mapping[str, Any]:
        command = [
            "wearfleet-cloud", "export", "--run", str(self._run_dir(selected)), "--out", str(self._model),
            "--model-id", "har", "--json", *self._data_root(),
        ]  # fmt: skip
        with self._bar("exporting one ONNX file and comparing it with torch"):
            report: Mapping[str, Any] = self._processes.call("export", command)
        return report

    def _start_fleet(self, prepared: Prepared, people: tuple[str, ...]) -> dict[str, str]:
        """Service and agents; device id of each agent by its name."""
        settings, processes = self._settings, self._processes
        replays = write_replays(prepared, settings.out / "replays", people)
        command = [
            "wearfleet-cloud", "serve", "--state", self._state, "--port", "0", "--enrol-port", "0",
            "--broker-port", "0", "--web-port", str(settings.web_port),
            "--source-name", prepared.dataset.name, "--json",
        ]  # fmt: skip
        processes.start("service", command + (["--simulated"] if prepared.dataset.simulated else []))
        with self._bar("starting broker and service"):
            ready = processes.ready_line("service")
        self._page = f"http://{ready['host']}:{ready['web_port']}"
        self._console.print(f"live page: [bold]{self._page}[/]")
        self._admin("models", "publish", str(self._model))
        agents: dict[str, str] = {}
        for person, replay in zip(people, replays, strict=True):
            name = f"person-{person}".lower()
            with self._bar(f"enrolling {name}"):
                ticket = self._admin("devices", "enrol-code", "--name", name)["ticket"]
                place = str(settings.out / "devices" / name)
                enrolled = processes.call(
                    f"enrol-{name}", ["wearfleet-edge", "enrol", ticket, "--state", place, "--json"]
                )
            agents[name] = enrolled["device_id"]
            speed = max(1.0, _duration_s(prepared, person) / settings.stream_s)
            processes.start(
                name,
                ["wearfleet-edge", "run", "--state", place, "--recording", str(replay), "--speed", f"{speed:.2f}",
                 "--no-repeat", "--share-raw-windows", "--json"],
            )  # fmt: skip
        return agents

    def _federate(self, selected: str, agents: Mapping[str, str]) -> Mapping[str, Any]:
        settings = self._settings
        run_id = self._admin(
            "federation", "start", "--strategy", _STRATEGY, "--run", str(self._run_dir(selected)),
            "--rounds", str(settings.rounds), "--min-clients", str(len(agents)), "--quorum", str(len(agents)),
            "--deadline", "60", "--seed", str(settings.seed), "--set", "epochs=1", "--set", "learning_rate=0.003",
        )["run_id"]  # fmt: skip
        limit = time.monotonic() + _FINISH_S
        with self._bar(f"{settings.rounds} rounds of {_STRATEGY}, then personal weights") as show:
            while True:
                self._processes.check([*agents, "service"])
                run: Mapping[str, Any] = self._admin("federation", "status", run_id)
                done = sum(1 for r in run["rounds"] if r["state"] in ("PUBLISHED", "SKIPPED"))
                show(min(done, settings.rounds + 1), settings.rounds + 1)
                if run["state"] != "running":
                    break
                if time.monotonic() > limit:
                    raise CommandError(f"the federated run did not end in {_FINISH_S:.0f} s: {run}")
                time.sleep(1.0)  # the question costs a second of one core, which the devices want
        if run["state"] != "done":
            raise CommandError(f"the federated run ended as {run['state']}: {run['reason']}")
        return run

    def _finish_streams(self, agents: Mapping[str, str]) -> None:
        limit = time.monotonic() + _FINISH_S
        with self._bar("streaming the rest of the recordings") as show:
            while True:
                self._processes.check([*agents, "service"])
                statuses = [self._status(name) for name in agents]
                finished = [
                    s
                    for s in statuses
                    if s["stream_finished"] and s["outbox_depth"] == 0 and s["personalised"]
                ]
                show(len(finished), len(agents))
                if len(finished) == len(agents):
                    return
                if time.monotonic() > limit:
                    raise CommandError(f"the streams did not end in {_FINISH_S:.0f} s")
                time.sleep(0.3)

    def _report(self, prepared: Prepared, agents: Mapping[str, str], outcome: _Outcome) -> dict[str, Any]:
        people = dict(zip(agents, _unseen_people(prepared), strict=True))
        streams = read_streams(Path(self._state), tuple(agents.values()))
        summary: dict[str, Any] = {
            "dataset": prepared.dataset.name,
            "simulated": prepared.dataset.simulated,
            "source_subjects": [s for s in prepared.subjects if s not in people.values()],
            "device_subjects": list(people.values()),
            "central": {
                name: {"target_accuracy": outcome.results[name]["target_accuracy"]} for name in ALGORITHMS
            },
            "selected_algorithm": outcome.selected,
            "export": {
                key: outcome.export["parity"][key] for key in ("max_abs_difference", "argmax_agreement")
            },
            "devices": [
                _device_summary(device, people[name], outcome.statuses[name], streams[device])
                for name, device in agents.items()
            ],
            "federated": _federated_summary(outcome.run),
            "seconds": {name: round(value, 2) for name, value in self._seconds.items()},
        }
        reports = [
            _person_report(device, people[name], outcome.statuses[name], streams[device])
            for name, device in agents.items()
        ]
        out = self._settings.out
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        (out / "report.html").write_text(render_report(summary, prepared.dataset.label_names, reports))
        return summary

    def _admin(self, *command: str) -> Any:
        return self._processes.call(
            " ".join(command[:2]).replace(" ", "-"),
            ["wearfleet-cloud", *command, "--state", self._state, "--json"],
        )

    def _status(self, name: str) -> Mapping[str, Any]:
        path = self._settings.out / "devices" / name / "status.json"
        empty = {"stream_finished": False, "outbox_depth": 1, "personalised": False}
        return json.loads(path.read_text()) if path.exists() else empty

    def _run_dir(self, name: str) -> Path:
        return self._settings.out / "train" / name

    @property
    def _model(self) -> Path:
        return self._settings.out / "model" / "har.onnx"

    def _data_root(self) -> list[str]:
        return ["--data-root", str(self._settings.data_root)] if self._settings.data_root else []

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - begin

    @contextmanager
    def _bar(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar that is told (done, total); one that is told nothing only runs."""
        with _bars(self._console) as bars:
            task = bars.add_task(what, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)


def print_summary(summary: Mapping[str, Any], console: Console, out: Path) -> None:
    """The table that ends a demonstration."""
    kind = "simulated people" if summary["simulated"] else "real people"
    console.print(
        f"{summary['dataset']}, {kind} unseen in training; accuracy on the later part of each recording"
    )
    table = Table("person", "before", "after", "windows", "lost", "twice", "p50 µs", "p99 µs", "MB", "torch")
    for d in summary["devices"]:
        table.add_row(
            d["subject"], f"{d['accuracy_before']:.3f}", f"{d['accuracy_after']:.3f}", str(d["windows_ingested"]),
            str(d["windows_lost"]), str(d["windows_duplicated"]), f"{d['inference_ms_p50'] * 1e3:.0f}",
            f"{d['inference_ms_p99'] * 1e3:.0f}", f"{d['rss_mb']:.0f}", "yes" if d["torch_imported"] else "no",
        )  # fmt: skip
    means = [
        statistics.fmean(d[key] for d in summary["devices"]) for key in ("accuracy_before", "accuracy_after")
    ]
    table.add_section()
    table.add_row("mean", *(f"{mean:.3f}" for mean in means))
    console.print(table)
    federated = summary["federated"]
    console.print(
        f"{federated['rounds']} rounds of {federated['strategy']}, {federated['round_seconds_median']:.2f} s each, "
        f"{federated['bytes_down'] / 1e6:.2f} MB down, {federated['bytes_up'] / 1e6:.2f} MB up; "
        f"the whole loop took {summary['seconds']['total']:.0f} s"
    )
    console.print(f"written: {out / 'summary.json'} and {out / 'report.html'}")


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _clear(out: Path) -> None:
    """Remove what a former demonstration wrote, and nothing else."""
    for name in ("train", "model", "cloud", "devices", "replays", "logs"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("summary.json", "report.html"):
        (out / name).unlink(missing_ok=True)


def _unseen_people(prepared: Prepared) -> tuple[str, ...]:
    """The first four of the first person group: target 0 of the cross-person protocol, not chosen by any result."""
    known = prepared.subjects
    if UNKNOWN_SUBJECT in known or len(known) < _PEOPLE + 2:
        raise ConfigError(
            f"a demonstration needs a data set with at least {_PEOPLE + 2} known people; {prepared.dataset.name} has "
            f"{'unknown people' if UNKNOWN_SUBJECT in known else len(known)}. Try simulator, hapt or usc-had"
        )
    grouped = [person for group in person_groups(prepared) for person in group]
    return tuple(grouped[:_PEOPLE])


def _duration_s(prepared: Prepared, subject: str) -> float:
    return sum(len(r.samples) / r.rate_hz for r in prepared.recordings_of(subject))


def _last_step(path: Path) -> int:
    """Step of the last whole line of a run's metrics, 0 when there is none yet."""
    if not path.exists():
        return 0
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def _device_summary(device: str, subject: str, status: Mapping[str, Any], stream: Stream) -> dict[str, Any]:
    """The entry of ``summary.json``; a window is counted by its prediction and, where sent, by its samples."""
    sent = {"prediction": status["windows_sent"], "window": status["raw_windows_sent"]}
    return {
        "device": device,
        "subject": subject,
        "accuracy_before": status["accuracy_before"],
        "accuracy_after": status["accuracy_after"],
        "windows_sent": status["windows_sent"],
        "windows_ingested": stream.ingested["prediction"],
        "windows_lost": max(sent[kind] - stream.ingested[kind] for kind in sent),
        "windows_duplicated": stream.counted_twice,
        "windows_redelivered": stream.redelivered,
        "inference_ms_p50": status["inference_ms_p50"],
        "inference_ms_p99": status["inference_ms_p99"],
        "rss_mb": status["rss_mb"],
        "private_mb": status["private_mb"],
        "torch_imported": status["torch_imported"],
    }


def _federated_summary(run: Mapping[str, Any]) -> dict[str, Any]:
    trained = [r for r in run["rounds"] if r["kind"] == "train"]
    return {
        "strategy": run["strategy"],
        "rounds": sum(1 for r in trained if r["state"].lower() == "published"),
        "bytes_down": sum(r["bytes_down"] for r in run["rounds"]),
        "bytes_up": sum(r["bytes_up"] for r in run["rounds"]),
        "round_seconds_median": statistics.median(r["seconds"] for r in trained),
    }


def _person_report(device: str, subject: str, status: Mapping[str, Any], stream: Stream) -> PersonReport:
    return PersonReport(
        device=device,
        subject=subject,
        confusion_before=np.array(status["confusion_before"], np.int64),
        confusion_after=np.array(status["confusion_after"], np.int64),
        ribbon=stream.ribbon,
    )
