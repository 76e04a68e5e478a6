"""python -m latency.compare, end to end on two-block models."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from files import checkpoint
from latency.compare import get_args_parser, main
from latency.kernels import attention_kernels
from models import BlockDims, ViTDims, build_vit
from runtime.errors import BadArguments

ARCH = "deit_tiny_distilled_patch16_224"
KWARGS = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10)
NARROW = ViTDims(16, (BlockDims(2, 4, 8, 32, 18),) * 2)


@pytest.fixture
def files(tmp_path):
    torch.save(dict(arch=ARCH, kwargs=KWARGS, model=build_vit(ARCH, **KWARGS).state_dict()), tmp_path / "dense.pth")
    small = build_vit(ARCH, NARROW, **KWARGS)
    checkpoint.save(
        tmp_path / "small.pth", arch=dict(name=ARCH, kwargs=KWARGS), dims=NARROW.to_dict(), model=small.state_dict()
    )
    return [str(tmp_path / name) for name in ("dense.pth", "small.pth")]


def run(*words):
    main(get_args_parser().parse_args([*map(str, words), "--device", "cpu", "--rounds", "2", "--copies", "2"]))


def test_figures_of_both_models_in_both_batches(files, tmp_path, capsys):
    run(*files, "--batch-size", "1", "3", "--modes", "eager", "--json", tmp_path / "f.json")
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "f.json").read_text())
    assert [(f["model"], f["batch"]) for f in figures] == [(m, b) for b in (1, 3) for m in files]
    for f in figures:
        assert f["n"] == 4 and f["q1"] <= f["seconds"] <= f["q3"] and f["dtype"] == "fp32"
        assert f["images_per_second"] == pytest.approx(f["batch"] / f["seconds"])
    assert figures[0]["speed_up"] == 1 and figures[1]["speed_up"] > 0
    assert [f["attention"] for f in figures[:2]] == ["flash_attention_for_cpu", "explicit"]
    assert "images/s" in printed and "batch 3, fp32, eager" in printed and torch.__version__ in printed


def test_the_kernel_is_the_one_that_runs(files):
    model, images = build_vit(ARCH, **KWARGS).eval(), torch.randn(2, 3, 16, 16)
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_kernels(model, images) == "math"
    assert attention_kernels(build_vit(ARCH, ViTDims(32, ()), **KWARGS).eval(), images) == "none"


def test_bad_input(files, tmp_path):
    (tmp_path / "bad.pth").write_text("x")
    other = dict(arch=ARCH, kwargs=KWARGS | dict(img_size=24), model={})
    other["model"] = build_vit(ARCH, **other["kwargs"]).state_dict()
    torch.save(other, tmp_path / "other.pth")
    for words, message in (
        ([*files, tmp_path / "bad.pth"], "bad.pth"),
        ([files[0], files[0]], "named twice"),
        ([*files, tmp_path / "other.pth"], "different sizes"),
        (["no_such_model"], "does not exist"),
        ([*files, "--batch-size", "0"], "--batch-size must be at least 1"),
    ):
        with pytest.raises(BadArguments, match=message):
            run(*words)
