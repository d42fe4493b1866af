"""``wearfleet-cloud ring``: a site's service joins a ring of federations and takes its turns."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated

import typer

from wearfleet_cloud.cli.state_options import ConfigFile, Json, StateFolder, opened, print_json, settings_of

__all__ = ["register"]

_group = typer.Typer(
    help="A ring of federations (MetaFed): sites learn from each other, one after the other.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Add the group ``ring`` to the command line."""
    app.add_typer(_group, name="ring")


@_group.command("join")
def join(
    ticket: Annotated[str, typer.Argument(help="From `devices enrol-code` of the ring's service.")],
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Json = False,
) -> None:
    """Give this site its identity in a ring; the key is made here and stays here."""
    from wearfleet_edge.enrolment import enrol_device

    from wearfleet_cloud.cli.ring_member import ring_folder

    enrolled = enrol_device(ring_folder(settings_of(config, state).service.state_dir), ticket)
    if as_json:
        print_json({"device_id": enrolled.device_id, "cloud_address": enrolled.cloud_address})
        return
    print(f"this site is {enrolled.device_id} in the ring at {enrolled.cloud_address}")


@_group.command("run")
def run(
    *,
    training: Annotated[
        Path | None, typer.Option("--run", help="Folder of the training run behind the released model.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Folder of `plan build --strategy metafed-site`, instead of --run."),
    ] = None,
    min_clients: Annotated[int, typer.Option(min=1, help="Devices that must be there to begin a round.")] = 1,
    quorum: Annotated[int, typer.Option(min=1, help="Fewest updates worth averaging.")] = 1,
    deadline: Annotated[
        float, typer.Option(help="Seconds that a round waits for the site's devices.")
    ] = 300.0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Hyper-parameter of metafed-site, name=value; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of shuffling.")] = 0,
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Json = False,
) -> None:
    """Take this site's turns until Ctrl-C, beside its running service."""
    from wearfleet_cloud.cli.federation import plan_and_graphs
    from wearfleet_cloud.cli.plan import parse_settings
    from wearfleet_cloud.cli.ring_member import RingMember
    from wearfleet_cloud.cli.serve import log_to_stderr
    from wearfleet_cloud.federated import create_strategy
    from wearfleet_cloud.federated.cohort import CohortPolicy
    from wearfleet_cloud.federated.metafed_site import MetaFedSite
    from wearfleet_cloud.federated.round import RoundPolicy
    from wearfleet_cloud.service.run_context import RunSettings

    log_to_stderr()
    options = parse_settings(settings or [])
    strategy = create_strategy("metafed-site", options)
    assert isinstance(strategy, MetaFedSite)
    document, graphs = plan_and_graphs(plan, training, "metafed-site", options, seed)
    turn = RunSettings(
        rounds=strategy.rounds,
        cohort=CohortPolicy(0, min_clients),
        policy=RoundPolicy(quorum=quorum, deadline_s=deadline),
        options=options,
        seed=seed,
    )
    with opened(config, state) as (known, service):
        member = RingMember(known.service.state_dir, service, plan=document, graphs=graphs, settings=turn)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: member.stop())
        if as_json:
            print(json.dumps({"ready": True, "device_id": member.device_id}), flush=True)
        member.run()
