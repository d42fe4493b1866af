"""The colours of activities, told apart also by people who confuse red and green, or blue and yellow.

Eight hues, each in a tone for light and one for dark ground; the ninth activity takes the first hue with stripes,
and so on. Amber with a hatch is left to out-of-distribution windows.
"""

from __future__ import annotations

from typing import Final

__all__ = ["DARK", "GROUND_DARK", "GROUND_LIGHT", "LIGHT"]

GROUND_LIGHT: Final = "#ffffff"
GROUND_DARK: Final = "#182234"

LIGHT: Final = (
    "#1c4dca",
    "#2ea290",
    "#aa297d",
    "#a474ed",
    "#d86c16",
    "#0e3903",
    "#685700",
    "#640262",
)
"""On light ground: blue, teal, magenta, violet, orange, forest, olive, plum."""

DARK: Final = (
    "#656ee6",
    "#66f1ff",
    "#f5809a",
    "#c78cfc",
    "#dc5215",
    "#91d646",
    "#e4eba7",
    "#a66297",
)
"""On dark ground, the same families in the same order."""
