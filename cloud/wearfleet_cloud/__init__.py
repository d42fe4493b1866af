"""The cloud side: data, algorithms, training, export, federated rounds, fleet and service.

``from wearfleet_cloud import load_dataset, train, evaluate`` is the way in for scripts and notebooks (``api.py``); the
functions are loaded when they are asked for, so importing the package costs nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wearfleet_cloud.api import evaluate, load_dataset, train

__all__ = ["evaluate", "load_dataset", "train"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from wearfleet_cloud import api  # noqa: PLC0415 - see above

    return getattr(api, name)
