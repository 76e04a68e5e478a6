"""The formats that a compact model is exported to: what each writes into a folder, and how it is read back to check."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor

from latency.runtimes import OnnxRuntime, export
from loading.preparation import Preparation
from models import hub, load_dense
from models.arch import Model
from models.tokens import streamline_
from runtime.folders import write_text
from tools import standalone
from tools.plain_timm import plain_timm

Call = Callable[[Tensor], Tensor]  # images (B, 3, S, S) -> logits (B, classes)


def preprocess(model: Model) -> dict[str, Any]:
    """timm's arguments for the transform that validation images get, as `load_dense` found them. Raises DataError."""
    channels, size = model.patch_embed.proj.in_channels, model.patch_embed.img_size
    return preparation_of(model).record | dict(input_size=(channels, *size))


def preparation_of(model: Model) -> Preparation:
    """How images are prepared for a model, as `load_dense` found it. Raises DataError."""
    size, record = model.patch_embed.img_size[0], getattr(model, "data_config", None)
    return Preparation.of_record(record, size) if record else Preparation.usual(size)


def images(model: Model, batch: int) -> Tensor:
    """Random images (B, 3, S, S), always the same."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size, generator=generator)


def _write_config(model: Model, folder: Path) -> None:
    hub.write_config(folder, hub.config_of(model, preprocess=preprocess(model)))


def _write_safetensors(model: Model, folder: Path) -> None:
    _write_config(model, folder)
    hub.write_weights(folder, model)


def _write_standalone(model: Model, folder: Path) -> None:
    _write_safetensors(model, folder)
    title = f"{model.arch} with pruned widths: embedding {model.dims.embed}, {len(model.dims.blocks)} blocks."
    images_are = f"Images are prepared so (`transform`): {preparation_of(model)}."
    write_text(folder / "model.py", standalone.source(f"{title}\n\n{images_are}"))


def _classifier(model: Model) -> Model:
    """A copy that computes what its logits need alone: an exported program can do nothing else."""
    return streamline_(copy.deepcopy(model))


def _write_onnx(model: Model, folder: Path) -> None:
    _write_config(model, folder)
    with torch.inference_mode():
        export(_classifier(model), images(model, 2), folder / "model.onnx", dynamic_batch=True)
    _add_metadata(folder / "model.onnx", data_config=json.dumps(preprocess(model)))


def _add_metadata(path: Path, **texts: str) -> None:
    """Add texts to what an ONNX file says of itself; weights beside the file stay there."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for key, value in texts.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)


def _write_program(model: Model, folder: Path) -> None:
    _write_config(model, folder)
    data_config, model = json.dumps(preprocess(model)), _classifier(model)
    with torch.inference_mode():
        program = torch.export.export(model, (images(model, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, folder / "model.pt2", extra_files={"data_config.json": data_config})


def _write_timm(model: Model, folder: Path) -> None:
    save_for_hf(plain_timm(model, **preprocess(model)), folder, safe_serialization=True)


def _read_module(path: Path) -> ModuleType:
    spec = util.spec_from_file_location("exported_model", path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read_onnx(folder: Path, threads: int) -> Call:
    run = OnnxRuntime("cpu", threads).session(folder / "model.onnx")
    return lambda x: torch.from_numpy(run(x)[0])


@dataclass(frozen=True)
class Format:
    """write(model, folder); read(folder) -> what was written, as a function; result: its file; needs: packages.

    use: how what was written is loaded, with {folder} for the folder and {file} for its file.
    """

    write: Callable[[Model, Path], None]
    read: Callable[[Path], Call]
    result: str
    use: str
    needs: tuple[str, ...] = ()
    extra: str = ""

    @property
    def missing(self) -> list[str]:
        """Packages that this format needs and that are not installed."""
        return [name for name in self.needs if util.find_spec(name) is None]


FORMATS = {
    "safetensors": Format(_write_safetensors, load_dense, hub.WEIGHTS, "models.load_dense({folder!r})"),
    "onnx": Format(
        _write_onnx,
        lambda folder: _read_onnx(folder, torch.get_num_threads()),
        "model.onnx",
        "onnxruntime.InferenceSession({file!r})",
        ("onnx", "onnxscript", "onnxruntime"),
        "onnx",
    ),
    "torch-export": Format(
        _write_program,
        lambda folder: torch.export.load(folder / "model.pt2").module(),
        "model.pt2",
        "torch.export.load({file!r}).module()",
    ),
    "timm": Format(
        _write_timm,
        lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
        hub.WEIGHTS,
        "timm.create_model('local-dir:{folder}', pretrained=True)",
    ),
    "standalone": Format(
        _write_standalone,
        lambda folder: _read_module(folder / "model.py").load(),
        "model.py",
        "copy {folder}; its model.py has load()",
    ),
}
