"""The charts of a report, each an Axes that is filled from runs, and the words that say what it shows."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.swin_dims import Dims
from tools.run_data import Event, Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

AXES = dict(heads="heads", qk="QK width of a head", v="V width of a head", mlp="MLP width")
TITLES = AXES | dict(tokens="tokens")
PUBLISHED = dict(heads="head", qk="QK", v="V", mlp="MLP")
BLUE, PALE, ORANGE = "#1f5fa8", "#cfdcec", "#b45309"
SIZE, DPI, FONT = (5.0, 3.2), 150, 12  # inches, dots per inch, points: readable when shrunk to a phone's width


@dataclass(frozen=True)
class Chart:
    """A picture with its caption and the text that stands in for it."""

    png: bytes
    caption: str
    alt: str


def _chart(draw: Callable[[Axes], None], caption: str, alt: str) -> Chart:
    with plt.rc_context({"font.size": FONT, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=SIZE, constrained_layout=True)
        draw(axes)
        png = _png(figure)
    return Chart(png, caption, alt)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI, format="png")
    plt.close(figure)
    return file.getvalue()


def _bars(axes: Axes, widths: Sequence[int], dense: Sequence[int] | None) -> None:
    blocks = range(1, len(widths) + 1)
    if dense is not None:
        axes.bar(blocks, dense, color=PALE, label="dense")
    bars = axes.bar(blocks, widths, color=BLUE, width=0.6, label="left")
    axes.bar_label(bars, fontsize=min(FONT - 2, 140 / len(widths)))  # as wide as four digits may be
    axes.margins(y=0.12)
    axes.set(xlabel="block", xticks=list(blocks))
    axes.yaxis.get_major_locator().set_params(integer=True)


def embedding(dims: Dims) -> str:
    """The embedding's width, of a Swin Transformer that of every stage."""
    return ", ".join(str(stage.embed) for stage in dims.stages)


def _title(axis: str) -> str:
    return TITLES[axis][0].upper() + TITLES[axis][1:]


def _summary(numbers: Sequence[float]) -> str:
    return ", ".join(f"{n:g}" for n in numbers)


def axes_of(run: Run) -> list[str]:
    """What to draw of a run's blocks: tokens too where some were merged."""
    left, dense = run.dims(run.last), run.dims("dense")
    now = [b.tokens for b in left.blocks]
    before = [b.tokens for b in (dense or left).blocks] if dense or len(left.stages) > 1 else [max(now)] * len(now)
    return [*AXES, *(["tokens"] if now != before else [])]


def widths(run: Run, axis: str) -> Chart:
    """What is left of one width per block, over the dense model's."""
    left, dense = run.dims(run.last), run.dims("dense")
    now = [getattr(b, axis) for b in left.blocks]
    before = [getattr(b, axis) for b in dense.blocks] if dense else None
    beside = f"; dense: {_summary(before)}" if before else ""
    alt = f"{TITLES[axis]} left in blocks 1 to {len(now)}: {_summary(now)}{beside}"
    return _chart(lambda axes: _bars(axes, now, before), f"{_title(axis)} per block", alt)


def redistribution(events: Sequence[Event], dense: Dims, axis: str) -> Chart:
    """The share that is left of one width, per block (rows) and pruning event (columns)."""
    full = np.array([getattr(b, axis) for b in dense.blocks])[:, None]
    left = np.array([event.dim[PUBLISHED[axis]] for event in events]).T / full.clip(1)  # L events

    def draw(axes: Axes) -> None:
        picture = axes.imshow(
            left,
            aspect="auto",
            cmap="Blues_r",
            vmin=0,
            vmax=1,
            interpolation="nearest",
            extent=(0.5, len(events) + 0.5, len(full) + 0.5, 0.5),
        )
        axes.figure.colorbar(picture, ax=axes, label="share left")
        axes.set(xlabel="pruning event", ylabel="block", yticks=range(1, len(full) + 1))
        axes.xaxis.get_major_locator().set_params(integer=True)

    alt = f"share of {AXES[axis]} left in blocks 1 to {len(full)} after the last of {len(events)} events: "
    return _chart(draw, f"{_title(axis)}, event by event", alt + _summary(left[:, -1].round(2)))


def _line(values: Sequence[float], label: str, caption: str, what: str, begin: int = 1) -> Chart:
    places = range(begin, begin + len(values))

    def draw(axes: Axes) -> None:
        axes.plot(places, values, color=BLUE, marker="o" if len(values) < 20 else "")
        axes.set(xlabel=label, ylabel=what)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _chart(draw, caption, f"{what}: from {values[0]:.4g} to {values[-1]:.4g} over {len(values)} {label}s")


def trajectories(run: Run) -> list[Chart]:
    """Predicted latency, embedding and saliency over the events of pruning."""
    if len(run.events) < 2:
        return []
    scores = [event.score for event in run.events]
    return [
        _line([event.ratio for event in run.events], "pruning event", "Predicted latency", "share of dense"),
        _line([event.dim["EMB"] for event in run.events], "pruning event", "Embedding width", "channels"),
        _line(scores, "pruning event", "Saliency of the last group that an event removed", "saliency less λ × latency"),
    ]


def epochs(run: Run, key: str, caption: str, what: str) -> Chart | None:
    """One logged figure over the epochs of pruning and then of finetuning; None where nothing was logged."""
    parts = dict(pruning=run.pruning, finetuning=run.finetuning)
    logged = {name: [line[key] for line in lines if key in line] for name, lines in parts.items()}
    logged = {name: values for name, values in logged.items() if values}
    if not logged:
        return None

    def draw(axes: Axes) -> None:
        begin = 1
        for (name, values), color in zip(logged.items(), (BLUE, ORANGE), strict=False):
            axes.plot(range(begin, begin + len(values)), values, color=color, marker="o", label=name)
            begin += len(values)
        axes.set(xlabel="epoch", ylabel=what)
        axes.set_xlim(0.5, begin - 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)

    alt = "; ".join(f"{name}: from {v[0]:.4g} to {v[-1]:.4g} in {len(v)} epochs" for name, v in logged.items())
    return _chart(draw, caption, f"{what}, {alt}")


def pareto(runs: Sequence[Run], labels: Sequence[str]) -> Chart | None:
    """Top-1 against measured latency of every stage of every run; None where nothing was measured."""
    points = [
        (label, name, stage["latency_measured"], stage["top1"])
        for run, label in zip(runs, labels, strict=True)
        for name, stage in run.stages.items()
        if stage["latency_measured"]
    ]
    if not points:
        return None
    looks = dict(dense=("s", "#444444"), pruned=("o", ORANGE), finetuned=("o", BLUE))

    def draw(axes: Axes) -> None:
        for label, name, latency, top1 in points:
            marker, color = looks[name]
            known = name in axes.get_legend_handles_labels()[1]
            axes.scatter(latency, top1, marker=marker, color=color, label=None if known else name, zorder=2)
            if name != "dense" and len(runs) > 1:
                axes.annotate(label, (latency, top1), xytext=(5, 4), textcoords="offset points", fontsize=FONT - 2)
        axes.set(xlabel="measured latency, share of dense", ylabel="top-1 %")
        axes.margins(0.1)
        axes.grid(color="#e5e7eb", zorder=0)
        axes.legend(frameon=False)

    said = (f"{label} {name} {top1:.2f} % at {latency:.3f}" for label, name, latency, top1 in points)
    return _chart(draw, "Accuracy against measured latency", "; ".join(dict.fromkeys(said)))


def plot_widths(run: Run, path: Path) -> None:
    """All widths of one run in one PNG file."""
    left, dense = run.dims(run.last), run.dims("dense")
    figure, axes = plt.subplots(1, len(AXES), figsize=(3.2 * len(AXES), 3.2), constrained_layout=True)
    for panel, (axis, title) in zip(axes, AXES.items(), strict=True):
        _bars(
            panel, [getattr(b, axis) for b in left.blocks], [getattr(b, axis) for b in dense.blocks] if dense else None
        )
        panel.set_title(title)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"embedding {embedding(left)}" + (f" of {embedding(dense)}" if dense else ""))
    figure.savefig(path, dpi=130)
    plt.close(figure)
