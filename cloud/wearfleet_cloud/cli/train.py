"""Commands ``train``, ``evaluate`` and ``algorithms``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from wearfleet_cloud.data.dataset import Dataset, Progress
    from wearfleet_cloud.data.scenarios import Scenario
    from wearfleet_cloud.export.detection import Detection
    from wearfleet_cloud.export.ood_score import OodMethod

__all__ = ["register"]

BACKBONE_NAMES: Final = (
    "cnn",
    "cnn-small",
    "cnn-large",
    "cnn-plain",
    "cnn-plain-3",
    "transformer",
    "transformer-strict",
    "multimodal-transformer",
    "patch-transformer",
    "deep-conv-lstm",
    "resnet",
    "lag-cnn",
    "lag-transformer",
)
"""Keys of ``wearfleet_models.BACKBONES``, which needs torch to be read."""

DatasetOption = Annotated[
    str, typer.Option("--dataset", help="Name of the data set, or a .py file that describes one.")
]
RootOption = Annotated[
    Path | None,
    typer.Option("--data-root", envvar="WEARFLEET_DATA_ROOT", help="Folder with the official distributions."),
]
CacheOption = Annotated[Path | None, typer.Option("--cache-dir", help="Folder of prepared data.")]
ScenarioOption = Annotated[
    str,
    typer.Option(
        "--scenario", help="What the domains are: cross-person, -position, -dataset, -time or -device."
    ),
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--target",
        help="Held-out domain: its number, or its name: torso; cross-person: persons 07 or 3,8 or 3,",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of initial weights, splits and all random numbers.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and no progress.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("train")(_train)
    app.command("evaluate")(_evaluate)
    app.command("algorithms")(_algorithms)


def _train(
    *,
    dataset: DatasetOption,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; an interrupted run there goes on.")],
    data_root: RootOption = None,
    cache_dir: CacheOption = None,
    scenario: ScenarioOption = "cross-person",
    target: TargetOption = "0",
    algorithm: Annotated[
        str,
        typer.Option("--algorithm", help="See: wearfleet-cloud algorithms; or a .py file that holds one."),
    ] = "erm",
    backbone: Annotated[
        str, typer.Option("--backbone", help=f"One of: {', '.join(BACKBONE_NAMES)}.")
    ] = "cnn",
    steps: Annotated[int, typer.Option("--steps", help="Number of updates.")] = 3000,
    seed: SeedOption = 0,
    device: Annotated[str, typer.Option("--device", help="Of torch: cpu, cuda, cuda:1.")] = "cpu",
    left_out: Annotated[
        list[str] | None,
        typer.Option("--leave-out", help="An activity to take out of the data, to be unknown; repeatable."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="name=value: a setting of training, of the network or of the algorithm; repeatable."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model on source domains and score it on an unseen one."""
    from wearfleet_cloud.training.config import TrainConfig
    from wearfleet_cloud.training.settings import run_settings
    from wearfleet_cloud.training.trainer import train

    with _progress(as_json) as progress:
        world = _scenario(
            dataset,
            data_root,
            cache_dir,
            kind=scenario,
            target=target,
            seed=seed,
            left_out=left_out or (),
            progress=progress,
        )
        config = TrainConfig(steps=steps, seed=seed, device=device)
        spec, config = run_settings(world.prepared.dataset, algorithm, config, backbone, settings or [])
        result = train(world, algorithm, spec, config, out, progress)
    _show_run({**result.summary, "out": str(out)}, as_json)


def _evaluate(
    *,
    dataset: DatasetOption,
    run: Annotated[Path | None, typer.Option("--run", help="Folder of a run.")] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="model.safetensors, with model.json beside it.")
    ] = None,
    data_root: RootOption = None,
    cache_dir: CacheOption = None,
    scenario: ScenarioOption = "cross-person",
    target: TargetOption = "0",
    seed: SeedOption = 0,
    ood: Annotated[
        bool,
        typer.Option(
            "--ood", help="Judge how well out-of-distribution scores of --run find unknown windows."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Score a trained model on the target domain of a scenario, or its scores of what is unknown."""
    from wearfleet_protos.errors import ConfigError

    from wearfleet_cloud.training.model_files import load_model
    from wearfleet_cloud.training.scoring import score

    if (run is None) == (model is None):
        raise ConfigError("give either --run (a folder) or --model (a file)")
    if ood:
        if run is None:
            raise ConfigError("--ood needs --run, the folder that says what the model was trained on")
        _show_detection(_detections(run, dataset, data_root, cache_dir, as_json), as_json)
        return
    network = load_model(run or model or Path())
    with _progress(as_json) as progress:
        world = _scenario(
            dataset, data_root, cache_dir, kind=scenario, target=target, seed=seed, progress=progress
        )
    scores = score(network, world.target.x, world.target.y, world.prepared.dataset.label_names)
    known = world.prepared.dataset
    if as_json:
        about = {"dataset": known.name, "simulated": known.simulated, "target": world.target.name}
        print(json.dumps({**about, **asdict(scores)}))
        return
    rows = [[c.activity, str(c.windows), f"{c.recall:.3f}", f"{c.f1:.3f}"] for c in scores.classes]
    _table(["activity", "windows", "recall", "F1"], rows)
    print(
        f"{_name(known)}, {world.target.name}: accuracy {scores.accuracy:.4f}, macro-F1 {scores.macro_f1:.4f}"
    )


def _detections(
    run: Path, dataset: str, data_root: Path | None, cache_dir: Path | None, quiet: bool
) -> dict[str, dict[OodMethod, Detection]]:
    from wearfleet_cloud.data import dataset_named
    from wearfleet_cloud.data.prepared import default_cache_dir, prepare
    from wearfleet_cloud.export.detection import compare_scores, unknown_windows
    from wearfleet_cloud.export.run_folder import read_run, windows_of_run

    trained = read_run(run)
    with _progress(quiet) as progress:
        described = dataset_named(dataset).for_scenario(trained.scenario)
        prepared = prepare(described, data_root, cache_dir or default_cache_dir(), progress)
    windows = windows_of_run(trained, prepared)
    return compare_scores(trained.model, windows.x, windows.y, unknown_windows(trained, prepared))


def _show_detection(found: dict[str, dict[OodMethod, Detection]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({s: {m: asdict(d) for m, d in scores.items()} for s, scores in found.items()}))
        return
    rows = [
        [unknown, method, f"{d.auroc:.3f}", f"{d.aupr_in:.3f}", f"{d.aupr_out:.3f}", f"{d.fpr95:.3f}"]
        for unknown, scores in found.items()
        for method, d in scores.items()
    ]
    _table(["unknown", "score", "AUROC", "AUPR in", "AUPR out", "FPR at 95 %"], rows)


def _algorithms(as_json: JsonOption = False) -> None:
    """List the training algorithms."""
    from wearfleet_cloud.algorithms import ALGORITHMS

    infos = [kind.info for kind in ALGORITHMS.values()]
    if as_json:
        print(json.dumps([asdict(info) for info in infos]))
        return
    rows = [
        [
            info.name,
            info.paper,
            info.family,
            ", ".join(info.needs) or "labels only",
            ", ".join(f"{name}={value:g}" for name, value in info.hyper.items()) or "-",
            info.inference,
            f"no: {info.alone}" if info.alone else "yes",
        ]
        for info in infos
    ]
    _table(["name", "paper", "family", "needs", "hyper-parameters", "inference network", "stacks"], rows)


def _scenario(
    dataset: str,
    data_root: Path | None,
    cache_dir: Path | None,
    *,
    kind: str,
    target: str,
    seed: int,
    left_out: Sequence[str] = (),
    progress: Progress,
) -> Scenario:
    from wearfleet_cloud.data import dataset_named
    from wearfleet_cloud.data.prepared import default_cache_dir
    from wearfleet_cloud.data.scenarios import open_scenario
    from wearfleet_cloud.training.settings import held_out

    return open_scenario(
        dataset_named(dataset),
        kind,
        held_out(target),
        seed=seed,
        data_root=data_root,
        cache_dir=cache_dir or default_cache_dir(),
        activities_left_out=left_out,
        progress=progress,
    )


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """Bars on standard error, or nothing for programs that read the output."""
    from wearfleet_cloud.cli.data import progress_bars
    from wearfleet_cloud.data.dataset import silent

    if quiet:
        yield silent
        return
    with progress_bars() as bars:
        yield bars


def _show_run(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary))
        return
    name = f"{summary['dataset']} (simulated)" if summary["simulated"] else summary["dataset"]
    rows = [
        ["data set", f"{name}, {summary['scenario']}, target {summary['target']}"],
        ["algorithm", summary["algorithm"]],
        ["target accuracy", f"{summary['target_accuracy']:.4f}" + _how(summary)],
        ["target macro-F1", f"{summary['target_macro_f1']:.4f}"],
        ["source validation accuracy", f"{summary['source_validation_accuracy']:.4f}"],
        ["kept step", f"{summary['selected_step']} of {summary['config']['steps']} ({summary['selection']})"],
        ["steps a second", f"{summary['steps_per_second']}"],
        ["written to", summary["out"]],
    ]
    _table(["", ""], rows)


def _how(summary: dict[str, Any]) -> str:
    """What to add to the score of a run that was given the target's windows."""
    if not summary["transductive"]:
        return ""
    return (
        f" (transductive: all of the target's windows were used, unlabelled; the network alone "
        f"{summary['network_target_accuracy']:.4f})"
    )


def _name(dataset: Dataset) -> str:
    return f"{dataset.name} (simulated)" if dataset.simulated else dataset.name


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, show_header=any(columns))
    for row in rows:
        table.add_row(*row)
    Console().print(table)
