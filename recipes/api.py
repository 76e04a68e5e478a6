"""Pruning from Python: plain functions on modules, tensors and values. No arguments to parse, no file, nothing printed.

small = prune(model, images, latency=0.5)
study = analyse(model, images); small = study.prune(latency=0.3); study.curve([0.8, 0.5, 0.3])
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from latency.cache import find_or_measure
from latency.measure import DTYPES
from latency.quick import measure_table as measure_quick
from latency.table import LatencyTable
from latency.whole import measure_ratios
from loading.folders import Pictures
from loading.preparation import Preparation
from models import hub
from models.arch import Arch, Model
from models.dims import ViTDims
from models.from_timm import take
from models.pretrained import load_dense
from pruning.align import align_
from pruning.config import PruningConfig
from pruning.objective import OBJECTIVES, PREDICTIONS, TOKENS, Features
from pruning.one_shot import Analysis, Choice
from pruning.one_shot import analyse as analyse_aligned
from pruning.recovery import recover_
from pruning.refit import unseen_of

__all__ = ["Size", "Study", "analyse", "load", "measure_table", "prune", "save"]

Progress = Callable[[str], None]
LEAST_IMAGES, LATENCY_BATCH = 64, 8


@dataclass(frozen=True)
class Size:
    """A point of the curve. latency: predicted, relative to the dense model; divergence: predicted for its widths."""

    latency: float
    divergence: float
    params: int
    macs: int
    dims: ViTDims


@dataclass(frozen=True)
class Study:
    """One analysis of a model, and every size that follows from it."""

    analysis: Analysis
    table: LatencyTable
    progress: Progress

    def _choose(self, latency: float) -> Choice:
        if not 0 < latency <= 1:
            raise ValueError(f"latency must be in (0, 1], a share of the dense model's, not {latency}")
        return self.analysis.choose(self.table, latency)

    def prune(
        self, latency: float, measured: bool = False, recover_minutes: float = 0.0, hflip: float = 0.5
    ) -> nn.Module:
        """A compact model at most `latency` times as slow as the dense one, in eval mode; `.divergence` says how far
        its outputs are on images that no fit has seen.

        measured: as measured on the table's device, not as predicted. recover_minutes: distil the dense outputs on the
        calibration images for so long, each mirrored with probability `hflip`. Raises ValueError where no widths are as
        quick.
        """
        choice = self._choose(latency)
        if measured:
            choice = self.analysis.choose_measured(self.table, latency, self.measure, self.progress)
        pruned = self.analysis.cut(choice.dims)
        self.progress(f"pruned to {self.ratio(choice.dims):.3f} of the latency: divergence {pruned.divergence:.1e}")
        pruned.model.divergence = pruned.divergence
        if recover_minutes:
            pruned.model.divergence = self._recover(pruned.model, recover_minutes, hflip)
        return pruned.model.requires_grad_(True)

    def _recover(self, small: nn.Module, minutes: float, hflip: float) -> float:
        analysis = self.analysis
        unseen = unseen_of(analysis.images)
        batches = random_batches(analysis.images[: -len(unseen)], analysis.batch, hflip)
        seconds = 60 * minutes
        return recover_(
            small, analysis.dense, batches, seconds, unseen, analysis.batch, analysis.objective, progress=self.progress
        ).after

    def curve(self, latencies: Iterable[float]) -> list[Size]:
        """What each of the latencies would give; nothing is refitted."""
        arch = Arch.of_model(self.analysis.dense)
        sizes = []
        for latency in latencies:
            dims, divergence = self._choose(latency)
            sizes.append(Size(self.ratio(dims), divergence, arch.params(dims), arch.macs(dims), dims))
        return sizes

    def ratio(self, dims: ViTDims) -> float:
        """Predicted latency of widths, relative to the dense model."""
        return self.table.ratio(dims, self.analysis.dense.dims)

    def measure(self, dims: ViTDims) -> float:
        """Measured latency of widths, relative to the dense model, under the table's conditions."""
        meta, device = self.table.meta, next(self.analysis.dense.parameters()).device
        arch = Arch.of_model(self.analysis.dense)
        measured = measure_ratios(arch, [dims], meta.get("batch", LATENCY_BATCH), device, meta.get("dtype", "fp32"))
        if measured.note:
            self.progress(measured.note)
        return float(measured.ratios[0])


def _say_nothing(line: str) -> None:
    pass


def analyse(
    model: nn.Module,
    images: Any,
    *,
    table: LatencyTable | str | Path | None = None,
    objective: str | None = None,
    feature_tokens: str = "pooled",
    keep_output: bool = False,
    batch_size: int = 32,
    latency_batch_size: int = LATENCY_BATCH,
    table_cache: str | Path | None = None,
    max_images: int = 1024,
    pricing: str = "gradient",
    progress: Progress | None = None,
) -> Study:
    """Align a model and price its widths; sizes for any latency then follow in seconds.

    model: a plain Vision Transformer of timm or transformers, with or without a classifier; it is left as it is.
    images: a tensor (n, 3, H, W) prepared as the model expects, an iterable of such batches, alone or with labels, or a
    folder of image files, nested or flat; `max_images` of them calibrate. table: a `LatencyTable` or its file; without
    one a coarse table of the model's device, at `latency_batch_size`, is measured and kept for the next time, in the
    folder `table_cache` or the user's cache folder. objective: `predictions` of the classifier, or `features` for a
    model without one, of the `feature_tokens` class, patches, pooled or all. The width of features stays, and with it
    the embedding, unless keep_output: then the embedding is pruned too, and the model ends in a linear layer, `head`,
    that restores its width. What a pool by attention gives keeps its width at any embedding. progress: called with a
    line of text after every stage. Raises ValueError.
    """
    say = progress or _say_nothing
    if isinstance(table, str | Path):
        table = LatencyTable.load(table)
    dense = take(model).requires_grad_(False)
    objective = objective or ("predictions" if isinstance(dense.head, nn.Linear) else "features")
    if objective not in OBJECTIVES or feature_tokens not in TOKENS:
        raise ValueError(f"objective is one of {', '.join(OBJECTIVES)}, feature_tokens one of {', '.join(TOKENS)}")
    if objective == "predictions" and not isinstance(dense.head, nn.Linear):
        raise ValueError("the model has no classifier: take objective='features'")
    device = next(dense.parameters()).device
    calibration = collect_images(images, dense, max_images)
    if table is None:
        arch = Arch.of_model(dense).plain.without_drops
        table = find_or_measure(arch, latency_batch_size, device.type, folder=table_cache, progress=say)
    table.check_covers(dense.dims)
    if keep_output:
        dense = with_linear_output(dense, feature_tokens)
    pooled = dense.attn_pool and feature_tokens == "pooled"
    keeps_width = objective == "features" and not keep_output and not pooled  # others read the stream itself
    left = align_(dense, [part.to(device) for part in calibration.split(batch_size)], embedding=not keeps_width)
    say(f"aligned on {len(calibration)} images" + (f": {'; '.join(left)}" if left else ""))
    goal = PREDICTIONS
    if objective == "features":
        goal = Features.of(dense, calibration, batch_size, feature_tokens)
    alone = {*Arch.of_model(dense).left_alone, *(("embed",) if keeps_width else ())}
    groups = PruningConfig().group_sizes(dense.dims, left_alone=alone)
    analysis = analyse_aligned(dense, calibration, groups, batch_size, goal, pricing)
    say("every width is priced")
    return Study(analysis, table, say)


def prune(
    model: nn.Module,
    images: Any,
    latency: float = 0.5,
    *,
    measured: bool = False,
    recover_minutes: float = 0.0,
    hflip: float = 0.5,
    **kwargs: Any,
) -> nn.Module:
    """A compact copy of a model that takes at most `latency` times as long, without labels or training.

    Arguments and errors as of `analyse` and `Study.prune`.
    """
    if not 0 < latency <= 1:
        raise ValueError(f"latency must be in (0, 1], a share of the dense model's, not {latency}")
    return analyse(model, images, **kwargs).prune(latency, measured, recover_minutes, hflip)


@torch.no_grad()
def with_linear_output(model: VisionTransformer, tokens: str = "pooled") -> VisionTransformer:
    """A headless model with the identity as every head, (E, E), a linear map once the embedding is cut.

    tokens: the features that are wanted. Raises ValueError for a model that cannot have such an output, or needs none.
    """
    if isinstance(model.head, nn.Linear):
        raise ValueError("keep_output is for a model without a classifier: this one's outputs keep their width")
    if model.attn_pool is not None:
        raise ValueError("keep_output is for models that give their residual stream: a pool's outputs keep their width")
    if tokens != "pooled" and hasattr(model, "head_dist"):
        raise ValueError("keep_output of a distilled model, which has two outputs, goes with feature_tokens='pooled'")
    arch = Arch.of_model(model).with_kwargs(num_classes=model.embed_dim)
    wider = arch.build()
    wider.load_state_dict(model.state_dict(), strict=False)
    for name in ("head", "head_dist"):
        if layer := getattr(wider, name, None):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
    reference = next(model.parameters())
    return wider.to(reference.device, reference.dtype).eval().requires_grad_(False)


def measure_table(
    model: nn.Module, batch_size: int = 8, dtype: str = "fp32", device: str | torch.device | None = None
) -> LatencyTable:
    """A coarse latency table of a model's blocks, measured now; device: by default where the model is."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype}")
    ours = take(model)
    device = torch.device(device) if device else next(ours.parameters()).device
    return measure_quick(Arch.of_model(ours).plain, batch_size, device.type, dtype)


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> Model:
    """A compact model from a checkpoint, a folder that `save` or tools.export has written, or hf-hub:OWNER/NAME."""
    return load_dense(str(path), device)


def save(model: Model, folder: str | os.PathLike) -> Path:
    """Write a compact model as config.json and model.safetensors; returns the folder.

    How its images are prepared, where `model.data_config` says so, is in config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = getattr(model, "data_config", None)
    hub.write_config(folder, hub.config_of(model, **(dict(preprocess=record) if record else {})))
    hub.write_weights(folder, model)
    return folder


def random_batches(images: Tensor, batch: int, hflip: float) -> Iterator[Tensor]:
    """Endless random batches of images (n, 3, H, W), each image mirrored with probability `hflip`."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for places in torch.randperm(len(images), generator=generator).split(batch):
            mirrored = torch.rand(len(places), 1, 1, 1, generator=generator) < hflip
            yield torch.where(mirrored, images[places].flip(-1), images[places])


def collect_images(images: Any, model: nn.Module, most: int) -> Tensor:
    """Calibration images (n, 3, H, W) from a tensor, an iterable of batches or a folder. Raises ValueError."""
    if isinstance(images, Tensor):
        tensor = images[:most]
    elif isinstance(images, str | Path):
        tensor = _from_folder(Path(images), model, most)
    else:
        parts, count = [], 0
        for batch in images:
            part = batch[0] if isinstance(batch, list | tuple) else batch
            if not isinstance(part, Tensor):
                raise ValueError(
                    f"images must be a tensor, an iterable of tensors or a folder, not of {type(part).__name__}"
                )
            parts.append(part)
            count += len(part)
            if count >= most:
                break
        if not parts:
            raise ValueError("images is empty")
        tensor = torch.cat(parts)[:most]
    stem = model.patch_embed
    wanted = (stem.proj.in_channels, *stem.img_size)
    if tensor.dim() != 4 or tuple(tensor.shape[1:]) != wanted or not tensor.is_floating_point():
        raise ValueError(f"images must be floating-point (n, {', '.join(map(str, wanted))}), not {tuple(tensor.shape)}")
    if len(tensor) < LEAST_IMAGES:
        raise ValueError(f"{len(tensor)} images are too few to calibrate with: at least {LEAST_IMAGES}")
    return tensor.float().cpu()


def _from_folder(folder: Path, model: nn.Module, most: int) -> Tensor:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    pictures = Pictures(folder, Preparation.of_timm(cfg, model.patch_embed.img_size[0]).eval_transform())
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:most].tolist()
    return torch.stack([pictures[i][0] for i in order])
