"""Handing a model over: every format computes what the model does, read back by its own means."""

import json
import subprocess
import sys
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from jobs import run

import hubconf
from files import checkpoint
from models import BlockDims, ViTDims, build_vit, load_dense
from runtime.errors import BadArguments, RunFailed
from runtime.folders import make_folder
from tools import export, formats
from tools.plain_timm import plain_timm, uniform_dims

KWARGS = dict(img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=4, num_classes=7)
DIMS = ViTDims(40, (BlockDims(2, 5, 9, 50, 18), BlockDims(0, 5, 9, 30, 18), BlockDims(3, 8, 10, 0, 18)))
USE = """import sys, torch
from PIL import Image
from model import load, transform
model, prepare = load(), transform()
torch.save((model(torch.load(sys.argv[1])), prepare(Image.new("RGB", (20, 30))).shape), sys.argv[2])
print(*sys.modules)
"""


LOADERS = ("models", "onnxruntime", "timm", "torch")


def write(path, model):
    dims = model.dims
    checkpoint.save(
        path,
        arch=dict(name=model.arch, kwargs=model.arch_kwargs),
        dims=dims.to_dict(),
        dim=dims.to_dim(),
        model=model.state_dict(),
        args={},
    )
    return path


@pytest.fixture
def small(tmp_path, randomise):
    """A checkpoint of uneven widths, one block without attention and one without MLP."""
    model = randomise(build_vit("deit_tiny_distilled_patch16_224", DIMS, **KWARGS))
    return write(tmp_path / "small.pth", model)


def exported(path, kind, folder, capsys):
    run(export, path, "--format", kind, "--output", folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith("relative difference") and lines[-3].startswith("latency at batch 1")
    if kind != "standalone":  # the others say the call that loads them
        assert eval(lines[-2].removeprefix("next: "), {name: sys.modules.get(name) for name in LOADERS})
    return formats.FORMATS[kind].read(folder)


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_a_format_computes_the_same_for_any_batch(small, kind, tmp_path, capsys):
    if missing := formats.FORMATS[kind].missing:
        pytest.skip(f"needs {missing}")
    result, model = exported(small, kind, tmp_path / "out", capsys), load_dense(small)
    images = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(result(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", [{}, dict(dense_merge=True), dict(content_merge=True, lean_last=True)])
@pytest.mark.parametrize("kind", formats.FORMATS)
def test_a_token_compressed_model(kind, merge, tmp_path, randomise, capsys):
    dims = ViTDims(40, (BlockDims(2, 5, 9, 50, 9), BlockDims(0, 5, 9, 30, 18), BlockDims(3, 8, 10, 0, 7)))
    model = randomise(build_vit("deit_tiny_distilled_patch16_224", dims, **KWARGS, **merge))
    path = write(tmp_path / "tokens.pth", model)
    if kind == "timm":
        with pytest.raises(BadArguments, match="also merges tokens"):
            run(export, path, "--format", kind)
        return
    result, images = exported(path, kind, tmp_path / "out", capsys), torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(result(images), load_dense(path)(images), rtol=1e-4, atol=1e-5)


def test_safetensors_are_read_by_load_dense_and_torch_hub(small, tmp_path, capsys):
    exported(small, "safetensors", tmp_path / "out", capsys)
    model, images = load_dense(small), torch.randn(2, 3, 16, 16)
    for again in (load_dense(tmp_path / "out"), hubconf.vit_from_checkpoint(str(tmp_path / "out"))):
        assert again.dims == DIMS and not again.training and torch.equal(again(images), model(images))


def test_the_hub_cache_is_read_without_network(small, tmp_path, capsys, monkeypatch):
    """The layout that the Hub's client leaves on disk."""
    snapshot = tmp_path / "cache" / "models--someone--small" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (refs := snapshot.parent.parent / "refs").mkdir()
    (refs / "main").write_text("abc")
    exported(small, "safetensors", snapshot, capsys)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_dense("hf-hub:someone/small").dims == DIMS
    for name in ("someone/other", "no name/at all"):
        with pytest.raises(checkpoint.CheckpointError, match=f"{name} cannot be had from the Hugging Face Hub"):
            load_dense(f"hf-hub:{name}")


def test_push_uploads_what_was_written(small, tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **_: calls.append(name))
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path: calls.extend(sorted(p.name for p in folder_path.iterdir())),
    )
    run(export, small, "--format", "safetensors", "--output", tmp_path / "out", "--push", "someone/small")
    assert calls == ["someone/small", "config.json", "model.safetensors"]


def test_the_standalone_folder_needs_nothing_of_this_project(small, tmp_path, capsys):
    exported(small, "standalone", tmp_path / "out", capsys)
    images = torch.randn(2, 3, 16, 16)
    torch.save(images, tmp_path / "images.pth")
    (tmp_path / "out" / "use.py").write_text(USE)
    done = subprocess.run(
        [sys.executable, "out/use.py", "images.pth", "found.pth"],
        cwd=tmp_path,
        env=dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    logits, shape = torch.load(tmp_path / "found.pth", weights_only=True)
    torch.testing.assert_close(logits, load_dense(small)(images), rtol=1e-5, atol=1e-6)
    assert shape == (3, 16, 16) and not {"models", "files", "runtime", "latency"} & set(done.stdout.split())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--isolated",
            "--select",
            "E,F,W",
            "--line-length",
            "120",
            tmp_path / "out" / "model.py",
        ],
        check=True,
    )


def test_every_family_has_a_plain_and_a_standalone_form(family, tmp_path, randomise):
    model, images = randomise(build_vit(**family)).eval(), torch.randn(2, 3, 16, 16)
    for kind in ("timm", "standalone"):
        formats.FORMATS[kind].write(model, make_folder(tmp_path / kind))
        result = formats.FORMATS[kind].read(tmp_path / kind)
        torch.testing.assert_close(result(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_lean_model_of_all_tokens_is_a_plain_one_in_timm(randomise):
    model = randomise(build_vit("deit_tiny_distilled_patch16_224", **KWARGS, lean_last=True))
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(plain_timm(model)(images), model.eval()(images), rtol=1e-4, atol=1e-5)


def test_plain_widths_are_the_narrowest_that_timm_has():
    assert uniform_dims(DIMS).blocks == (BlockDims(4, 10, 10, 50, 18),) * 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--push", "nobody"], "--push takes OWNER/NAME"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--use-ema"], "holds no moving average"),
        (["--output", __file__], "is a file, not a folder"),
    ],
)
def test_bad_arguments(small, flags, message):
    with pytest.raises(BadArguments, match=message):
        run(export, small, "--format", "safetensors", *flags)


def test_a_missing_package_is_named_with_its_extra(small, monkeypatch):
    monkeypatch.setattr(formats.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(BadArguments, match=r'--format onnx needs onnxscript: pip install "\.\[onnx\]"'):
        run(export, small, "--format", "onnx")


def test_widths_that_timm_cannot_express(tmp_path):
    dims = ViTDims(20, (BlockDims(4, 12, 12, 64, 18),) * 3)
    write(tmp_path / "narrow.pth", build_vit("deit_tiny_distilled_patch16_224", dims, **KWARGS))
    with pytest.raises(RunFailed, match="4 heads of 12 do not fit into an embedding of 20"):
        run(export, tmp_path / "narrow.pth", "--format", "timm", "--output", tmp_path / "out")


def test_an_export_that_differs_is_refused(small, tmp_path, monkeypatch):
    wrong = replace(formats.FORMATS["safetensors"], read=lambda folder: lambda x: torch.randn(len(x), 7))
    monkeypatch.setitem(formats.FORMATS, "safetensors", wrong)
    with pytest.raises(RunFailed, match="computes something else than the model"):
        run(export, small, "--format", "safetensors", "--output", tmp_path / "out")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json in it"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors in it"),
        (lambda folder: (folder / "config.json").write_text("{}"), "describes no model of this project"),
        (
            lambda folder: (folder / "config.json").write_text('{"format": {"name": "other"}, "arch": 1, "dims": 1}'),
            "is of other",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "cannot be read"),
    ],
)
def test_a_damaged_folder(small, tmp_path, damage, message, capsys):
    exported(small, "safetensors", tmp_path / "out", capsys)
    damage(tmp_path / "out")
    with pytest.raises(checkpoint.CheckpointError, match=message):
        load_dense(tmp_path / "out")


def test_a_runs_folder_is_told_its_checkpoints(tmp_path, small):
    with pytest.raises(checkpoint.CheckpointError, match="in it; for a checkpoint name the file: small.pth"):
        load_dense(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(formats.FORMATS) - {"timm"}))
def test_a_pruned_run_is_compacted_and_exported(runs, kind, tmp_path, capsys):
    """As main_full_global_latency.py wrote it: masks, full-size weights."""
    result = exported(runs["pruned"] / "pruned_checkpoint.pth", kind, tmp_path / "out", capsys)
    images = torch.randn(4, 3, 16, 16)
    with torch.inference_mode():
        expected = load_dense(runs["pruned"] / "pruned_checkpoint.pth")(images)
        assert (result(images) - expected).norm() <= 1e-4 * expected.norm()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dims"] == json.loads((runs["pruned"] / "dims.json").read_text())
