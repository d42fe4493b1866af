"""A Ray cluster for as long as a command needs it. Ray is optional and loaded only here."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from wearfleet_protos.errors import ConfigError

__all__ = ["ray_cluster"]


@contextmanager
def ray_cluster(address: str, instead: str) -> Iterator[ModuleType]:
    """Connect, and let go at the end.

    Args:
        address: of the cluster, "auto" for the one this machine belongs to, "local" for one of this machine alone.
        instead: what serves this machine alone, for the error.

    Yields:
        The module ``ray``.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray  # noqa: PLC0415 - optional
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--ray needs Ray here and on every machine of the cluster: pip install 'wearfleet[cloud,ray]'; "
            f"or use {instead} for this machine alone"
        ) from error
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster at {address!r} ({error}); start one with: ray start --head"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
