"""``wearfleet-cloud strategies`` and ``wearfleet-cloud plan``: federated algorithms and what they send to devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from wearfleet_protos.errors import ConfigError

if TYPE_CHECKING:
    from wearfleet_protos.plan import Plan

__all__ = ["parse_settings", "register"]

_group = typer.Typer(help="Build, show and verify the plans that devices run.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Folder = Annotated[Path, typer.Argument(help="Folder written by `plan build`.")]
RunFolder = Annotated[Path, typer.Option("--run", help="Folder of a finished training run.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Hyper-parameter, name=value; repeatable.")]


def register(app: typer.Typer) -> None:
    """Add ``strategies`` and the group ``plan`` to the command line."""
    app.command("strategies")(strategies)
    app.add_typer(_group, name="plan")


def strategies(as_json: Json = False) -> None:
    """Every federated strategy: paper, phases, what stays on the device, what it composes with."""
    from wearfleet_cloud.federated import STRATEGIES, default_options

    rows: list[dict[str, Any]] = [
        {
            "name": info.name,
            "paper": info.paper,
            "version": info.version,
            "phases": list(info.phases),
            "uploaded": [str(role) for role in info.uploaded],
            "kept_local": [str(role) for role in info.kept_local],
            "kept_beside": list(info.kept_beside),
            "composes_with": list(info.composes_with),
            "hyper_parameters": dict(info.hyper_parameters),
            "options": {name: str(value) for name, value in default_options(info.name).items()},
        }
        for info in (strategy.info for strategy in STRATEGIES.values())
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("name", "paper", "phases", "stays on the device", "composes with")
    for row in rows:
        table.add_row(
            row["name"],
            row["paper"],
            ", ".join(row["phases"]),
            ", ".join([*row["kept_local"], *row["kept_beside"]]) or "nothing",
            ", ".join(row["composes_with"]),
        )
    Console().print(table)


@_group.command("build")
def build(
    *,
    run: RunFolder,
    out: Annotated[Path, typer.Option("--out", help="Folder for the plan and its graphs.")],
    strategy: Annotated[str, typer.Option("--strategy", help="A name of `strategies`.")] = "fedavg",
    settings: Settings = None,
    seed: Annotated[int, typer.Option("--seed", help="Of shuffling and random numbers.")] = 0,
    as_json: Json = False,
) -> None:
    """Compile a strategy's client side for the model of a training run."""
    from wearfleet_cloud.federated import create_strategy

    chosen = create_strategy(strategy, parse_settings(settings or []))
    from wearfleet_cloud.data import dataset_named  # what follows loads torch
    from wearfleet_cloud.export.run_folder import contract_of, read_run
    from wearfleet_cloud.federated.plan_builder import build_plan
    from wearfleet_cloud.federated.plan_files import save_plan

    trained = read_run(run)
    plan, graphs = build_plan(
        chosen,
        chosen.network(trained.model, seed),
        contract_of(dataset_named(trained.dataset).for_scenario(trained.scenario), trained.labels),
        plan_id=f"{strategy}-{trained.identity}",
        seed=seed,
    )
    save_plan(out, plan, graphs)
    _print(_summary(plan), as_json)


@_group.command("show")
def show(folder: Folder, as_json: Json = False) -> None:
    """What a plan makes a device do: phases, loops, tensors, what is sent and what stays."""
    from wearfleet_cloud.federated.plan_files import load_plan

    _print(_summary(load_plan(folder)[0]), as_json)


@_group.command("verify")
def verify(folder: Folder, as_json: Json = False) -> None:
    """Check a plan's graphs: digests, valid standard ONNX, and that they fit the tensors they are bound to."""
    from wearfleet_cloud.federated.plan_files import check_plan, load_plan

    plan, graphs = load_plan(folder)
    reports = check_plan(plan, graphs)
    if as_json:
        phases = [
            {
                "phase": r.name,
                "graph": r.graph,
                "graph_bytes": r.graph_bytes,
                "operators": r.operators,
                "reads": r.reads,
                "writes": r.writes,
            }
            for r in reports
        ]
        print(json.dumps({"plan_id": plan.plan_id, "valid": True, "phases": phases}, indent=2))
        return
    table = Table("phase", "nodes", "operators", "bytes", "reads", "writes", title=f"{plan.plan_id}: valid")
    for r in reports:
        counts = (sum(r.operators.values()), len(r.operators), r.graph_bytes, r.reads, r.writes)
        table.add_row(r.name, *(str(count) for count in counts))
    Console().print(table)


def parse_settings(settings: list[str]) -> dict[str, object]:
    """``name=value`` texts as a mapping.

    Raises:
        ConfigError: a text without ``=``, or a name twice.
    """
    parsed: dict[str, object] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes name=value, got {text!r}")
        if name in parsed:
            raise ConfigError(f"--set names {name} twice")
        parsed[name] = value
    return parsed


def _summary(plan: Plan) -> dict[str, Any]:
    return {
        "plan_id": plan.plan_id,
        "strategy": plan.strategy,
        "model_schema_hash": plan.model_schema_hash,
        "plan_bytes": len(plan.to_bytes()),
        "graph_bytes": sum({p.graph: p.graph_bytes for p in plan.phases}.values()),
        "download_bytes": sum(s.size_bytes for s in plan.download_specs()),
        "upload_codec": plan.upload.codec.to_json(),
        "upload_bytes": plan.update_format().most_bytes(1),
        "keep_local": [str(role) for role in plan.keep_local],
        "kept_bytes": sum(s.size_bytes for s in plan.local_specs()),
        "phases": [
            {
                "name": p.name,
                "graph": p.graph,
                "split": p.loop.split,
                "batch_size": p.loop.batch_size,
                "epochs": p.loop.epochs,
                "scalars": dict(p.scalars),
            }
            for p in plan.phases
        ],
    }


def _print(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    table = Table("phase", "windows", "batch", "epochs", "scalars", "graph", title=summary["plan_id"])
    for phase in summary["phases"]:
        table.add_row(
            phase["name"],
            phase["split"],
            str(phase["batch_size"]),
            str(phase["epochs"]),
            ", ".join(f"{name} {value:g}" for name, value in phase["scalars"].items()),
            phase["graph"][:19],
        )
    Console().print(table)
    Console().print(
        f"down {summary['download_bytes']} bytes of tensors and {summary['graph_bytes']} of graphs, "
        f"up {summary['upload_bytes']} in codec {summary['upload_codec']}; "
        f"{summary['kept_bytes']} bytes stay on the device"
    )
