"""The command line ``wearfleet-cloud``: one module a group of commands, each with a ``register`` function.

Exit codes: 0 ok, 1 error, 2 usage, 3 not found, 4 denied, 5 conflict, 75 try later.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from wearfleet_protos.errors import WearfleetError

if TYPE_CHECKING:
    import typer

__all__ = ["create_app", "main"]


def main() -> None:
    """Run the command line and end the process with its exit code."""
    try:
        create_app()()
    except WearfleetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("wearfleet"):
            raise
        sys.exit(f"wearfleet-cloud needs the cloud extra ({error}): pip install 'wearfleet[cloud]'")


def create_app() -> typer.Typer:
    """The command line with all its commands."""
    import typer

    from wearfleet_cloud.cli import benchmark, data, demo, export, plan, serve, simulate, train

    app = typer.Typer(
        name="wearfleet-cloud",
        help="Train, export, sign, serve, federate: the cloud side of wearfleet.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    for module in (demo, serve, data, train, benchmark, export, plan, simulate):
        module.register(app)
    return app
