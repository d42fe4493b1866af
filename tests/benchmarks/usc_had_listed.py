"""USC-HAD with the published groups of people counted as a listing of its folders counts them.

The published arrays number people from 0 and do not say who they are. A listing in the order of text is Subject1,
Subject10 to Subject14, Subject2 to Subject9; with it plain training gets the published pattern of easy and hard targets
(``docs/results/ood-ladder.md``), which it does not with the official numbers. A guess that fits, not a fact.
"""

from dataclasses import replace

from wearfleet_cloud.data.usc_had import USC_HAD

_LISTED = sorted(str(number) for number in range(1, 15))
_PUBLISHED = ((1, 11, 2, 0), (6, 3, 9, 5), (7, 13, 8, 10), (4, 12))

DATASET = replace(
    USC_HAD,
    name="usc-had-listed",
    domain_groups=tuple(tuple(f"{int(_LISTED[place]):02d}" for place in group) for group in _PUBLISHED),
)
