"""A compact model as a backbone: the maps of the masked model's surviving channels, in one scale or several."""

from dataclasses import replace

import pytest
import timm
import torch
from conftest import CASES
from torch import nn

from models import FeaturePyramid, Masks, ViTDims, backbone, build_vit, compact
from models.tokens import streamline_


def test_maps_are_those_of_the_masked_model(family, randomise, prune, images):
    model = randomise(build_vit(**family)).eval()
    masks = prune(Masks(model.dims), CASES["everything"])
    masks.install_(model)
    maps = backbone(compact(model, masks), [0, 1])(images)
    expected = model.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    for found, full in zip(maps, expected, strict=True):
        assert found.shape == (3, masks.dims.embed, 4, 4)
        torch.testing.assert_close(found, full[:, masks.keep["embed"]], rtol=1e-4, atol=1e-4)


def test_it_says_what_its_maps_are_and_leaves_the_model_alone(tiny, images):
    model = build_vit(**tiny | dict(embed_dim=24, depth=3)).eval()
    before = model(images)
    features = backbone(model, [0, 1], norm=True)
    assert features.feature_info.channels() == [24, 24] and features.feature_info.reduction() == [4, 4]
    assert len(features.model.blocks) == len(features.model.dims.blocks) == 2
    assert len(backbone(model, 3)(images)) == 3 and torch.equal(model(images), before)


@pytest.mark.parametrize("streamed", [False, True])
def test_maps_of_a_lean_model_are_whole(tiny, randomise, images, streamed):
    full = randomise(build_vit(**tiny)).eval()
    lean = build_vit(**tiny, lean_last=True).eval()
    lean.load_state_dict(full.state_dict())
    body = backbone(streamline_(lean) if streamed else lean, [0, 1])
    for found, expected in zip(body(images), backbone(full, [0, 1])(images), strict=True):
        torch.testing.assert_close(found, expected)
    assert lean.blocks[-1].num_queries == lean.num_prefix_tokens and "lean_last" not in body.model.arch_kwargs
    FeaturePyramid(lean, 8)(images)[0].sum().backward()


def test_what_was_frozen_stays_frozen_in_a_backbone(tiny):
    dims = ViTDims(32, tuple(replace(b, tokens=9) for b in build_vit(**tiny).dims.blocks))
    model = build_vit(**tiny, dims=dims, lean_last=True)
    model.blocks[0].tokens.requires_grad_(False)
    first, last = (block.tokens for block in backbone(model, [0, 1]).model.blocks)
    assert not (first.merge.requires_grad or first.reconstruct.requires_grad)
    assert last.merge.requires_grad and last.reconstruct.requires_grad
    assert not model.blocks[1].tokens.reconstruct.requires_grad  # the given one is left as it is


def test_a_decoder_trains_on_it(tiny, images):
    features = backbone(build_vit(**tiny), [1])
    decoder = nn.Sequential(nn.Conv2d(32, 5, 1), nn.Upsample(scale_factor=4, mode="bilinear"))
    optimizer = torch.optim.AdamW([*features.parameters(), *decoder.parameters()], lr=1e-2)
    wanted = torch.randint(5, (3, 16, 16))
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(decoder(features(images)[-1]), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


@pytest.fixture
def detector_body(randomise):
    """A small ViT with patches of 16 pixels, an odd width and blocks that compute on some of their tokens."""
    kwargs = dict(arch="deit_tiny_distilled_patch16_224", img_size=112, embed_dim=32, depth=2, num_heads=4)
    dims = ViTDims.of(build_vit(**kwargs))
    blocks = (replace(dims.blocks[0], tokens=20, qk=5, v=3), replace(dims.blocks[1], tokens=9, mlp=0))
    return randomise(build_vit(**kwargs, dims=ViTDims(27, blocks)))


def test_a_pyramid_has_the_strides_of_a_cnn(detector_body):
    images = torch.randn(2, 3, 112, 112)
    cnn = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    pyramid = FeaturePyramid(detector_body, channels=24)
    assert pyramid.feature_info.reduction() == cnn.feature_info.reduction() == [4, 8, 16, 32]
    assert pyramid.feature_info.channels() == [24] * 4
    with torch.no_grad():
        sizes = [(m.shape[1], *m.shape[2:]) for m in pyramid(images)]
        assert sizes == [(24, *m.shape[2:]) for m in cnn(images)]


def test_a_pyramid_without_its_projections_is_the_last_map(detector_body):
    images = torch.randn(2, 3, 112, 112)
    pyramid = FeaturePyramid(detector_body.eval(), 8, scales=(2, 1, 0.5)).eval()
    pyramid.levels = nn.ModuleList(level[:-4] for level in pyramid.levels)
    finer, same, coarser = pyramid(images)
    (last,) = detector_body.forward_intermediates(images, indices=1, intermediates_only=True)
    assert torch.equal(same, last) and finer.shape == (2, 13, 14, 14)
    assert torch.equal(coarser[..., 0, 0], last[..., :2, :2].amax((2, 3))) and coarser.shape == (2, 27, 4, 4)


@pytest.mark.parametrize("scales", [(), (3, 1), (1, 2), (1, 1), (1, 0), (-2,)])
def test_other_scales_are_refused(tiny, scales):
    with pytest.raises(ValueError, match="powers of two"):
        FeaturePyramid(build_vit(**tiny), scales=scales)


def test_a_detection_head_trains_on_a_pyramid(detector_body):
    """One head for all levels, as in RetinaNet; every weight of backbone and pyramid moves."""
    pyramid, head = FeaturePyramid(detector_body, channels=8), nn.Conv2d(8, 5, 1)
    before = {name: p.clone() for name, p in pyramid.named_parameters()}
    optimizer = torch.optim.AdamW([*pyramid.parameters(), *head.parameters()], lr=3e-3)
    images, losses = torch.randn(4, 3, 112, 112), []
    wanted = [torch.randint(5, (4, side, side)) for side in (28, 14, 7, 4)]
    for _ in range(3):
        loss = sum(nn.functional.cross_entropy(head(m), w) for m, w in zip(pyramid(images), wanted, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert not [name for name, p in pyramid.named_parameters() if torch.equal(p, before[name])]
