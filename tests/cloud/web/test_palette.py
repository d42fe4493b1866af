"""The activity colours can be told apart, by everybody, on both grounds."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from wearfleet_cloud.service.web.palette import DARK, GROUND_DARK, GROUND_LIGHT, LIGHT

# Colour vision deficiencies of full severity as matrices on linear RGB: Machado, Oliveira and Fernandes 2009,
# "A Physiologically-based Model for Simulation of Color Vision Deficiency", table 1.
VISIONS = {
    "full": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# Oklab (Ottosson 2020, "A perceptual color space for image processing").
TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def linear(colour: str) -> np.ndarray:
    coded = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2.2, 1 to 21."""
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def oklab(rgb: np.ndarray) -> np.ndarray:
    return TO_LAB @ np.cbrt(TO_CONES @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize(("colours", "ground"), [(LIGHT, GROUND_LIGHT), (DARK, GROUND_DARK)])
def test_large_text_in_an_activity_colour_is_legible(colours: tuple[str, ...], ground: str) -> None:
    assert min(contrast(colour, ground) for colour in colours) >= 3.0


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_any_two_activity_colours_differ_for_every_kind_of_colour_vision(
    colours: tuple[str, ...], vision: str
) -> None:
    seen = [oklab(VISIONS[vision] @ linear(colour)) for colour in colours]
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) > 0.1


def test_two_confusable_colours_would_be_noticed() -> None:
    red, green = (oklab(VISIONS["deutan"] @ linear(colour)) for colour in ("#c8572b", "#6e8a2a"))
    assert np.linalg.norm(red - green) < 0.1


def test_both_grounds_have_as_many_colours() -> None:
    assert len(LIGHT) == len(DARK) == len(set(LIGHT)) == len(set(DARK))
