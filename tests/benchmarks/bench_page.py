"""What the live page costs: CPU of the server and of one open page, and its delay, by number of devices.

Run: ``python tests/benchmarks/bench_page.py [seconds]`` from the repository root; prints one JSON line a case.
Each device recognises a window every 1.28 s. The server's share is its thread's CPU time; the page's share is the
busy time of the browser's main thread, as the DevTools protocol reports it. The delay, from a recognised window until
it is drawn, is to stay below a second.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from browser import open_page
from page_script import WINDOW_NS, Wearer, fleet, running_round
from page_server import PageServer, serve_page
from selenium.webdriver import Chrome
from wearfleet_cloud.service.live import LiveState


def busy_s(page: Chrome) -> float:
    """Busy seconds of the page's main thread so far."""
    metrics = page.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return float(next(entry["value"] for entry in metrics if entry["name"] == "TaskDuration"))


def stream(server: PageServer, wearers: list[Wearer], seconds: float) -> list[float]:
    """Let all devices recognise in turn; gives the seconds that each call into the picture took."""
    calls: list[float] = []
    pause_s = WINDOW_NS / 1e9 / len(wearers)
    for wearer in islice(cycle(wearers), int(seconds / pause_s)):
        due = time.monotonic() + pause_s

        def step(wearer: Wearer = wearer) -> None:
            began = time.perf_counter()
            wearer.step(time.time_ns())
            calls.append(time.perf_counter() - began)

        server.call(step)
        time.sleep(max(0.0, due - time.monotonic()))
    return calls


def delays_ms(server: PageServer, live: LiveState, wearers: list[Wearer], page: Chrome) -> list[float]:
    """Milliseconds from each of 50 recognised windows until the page has drawn it, in rising order."""
    delays: list[float] = []
    for wearer in islice(cycle(wearers), 50):
        server.call(lambda wearer=wearer: wearer.step(time.time_ns()))
        began = time.perf_counter()
        while int(page.execute_script("return document.querySelector('.wf').dataset.version")) < live.version:
            pass
        delays.append(1e3 * (time.perf_counter() - began))
    return sorted(delays)


def measure(devices: int, seconds: float) -> dict[str, float]:
    """CPU shares in percent of one core, and microseconds of one call, with one viewer."""
    live = LiveState("bench", simulated=True)
    with serve_page(live) as server, open_page(server.url) as page:
        people = tuple(f"Person {i}" for i in range(devices))
        wearers = server.call(lambda: fleet(live, time.time_ns(), people))
        server.call(lambda: live.on_round(running_round(time.time_ns(), wearers)))
        page.execute_cdp_cmd("Performance.enable", {"timeDomain": "timeTicks"})
        time.sleep(2)
        server_s, page_s, began = server.call(time.thread_time), busy_s(page), time.monotonic()
        calls = stream(server, wearers, seconds)
        span = time.monotonic() - began
        server_percent = 100 * (server.call(time.thread_time) - server_s) / span
        page_percent = 100 * (busy_s(page) - page_s) / span
        delays = delays_ms(server, live, wearers, page)
        return {
            "devices": devices,
            "windows_per_s": round(len(calls) / span, 1),
            "server_cpu_percent": round(server_percent, 2),
            "page_cpu_percent": round(page_percent, 2),
            "call_us_median": round(1e6 * sorted(calls)[len(calls) // 2], 1),
            "delay_ms_median": round(delays[len(delays) // 2], 1),
            "delay_ms_most": round(delays[-1], 1),
        }


def main() -> None:
    """Measure 4 and 50 devices."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    for devices in (4, 50):
        sys.stdout.write(json.dumps(measure(devices, seconds)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
