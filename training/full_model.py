"""The full-size model that a run is about, and the teachers it distils from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from models import Arch
from models.foreign import adapt, kind, mismatch, some
from models.pretrained import Initial, check_initial, find_initial, load_initial_
from models.swin_dims import Dims
from models.vit import TokenLogits
from runtime.console import say
from runtime.errors import first_line
from training.class_names import check_class_names
from training.sources import Checkpoint, Source, Teacher, structural_kwargs


@dataclass(frozen=True)
class FullModel:
    """The full-size model that a run is about: its architecture (with its classes once the data is known) and weights.

    start: the checkpoint of a narrower model that the run starts from; `path` is then where the dense weights are;
    class_names: of the images that the weights were trained on, where the file holds them; data_names: of the run's
    own images; ema: whether the weights are a moving average.
    """

    arch: Arch
    path: str = ""
    state: dict[str, Tensor] | None = field(default=None, repr=False)
    pretrained: bool = False
    start: Checkpoint | None = None
    class_names: tuple[str, ...] = ()
    data_names: tuple[str, ...] = ()
    ema: bool = False

    def for_data(self, data: Any) -> FullModel:
        """With a classifier for the classes of the data."""
        return replace(self.with_kwargs(num_classes=data.classes), data_names=data.names)

    def for_other_classes(self) -> FullModel:
        """Without its classifier, which is for other classes: a fresh one is trained."""
        say(f"new classifier: {self.path} knows other classes of this number")
        return self._without_head()

    def without_classifier(self) -> FullModel:
        """For its features: weights of a classifier are left out."""
        return self._without_head().with_kwargs(num_classes=0)

    def _without_head(self) -> FullModel:
        state = self.state and {name: value for name, value in self.state.items() if not name.startswith("head")}
        return replace(self, state=state, class_names=())

    def with_kwargs(self, **kwargs: Any) -> FullModel:
        """The same with other arguments of timm."""
        return replace(self, arch=self.arch.with_kwargs(**kwargs))

    @property
    def image_size(self) -> int:
        """Side of its images, in pixels."""
        return self.arch.skeleton.patch_embed.img_size[0]

    @property
    def classes(self) -> int:
        return self.arch.skeleton.num_classes

    @property
    def dims(self) -> Dims:
        """Widths of the full-size model, whatever the run starts from."""
        return self.arch.dims

    def build(self, **drop_rates: float) -> nn.Module:
        """The model with its weights, or freshly initialised where it has none. Raises ValueError."""
        if self.start is not None:
            return self.start.build(self.ema, **drop_rates)
        if self.state is None and self.pretrained:
            return self._download(drop_rates)
        if self.state is not None:
            check_initial(self.arch, self.state, self.path)
        model = self.arch.build(**drop_rates)
        if self.state is not None and (fresh := load_initial_(model, self.state, self.path)):
            lacks = "has no classifier" if fresh[0] not in self.state else "has a classifier for other classes"
            say(f"{self.path} {lacks}: {', '.join(fresh)} start fresh")
        return model

    def _download(self, drop_rates: dict[str, float]) -> nn.Module:
        try:
            return self.arch.build(pretrained=True, **drop_rates)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"--pretrained: the weights of {self.arch.name} cannot be downloaded ({first_line(error)}); "
                "give a local file with --initial-checkpoint FILE"
            ) from None

    def check_classifier(self) -> None:
        """Raises ValueError when the weights are for other classes than the data: the head would be random."""
        classes, known = self.classes, timm.get_pretrained_cfg_value(self.arch.name, "num_classes")
        if self.state is not None:
            own = self.arch.skeleton.state_dict()
            heads = [name for name in own if name.startswith("head")]
            if not {*own} & {*self.state}:
                return  # no weights of this model at all: `build` says so
            if self.start is None and (lacking := [name for name in heads if name not in self.state]):
                raise ValueError(
                    f"{self.path} has no classifier ({some(lacking)}): first train the full model on the data "
                    "(finetune_dense.py --initial-checkpoint FILE --kl_loss_coeff 0); --one_shot can keep its features "
                    "instead (--objective features)"
                )
            head = next((name for name in heads if name.endswith("weight")), "")
            known = len(self.state.get(head, range(classes)))
        if known != classes:
            raise ValueError(
                f"the dense weights know {known} classes, the data has {classes}: first train the "
                "full model on the data (finetune_dense.py --initial-checkpoint FILE --kl_loss_coeff 0)"
            )
        self.check_names()

    def check_names(self) -> None:
        """Raises ValueError when the weights know other classes than the data has, or in another order."""
        check_class_names(self.class_names, self.data_names, self.start.path if self.start else self.path)

    @property
    def has_weights(self) -> bool:
        return self.state is not None or self.pretrained


def check_plain(arch: Arch) -> None:
    """Raises ValueError for a Swin Transformer, which most methods do not take."""
    if arch.is_swin:
        raise ValueError(
            f"--model {arch.name} is a Swin Transformer, which main_full_global_latency.py and "
            "finetune_dense.py take and this script does not"
        )


def _with_size(arch: Arch, size: int | None, fixed: bool) -> Arch:
    """The architecture for images of `size`, None for its own, which a compact one keeps. Raises ValueError."""
    own = arch.skeleton.patch_embed.img_size
    if size and size != own[0]:
        if fixed or "img_size" in arch.kwargs:
            raise ValueError(f"--input-size is {size} but the model has img_size={own[0]}")
        arch = arch.with_kwargs(img_size=size)
        own = arch.skeleton.patch_embed.img_size
    if len(set(own)) > 1:
        raise ValueError(f"{arch.name} takes images that are not square, which the data transforms do not make")
    return arch


def read_full_model(source: Source, swin: bool = False, narrower: bool = False) -> FullModel:
    """The model that a source names. Raises ValueError.

    swin: whether it may be a Swin Transformer; narrower: whether the weights may be of a model that was pruned already.
    """
    initial, path = Initial(None, {}, None), ""
    start = Checkpoint.find(source.weights) if narrower else None
    if start and start.is_full:
        start = None
    if start:
        initial = Initial(start.arch.name, start.arch.kwargs, start.weights, classes=start.class_names)
        path = start.origin
    elif source.weights:
        initial = find_initial(source.weights, source.ema)
        path = str(Path(source.weights).resolve())
    name, kwargs, state, notes = initial.arch, initial.kwargs, initial.state, initial.notes
    if source.model and name and source.model.partition(".")[0] != name.partition(".")[0]:  # tags may differ
        raise ValueError(f"--model is {source.model} but {source.weights} holds {name}")
    name = source.model or name or source.default
    if not swin:
        check_plain(Arch.of(name))
    for key, value in source.kwargs.items():
        if kwargs.get(key, value) != value:
            raise ValueError(f"--model-kwargs {key}={value} but {source.weights} has {key}={kwargs[key]}")
    arch = _with_size(Arch.of(name, **structural_kwargs(kwargs | source.kwargs)), source.size, fixed=bool(start))
    if state is not None and not start:
        state, more = adapt(state, arch.skeleton, arch.name, path)
        for note in notes + more:
            say(note)
    return FullModel(arch, path, state, source.pretrained, start, tuple(initial.classes), ema=source.ema)


def is_dense(full: FullModel, dims: Dims) -> bool:
    """Whether a model of these widths is the full-size model itself; one whose last block is lean is not."""
    return dims == full.dims and not full.arch.lean


def freeze(model: nn.Module, device: torch.device) -> nn.Module:
    """A teacher: both tokens' logits, in eval mode, without gradients."""
    return TokenLogits(model).to(device).eval().requires_grad_(False)


def load_cnn_teacher(source: Teacher | None, classes: int, device: torch.device) -> nn.Module | None:
    """A CNN to distil from. Raises ValueError where it cannot be had or knows other classes."""
    if source is None:
        return None
    try:
        teacher = _local_cnn(source) if source.path else timm.create_model(source.model, pretrained=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:500] if source.path else first_line(error)
        hint = "" if source.path else "; give a local file with --teacher-path FILE"
        raise ValueError(f"CNN teacher {source.model}: {reason}{hint}") from None
    if teacher.num_classes != classes:
        raise ValueError(f"CNN teacher {source.model} knows {teacher.num_classes} classes, the data has {classes}")
    return teacher.to(device).eval().requires_grad_(False)


def _local_cnn(source: Teacher) -> nn.Module:
    """A CNN of timm's with the weights of a file. Raises ValueError."""
    initial = find_initial(source.path)
    state, more = adapt(initial.state, timm.create_model(source.model), source.model, source.path)
    for note in initial.notes + more:
        say(note)
    classifier = _classifier(source.model)
    if classifier not in state:
        raise ValueError(f"{source.path} has no classifier ({classifier}), so it cannot teach{kind(state)}")
    teacher = timm.create_model(source.model, num_classes=len(state[classifier]))
    if reason := mismatch(teacher.state_dict(), state):
        raise ValueError(f"the weights of {source.path} do not fit it: {reason}")
    teacher.load_state_dict(state)
    return teacher


def load_full_teacher(full: FullModel, device: torch.device) -> nn.Module:
    """The full model to distil from. Raises ValueError where it has no weights."""
    if not full.has_weights:
        raise ValueError("no full model to distil from: give --initial-checkpoint FILE, or --kl_loss_coeff 0")
    full.check_classifier()
    return freeze(full.build(), device)


def _classifier(model: str) -> str:
    """Name of the bias of a timm model's classifier, from its config."""
    classifier = timm.get_pretrained_cfg_value(model, "classifier") or "head"
    return f"{classifier if isinstance(classifier, str) else classifier[0]}.bias"
