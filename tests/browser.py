"""Headless Chromium for the tests of the live page and for its pictures."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

PICTURES = Path(__file__).parents[1] / "runs" / "test-output"
DESKTOP = (1280, 720)
PHONE = (390, 844)
_QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)


def _program(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    assert found, f"needs one of {names} on PATH: apt-get install chromium chromium-driver"
    return found


@contextlib.contextmanager
def open_page(url: str, *, size: tuple[int, int] = DESKTOP, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """A fresh browser at ``url`` with a viewport of ``size`` pixels that prefers light or dark."""
    os.environ["SE_OFFLINE"] = "true"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = _program("chromium", "chromium-browser", "google-chrome")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for flag in (*_QUIET, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        page = webdriver.Chrome(options=options, service=Service(_program("chromedriver")))
        try:
            set_view(page, size, dark=dark)
            page.get(url)
            yield page
        finally:
            page.quit()


def set_view(page: webdriver.Chrome, size: tuple[int, int], *, dark: bool, calm: bool = False) -> None:
    """Give an open page another viewport, colour preference or motion preference."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
        {"name": "prefers-reduced-motion", "value": "reduce" if calm else "no-preference"},
    ]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def picture(page: webdriver.Chrome, name: str) -> Path:
    """Save what the page shows under ``runs/test-output``."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    path = PICTURES / f"{name}.png"
    page.save_screenshot(str(path))
    return path
