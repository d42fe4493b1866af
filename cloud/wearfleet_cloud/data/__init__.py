"""Data sets: readers of the official distributions, the simulator, scenarios and splits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.data.dataset import Dataset
from wearfleet_cloud.data.dsads import DSADS
from wearfleet_cloud.data.emg import EMG
from wearfleet_cloud.data.hapt import HAPT
from wearfleet_cloud.data.har_common import HAR_COMMON, HAR_COMMON_STRICT
from wearfleet_cloud.data.mhealth import MHEALTH
from wearfleet_cloud.data.pamap2 import PAMAP2
from wearfleet_cloud.data.simulator import SIMULATOR
from wearfleet_cloud.data.uci_har import UCI_HAR
from wearfleet_cloud.data.usc_had import USC_HAD
from wearfleet_cloud.data.wesad import WESAD
from wearfleet_cloud.data.wisdm import WISDM

__all__ = ["DATASETS", "dataset_named"]

DATASETS: Final = {
    "dsads": DSADS,
    "emg": EMG,
    "hapt": HAPT,
    "har-common": HAR_COMMON,
    "har-common-strict": HAR_COMMON_STRICT,
    "mhealth": MHEALTH,
    "pamap2": PAMAP2,
    "simulator": SIMULATOR,
    "uci-har": UCI_HAR,
    "usc-had": USC_HAD,
    "wesad": WESAD,
    "wisdm-51": WISDM,
}


def dataset_named(name: str) -> Dataset:
    """A registered data set, or the ``DATASET`` of a Python file of the user's (docs/howto/own-dataset.md).

    Args:
        name: a key of :data:`DATASETS`, or a path that ends in ``.py``; the file is executed.

    Raises:
        ConfigError: unknown name, no such file, or a file without a ``DATASET``.
    """
    if name in DATASETS:
        return DATASETS[name]
    path = Path(name)
    if path.suffix != ".py":
        raise ConfigError(
            f"unknown data set {name!r}; known: {', '.join(DATASETS)}, or the path of a .py file"
        )
    spec = importlib.util.spec_from_file_location(
        f"wearfleet_user_dataset_{path.stem.replace('-', '_')}", path
    )
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"data set file {path} does not exist")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dataset = getattr(module, "DATASET", None)
    if not isinstance(dataset, Dataset):
        raise ConfigError(
            f"{path}: expected a variable DATASET that holds a Dataset, got {type(dataset).__name__}"
        )
    return dataset
