"""Closed-form MACs and parameters against torch's own counts, and the published figures."""
import random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import BlockDims, ViTDims, build_vit, macs, params
from models.vit import Attention


def random_dims(tokens: int, depth: int) -> ViTDims:
    blocks = (
        BlockDims(random.randint(0, 4), random.randint(1, 12), random.randint(1, 12), random.choice((0, 7, 50)), tokens)
        for _ in range(depth)
    )
    return ViTDims(random.randint(8, 40), tuple(blocks))


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_torchs(monkeypatch, family, images, seed):
    monkeypatch.setattr(Attention, "pad_to_equal", False)
    random.seed(seed)
    tokens = build_vit(**family).dims.blocks[0].tokens
    dims = random_dims(tokens, depth=1 + seed) if seed else None
    model = build_vit(**family, dims=dims).eval()
    assert params(**family, dims=dims) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images[:1])
    assert 2 * macs(**family, dims=dims) == counter.get_total_flops()


@pytest.mark.parametrize("arch, giga_macs, mega_params, digits", [
    ("deit_base_distilled_patch16_224", 17.66, 87.34, 2),  # NViT, counted with both heads
    ("deit_base_patch16_224", 17.6, 86.6, 1),  # DeiT and SAViT, tables 1
    ("deit_small_patch16_224", 4.6, 22.1, 1),
    ("deit_tiny_patch16_224", 1.3, 5.7, 1),
])  # fmt: skip
def test_published_figures(arch, giga_macs, mega_params, digits):
    assert round(macs(arch) / 1e9, digits) == giga_macs
    assert round(params(arch) / 1e6, digits) == mega_params


def test_counts_follow_classes_image_size_and_channels(monkeypatch, tiny):
    monkeypatch.setattr(Attention, "pad_to_equal", False)
    kwargs = tiny | dict(num_classes=7, img_size=24, in_chans=1)
    model = build_vit(**kwargs).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 1, 24, 24))
    assert 2 * macs(**kwargs) == counter.get_total_flops()
    assert params(**kwargs) == sum(p.numel() for p in model.parameters())


def test_padding_is_not_counted(tiny, images):
    """MACs are the architecture's; what the kernel really multiplies is more where qk and v differ."""
    dims = ViTDims(32, (BlockDims(4, 2, 8, 16, 18),))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        build_vit(**tiny, dims=dims).eval()(images[:1])
    assert 2 * macs(**tiny, dims=dims) < counter.get_total_flops()
