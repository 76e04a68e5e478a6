"""A report as one HTML page that needs nothing else: pictures inside, no script, no network."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from tools import figures
from tools.figures import AXES, Chart
from tools.run_data import Run, incomparable

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; color: #1a202c; background: #ffffff; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
header, main, footer { max-width: 80rem; margin: 0 auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; }
h1 { font-size: 1.6rem; margin: 1.5rem 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 2px solid #cfdcec; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
.headline { font-size: 1.25rem; }
.note { border-left: 4px solid #b45309; background: #fff7ed; padding: .5rem 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #4a5568; padding-bottom: .25rem; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #d6dde6; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { background: #eef3f9; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
.charts { gap: 1rem; margin: 1rem 0; align-items: end; }
figure { margin: 0; max-width: 30rem; }
figcaption { font-weight: 600; }
img { width: 100%; height: auto; display: block; }
pre { background: #f4f6f9; padding: .75rem; white-space: pre-wrap; font-size: .875rem; }
footer { color: #4a5568; padding-bottom: 2rem; margin-top: 3rem; }
"""


def element(name: str, content: str, **attributes: Any) -> str:
    """<name attributes>content</name>; `content` is HTML, attribute values are text."""
    said = "".join(f' {key.rstrip("_")}="{escape(str(value))}"' for key, value in attributes.items())
    return f"<{name}{said}>{content}</{name}>"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table whose first column names the rows; it scrolls by itself where it is too wide."""
    head = element("tr", "".join(element("th", escape(h) or "stage", scope="col") for h in headers))
    body = "".join(
        element("tr", element("th", escape(row[0]), scope="row") + "".join(element("td", escape(c)) for c in row[1:]))
        for row in rows
    )
    content = element("caption", escape(caption)) + element("thead", head) + element("tbody", body)
    named = dict(role="region", tabindex=0) | {"aria-label": caption}  # reached by keyboard where it scrolls
    return element("div", element("table", content), class_="scroll", **named)


def charts(pictures: Iterable[Chart | None]) -> str:
    """Pictures in as many columns as fit."""
    shown = "".join(
        element("figure", element("figcaption", escape(chart.caption)) + _image(chart)) for chart in pictures if chart
    )
    return element("div", shown, class_="charts")


def _image(chart: Chart) -> str:
    width, height = (round(inches * figures.DPI) for inches in figures.SIZE)
    data = base64.b64encode(chart.png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(chart.alt)}" width="{width}" height="{height}">'


def headline(run: Run) -> str:
    """What it comes to, in one sentence."""
    result, dense, measured = run.result, run.stages.get("dense"), run.result["latency_measured"]
    speed = f"{1 / measured:.2f} times as fast as the dense model" if measured else "not measured"
    if dense is None or run.last == "dense":
        return f"Top-1 {result['top1']:.2f} %."
    return (
        f"{speed.capitalize()}, top-1 {result['top1']:.2f} % ({result['top1'] - dense['top1']:+.2f} points), "
        f"{result['params'] / dense['params']:.0%} of its parameters, {result['macs'] / dense['macs']:.0%} of its "
        "MACs."
    )


def _how_made(run: Run) -> str:
    said = []
    for start in run.made:
        versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
        said.append(f"python {shlex.join(start['command'][1:])}\n# {versions}")
    return element("pre", escape("\n\n".join(said) or "no run.json in the folder"))


def _section(run: Run, level: int) -> str:
    """Everything about one run, under headings of `level`."""
    heading, dense = f"h{level}", run.dims("dense")
    left = run.dims(run.last)
    embed = f"Embedding {figures.embedding(left)}" + (f" of {figures.embedding(dense)}." if dense else ".")
    parts = [
        element(heading, "Widths that are left"),
        element("p", escape(embed)),
        charts(figures.widths(run, axis) for axis in figures.axes_of(run)),
    ]
    if dense and len(run.events) > 1:
        parts += [
            element(heading, "Where pruning took them"),
            charts(figures.redistribution(run.events, dense, axis) for axis in AXES),
        ]
    losses = (
        figures.epochs(run, "train_loss", "Training loss", "loss"),
        figures.epochs(run, "test_acc1", "Validation accuracy", "top-1 %"),
    )
    if any(losses) or run.events:
        parts += [element(heading, "The way there"), charts([*figures.trajectories(run), *losses])]
    return "".join([*parts, element(heading, "How it was made"), _how_made(run)])


def page(
    runs: Sequence[Run], labels: Sequence[str], headers: Sequence[str], rows: Sequence[Sequence[str]], conditions: str
) -> str:
    """The whole page; labels name the runs, headers and rows are the table of all their stages."""
    title = "Compressed Vision Transformer" if len(runs) == 1 else f"{len(runs)} compressed Vision Transformers"
    notes = "".join(element("p", escape(note), class_="note", role="note") for note in incomparable(list(runs)))
    first = "".join(
        element("p", escape((f"{label}: " if len(runs) > 1 else "") + headline(run)), class_="headline")
        for run, label in zip(runs, labels, strict=True)
    )
    main = [
        first,
        notes,
        element("h2", "Result"),
        element("p", escape(conditions)),
        table(headers, rows, "Dense and compact"),
    ]
    if chart := figures.pareto(runs, labels):
        main.append(charts([chart]))
    if len(runs) == 1:
        main.append(_section(runs[0], 2))
    else:
        main += [
            element("h2", escape(f"{label}: {run.name}")) + _section(run, 3)
            for run, label in zip(runs, labels, strict=True)
        ]
    names = ", ".join(run.name for run in runs)
    body = (
        element("header", element("h1", escape(title)))
        + element("main", "".join(main))
        + element("footer", element("p", escape(f"Written by tools.report from {names}.")))
    )
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        + element("title", escape(title))
        + element("style", STYLE)
    )
    return "<!DOCTYPE html>\n" + element("html", element("head", head) + element("body", body), lang="en") + "\n"
