"""What a run is made from, as values: dense weights, a checkpoint of this project, a CNN to distil from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from files import checkpoint
from models import Arch, dims_from_dict
from models.pretrained import from_checkpoint
from models.swin_dims import Dims


def structural_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """timm's arguments without the classes, which the data decides, and the drop rates, which the flags do."""
    return {k: v for k, v in kwargs.items() if k != "num_classes" and not k.endswith("drop_rate")}


@dataclass(frozen=True)
class Source:
    """A full-size model: timm's name and kwargs, the images' size, and a file of weights or timm's own.

    model, size: None as `weights` have them; default: the model where neither names one; ema: the weights' moving
    average.
    """

    model: str | None
    kwargs: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    weights: str = ""
    pretrained: bool = False
    ema: bool = False
    default: str = "deit_base_distilled_patch16_224"

    @classmethod
    def of(cls, args: Any) -> Source:
        """What --model, --model-kwargs, --input-size, --initial-checkpoint, --pretrained and --use-ema say."""
        return cls(
            args.model, args.model_kwargs, args.input_size, args.initial_checkpoint, args.pretrained, args.use_ema
        )

    def like(self, start: Checkpoint) -> Source:
        """For the full-size model that a checkpoint was made from; the kwargs add to its own."""
        return replace(self, model=start.arch.name, kwargs=structural_kwargs(start.arch.kwargs) | self.kwargs)


@dataclass(frozen=True)
class Teacher:
    """A CNN to distil from: timm's name, and a file of its weights, '' for timm's own."""

    model: str
    path: str = ""

    @classmethod
    def of(cls, args: Any) -> Teacher | None:
        """What --teacher-model and --teacher-path say, None for --distillation-type none."""
        return None if args.distillation_type == "none" else cls(args.teacher_model, args.teacher_path)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of this project that a model can be built from. content: as `files.checkpoint.load` returns it."""

    path: str
    content: dict[str, Any] = field(repr=False)

    @classmethod
    def load(cls, path: Any) -> Checkpoint:
        """Raises CheckpointError."""
        return cls(str(path), checkpoint.load_model(path))

    @classmethod
    def find(cls, path: str) -> Checkpoint | None:
        """None for no file, and for one that another project wrote. Raises CheckpointError."""
        if not path or not checkpoint.is_ours(content := checkpoint.read(path)):
            return None
        return cls(path, checkpoint.with_model(checkpoint.checked(content, path), path))

    @property
    def arch(self) -> Arch:
        return Arch.of_record(self.content["arch"])

    @property
    def dims(self) -> Dims:
        """Raises DimsError."""
        return dims_from_dict(self.content["dims"])

    @property
    def classes(self) -> int:
        return self.arch.skeleton.num_classes

    @property
    def weights(self) -> dict[str, Tensor]:
        """Of the masked model, where it is a pruned one."""
        return self.content["model"]

    @property
    def args(self) -> dict[str, Any]:
        """Of the run that wrote it."""
        return self.content["args"]

    @property
    def origin(self) -> str:
        """Path of the dense weights that it was made from, '' where that is not known."""
        return self.args.get("initial_checkpoint", "")

    @property
    def origin_ema(self) -> bool:
        """Whether it was made from the moving average of those weights."""
        return bool(self.args.get("initial_ema", self.args.get("use_ema")))

    @property
    def class_names(self) -> list[str]:
        """Of the images that it was trained on, [] where that is not known."""
        return list(self.args.get("class_names") or [])

    @property
    def is_pruned(self) -> bool:
        """Whether it holds a masked model."""
        return self.content["masks"] is not None

    @property
    def is_full(self) -> bool:
        """Whether it holds a model of all its widths and tokens."""
        return not self.is_pruned and self.dims.with_queries(None) == self.arch.dims

    def build(self, ema: bool = False, **overrides: Any) -> nn.Module:
        """The compact model: `models.pretrained.from_checkpoint`."""
        return from_checkpoint(self.content, self.path, ema, **overrides)
