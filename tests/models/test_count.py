"""Closed-form MACs and parameters against torch's own counts, and the published figures."""

import random
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import Arch, BlockDims, ViTDims, build_vit, macs, params
from models.vit import Attention


def random_dims(tokens: int, depth: int) -> ViTDims:
    blocks = (
        BlockDims(random.randint(0, 4), random.randint(1, 12), random.randint(1, 12), random.choice((0, 7, 50)), tokens)
        for _ in range(depth)
    )
    return ViTDims(random.randint(8, 40), tuple(blocks))


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_torchs(monkeypatch, family, images, seed):
    monkeypatch.setattr(Attention, "route", "fused")
    random.seed(seed)
    tokens = build_vit(**family).dims.blocks[0].tokens
    dims = random_dims(tokens, depth=1 + seed) if seed else None
    model = build_vit(**family, dims=dims).eval()
    assert params(**family, dims=dims) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images[:1])
    assert 2 * macs(**family, dims=dims) == counter.get_total_flops()


@pytest.mark.parametrize(
    "arch, giga_macs, mega_params, digits",
    [
        ("deit_base_distilled_patch16_224", 17.66, 87.34, 2),  # NViT, counted with both heads
        ("deit_base_patch16_224", 17.6, 86.6, 1),  # DeiT and SAViT, tables 1
        ("deit_small_patch16_224", 4.6, 22.1, 1),
        ("deit_tiny_patch16_224", 1.3, 5.7, 1),
    ],
)
def test_published_figures(arch, giga_macs, mega_params, digits):
    assert round(macs(arch) / 1e9, digits) == giga_macs
    assert round(params(arch) / 1e6, digits) == mega_params


def test_counts_follow_classes_image_size_and_channels(monkeypatch, tiny):
    monkeypatch.setattr(Attention, "route", "fused")
    kwargs = tiny | dict(num_classes=7, img_size=24, in_chans=1)
    model = build_vit(**kwargs).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 1, 24, 24))
    assert 2 * macs(**kwargs) == counter.get_total_flops()
    assert params(**kwargs) == sum(p.numel() for p in model.parameters())


def test_padding_is_not_counted(tiny, images):
    """MACs are the architecture's; what the kernel really multiplies is more where qk and v differ."""
    dims = ViTDims(32, (BlockDims(4, 2, 8, 16, 18),))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # with gradients: the padded route
        build_vit(**tiny, dims=dims).eval()(images[:1])
    assert 2 * macs(**tiny, dims=dims) < counter.get_total_flops()


@pytest.mark.parametrize(
    "size, heads, mlp, embed, before, after",
    [
        ("base", 26, 9441, 285, (6.2935, 11.1555, 17.5675), (3.461, 5.219, 8.756)),
        ("small", 7, 3157, 80, (1.7524, 2.7891, 4.6007), (1.320, 1.830, 3.197)),
        ("tiny", 3, 1828, 27, (0.5276, 0.6974, 1.2546), (0.439, 0.480, 0.9448)),
    ],
)
def test_savits_published_logs(size, heads, mlp, embed, before, after):
    """Given what its logs say was removed; they count norms and put the classifier into each part's line."""
    arch = f"deit_{size}_patch16_224"
    dims = ViTDims.of(build_vit(arch))
    gone = {"heads": heads, "mlp": mlp}
    blocks = [
        replace(b, **{axis: getattr(b, axis) - (n * (i + 1) // 12 - n * i // 12) for axis, n in gone.items()})
        for i, b in enumerate(dims.blocks)
    ]
    for widths, logged in ((dims, before), (ViTDims(dims.embed - embed, tuple(blocks)), after)):
        parts = Arch.of(arch).macs_by_part(widths)
        found = (parts["attention"], parts["mlp"], macs(arch, widths))
        for ours, theirs in zip(found, logged, strict=True):
            assert ours / 1e9 == pytest.approx(theirs, rel=0.005)
