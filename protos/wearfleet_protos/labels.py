"""Label sets of the public data sets, in the order of their class indices."""

from __future__ import annotations

from typing import Final

__all__ = [
    "DSADS19",
    "EMG6",
    "MHEALTH12",
    "PAMAP2_12",
    "SIMULATED6",
    "UCI_HAR6",
    "UNLABELLED",
    "USC_HAD12",
    "WESAD4",
    "WISDM18",
]

UNLABELLED: Final = -1
"""Class index of a sample or window without a usable label."""

UCI_HAR6: Final = ("walking", "walking upstairs", "walking downstairs", "sitting", "standing", "lying")

USC_HAD12: Final = (
    "walking forward",
    "walking left",
    "walking right",
    "walking upstairs",
    "walking downstairs",
    "running forward",
    "jumping up",
    "sitting",
    "standing",
    "sleeping",
    "elevator up",
    "elevator down",
)

DSADS19: Final = (
    "sitting",
    "standing",
    "lying on back",
    "lying on right side",
    "ascending stairs",
    "descending stairs",
    "standing in an elevator",
    "moving around in an elevator",
    "walking in a parking lot",
    "walking on a flat treadmill",
    "walking on an inclined treadmill",
    "running on a treadmill",
    "exercising on a stepper",
    "exercising on a cross trainer",
    "cycling in horizontal position",
    "cycling in vertical position",
    "rowing",
    "jumping",
    "playing basketball",
)

EMG6: Final = (
    "hand at rest",
    "hand clenched in a fist",
    "wrist flexion",
    "wrist extension",
    "radial deviation",
    "ulnar deviation",
)

WISDM18: Final = (
    "walking",
    "jogging",
    "stairs",
    "sitting",
    "standing",
    "typing",
    "brushing teeth",
    "eating soup",
    "eating chips",
    "eating pasta",
    "drinking",
    "eating sandwich",
    "kicking",
    "playing catch",
    "dribbling",
    "writing",
    "clapping",
    "folding clothes",
)

PAMAP2_12: Final = (
    "lying",
    "sitting",
    "standing",
    "walking",
    "running",
    "cycling",
    "Nordic walking",
    "ascending stairs",
    "descending stairs",
    "vacuum cleaning",
    "ironing",
    "rope jumping",
)

WESAD4: Final = ("baseline", "stress", "amusement", "meditation")

MHEALTH12: Final = (
    "standing still",
    "sitting and relaxing",
    "lying down",
    "walking",
    "climbing stairs",
    "waist bends forward",
    "frontal elevation of arms",
    "knees bending",
    "cycling",
    "jogging",
    "running",
    "jump front and back",
)

SIMULATED6: Final = ("walking", "walking upstairs", "walking downstairs", "sitting", "standing", "lying")
