"""What a finished run reports: one object per stage, with latency measured against the dense model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from files import schema
from latency.measure import DTYPES, interleaved, ratio
from latency.table import LatencyTable
from latency.whole import Measured, measure_ratios
from models import sparsity
from models.arch import Model
from models.compact import difference
from models.swin_dims import Dims
from runtime.console import say, say_next, say_result, warn
from runtime.device import device_name
from runtime.errors import RunFailed
from runtime.folders import write_json
from training.full_model import FullModel, is_dense

MOST_BATCH = 65_536  # largest batch of a measurement that a file may request


class Effort(NamedTuple):
    """How much is measured: fresh pairs of models, and rounds of each."""

    builds: int
    rounds: int


EFFORT = Effort(builds=5, rounds=9)


@dataclass(frozen=True)
class Conditions:
    """What a latency is measured under: the table's, so that prediction and measurement speak of the same thing."""

    batch: int
    dtype: str = "fp32"
    compiled: bool = False
    threads: int = 0  # those of the run; where others disturbed a table, the fewer that it was measured with

    @classmethod
    def of(cls, table: LatencyTable, batch: int) -> Conditions:
        """A table's; `batch` where it does not say."""
        meta = table.meta
        threads = int(meta.get("threads", 0)) if "threads_wanted" in meta else 0
        return cls(int(meta.get("batch", batch)), meta.get("dtype", "fp32"), bool(meta.get("compile")), threads)


def other_conditions(table: LatencyTable, device: torch.device, dtype: torch.dtype | None) -> list[str]:
    """Where the run's device and threads, its type (None: fp32) or its runtime is not the table's, a line for each."""
    here, computed = device_name(device), {v: k for k, v in DTYPES.items()}[dtype or torch.float32]
    meta, lines = table.meta, []
    for what, theirs, ours in (
        ("on", table.device or here, here),
        ("in", meta.get("dtype", computed), computed),
        ("by", meta.get("runtime", "torch"), "torch"),
    ):
        if theirs != ours:
            lines.append(
                f"the latency table was measured {what} {theirs}, this run computes {what} {ours}: predictions and "
                "targets are for the former"
            )
    return lines


def check_compact(model: Model, small: Model) -> float:
    """Relative difference of the logits of a masked model and its compact one. Raises RunFailed above 1e-3."""
    if not (error := difference(model, small)) <= 1e-3:
        raise RunFailed(f"the compact model differs from the masked one by {error:.1e}: please report this")
    return error


@dataclass(frozen=True)
class Report:
    """The end of a run: its model measured against the dense one under `conditions`, and the files in `folder`."""

    folder: Path
    full: FullModel
    device: torch.device
    conditions: Conditions
    effort: Effort = EFFORT
    measurements: dict[Dims, Measured] = field(default_factory=dict, repr=False)  # of this run so far

    def measure(self, dims: Dims) -> float:
        """Measured latency of the compact model relative to the dense one, the median of fresh pairs of models.

        A warning says where others disturbed it.
        """
        measured = self.measure_fully(dims)
        if measured.note:
            warn(measured.note)
        return round(float(measured.ratios[0]), 5)

    def measure_fully(self, dims: Dims) -> Measured:
        """As `measure`, with the threads and the disturbances that it was measured with. Once for the same widths."""
        if dims in self.measurements:
            return self.measurements[dims]
        self.measurements[dims] = measure_ratios(
            self.full.arch,
            [dims],
            self.conditions.batch,
            self.device,
            self.conditions.dtype,
            self.conditions.compiled,
            threads=self.conditions.threads,
            **self.effort._asdict(),
        )
        return self.measurements[dims]

    def measure_sparse(self, model: Model) -> float | None:
        """As `measure`, of a 2:4 sparse model in bfloat16; None where the device has no kernels for it."""
        if not sparsity.has_kernels(self.device):
            return None
        stem = model.patch_embed
        images = torch.randn(self.conditions.batch, stem.proj.in_channels, *stem.img_size, device=self.device)
        models = dict(
            dense=self.full.arch.plain.build().to(self.device),
            sparse=sparsity.accelerate(model, DTYPES[self.conditions.dtype]),
        )
        timings = interleaved(models, images, dtype=self.conditions.dtype)
        return round(ratio(timings["sparse"], timings["dense"]).median, 5)

    def stage(
        self, dims: Dims, top1: float, predicted: float | None, measured: float | None, **more: Any
    ) -> dict[str, Any]:
        """One object of summary.json: top-1 in percent, counts of one image, latencies as ratios to the dense model."""
        return dict(
            top1=round(top1, 3),
            params=self.full.arch.params(dims),
            macs=self.full.arch.macs(dims),
            latency_predicted=predicted,
            latency_measured=measured,
            device=device_name(self.device),
            batch=self.conditions.batch,
            dtype=self.conditions.dtype,
            compiled=self.conditions.compiled,
            dims=dims.to_dict(),
            **more,
        )

    def dense(self, dims: Dims, top1: float) -> dict[str, Any]:
        """The dense model's stage by its name; none where `dims` are another's."""
        return dict(dense=self.stage(dims, top1, 1.0, 1.0)) if is_dense(self.full, dims) else {}

    def conclude(
        self, name: str, dims: Dims, top1: float, predicted: float | None = None, earlier: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Measure the stage that the run ends with, and write dims.json and summary.json, `earlier` stages included."""
        if name == "dense":
            stage = self.stage(dims, top1, 1.0, 1.0)
        else:
            measured = self.measure_fully(dims)
            if measured.note:
                warn(measured.note)
            how = dict(threads=measured.threads, disturbed=round(measured.disturbed, 3))
            stage = self.stage(dims, top1, predicted, round(float(measured.ratios[0]), 5), **how)
        write_json(self.folder / "dims.json", dims.to_dict())
        write_json(self.folder / "summary.json", (earlier or {}) | {name: stage})
        return stage

    def say(self, result: str, stage: dict[str, Any], *following: str) -> None:
        """Say what was written, the commands that go on from it, and what the file `result` is worth."""
        say_where(self.folder, *following)
        say_result(
            f"{self.folder / result}: top-1 {stage['top1']:.2f}, {stage['params']:,} parameters, "
            f"{stage['macs'] / 1e6:,.1f} M MACs, measured latency {stage['latency_measured']:.3f} of dense"
        )


def say_where(folder: Path, *following: str) -> None:
    """Say what a finished run has written, and the commands that go on from it."""
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if not p.name.startswith("."))
    shown = [name for name in names if not name.startswith("events.")]
    curves = f"; curves: tensorboard --logdir {shlex.quote(str(folder))}" if len(shown) < len(names) else ""
    say(f"in {folder}: {', '.join(shown)}{curves}")
    say_next(*following)


def data_flags(args: Any) -> str:
    """The flags that name the data of a run, to repeat in the next command."""
    path = f" --data-path {shlex.quote(args.data_path)}" if args.data_path else ""
    return f"--data-set {args.data_set}{path}"


def after_training(folder: Path) -> tuple[str, str]:
    """The commands that follow finetuning, for `say_where`."""
    quoted = shlex.quote(str(folder))
    return (
        f"-m tools.report {quoted}",
        f"-m tools.export {shlex.quote(str(folder / 'ft_checkpoint.pth'))} --format onnx",
    )


def after_dense(folder: Path) -> tuple[str, str]:
    """The commands that follow training of a dense model, for `say_where`."""
    weights, measured = (shlex.quote(str(folder / name)) for name in ("ft_checkpoint.pth", "latency.json"))
    return (
        f"-m latency.build_table --initial-checkpoint {weights} --output {measured}",
        f"-m tools.report {shlex.quote(str(folder))}",
    )


def earlier(folder: Path) -> dict[str, Any]:
    """The stages before this one, from the summary in `folder`: what is no summary is left out, with a warning."""
    path = folder / "summary.json"
    if not path.exists():
        return {}
    try:
        return {name: _check(name, stage) for name, stage in schema.read_json(path).items()}
    except (schema.SchemaError, AttributeError) as error:
        reason = "it is no object" if isinstance(error, AttributeError) else str(error).removeprefix(f"{path} ")
        warn(f"{path} is left out of this run's summary: {reason}")
        return {}


def _check(name: str, stage: Any) -> dict[str, Any]:
    schema.check_plain(stage, name)
    batch = stage.get("batch", 1)
    if not isinstance(batch, int) or not 0 < batch <= MOST_BATCH or stage.get("dtype", "fp32") not in DTYPES:
        raise schema.SchemaError(f"{name}: batch or dtype is none")
    return stage


def log_line(stats: dict[str, float], test: dict[str, float]) -> dict[str, float]:
    """Training and test figures of an epoch, under the names that log.txt has for them."""
    return {f"train_{k}": v for k, v in stats.items()} | {f"test_{k}": v for k, v in test.items()}
