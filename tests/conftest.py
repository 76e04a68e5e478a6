"""Fixtures for every test: tiny models of every plain ViT family, random weights, random pruning, generated images."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from filelock import FileLock
from jobs import PRUNE, TRAIN, TUNE, only, run, table_file
from PIL import Image
from torch import Tensor, nn

import finetune_dense
import main_full_global_latency
from models import Masks
from training.results import EFFORT

# models are too small to share out: on a busy machine two threads take eight times as long, and they round differently
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)

hypothesis.settings.register_profile("fast", max_examples=40, deadline=None, database=None, derandomize=True)
hypothesis.settings.register_profile(
    "long", max_examples=10_000, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("fast")

TINY = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10)
NO_CLS = dict(class_token=False, global_pool="avg")
FAMILIES = {
    "distilled": dict(arch="deit_tiny_distilled_patch16_224"),
    "plain": dict(arch="vit_tiny_patch16_224"),
    "registers": dict(arch="vit_tiny_patch16_224", reg_tokens=4),
    "layer_scale": dict(arch="vit_tiny_patch16_224", init_values=0.1),
    "avg_pool_fc_norm": dict(arch="vit_tiny_patch16_224", global_pool="avg"),
    "pre_norm_quick_gelu": dict(arch="vit_base_patch16_clip_quickgelu_224"),
    "no_class_token": dict(arch="vit_tiny_patch16_224", **NO_CLS),
    "no_embed_class": dict(arch="deit3_small_patch16_224"),
    "dinov2_registers": dict(arch="vit_small_patch14_reg4_dinov2", reg_tokens=4),
    "bare": dict(
        arch="vit_tiny_patch16_224", qkv_bias=False, proj_bias=False, final_norm=False, pos_embed="none", **NO_CLS
    ),
}
CASES = {  # what a pruned model may lack: axes of which some units go, and branches that go altogether
    **{axis: (axis,) for axis in ("embed", "heads", "qk", "v", "mlp")},
    "no_attention": ("blocks.0.heads=0",),
    "no_mlp": ("blocks.1.mlp=0",),
    "every_width": ("embed", "heads", "qk", "v", "mlp"),
    "everything": ("embed", "heads", "qk", "v", "mlp", "blocks.0.heads=0", "blocks.1.mlp=0"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests, and with several workers their files, come first: the last ones to end are short."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Makes a folder once a session, by whichever of several workers needs it first."""
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def once(name: str, make: Callable[[Path], None]) -> Path:
        with FileLock(root / f"{name}.lock"):
            if not (done := root / f"{name}.done").exists():
                make(root / name)
                done.touch()
        return root / name

    return once


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Arguments of `build_vit` for a two-block distilled DeiT on 16 x 16 images, 10 classes."""
    return dict(arch="deit_tiny_distilled_patch16_224") | TINY


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Arguments of `build_vit`, one set per family; the width is no power of two, so that K / E is not exact."""
    return TINY | dict(embed_dim=36) | FAMILIES[request.param]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """What `prune` removes: one axis alone, one whole branch, all of them."""
    return CASES[request.param]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 16, 16)  # B 3 S S


@pytest.fixture
def randomise() -> Callable[[nn.Module], nn.Module]:
    """Gives every parameter a value that matters: norms near 1, weights of unit gain, biases and tokens far from 0."""

    @torch.no_grad()
    def fill(model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight") or name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() in (2, 4):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.5)
        return model

    return fill


@pytest.fixture
def prune() -> Callable[[Masks, tuple[str, ...]], Masks]:
    """Removes random units: a third of an axis in block 0, half in block 1; `blocks.0.heads=0` takes the whole axis."""

    def remove(masks: Masks, what: tuple[str, ...]) -> Masks:
        for axis, keep in masks.keep.items():
            if f"{axis}=0" in what:
                masks.remove(axis, torch.arange(len(keep)))
            elif axis.split(".")[-1] in what:
                masks.remove(axis, torch.randperm(len(keep))[: len(keep) // (2 if "blocks.1" in axis else 3)])
        return masks

    return remove


@pytest.fixture
def image_folder() -> Callable[..., Path]:
    """Writes train/ and val/ class folders of random PNG files."""

    def write(root: Path, classes: tuple[str, ...] = ("ant", "bee"), per_class: int = 3, side: int = 40) -> Path:
        for split in ("train", "val"):
            for name in classes:
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(per_class):
                    pixels = np.random.randint(0, 256, (side, side, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
        return root

    return write


def make_runs(root: Path) -> None:
    root.mkdir()
    run(finetune_dense, *TRAIN, "--output_dir", root / "dense")
    flags = ["--initial-checkpoint", only(root / "dense", "scratch_*") / "ft_checkpoint.pth", "--output_dir", root]
    run(main_full_global_latency, *PRUNE, *flags, "--latency_look_up_table", table_file(root / "table.json"))
    run(finetune_dense, *TUNE, "--finetune", only(root, "global_prune_*"), effort=EFFORT)


@pytest.fixture(scope="session")
def runs(shared: Callable[..., Path]) -> dict[str, Path]:
    """Folders of a dense, a pruning and a finetuning run, and the latency table: to be read, not written in."""
    root = shared("runs", make_runs)
    pruned = only(root, "global_prune_*")
    dense, tuned = only(root / "dense", "scratch_*"), only(pruned, "ft_dense_*")
    return dict(root=root, dense=dense, pruned=pruned, tuned=tuned, table=root / "table.json")


@pytest.fixture(scope="session")
def learnt(shared: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Checkpoint of a small model that knows most of the digits."""

    def make(root: Path) -> None:
        run(finetune_dense, *TRAIN, "--epochs", 14, "--lr", "3e-2", "--no-model-ema", "--output_dir", root)

    return only(shared("learnt", make), "scratch_*") / "ft_checkpoint.pth"
