"""DSADS, USC-HAD, HAPT and PAMAP2 joined for cross-dataset: six activities, six channels, two seconds at 25 Hz.

Where the sensor's axes point was read off the distributions: USC-HAD's files say "x gravity, y walking direction, z
vertical to walking direction"; DSADS' torso unit reads gravity on x standing, on z lying on the back and on -y lying
on the right side; HAPT's phone reads it on x standing and mostly on y lying. Belts slip: how a sensor is turned about
the vertical differs between people by tens of degrees and stays as it is. PAMAP2 could not be had: a row of it that is
printed in public reads (0.24, 9.80, -1.69) m/s^2 at the chest of somebody upright, so y points up; that z points into
the chest is inferred from its sign, because what points out of a chest also points up a little (DSADS: in all eight).

Source: specs/ood.md 1.3, scenario 3. Differs: HAPT stands for UCI-HAR, because the stored UCI-HAR windows name no
wearer. What is not in the data root is left out, as long as two are there; the domains of a result name its members.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from wearfleet_cloud.data.dataset import INERTIAL6, Dataset
from wearfleet_cloud.data.dsads import DSADS
from wearfleet_cloud.data.hapt import HAPT
from wearfleet_cloud.data.joined import STRICT_CHANNELS, JoinedReader, Member
from wearfleet_cloud.data.pamap2 import PAMAP2
from wearfleet_cloud.data.usc_had import USC_HAD

__all__ = ["HAR_COMMON", "HAR_COMMON_STRICT"]

_LABELS: Final = ("sitting", "standing", "lying", "walking upstairs", "walking downstairs", "walking")
_RATE_HZ: Final = 25.0

_MEMBERS: Final = (
    Member(
        DSADS.for_scenario("cross-position"),
        {
            "sitting": "sitting",
            "standing": "standing",
            "lying on back": "lying",
            "lying on right side": "lying",
            "ascending stairs": "walking upstairs",
            "descending stairs": "walking downstairs",
            "walking in a parking lot": "walking",
        },
        positions=("torso",),
        axes=((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    ),
    Member(
        USC_HAD,
        {
            "sitting": "sitting",
            "standing": "standing",
            "sleeping": "lying",
            "walking upstairs": "walking upstairs",
            "walking downstairs": "walking downstairs",
            "walking forward": "walking",
        },
        units=("g", "deg/s"),
    ),
    Member(HAPT, {name: name for name in HAPT.label_names}, units=("g", "rad/s")),
    Member(
        PAMAP2.for_scenario("cross-position"),
        {
            "sitting": "sitting",
            "standing": "standing",
            "lying": "lying",
            "ascending stairs": "walking upstairs",
            "descending stairs": "walking downstairs",
            "walking": "walking",
        },
        positions=("chest",),
        axes=((0, 1, 0), (0, 0, -1), (-1, 0, 0)),
    ),
)
_READER: Final = JoinedReader(_MEMBERS, _LABELS, _RATE_HZ)

HAR_COMMON: Final = Dataset(
    name="har-common",
    title="DSADS (torso), USC-HAD (hip), HAPT (waist) and PAMAP2 (chest) in common form",
    citation="; ".join(member.dataset.citation for member in _MEMBERS),
    license="; ".join(f"{member.dataset.name}: {member.dataset.license}" for member in _MEMBERS),
    channels=INERTIAL6,
    label_names=_LABELS,
    rate_hz=_RATE_HZ,
    window=50,
    stride=25,
    reader=_READER,
    domain_groups=tuple(
        tuple(f"{member.dataset.name}/{subject}" for subject in group)
        for member in _MEMBERS
        for group in member.dataset.domain_groups
    ),
    members=tuple(member.dataset.name for member in _MEMBERS),
    kernel=6,
    notes="m/s^2, rad/s, axes up, forward, left; resampled with a low-pass filter; members that are not in "
    "the data root are left out",
)

HAR_COMMON_STRICT: Final = replace(
    HAR_COMMON,
    name="har-common-strict",
    title="DSADS (torso), USC-HAD (hip), HAPT (waist) and PAMAP2 (chest) joined as published, faults included",
    channels=STRICT_CHANNELS,
    reader=replace(_READER, strict=True),
    notes="units and axes differ between the members, samples were dropped without a filter: to compare with "
    "published numbers only, never for a device",
)
