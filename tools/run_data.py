"""What finished runs have left in their folders, as values."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models import DimsError, dims_from_dict
from models.swin_dims import Dims

STAGES = ("dense", "pruned", "finetuned")
_RATIO, _SCORE = (re.compile(rf"{name}: (\S+)") for name in ("latency_ratio", "threshold_now"))


@dataclass(frozen=True)
class Event:
    """One pruning event: widths that were left, predicted latency of dense, saliency of the last group removed."""

    dim: dict[str, Any]  # the published spelling; EMB is the sum over stages
    ratio: float
    score: float


@dataclass
class Run:
    """A finished run: its stages by name, as in summary.json, what pruning and finetuning logged, and how it was made.

    pruning, finetuning: log.txt's lines; events: of pruning by saliency; made: the last start of both, from run.json.
    """

    name: str
    folder: Path
    stages: dict[str, dict[str, Any]]
    pruning: list[dict[str, Any]] = field(default_factory=list)
    finetuning: list[dict[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    made: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last(self) -> str:
        """Name of the last stage."""
        return list(self.stages)[-1]

    @property
    def result(self) -> dict[str, Any]:
        return self.stages[self.last]

    def dims(self, stage: str) -> Dims | None:
        """Widths of a stage, None where the run has none of that name."""
        return dims_from_dict(self.stages[stage]["dims"]) if stage in self.stages else None


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _lines(folder: Path) -> list[dict[str, Any]]:
    """log.txt, but for a last line that a crash tore off."""
    rows = []
    path = folder / "log.txt"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _event(path: Path, stages: int) -> Event | None:
    numbers = [int(n) for n in path.read_text().split(",")]
    state = path.with_name(path.name.replace("dimension", "pruning"))
    text = state.read_text() if state.exists() else ""
    ratio, score = _RATIO.search(text), _SCORE.search(text)
    depth, odd = divmod(len(numbers) - stages, 4)
    if not ratio or not score or depth < 0 or odd:
        return None
    lists = {name: numbers[stages + i * depth :][:depth] for i, name in enumerate(("head", "QK", "V", "MLP"))}
    return Event(dict(EMB=sum(numbers[:stages])) | lists, float(ratio[1]), float(score[1]))


def _unfinished(folder: Path) -> str:
    """Why a folder has no summary, or what would be right."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    if (folder / "args.json").exists():
        epochs = len(_lines(folder))
        return (
            f"{folder} is of a run that has not finished ({epochs} {'epoch is' if epochs == 1 else 'epochs are'} "
            "logged); continue with --resume"
        )
    inside = sorted(p.parent for p in folder.rglob("summary.json") if p.parent != folder)[:3]
    hint = f"; these in it are: {', '.join(map(str, inside))}" if inside else ""
    return f"{folder} is not the folder of a run{hint}"


def read_run(folder: Path) -> Run:
    """The run in `folder`: of finetuning, with the pruning run around it, or of pruning. Raises ValueError."""
    copied = (folder / "report.html").exists() and not (folder / "args.json").exists()  # an earlier report's folder
    if copied or not (folder / "summary.json").is_file():
        raise ValueError(_unfinished(folder))
    try:
        summary = _json(folder / "summary.json")
        run = Run(folder.resolve().name, folder, {name: summary[name] for name in STAGES if name in summary})
        for name in run.stages:
            run.dims(name)
        run.result["top1"]
    except (KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError, DimsError) as error:
        raise ValueError(f"{folder / 'summary.json'} is damaged or of another program: {error!r}") from None
    tuned = (folder / "ft_checkpoint.pth").exists()
    outer = folder.resolve().parent if tuned else folder
    has_outer = not tuned or ((outer / "summary.json").exists() and "pruned" in run.stages)
    if tuned:
        run.finetuning = _lines(folder)
        run.name = f"{outer.name}/{folder.resolve().name}" if has_outer else run.name
    if has_outer:
        run.pruning = _lines(outer)
        stages = len(run.dims(run.last).stages)
        events = (_event(path, stages) for path in sorted(outer.glob("debug/debugOutput_dimension_*.txt")))
        run.events = [event for event in events if event]
    places = dict.fromkeys([outer, folder] if has_outer else [folder])
    run.made = [made["starts"][-1] for place in places if (made := _json(place / "run.json"))]
    return run


def incomparable(runs: list[Run]) -> list[str]:
    """What keeps runs from being compared: dense models, or conditions of measurement, that differ from the first's."""
    first, reasons = runs[0], []
    for run in runs[1:]:
        if run.dims("dense") != first.dims("dense"):
            reasons.append(f"{run.name} and {first.name} have different dense models: compare no ratios to dense")
        for key, what in (("device", "on"), ("batch", "at batch"), ("dtype", "in")):
            if run.result.get(key) != first.result.get(key):
                reasons.append(
                    f"{run.name} was measured {what} {run.result.get(key)}, {first.name} {what} {first.result.get(key)}"
                )
    return reasons
