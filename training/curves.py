"""What TensorBoard shows of a run; silent on all ranks but the main one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from engine import Progress
from models.axes import Axis
from runtime.ranks import is_main


class Curves:
    """Writes a run's curves into its folder. purge_step: the step from which an earlier part of the run is void."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self.writer = SummaryWriter(folder, purge_step=purge_step) if is_main() else None
        self._rate = 0.0  # images per second

    @contextlib.contextmanager
    def training(self, progress: Progress, images: int) -> Iterator[None]:
        """Around the updates of an epoch, each of so many images: measures throughput, on the main rank."""
        begin, first = time.perf_counter(), progress.step
        yield
        self._rate = (progress.step - first) * images / (time.perf_counter() - begin)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """One point of every curve, by tag."""
        for tag, value in values.items() if self.writer else ():
            self.writer.add_scalar(tag, value, step)

    def epoch(self, line: dict[str, float], epoch: int) -> None:
        """The figures of a log line (train_loss is train/loss), and the throughput of its training."""
        self.scalars({tag.replace("_", "/", 1): value for tag, value in line.items()}, epoch)
        self.scalars({"train/images_per_second": self._rate}, epoch)

    def saliency(self, scores: dict[str, Tensor], keep: dict[str, Tensor], step: int) -> None:
        """Histograms of log10 of the scores of the units that are left, over all blocks, by kind of axis.

        scores, keep (bool, True is keep): by axis, (units,).
        """
        kinds: dict[str, list[Tensor]] = {}
        for axis, values in scores.items() if self.writer else ():
            left = values[keep[axis].to(values.device)]
            kinds.setdefault(Axis.parse(axis).kind, []).append(left[left > 0].log10())
        for kind, parts in kinds.items():
            if (values := torch.cat(parts)).numel():
                self.writer.add_histogram(f"saliency_log10/{kind}", values, step)

    def end(self, args: dict[str, Any], metrics: dict[str, float]) -> None:
        """The arguments beside what they came to, for TensorBoard's table of hyper-parameters."""
        if not self.writer:
            return
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in args.items()}
        figures = {f"result/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}
        self.writer.add_hparams(plain, figures, run_name=".")
        self.writer.close()
