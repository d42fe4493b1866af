"""What noised releases cost: epsilon at a delta, by Google's dp-accounting library (extra ``privacy``).

Releases with noise in every round compose to one Gaussian, whose epsilon is exact (Balle and Wang 2018,
arXiv:1805.06530). Where each release is of a Poisson sample, it is an upper bound by Renyi divergences of integer order
(Mironov et al. 2019, arXiv:1908.10530; conversion of Canonne et al. 2020, arXiv:2004.00010).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from wearfleet_protos.errors import ConfigError

__all__ = ["Spend", "Unit", "epsilon_of", "require_library"]

Unit = Literal["client", "record"]
"""What an epsilon is of: all that a client did, or one window of its wearer. They are never summed up."""

_ORDERS: Final = (*range(2, 257), 384, 512, 1024)


@dataclass(frozen=True, slots=True)
class Spend:
    """Releases that a wearer, or a record, took part in.

    Args:
        noise_multiplier: z, standard deviation of the noise over what one of them can change.
        sampling_rate: probability of being in a release, drawn afresh for each and known to nobody; 1 claims nothing.
        count: equal releases.
        unit: what can change what one release is of.

    Raises:
        ConfigError: a number is out of range.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    count: int = 1
    unit: Unit = "client"

    def __post_init__(self) -> None:
        if self.noise_multiplier < 0.0 or not 0.0 < self.sampling_rate <= 1.0 or self.count < 0:
            raise ConfigError(
                "noise multiplier and count must be at least 0 and the sampling rate above 0 and at most 1, "
                f"got {self.noise_multiplier}, {self.count} and {self.sampling_rate}"
            )


def epsilon_of(spends: Iterable[Spend], delta: float) -> float:
    """The epsilon of everything together, at ``delta``; inf where one release had no noise.

    Args:
        spends: in any order, of one unit.
        delta: between 0 and 1.

    Raises:
        ConfigError: the library is not installed, or units are mixed.
    """
    counted = [spend for spend in spends if spend.count]
    if len({spend.unit for spend in counted}) > 1:
        raise ConfigError(
            "epsilons of clients and of records mean different things; account for each by itself"
        )
    if not counted:
        return 0.0
    if any(spend.noise_multiplier == 0.0 for spend in counted):
        return math.inf
    library = _library()
    together = sum(spend.count / spend.noise_multiplier**2 for spend in counted) ** -0.5
    unsampled = float(library.get_epsilon_gaussian(together, delta))
    if all(spend.sampling_rate == 1.0 for spend in counted):
        return unsampled
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415  an extra

    accountant = RdpAccountant(_ORDERS)
    for spend in counted:
        event = library.GaussianDpEvent(spend.noise_multiplier)
        if spend.sampling_rate < 1.0:
            event = library.PoissonSampledDpEvent(spend.sampling_rate, event)
        accountant.compose(event, spend.count)
    return min(
        unsampled, float(accountant.get_epsilon(delta))
    )  # with little noise the divergences bound less


def require_library() -> None:
    """Make sure that costs can be told.

    Raises:
        ConfigError: the library for accounting is not installed.
    """
    _library()


def _library() -> Any:
    try:
        import dp_accounting  # noqa: PLC0415  an extra
    except ModuleNotFoundError as error:
        raise ConfigError(
            "accounting for privacy needs dp-accounting; install wearfleet[cloud,privacy]"
        ) from error
    return dp_accounting
