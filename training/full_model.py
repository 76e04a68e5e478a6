"""The full-size model that a run is about, and the teachers it distils from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from files import checkpoint
from models import build_vit, dims_of, is_swin, skeleton
from models.pretrained import check_initial, from_checkpoint, load_initial_, read_initial
from models.swin import as_timm_names
from models.swin_dims import Dims
from models.vit import TokenLogits
from runtime.console import say
from runtime.errors import first_line

DEFAULT_MODEL = "deit_base_distilled_patch16_224"


@dataclass
class FullModel:
    """The full-size model a run is about: timm's name, kwargs (classes once the data is known) and weights.

    start: the checkpoint of a narrower model that the run starts from; `path` is then where the dense weights are.
    """

    arch: str
    kwargs: dict[str, Any]
    path: str = ""
    state: dict[str, Tensor] | None = field(default=None, repr=False)
    pretrained: bool = False
    start: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def dims(self) -> Dims:
        """Widths of the full-size model, whatever the run starts from."""
        return dims_of(skeleton(self.arch, **self.kwargs))

    @property
    def asking(self) -> int | None:
        """The tokens that ask in the last block, None for all (`lean_last` of `models.build_vit`)."""
        return skeleton(self.arch, **self.kwargs).num_prefix_tokens if self.kwargs.get("lean_last") else None

    def build(self, **drop_rates: float) -> nn.Module:
        """The model with its weights, or freshly initialised where it has none. Raises ValueError."""
        if self.start is not None:
            return from_checkpoint(self.start, self.start["path"], **drop_rates)
        if self.state is None and self.pretrained:
            return self._download(drop_rates)
        if self.state is not None:
            check_initial(self.arch, self.kwargs, self.state, self.path)
        model = build_vit(self.arch, **self.kwargs | drop_rates)
        if self.state is not None and (fresh := load_initial_(model, self.state, self.path)):
            say(f"classifier of {self.path} is for other classes: {', '.join(fresh)} start fresh")
        return model

    def _download(self, drop_rates: dict[str, float]) -> nn.Module:
        try:
            return build_vit(self.arch, pretrained=True, **self.kwargs | drop_rates)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"--pretrained: the weights of {self.arch} cannot be downloaded ({first_line(error)}); "
                "give a local file with --initial-checkpoint FILE"
            ) from None

    def check_classifier(self) -> None:
        """Raises ValueError when the weights are for other classes than the data: the head would be random."""
        found = timm.get_pretrained_cfg_value(self.arch, "num_classes")
        if self.state is not None:
            head = "head.fc.weight" if is_swin(self.arch) else "head.weight"
            found = len(self.state.get(head, range(self.kwargs["num_classes"])))  # without: cannot be loaded
        if found != self.kwargs["num_classes"]:
            raise ValueError(
                f"the dense weights know {found} classes, the data has {self.kwargs['num_classes']}: first train the "
                "full model on the data (finetune_dense.py --initial-checkpoint FILE --kl_loss_coeff 0)"
            )

    @property
    def has_weights(self) -> bool:
        return self.state is not None or self.pretrained

    @property
    def record(self) -> dict[str, Any]:
        """As checkpoints store it under `arch`."""
        return dict(name=self.arch, kwargs=self.kwargs)


def structural_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """timm's arguments without the classes, which the data decides, and the drop rates, which the flags do."""
    return {k: v for k, v in kwargs.items() if k != "num_classes" and not k.endswith("drop_rate")}


def check_plain(arch: str) -> None:
    """Raises ValueError for a Swin Transformer, which most methods do not take."""
    if is_swin(arch):
        raise ValueError(
            f"--model {arch} is a Swin Transformer, which main_full_global_latency.py and "
            "finetune_dense.py take and this script does not"
        )


def _narrower(path: str) -> dict[str, Any] | None:
    """The checkpoint of a model that pruning has made narrower already; None for anything else. Raises ValueError."""
    if not path or not checkpoint.is_ours(content := checkpoint.read(path)):
        return None
    content = checkpoint.with_model(checkpoint.checked(content, path), path)
    arch = content["arch"]
    dense = dims_of(skeleton(arch["name"], **arch["kwargs"])).to_dict()
    return None if content["masks"] is None and content["dims"] == dense else content | dict(path=path)


def _sized(arch: str, kwargs: dict[str, Any], size: int | None, fixed: bool) -> dict[str, Any]:
    """The arguments for images of `size`, None for the model's own, which a compact one keeps. Raises ValueError."""
    own = skeleton(arch, **kwargs).patch_embed.img_size
    if size and size != own[0]:
        if fixed or "img_size" in kwargs:
            raise ValueError(f"--input-size is {size} but the model has img_size={own[0]}")
        own = skeleton(arch, **(kwargs := kwargs | dict(img_size=size))).patch_embed.img_size
    if len(set(own)) > 1:
        raise ValueError(f"{arch} takes images that are not square, which the data transforms do not make")
    return kwargs


def read_full_model(args: Any, swin: bool = False, narrower: bool = False) -> FullModel:
    """What --model, --model-kwargs, --input-size, --initial-checkpoint and --pretrained say. Raises ValueError.

    swin: whether it may be a Swin Transformer; narrower: whether the weights may be of a compact model.
    """
    arch, kwargs, state, path = None, {}, None, ""
    start = _narrower(args.initial_checkpoint) if narrower else None
    if start:
        arch, kwargs, state = start["arch"]["name"], start["arch"]["kwargs"], start["model"]
        path = (start["args"] or {}).get("initial_checkpoint", "")
    elif args.initial_checkpoint:
        arch, kwargs, state = read_initial(args.initial_checkpoint)
        path = str(Path(args.initial_checkpoint).resolve())
    if args.model and arch and args.model != arch:
        raise ValueError(f"--model is {args.model} but {args.initial_checkpoint} holds {arch}")
    arch = args.model or arch or DEFAULT_MODEL
    if not swin:
        check_plain(arch)
    for key, value in args.model_kwargs.items():
        if kwargs.get(key, value) != value:
            raise ValueError(f"--model-kwargs {key}={value} but {args.initial_checkpoint} has {key}={kwargs[key]}")
    kwargs = _sized(arch, structural_kwargs(kwargs | args.model_kwargs), args.input_size, fixed=bool(start))
    if state is not None and is_swin(arch) and not start:
        state = as_timm_names(state, skeleton(arch, **kwargs), path)
    return FullModel(arch, kwargs, path, state, args.pretrained, start)


def is_dense(full: FullModel, dims: Dims) -> bool:
    """Whether a model of these widths is the full-size model itself; one whose last block is lean is not."""
    return dims == full.dims and full.asking is None


def freeze(model: nn.Module, device: torch.device) -> nn.Module:
    """A teacher: both tokens' logits, in eval mode, without gradients."""
    return TokenLogits(model).to(device).eval().requires_grad_(False)


def load_cnn_teacher(args: Any, classes: int, device: torch.device) -> nn.Module | None:
    """The CNN of --distillation-type soft or hard. Raises ValueError where it cannot be had or knows other classes."""
    if args.distillation_type == "none":
        return None
    try:
        if not args.teacher_path:
            teacher = timm.create_model(args.teacher_model, pretrained=True)
        else:
            _, _, state = read_initial(args.teacher_path)
            teacher = timm.create_model(args.teacher_model, num_classes=len(state[_classifier(args.teacher_model)]))
            teacher.load_state_dict(state)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        hint = "" if args.teacher_path else "; give a local file with --teacher-path FILE"
        raise ValueError(f"CNN teacher {args.teacher_model}: {first_line(error)}{hint}") from None
    if teacher.num_classes != classes:
        raise ValueError(
            f"CNN teacher {args.teacher_model} knows {teacher.num_classes} classes, the data has {classes}"
        )
    return teacher.to(device).eval().requires_grad_(False)


def load_full_teacher(args: Any, full: FullModel, device: torch.device) -> nn.Module | None:
    """The full model that --kl_loss_coeff distils from, or None. Raises ValueError where it has no weights."""
    if not args.kl_loss_coeff:
        return None
    if not full.has_weights:
        raise ValueError("no full model to distil from: give --initial-checkpoint FILE, or --kl_loss_coeff 0")
    full.check_classifier()
    return freeze(full.build(), device)


def _classifier(model: str) -> str:
    """Name of the bias of a timm model's classifier, from its config."""
    classifier = timm.get_pretrained_cfg_value(model, "classifier") or "head"
    return f"{classifier if isinstance(classifier, str) else classifier[0]}.bias"
