"""What a run is made from, as values: flags, checkpoints."""

from types import SimpleNamespace

import pytest
import torch

from files import checkpoint
from files.checkpoint import CheckpointError
from models import Arch, Masks, build_vit
from training.full_model import read_full_model
from training.sources import Checkpoint, Source, Teacher

ARCH, KWARGS = "deit_tiny_patch16_224", dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4)


def save(path, masks=None, dims=None, args=None):
    model = build_vit(ARCH, dims, num_classes=7, **KWARGS)
    checkpoint.save(
        path,
        arch=dict(name=ARCH, kwargs=KWARGS | dict(num_classes=7)),
        dims=(masks or model).dims.to_dict(),
        masks=masks and masks.state_dict(),
        model=model.state_dict(),
        args=args,
    )
    return str(path)


def test_a_checkpoint_says_what_it_holds(tmp_path, prune):
    full = build_vit(ARCH, **KWARGS).dims
    masks = prune(Masks(full), ("mlp",))
    dense = Checkpoint.load(save(tmp_path / "dense.pth"))
    pruned = Checkpoint.load(save(tmp_path / "pruned.pth", masks, args=dict(initial_checkpoint="dense.pth")))
    compact = Checkpoint.load(save(tmp_path / "compact.pth", dims=masks.dims))
    unpruned = Checkpoint.load(save(tmp_path / "unpruned.pth", Masks(full)))
    found = [(c.is_pruned, c.is_full) for c in (dense, pruned, compact, unpruned)]
    assert found == [(False, True), (True, False), (False, False), (True, False)]
    assert (pruned.arch.name, pruned.classes, pruned.dims) == (ARCH, 7, masks.dims)
    assert pruned.build().dims == compact.build().dims == masks.dims
    assert (dense.origin, pruned.origin) == ("", str(tmp_path / "dense.pth"))
    like = Source(None, dict(mlp_ratio=2.0)).like(pruned)
    assert like == Source(ARCH, KWARGS | dict(mlp_ratio=2.0))  # without the classes, which the data decides


def test_what_another_project_wrote_is_no_checkpoint(tmp_path):
    torch.save(dict(model=build_vit(ARCH, **KWARGS).state_dict()), tmp_path / "other.pth")
    assert Checkpoint.find("") is Checkpoint.find(str(tmp_path / "other.pth")) is None
    with pytest.raises(CheckpointError, match="was not written by this project"):
        Checkpoint.load(tmp_path / "other.pth")


def test_flags_become_values():
    args = SimpleNamespace(
        model=None,
        model_kwargs=KWARGS,
        input_size=None,
        initial_checkpoint="",
        pretrained=False,
        use_ema=False,
        distillation_type="none",
        teacher_model="resnet18",
        teacher_path="cnn.pth",
    )
    assert Source.of(args) == Source(None, KWARGS) and Teacher.of(args) is None
    args.distillation_type = "hard"
    assert Teacher.of(args) == Teacher("resnet18", "cnn.pth")


def test_classes_make_a_new_full_model():
    full = read_full_model(Source(None, KWARGS, default=ARCH))
    assert full.arch == Arch.of(ARCH, **KWARGS) and full.image_size == 16
    assert full.with_kwargs(num_classes=3).build().num_classes == 3 and full.classes == 1000
