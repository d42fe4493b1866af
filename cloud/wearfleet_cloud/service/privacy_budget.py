"""The ledger of privacy as the service uses it: who may be asked, and what each transition writes beside the round."""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Final, get_args

from sqlalchemy.engine import Connection

from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.privacy.accounting import Unit
from wearfleet_cloud.federated.privacy.ledger import Ledger, charged, cost_of_round
from wearfleet_cloud.federated.privacy.options import PrivacyOptions
from wearfleet_cloud.federated.round import Round
from wearfleet_cloud.storage.device_records import list_devices
from wearfleet_cloud.storage.privacy_records import read_ledger, write_spends
from wearfleet_cloud.storage.run_records import RunRow, list_runs

__all__ = ["PrivacyBudget", "privacy_of", "refusals"]

_LOGGER: Final = logging.getLogger(__name__)

Work = Callable[[Connection], None]


class PrivacyBudget:
    """The ledger in memory, equal to the database's; entries of a transition count once its transaction is through."""

    def __init__(self) -> None:
        self._stored = self._proposed = Ledger()
        self._refused: dict[str, str] = {}

    def load(self, ledger: Ledger) -> None:
        """Take over what the database has."""
        self._stored = self._proposed = ledger

    def begin(self) -> None:
        """Forget what a transition proposed whose transaction failed."""
        self._proposed = self._stored

    def enter(self, options: PrivacyOptions, current: Round) -> list[Work]:
        """The writes that belong to a training round's new state; none where its entries stay what they are."""
        cost = cost_of_round(options)
        if cost is None:
            return []
        place, clients = (current.run_id, current.number), charged(options, current)
        if self._proposed.clients_of(place) == clients:
            return []
        self._proposed = self._proposed.with_round(place, clients, cost)
        return [partial(write_spends, place=place, devices=clients, cost=cost, now_ns=time.time_ns())]

    def commit(self) -> None:
        """The transaction is through."""
        self._stored = self._proposed

    def allowed(self, options: PrivacyOptions, devices: Collection[str]) -> set[str]:
        """Devices that can afford another round; the others are logged once.

        Raises:
            ConfigError: the library for accounting is not installed.
        """
        reasons = {device: self._proposed.refusal(device, options) for device in devices}
        refused = {device: reason for device, reason in reasons.items() if reason}
        for device in sorted(refused.keys() - self._refused.keys()):
            _LOGGER.warning("%s is not asked: %s", device, refused[device])
        self._refused = refused
        return set(devices) - refused.keys()


def privacy_of(connection: Connection, device_id: str) -> dict[str, Any]:
    """What a device's privacy has cost, and which runs do not ask it, for people.

    Args:
        connection: of a transaction.
        device_id: of the device.

    Returns:
        For ``client`` and for ``record``, which are never summed up: ``epsilon`` at ``delta`` (that of the newest run
        that protects it) and ``rounds`` it was entered for; and ``not_asked``.

    Raises:
        ConfigError: the library for accounting is not installed.
    """
    ledger, runs = read_ledger(connection, device_id), list_runs(connection)
    private = [options for options in map(_options, runs) if options.dp != "off"]
    return {
        **{unit: _spent(ledger, device_id, unit, private) for unit in get_args(Unit)},
        "not_asked": {
            run.run_id: reason
            for run in runs
            if run.state == "running" and (reason := ledger.refusal(device_id, _options(run)))
        },
    }


def _spent(
    ledger: Ledger, device_id: str, unit: Unit, private: Sequence[PrivacyOptions]
) -> dict[str, object]:
    deltas = [o.dp_delta for o in private if (cost := cost_of_round(o)) is not None and cost.unit == unit]
    delta = (deltas or [PrivacyOptions().dp_delta])[-1]
    return {
        "epsilon": ledger.epsilon(device_id, delta, unit),
        "delta": delta,
        "rounds": len(ledger.spent(device_id, unit)),
    }


def refusals(connection: Connection, run: RunRow) -> dict[str, str]:
    """Devices that a run under way does not ask, with the reason.

    Raises:
        ConfigError: the library for accounting is not installed.
    """
    if run.state != "running":
        return {}
    ledger, options = read_ledger(connection), _options(run)
    devices = [device.device_id for device in list_devices(connection) if device.revoked_ns is None]
    reasons = {device_id: ledger.refusal(device_id, options) for device_id in devices}
    return {device_id: reason for device_id, reason in reasons.items() if reason}


def _options(run: RunRow) -> PrivacyOptions:
    return create_strategy(run.strategy, run.settings["options"]).privacy
