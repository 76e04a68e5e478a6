"""How images are prepared goes with every exported model: its own transform equals that of validation images."""

import importlib.util
import json

import numpy as np
import pytest
import timm
import torch
from jobs import run
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from files import checkpoint
from loading.preparation import Preparation
from models import build_vit, load_dense
from runtime.errors import BadArguments
from tools import export, formats

KWARGS = dict(img_size=48, patch_size=16, embed_dim=48, depth=1, num_heads=4, num_classes=7)
PREPARED = Preparation(48, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), 0.8, "squash", "lanczos")


@pytest.fixture
def written(tmp_path):
    """Writes a checkpoint with what it says of the preparation."""

    def write(record):
        model = build_vit("vit_tiny_patch16_224", **KWARGS)
        path = tmp_path / "model.pth"
        arch = dict(name=model.arch, kwargs=model.arch_kwargs)
        checkpoint.save(path, arch=arch, dims=model.dims.to_dict(), model=model.state_dict(), data_config=record)
        return path

    return write


def of_onnx(folder):
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return create_transform(**json.loads(session.get_modelmeta().custom_metadata_map["data_config"]))


def of_program(folder):
    files = {"data_config.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=files)
    return create_transform(**json.loads(files["data_config.json"]))


def of_timm(folder):
    return create_transform(**resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True)))


def of_standalone(folder):
    spec = importlib.util.spec_from_file_location("standalone_model", folder / "model.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    assert f"Images are prepared so (`transform`): {PREPARED}." in module.__doc__
    return module.transform()


def of_folder(folder):
    return create_transform(**load_dense(folder).data_config)


READERS = {
    "onnx": of_onnx,
    "torch-export": of_program,
    "timm": of_timm,
    "standalone": of_standalone,
    "safetensors": of_folder,
}


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_an_exported_model_says_how_its_images_are_prepared(kind, written, tmp_path):
    if missing := formats.FORMATS[kind].missing:
        pytest.skip(f"needs {missing}")
    path = written(PREPARED.record)
    assert load_dense(path).data_config == PREPARED.record
    run(export, path, "--format", kind, "--output", tmp_path / "out")
    image = Image.fromarray(np.random.randint(0, 256, (70, 90, 3), dtype=np.uint8))
    assert torch.equal(READERS[kind](tmp_path / "out")(image), PREPARED.eval_transform()(image))


def test_a_checkpoint_that_does_not_say_is_exported_as_before(written, tmp_path):
    path = written(None)
    assert load_dense(path).data_config is None
    run(export, path, "--format", "safetensors", "--output", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert Preparation.of_record(config["preprocess"], 48) == Preparation.usual(48)


def test_a_checkpoint_with_an_odd_preparation_is_not_exported(written):
    path = written(PREPARED.record | dict(std=(0.2, 0.0, 0.2)))
    with pytest.raises(BadArguments, match=f"{path}: data_config must hold three means"):
        run(export, path, "--format", "safetensors")
