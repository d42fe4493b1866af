"""Data sets: readers of the official distributions, the simulator, scenarios and splits."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.data.dataset import Dataset
from wearfleet_cloud.data.ddlearn import DSADS_DDLEARN, PAMAP2_DDLEARN, USC_HAD_DDLEARN
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
from wearfleet_cloud.user_file import is_user_file, variable_of

__all__ = ["DATASETS", "dataset_named"]

DATASETS: Final = {
    "dsads": DSADS,
    "dsads-ddlearn": DSADS_DDLEARN,
    "emg": EMG,
    "hapt": HAPT,
    "har-common": HAR_COMMON,
    "har-common-strict": HAR_COMMON_STRICT,
    "mhealth": MHEALTH,
    "pamap2": PAMAP2,
    "pamap2-ddlearn": PAMAP2_DDLEARN,
    "simulator": SIMULATOR,
    "uci-har": UCI_HAR,
    "usc-had": USC_HAD,
    "usc-had-ddlearn": USC_HAD_DDLEARN,
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
    if not is_user_file(name):
        raise ConfigError(
            f"unknown data set {name!r}; known: {', '.join(DATASETS)}, or the path of a .py file"
        )
    dataset = variable_of(Path(name), "DATASET")
    if not isinstance(dataset, Dataset):
        raise ConfigError(
            f"{name}: expected a variable DATASET that holds a Dataset, got {type(dataset).__name__}"
        )
    return dataset
