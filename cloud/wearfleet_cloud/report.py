"""The report of a demonstration: one HTML file that needs nothing else, drawn from measured values only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Final

from wearfleet_cloud.service.web.palette import DARK, LIGHT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PersonReport", "RibbonWindow", "render_report"]

_STYLE: Final = """
:root{color-scheme:light dark;--ink:#16202a;--soft:#5b6875;--line:#d5dce3;--paper:#fbfcfd;--card:#fff;--good:#0b7a55}
@media(prefers-color-scheme:dark){:root{--ink:#e8eef4;--soft:#9aa8b5;--line:#2c3844;--paper:#10161c;--card:#172029;
--good:#5fd3a5}}
*{box-sizing:border-box}body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0}
main{max-width:72rem;margin:0 auto;padding:2rem 1.25rem 4rem}h1{font-size:2.1rem;margin:0 0 .25rem}
h2{margin:2.5rem 0 .75rem;font-size:1.3rem}.sub{color:var(--soft);margin:0 0 1.5rem}.badge{display:inline-block;
padding:.1rem .7rem;border-radius:1rem;background:#e69f00;color:#1b1200;font-weight:650;font-size:.9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(12rem,1fr));gap:1rem}.card{background:var(--card);
border:1px solid var(--line);border-radius:.75rem;padding:1rem}.card b{display:block;font-size:1.7rem}
.card span{color:var(--soft)}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;
font-variant-numeric:tabular-nums}th,td{text-align:right;padding:.4rem .6rem;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}.up{color:var(--good);font-weight:650}.pair{display:grid;gap:1.5rem;
grid-template-columns:repeat(auto-fit,minmax(19rem,1fr))}.matrix td,.matrix th{padding:.2rem .3rem;font-size:.8rem;
text-align:center}.matrix th:first-child{text-align:right;white-space:nowrap}svg{width:100%;height:auto;display:block}
.legend{display:flex;flex-wrap:wrap;gap:.4rem 1.1rem;margin:.5rem 0 1rem}.legend i{display:inline-block;width:.9rem;
height:.9rem;border-radius:.2rem;margin-right:.4rem;vertical-align:-.1rem}figure{margin:0}figcaption{color:var(--soft)}
"""


@dataclass(frozen=True, slots=True)
class RibbonWindow:
    """One recognised window in the order of the stream; ``annotated`` is None where the recording says nothing."""

    predicted: int
    annotated: int | None
    out_of_distribution: bool


@dataclass(frozen=True, slots=True, eq=False)
class PersonReport:
    """One person's results.

    Args:
        device: device id.
        subject: who wears it.
        confusion_before: (K, K) int64 windows, rows annotated, columns predicted, model as released.
        confusion_after: the same windows, personalised model.
        ribbon: what was streamed.
    """

    device: str
    subject: str
    confusion_before: NDArray[np.int64]
    confusion_after: NDArray[np.int64]
    ribbon: tuple[RibbonWindow, ...]


def render_report(summary: dict[str, Any], labels: Sequence[str], people: Sequence[PersonReport]) -> str:
    """The whole page.

    Args:
        summary: what ``summary.json`` holds.
        labels: K class names.
        people: one entry a device, in the order of ``summary["devices"]``.
    """
    badge = '<span class="badge">simulated data</span>' if summary["simulated"] else ""
    title = f"wearfleet on {escape(str(summary['dataset']))}"
    sections = (
        _cards(summary),
        "<h2>Accuracy before and after, for each person</h2>" + _device_table(summary),
        "<h2>What the devices said</h2>" + _legend(labels) + "".join(_ribbon(p) for p in people),
        "<h2>Confusion on the held-out later part</h2>" + "".join(_confusions(p, labels) for p in people),
        "<h2>Cost</h2>" + _cost_table(summary),
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head><body><main>'
        f'<h1>{title}</h1><p class="sub">{badge} Trained on {len(summary["source_subjects"])} people, then used and '
        f"improved by {len(summary['device_subjects'])} people it had never seen. Before and after are measured on the "
        "same later part of each person's recording, which no training on the device touched.</p>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _cards(summary: dict[str, Any]) -> str:
    devices = summary["devices"]
    before = sum(d["accuracy_before"] for d in devices) / len(devices)
    after = sum(d["accuracy_after"] for d in devices) / len(devices)
    cards = (
        (_percent(before) + " → " + _percent(after), "mean accuracy, before and after"),
        (str(sum(d["windows_lost"] for d in devices)), "windows lost"),
        (
            f"{max(d['inference_ms_p50'] for d in devices) * 1000:.0f} µs",
            "slowest device's median recognition",
        ),
        (f"{summary['federated']['rounds']}", f"rounds of {escape(str(summary['federated']['strategy']))}"),
        (f"{summary['seconds']['total']:.0f} s", "for the whole loop"),
    )
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{v}</b><span>{k}</span></div>' for v, k in cards)
        + "</div>"
    )


def _device_table(summary: dict[str, Any]) -> str:
    head = (
        "device",
        "person",
        "before",
        "after",
        "change",
        "windows",
        "lost",
        "twice",
        "p50 ms",
        "p99 ms",
        "MB",
    )
    rows = []
    for d in summary["devices"]:
        change = d["accuracy_after"] - d["accuracy_before"]
        cells = (
            escape(str(d["device"])),
            escape(str(d["subject"])),
            _percent(d["accuracy_before"]),
            _percent(d["accuracy_after"]),
            f'<span class="{"up" if change > 0 else ""}">{change * 100:+.1f}</span>',
            str(d["windows_ingested"]),
            str(d["windows_lost"]),
            str(d["windows_duplicated"]),
            f"{d['inference_ms_p50']:.3f}",
            f"{d['inference_ms_p99']:.3f}",
            f"{d['rss_mb']:.0f}",
        )
        rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return _table(head, rows)


def _cost_table(summary: dict[str, Any]) -> str:
    federated, export, central = summary["federated"], summary["export"], summary["central"]
    rows = [
        ("ERM on the unseen people", _percent(central["erm"]["target_accuracy"])),
        ("CORAL on the unseen people", _percent(central["coral"]["target_accuracy"])),
        ("selected by source validation", escape(str(summary["selected_algorithm"]))),
        ("largest difference, ONNX Runtime against torch", f"{export['max_abs_difference']:.2e}"),
        ("same arg-max", _percent(export["argmax_agreement"])),
        ("bytes down, all rounds and devices", f"{federated['bytes_down']:,}"),
        ("bytes up, all rounds and devices", f"{federated['bytes_up']:,}"),
        ("median round", f"{federated['round_seconds_median']:.2f} s"),
        *((f"seconds: {name}", f"{value:.1f}") for name, value in summary["seconds"].items()),
    ]
    return _table(("what", "value"), [f"<tr><td>{k}</td><td>{v}</td></tr>" for k, v in rows])


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{name}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{cells}</tr>{"".join(rows)}</table></div>'


def _legend(labels: Sequence[str]) -> str:
    items = "".join(
        f'<span><i style="background:{_colour(i)}"></i>{escape(n)}</span>' for i, n in enumerate(labels)
    )
    return f'<div class="legend">{items}</div>'


def _ribbon(person: PersonReport) -> str:
    """Three strips over the stream: recognised, annotated, and where the model was unsure."""
    count = max(len(person.ribbon), 1)
    parts = []
    for row, (top, height) in enumerate(((0, 16), (18, 8), (28, 3))):
        for begin, end, colour in _runs(person.ribbon, row):
            parts.append(
                f'<rect x="{begin}" y="{top}" width="{end - begin}" height="{height}" fill="{colour}"/>'
            )
    return (
        f"<figure><figcaption>{escape(person.device)}: recognised (top), annotated (middle), out of distribution "
        f'(bottom, orange)</figcaption><svg viewBox="0 0 {count} 32" preserveAspectRatio="none" '
        f'style="height:3.6rem" role="img" aria-label="activities of {escape(person.device)}">{"".join(parts)}'
        "</svg></figure>"
    )


def _runs(ribbon: Sequence[RibbonWindow], row: int) -> list[tuple[int, int, str]]:
    """(begin, end, colour) of stretches with one colour; stretches without colour are left out."""
    colours: list[str | None] = []
    for window in ribbon:
        value = window.predicted if row == 0 else window.annotated if row == 1 else None
        if row == 2:
            colours.append("#d55e00" if window.out_of_distribution else None)
        else:
            colours.append(None if value is None else _colour(value))
    runs: list[tuple[int, int, str]] = []
    begin = 0
    for index in range(1, len(colours) + 1):
        if index == len(colours) or colours[index] != colours[begin]:
            colour = colours[begin]
            if colour is not None:
                runs.append((begin, index, colour))
            begin = index
    return runs


def _confusions(person: PersonReport, labels: Sequence[str]) -> str:
    return (
        f"<h3>{escape(person.device)}</h3>"
        f'<div class="pair">{_matrix(person.confusion_before, labels, "before")}'
        f"{_matrix(person.confusion_after, labels, 'after')}</div>"
    )


def _matrix(matrix: NDArray[np.int64], labels: Sequence[str], caption: str) -> str:
    rows = []
    for index, name in enumerate(labels):
        total = max(int(matrix[index].sum()), 1)
        cells = "".join(
            f'<td style="background:rgba(0,114,178,{int(v) / total:.2f}){";color:#fff" if 2 * int(v) > total else ""}" '
            f'title="{escape(name)} seen as {escape(labels[j])}">{int(v) or ""}</td>'
            for j, v in enumerate(matrix[index])
        )
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return (
        f'<figure><figcaption>{caption}: rows annotated, columns recognised</figcaption><div class="scroll">'
        f'<table class="matrix">{"".join(rows)}</table></div></figure>'
    )


def _colour(index: int) -> str:
    colours = LIGHT + DARK
    return colours[index % len(colours)]


def _percent(value: float) -> str:
    return f"{value * 100:.1f} %"
