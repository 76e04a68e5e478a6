"""Checkpoints of the published NViT code become this project's."""

import argparse

import pytest
import timm
import torch
import torch.nn.functional as F
from jobs import run
from torch import nn

from loading.preparation import Preparation
from models import ViTDims, build_vit, load_dense
from runtime.errors import BadArguments
from tools import convert

DIM = dict(EMB=32, head=[2] * 12, QK=[8, 4] * 6, V=[8] * 12, MLP=[16] * 12)

PM_HEAD = dict(model={"cls_token": torch.zeros(1, 1, 192), "head.bias": torch.zeros(10)})


@pytest.fixture
def ours(randomise):
    """A narrow DeiT-B with the widths of DIM."""
    return randomise(build_vit(convert.ARCH, ViTDims.from_dim(DIM, 198), num_classes=10)).eval()


def published_state(model):
    """The published layout: separate Q, K, V, a 1 x 1 stem over (row, column, colour), a token mask per block."""
    state = {}
    for name, value in model.state_dict().items():
        if ".attn.qkv." in name:
            block = model.blocks[int(name.split(".")[1])].attn
            rows = [block.num_heads * w for w in (block.qk, block.qk, block.v)]
            for letter, part in zip("QKV", value.split(rows), strict=True):
                state[name.replace("qkv", letter)] = part
        elif name == "patch_embed.proj.weight":
            state[name] = value.permute(0, 2, 3, 1).reshape(len(value), -1, 1, 1)
        else:
            state[name] = value
    return state | {f"blocks.{i}.attn.token_mask.weight": torch.ones(198, 1) for i in range(12)}


def test_the_stem_computes_the_same(ours):
    """Independent of the converter: patches cut out by hand, row, column, colour."""
    weight = published_state(ours)["patch_embed.proj.weight"].flatten(1)
    images = torch.randn(1, 3, 224, 224)
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16)  # 1 3 14 14 16 16
    patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(1, 196, -1)
    expected = F.linear(patches, weight, ours.patch_embed.proj.bias)
    torch.testing.assert_close(ours.patch_embed(images), expected, rtol=1e-4, atol=1e-5)


def test_a_converted_checkpoint_is_the_same_function(ours, tmp_path, capsys):
    content = dict(model=published_state(ours), dim=DIM, epoch=299, args=argparse.Namespace(lr=1e-4))
    torch.save(content, tmp_path / "published.pth")
    run(convert, tmp_path / "published.pth", tmp_path / "ours.pth")
    assert "widths {'EMB': 32" in capsys.readouterr().out
    images = torch.randn(2, 3, 224, 224)
    converted = load_dense(tmp_path / "ours.pth")
    assert converted.dims.to_dim() == DIM and torch.equal(converted(images), ours(images))
    assert converted.data_config == Preparation.usual(224).record


@torch.no_grad()
def test_prune_and_merge_checkpoints_are_the_same_function(randomise, tmp_path, capsys):
    """Against the published block: out = R block(M x) + (1 - m) x, with matrices that finetuning has made dense."""
    model = randomise(timm.create_model("deit_tiny_patch16_224", num_classes=10)).eval()
    state, channels = model.state_dict(), [197] * 3 + [50, 20] * 4 + [3]
    for i, K in enumerate(channels):
        M, R = (torch.eye(197), torch.eye(197)) if K == 197 else (torch.rand(K, 197) / 50, torch.rand(197, K))
        mask = (torch.rand(197) > (0.1 if K < 197 else 0)).float()
        names = dict(merge_matrix=M, recover_matrix=R, token_mask=mask, bias=torch.ones(K))
        state |= {f"blocks.{i}.attn.{name}": value for name, value in names.items()}
    torch.save(dict(model=state, channels=channels, epoch=3, args=argparse.Namespace(lr=1)), tmp_path / "published.pth")
    run(convert, tmp_path / "published.pth", tmp_path / "ours.pth")
    assert "3 to 197 tokens" in capsys.readouterr().out
    images = torch.randn(2, 3, 224, 224)
    x = model._pos_embed(model.patch_embed(images))
    for i, block in enumerate(model.blocks):
        M, R, mask = (state[f"blocks.{i}.attn.{n}"] for n in ("merge_matrix", "recover_matrix", "token_mask"))
        x = R @ block(M @ x) + (1 - mask)[:, None] * x
    expected = model.forward_head(model.norm(x))
    torch.testing.assert_close(load_dense(tmp_path / "ours.pth")(images), expected, rtol=1e-4, atol=1e-4)


def test_token_masks_that_matter_are_reported(ours, tmp_path, capsys):
    state = published_state(ours)
    state["blocks.3.attn.token_mask.weight"][7] = 0.75
    torch.save(dict(model=state, dim=DIM), tmp_path / "published.pth")
    run(convert, tmp_path / "published.pth", tmp_path / "ours.pth")
    assert "token masks are up to 0.250 from 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        (dict(model={}, channels=[197] * 12), "is no Prune-and-Merge checkpoint"),
        (PM_HEAD | dict(channels=[197] * 11), "with one count per block"),
        (PM_HEAD | dict(channels=[0] * 12), "tokens must be at least 1"),
        (dict(model={}), "is no checkpoint of the published NViT or Prune-and-Merge code"),
        (dict(model={"head.bias": torch.zeros(10)}, dim=DIM | dict(QK=[8])), "QK"),
        (
            dict(model={"head.bias": torch.zeros(10), "blocks.0.attn.Q.weight": torch.zeros(16, 32)}, dim=DIM),
            "lacks K, V",
        ),
        (dict(model=nn.Linear(2, 2)), "needs unpickling of code"),
    ],
)
def test_what_is_not_one_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "published.pth")
    with pytest.raises(BadArguments, match=message):
        run(convert, tmp_path / "published.pth", tmp_path / "ours.pth")
    assert not (tmp_path / "ours.pth").exists()


TINY = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=16", "patch_size=4", "embed_dim=32", "depth=2"]
HEADS = ["num_heads=4"]


@pytest.mark.parametrize("headless", [False, True])
def test_dense_weights_become_a_checkpoint(headless, randomise, tmp_path, capsys):
    kwargs = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=0 if headless else 10)
    model = randomise(timm.create_model("vit_tiny_patch16_224", **kwargs)).eval()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / "x.pth")
    run(convert, tmp_path / "x.pth", tmp_path / "ours.pth", *TINY, *HEADS)
    assert ("has no classifier: converted as a model without one" in capsys.readouterr().out) == headless
    converted, images = load_dense(tmp_path / "ours.pth"), torch.randn(2, 3, 16, 16)
    assert torch.equal(converted(images), model(images)) and converted.num_classes == kwargs["num_classes"]


def test_published_weights_under_prefixes(ours, tmp_path):
    state = {f"module.{name}": value for name, value in published_state(ours).items()}
    torch.save(dict(model=state, dim=DIM), tmp_path / "published.pth")
    run(convert, tmp_path / "published.pth", tmp_path / "ours.pth")
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(load_dense(tmp_path / "ours.pth")(images), ours(images))


def test_dense_weights_without_a_model(tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), tmp_path / "x.pth")
    with pytest.raises(BadArguments, match="for dense weights give --model NAME"):
        run(convert, tmp_path / "x.pth", tmp_path / "ours.pth")
