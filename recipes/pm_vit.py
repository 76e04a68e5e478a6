"""The parts of Prune and Merge between its command line and its method: which model, its scores, its teacher."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import progress_bar
from loading.loaders import start_epoch
from models import ViTDims
from models.parents import ModelError, skeleton
from models.pretrained import read_initial
from models.vit import TokenLogits
from pruning import pm_vit, token_merging
from pruning.token_counts import choose_counts
from runtime.errors import RunFailed
from training.class_names import check_class_names
from training.dense import Run
from training.full_model import (
    FullModel,
    freeze,
    is_dense,
    load_full_teacher,
    read_full_model,
)
from training.parts import LossWeights, drop_rate_kwargs, make_precision
from training.sources import Checkpoint, Source, Teacher, structural_kwargs
from training.teachers import adapt, load_cnn, of_full_teacher

ALIASES = {
    f"{name}_{size}_patch16_224": f"deit_{size}_patch16_224"
    for name, size in itertools.product(("tmvit", "tmit"), ("tiny", "small", "base"))
}


@dataclass
class Model:
    """The model that --resume names, or the dense one, and where its dense weights are; start: of this project."""

    full: FullModel
    start: Checkpoint | None
    origin: str = ""

    def build(self, args: Any) -> nn.Module:
        """With its weights, and drop rates as the flags say. Raises ValueError."""
        return (self.start or self.full).build(**drop_rate_kwargs(args))

    def check_classes(self, args: Any, classes: int) -> None:
        """Raises ValueError for weights that know other classes than the data has."""
        if self.start is None:
            return self.full.check_classifier()
        if self.start.classes != classes:
            raise ValueError(f"{args.resume} has {self.start.classes} classes, the data has {classes}")
        check_class_names(self.start.class_names, self.full.data_names, args.resume)

    @property
    def weights(self) -> dict[str, Tensor] | None:
        return self.start.weights if self.start else self.full.state

    @property
    def dims(self) -> ViTDims:
        return (self.start or self.full).dims


def read_model(args: Any) -> Model:
    """Raises ValueError, whatever is wrong with the files."""
    name = ALIASES.get(args.model, args.model)
    start = Checkpoint.find(args.resume)
    if start is None:
        weights = args.resume or args.initial_checkpoint
        full = read_full_model(replace(Source.of(args), model=name, weights=weights))
        return Model(full, None, full.path)
    if name not in (None, start.arch.name):
        raise ValueError(f"--model is {args.model} but {args.resume} holds {start.arch.name}")
    full = read_full_model(Source(None, args.model_kwargs).like(start))
    if args.input_size not in (None, full.image_size):
        raise ValueError(f"--input-size is {args.input_size} but {args.resume} is for images of {full.image_size}")
    full = full.with_kwargs(num_classes=start.classes)
    dense = not start.is_pruned and is_dense(full, start.dims)
    return Model(full, start, str(Path(args.resume).resolve()) if dense else start.origin)


def is_compressed(full: FullModel, dims: ViTDims) -> bool:
    return any(b.tokens < full.dims.blocks[0].tokens for b in dims.blocks)


def merge_list(args: Any, dims: ViTDims) -> tuple[int, ...]:
    """The blocks to compress: those asked for, or all that have attention to score by. Raises ValueError."""
    scored = args.prune_mode not in ("random", "seq", "probe")
    if args.merge_list is None:
        return tuple(i for i, b in enumerate(dims.blocks) if b.heads or not scored)
    layers = args.merge_list
    if sorted(set(layers)) != layers or layers[0] < 0:
        raise ValueError(f"--merge_list must be block indices in ascending order, not {' '.join(map(str, layers))}")
    if layers[-1] >= len(dims.blocks):
        raise ValueError(f"--merge_list names block {layers[-1]}, the model has blocks 0 to {len(dims.blocks) - 1}")
    if odd := [i for i in layers if scored and not dims.blocks[i].heads]:
        raise ValueError(f"--merge_list: block {odd[0]} has no attention to score by; --prune_mode seq needs none")
    return tuple(layers)


def scoring_batches(loader: Any, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` batches, over as many epochs as they take; 0 for one epoch."""
    count = count or len(loader)
    for epoch in itertools.count():
        start_epoch(loader, epoch)
        yield from itertools.islice(loader, count - epoch * len(loader))
        if (epoch + 1) * len(loader) >= count:
            return


def scores(args: Any, run: Run, layers: Sequence[int]) -> Tensor:
    """Of every patch of `layers`: (L, N) on the CPU. Raises RunFailed where they are not finite."""
    model, (rows, columns) = run.model, run.model.patch_embed.grid_size
    if args.prune_mode == "seq":
        return pm_vit.even_ranks(layers, (rows, columns))
    if args.prune_mode == "random":
        generator = torch.Generator().manual_seed(args.seed)
        return torch.rand(len(layers), rows * columns, generator=generator, dtype=torch.float64)
    precision, logits = make_precision(args, run.device), TokenLogits(model)

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        with precision.autocast():
            cls, dist = logits(images)
        return F.cross_entropy((cls + dist).float() / 2, targets)

    batches = scoring_batches(run.data.train, args.prune_iter)
    batches = progress_bar(batches, args.prune_iter or len(run.data.train), "score")
    mode = "attn" if args.prune_mode == "clus" else args.prune_mode
    try:
        found = pm_vit.measure_importance(model, layers, batches, loss, mode, args.per_image, precision.scaler)
    except FloatingPointError as error:
        raise RunFailed(f"{error}: check the weights of --resume") from None
    return found.cpu()


def structure(args: Any, run: Run, images: Tensor | None) -> pm_vit.Structure:
    """What becomes of every patch. Raises ValueError (CompressionError) for rates that leave nothing.

    images: this process's calibration images, which --prune_mode probe alone looks at.
    """
    layers, stem = merge_list(args, run.model.dims), run.model.patch_embed
    if args.prune_mode == "probe":
        total, _ = pm_vit.budget(len(layers), stem.num_patches, args.prune_rate, args.keep_rate)
        return choose_counts(run.model, layers, images, total, args.batch_size, args.merge == token_merging.CONTENT)
    ranks = scores(args, run, layers)
    passing = pm_vit.skipped_patches(run.model, layers) if args.prune_mode == "clus" else None
    if args.prune_mode not in ("random", "seq"):
        return pm_vit.choose_centres(
            pm_vit.comparable(ranks, layers, args.depth_factor), layers, args.prune_rate, args.keep_rate, passing
        )
    chosen = pm_vit.choose_centres(ranks, layers, args.prune_rate, args.keep_rate)
    return replace(chosen, weights=torch.ones_like(chosen.weights))  # no patch matters more than another


class MeanLogits(nn.Module):
    """One set of logits, (B, classes), of a model that gives those of two tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return sum(self.model(images)) / 2


def losses_of(args: Any) -> LossWeights:
    """Published: base + alpha x distillation, not DeiT's mix. `soft` is the KL at temperature tau, times tau^2, over
    batch x 1000 classes; `hard` the cross-entropy with the teacher's label.
    """
    alpha, tau, kind = args.distillation_alpha, args.distillation_tau, args.distillation_type
    usual = LossWeights(original=1.0, kl=0.0, kind="none", alpha=alpha, tau=tau, kl_tau=tau)
    if kind == "soft":
        return replace(usual, kl=alpha * tau**2)
    if kind == "hard":  # (1 + alpha) ((1 - a) base + a hard)
        return replace(usual, original=1 + alpha, kind=kind, alpha=alpha / (1 + alpha))
    return usual


def teacher(args: Any, run: Run) -> nn.Module:
    """The dense model to distil from: --teacher-path, else what was compressed. Raises ValueError."""
    path, name = args.teacher_path or run.origin, ALIASES.get(args.teacher_model, args.teacher_model)
    if not path:
        raise ValueError("--distillation-type: no dense model to distil from: give --teacher-path FILE")
    arch, _, _ = read_initial(path)
    name = name or arch or run.full.arch.name
    own = structural_kwargs(run.full.arch.kwargs) if not arch and name == run.full.arch.name else {}
    try:
        skeleton(name)
    except ModelError:
        return freeze(load_cnn(Teacher(name, path), run.data, run.device), run.device)
    full = read_full_model(Source(name, own, weights=path))
    found = load_full_teacher(full.for_data(run.data), run.device)
    return adapt(
        found, f"teacher {path}", of_full_teacher(full, run.origin, run.data.preparation), run.data.preparation
    )
