"""``wearfleet-cloud federation``: start, watch and stop federated runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from wearfleet_protos.errors import ConfigError, NotFoundError

from wearfleet_cloud.cli.state_options import (
    ConfigFile,
    Json,
    StateFolder,
    opened,
    print_json,
    print_table,
    time_text,
)

if TYPE_CHECKING:
    from wearfleet_protos.plan import Plan
    from wearfleet_protos.tensors import Digest

    from wearfleet_cloud.storage.run_records import RoundRow, RunRow, Submission

__all__ = ["plan_and_graphs", "register", "run_summary"]

_group = typer.Typer(help="Federated runs: devices train, the service averages.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group ``federation`` to the command line."""
    app.add_typer(_group, name="federation")


@_group.command("start")
def start(
    *,
    strategy: Annotated[str, typer.Option(help="A name of `strategies`; not needed with --plan.")] = "fedbn",
    run: Annotated[
        Path | None, typer.Option(help="Folder of the training run behind the released model.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Folder written by `plan build`, instead of --run.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Training rounds.")] = 5,
    min_clients: Annotated[int, typer.Option(min=1, help="Devices that must be there to begin a round.")] = 1,
    cohort_size: Annotated[int, typer.Option(min=0, help="Updates wanted a round; 0: of all devices.")] = 0,
    over_selection: Annotated[float, typer.Option(help="Invite so many times the cohort.")] = 1.0,
    quorum: Annotated[int, typer.Option(min=1, help="Fewest updates worth averaging.")] = 1,
    deadline: Annotated[float, typer.Option(help="Seconds that a round waits for devices.")] = 300.0,
    extension: Annotated[float, typer.Option(help="Seconds added once when the quorum is missed.")] = 0.0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Hyper-parameter, name=value; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of cohorts, shuffling and random numbers.")] = 0,
    personalise: Annotated[
        bool, typer.Option(help="End with a local training whose result stays there.")
    ] = True,
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Json = False,
) -> None:
    """Start a run from the released model; a running service begins within a second."""
    from wearfleet_cloud.cli.plan import parse_settings
    from wearfleet_cloud.federated.cohort import CohortPolicy
    from wearfleet_cloud.federated.round import RoundPolicy
    from wearfleet_cloud.service.run_context import RunSettings
    from wearfleet_cloud.service.run_setup import start_run, tensors_of_model

    options = parse_settings(settings or [])
    document, graphs = plan_and_graphs(plan, run, strategy, options, seed)
    chosen = RunSettings(
        rounds=rounds,
        cohort=CohortPolicy(cohort_size, min_clients, over_selection),
        policy=RoundPolicy(quorum=quorum, deadline_s=deadline, extension_s=extension),
        options=options,
        seed=seed,
        personalise=personalise,
    )
    with opened(config, state) as (_, service):
        current = service.registry.current()
        if current is None:
            raise NotFoundError("no model is released; use `models publish` first")
        tensors = tensors_of_model(service.registry.model(current[0]), document.download_specs())
        run_id = start_run(
            service.database,
            service.blobs,
            service.keys,
            plan=document,
            graphs=graphs,
            tensors=tensors,
            settings=chosen,
            now_ns=time.time_ns(),
        )
    if as_json:
        print_json({"run_id": run_id, "strategy": document.strategy, "rounds": rounds})
        return
    print(run_id)


@_group.command("status")
def status(
    run_id: Annotated[str | None, typer.Argument(help="One run; all without it.")] = None,
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Json = False,
) -> None:
    """Runs with their rounds, bytes and the devices' own measurements."""
    from wearfleet_cloud.service.privacy_budget import refusals
    from wearfleet_cloud.storage import run_records

    with opened(config, state) as (_, service), service.database.read() as connection:
        runs = [run_records.find_run(connection, run_id)] if run_id else run_records.list_runs(connection)
        summaries = [
            run_summary(
                run,
                run_records.list_rounds(connection, run.run_id),
                run_records.list_submissions(connection, run.run_id),
            )
            | {"not_asked": refusals(connection, run)}
            for run in runs
        ]
    if as_json:
        print_json(summaries[0] if run_id else summaries)
        return
    for summary in summaries:
        print(
            f"{summary['run_id']}: {summary['state']} {summary['reason']}, begun {time_text(summary['created_ns'])}"
        )
        print_table(
            ("round", "kind", "state", "invited", "submitted", "suspect", "seconds", "bytes down", "bytes up"),
            [
                (r["round"], r["kind"], r["state"], len(r["invited"]), len(r["submitted"]), _suspects(r),
                 f"{r['seconds']:.2f}", r["bytes_down"], r["bytes_up"])
                for r in summary["rounds"]
            ],
        )  # fmt: skip
        for device_id, reason in summary["not_asked"].items():
            print(f"{device_id} is not asked: {reason}")


@_group.command("stop")
def stop(
    run_id: Annotated[str, typer.Argument(help="A run of `federation status`.")],
    reason: Annotated[str, typer.Option(help="Kept with the run.")] = "stopped by the operator",
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Json = False,
) -> None:
    """End a run; the newest tensors stay what they are."""
    from wearfleet_cloud.storage.audit import append_audit
    from wearfleet_cloud.storage.run_records import stop_run

    now_ns = time.time_ns()
    with opened(config, state) as (_, service), service.database.write() as connection:
        stopped = stop_run(connection, run_id, now_ns, reason)
        if stopped:
            append_audit(connection, now_ns, "federation.stop", run_id, reason)
    if as_json:
        print_json({"run_id": run_id, "stopped": stopped})
        return
    print(f"{run_id} {'is stopped' if stopped else 'had ended before'}")


def run_summary(run: RunRow, rounds: list[RoundRow], submissions: list[Submission]) -> dict[str, Any]:
    """A run for JSON: its rounds, and what each device handed in last."""
    last = {submission.device_id: submission for submission in submissions}
    return {
        "run_id": run.run_id,
        "strategy": run.strategy,
        "state": run.state,
        "reason": run.reason,
        "created_ns": run.created_ns,
        "finished_ns": run.finished_ns,
        "plan_digest": run.plan_digest,
        "tensors_digest": run.tensors_digest,
        "settings": dict(run.settings),
        "rounds": [_round(row, [s for s in submissions if s.round == row.round]) for row in rounds],
        "devices": {
            device_id: {
                "round": submission.round,
                "num_examples": submission.num_examples,
                "num_steps": submission.num_steps,
                "train_seconds": submission.train_seconds,
                "local_state_reset": submission.local_state_reset,
                "metrics": dict(submission.metrics),
            }
            for device_id, submission in sorted(last.items())
        },
    }


def _round(row: RoundRow, submissions: list[Submission]) -> dict[str, Any]:
    ended_ns = row.closed_ns or time.time_ns()
    return {
        "round": row.round,
        "kind": row.kind,
        "state": row.state,
        "seconds": (ended_ns - row.opened_ns) * 1e-9,
        "bytes_down": row.bytes_down,
        "bytes_up": row.bytes_up,
        "invited": list(row.snapshot["invited"]),
        "submitted": [submission.device_id for submission in submissions],
        "declined": [list(pair) for pair in row.snapshot["declined"]],
        "rejected": [list(pair) for pair in row.snapshot["rejected"]],
        "judged": list(row.snapshot.get("judged", ())),
        "reason": row.snapshot["reason"],
    }


def _suspects(summary: dict[str, Any]) -> int:
    """Devices of a round whose updates were refused, or that a robust rule pointed at."""
    judged = {judgement["client"] for judgement in summary["judged"] if judgement["suspect"]}
    return len(judged | {device_id for device_id, _ in summary["rejected"]})


def plan_and_graphs(
    plan: Path | None, run: Path | None, strategy: str, options: dict[str, object], seed: int
) -> tuple[Plan, dict[Digest, bytes]]:
    """A plan from its folder, or built for the model of a training run.

    Raises:
        ConfigError: neither or both are given, or an option is wrong.
    """
    if (plan is None) == (run is None):
        raise ConfigError("give either --run (a training run) or --plan (a folder of `plan build`)")
    if plan is not None:
        from wearfleet_cloud.federated.plan_files import load_plan

        return load_plan(plan)
    assert run is not None
    from wearfleet_cloud.data import dataset_named
    from wearfleet_cloud.export.run_folder import contract_of, read_run
    from wearfleet_cloud.federated import create_strategy
    from wearfleet_cloud.federated.plan_builder import build_plan

    trained = read_run(run)
    contract = contract_of(dataset_named(trained.dataset).for_scenario(trained.scenario), trained.labels)
    identity = f"{strategy}-{trained.identity}"
    return build_plan(
        create_strategy(strategy, options), trained.model, contract, plan_id=identity, seed=seed
    )
