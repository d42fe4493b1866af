"""Command ``export``: a training run becomes one checked ONNX file with its manifest."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wearfleet_cloud.cli.data import progress_bars

if TYPE_CHECKING:
    from wearfleet_protos.plan import InputContract

    from wearfleet_cloud.data.dataset import Progress
    from wearfleet_cloud.export import Release, ReleaseInfo
    from wearfleet_cloud.export.quantize import QuantizedModel
    from wearfleet_cloud.export.run_folder import Run, RunWindows

__all__ = ["register"]

OodMethod = Literal[
    "max-probability", "energy", "mahalanobis", "cosine"
]  # as in export.ood_score, without torch


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("export")(_export)


def _export(
    *,
    run: Annotated[Path, typer.Option("--run", help="Folder of a finished training run.")],
    out: Annotated[Path, typer.Option("--out", help="The ONNX file; its manifest is written beside it.")],
    data_root: Annotated[
        Path | None,
        typer.Option(
            "--data-root", envvar="WEARFLEET_DATA_ROOT", help="Folder with the official distributions."
        ),
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", help="Folder of prepared data.")] = None,
    quantize: Annotated[
        Literal["int8"] | None, typer.Option("--quantize", help="Also write OUT's stem + .int8.onnx.")
    ] = None,
    budget: Annotated[
        float, typer.Option("--budget", help="Largest loss of accuracy by quantisation, as a share.")
    ] = 0.01,
    ood_method: Annotated[
        OodMethod, typer.Option("--ood-method", help="Out-of-distribution score.")
    ] = "mahalanobis",
    model_id: Annotated[
        str | None, typer.Option("--model-id", help="Name of the model line; default: the data set's name.")
    ] = None,
    model_version: Annotated[
        int, typer.Option("--model-version", min=1, help="Grows with each release of the line.")
    ] = 1,
    licence: Annotated[
        str | None, typer.Option("--license", help="Of the model; default: terms of the data set.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option("--strategy", help="Add the layers that this federated strategy trains (fedclip)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and no progress.")] = False,
) -> None:
    """Export a run as one ONNX file: standardisation to out-of-distribution score, checked against torch."""
    from wearfleet_cloud.data import dataset_named
    from wearfleet_cloud.data.prepared import default_cache_dir, prepare
    from wearfleet_cloud.export import ReleaseInfo, write_release
    from wearfleet_cloud.export.run_folder import contract_of, read_run, windows_of_run
    from wearfleet_cloud.federated import create_strategy

    with _progress(as_json) as progress:
        trained = read_run(run)
        if strategy is not None:
            trained = replace(trained, model=create_strategy(strategy, {}).network(trained.model, seed=0))
        dataset = dataset_named(trained.dataset).for_scenario(trained.scenario)
        windows = windows_of_run(
            trained, prepare(dataset, data_root, cache_dir or default_cache_dir(), progress)
        )
        info = ReleaseInfo(
            model_id=model_id or dataset.name,
            version=model_version,
            train_run=trained.identity,
            license=licence or dataset.license,
            simulated=dataset.simulated,
            created_ns=time.time_ns(),
        )
        release = _released(
            trained, contract_of(dataset, trained.labels), windows, info, method=ood_method, progress=progress
        )
        manifest = write_release(out, release.data, release.manifest)
        report = _report(out, manifest, release) | {"transductive": trained.transductive}
        if quantize is not None:
            small = _quantized(release, windows, budget, progress)
            small_out = out.with_suffix(f".{quantize}.onnx")
            small_manifest = write_release(small_out, small.data, small.manifest)
            report |= {quantize: _report_int8(small_out, small_manifest, small)}
    _show(report, as_json)


def _released(
    run: Run,
    contract: InputContract,
    windows: RunWindows,
    info: ReleaseInfo,
    *,
    method: OodMethod,
    progress: Progress,
) -> Release:
    from wearfleet_cloud.export import export_classifier

    done = count()
    release = export_classifier(
        run.model,
        contract,
        info,
        x=windows.x,
        y=windows.y,
        x_validation=windows.x_validation,
        method=method,
        on_stage=lambda _: progress("exporting", next(done), 3),
    )
    progress("exporting", 3, 3)
    return release


def _quantized(release: Release, windows: RunWindows, budget: float, progress: Progress) -> QuantizedModel:
    from wearfleet_cloud.export.quantize import quantize

    progress("quantising", 0, 1)
    manifest = replace(release.manifest, model_id=f"{release.manifest.model_id}-int8")
    small = quantize(
        release.data,
        manifest,
        x=windows.x,
        y=windows.y,
        x_validation=windows.x_validation,
        y_validation=windows.y_validation,
        budget=budget,
    )
    progress("quantising", 1, 1)
    return small


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    from wearfleet_cloud.data.dataset import silent

    if quiet:
        yield silent
        return
    with progress_bars() as bars:
        yield bars


def _report(out: Path, manifest: Path, release: Release) -> dict[str, Any]:
    return {
        "model": str(out),
        "manifest": str(manifest),
        "digest": release.manifest.digest,
        "size_bytes": release.manifest.size_bytes,
        "simulated": release.manifest.simulated,
        "train_run": release.manifest.train_run,
        "ood_method": release.manifest.ood_method,
        "ood_threshold": release.manifest.ood_threshold,
        "parity": asdict(release.parity),
    }


def _report_int8(out: Path, manifest: Path, small: QuantizedModel) -> dict[str, Any]:
    return {
        "model": str(out),
        "manifest": str(manifest),
        "digest": small.manifest.digest,
        "ood_threshold": small.manifest.ood_threshold,
        "accuracy_loss": small.report.loss,
        **asdict(small.report),
    }


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
        return
    from rich.console import Console
    from rich.table import Table

    parity = report["parity"]
    table = Table("", "", show_header=False)
    table.add_row("model", f"{report['model']} ({report['size_bytes']} bytes)")
    table.add_row("manifest", report["manifest"])
    table.add_row("trained on", report["train_run"] + (" (simulated)" if report["simulated"] else ""))
    if report["transductive"]:
        table.add_row(
            "exported",
            "the network that was trained, without the run's transductive predictions of the target",
        )
    table.add_row("out of distribution", f"{report['ood_method']} above {report['ood_threshold']:.4g}")
    table.add_row("torch against ONNX Runtime", f"{parity['windows']} windows")
    table.add_row("same class", f"{parity['argmax_agreement']:.2%}")
    table.add_row("largest difference of logits", f"{parity['max_abs_difference']:.2g}")
    Console().print(table)
    if "int8" in report:
        _show_int8(report["int8"])


def _show_int8(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(report["model"], "float32", "int8")
    table.add_row("accuracy", f"{report['accuracy_float32']:.4f}", f"{report['accuracy_int8']:.4f}")
    for label, before, after in report["per_class"]:
        table.add_row(f"  {label}", f"{before:.4f}", f"{after:.4f}")
    for name in ("p50_us", "p99_us"):
        before, after = report["latency_float32"][name], report["latency_int8"][name]
        table.add_row(f"one window, {name[:3]}, us", f"{before:.1f}", f"{after:.1f}")
    table.add_row("bytes", str(report["size_float32"]), str(report["size_int8"]))
    Console().print(table)
    if report["latency_int8"]["p50_us"] >= report["latency_float32"]["p50_us"]:
        Console().print("int8 is not faster here: prefer the float32 model unless its size matters")
