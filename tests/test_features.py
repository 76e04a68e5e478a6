"""A compact model as a backbone: the maps of the masked model's surviving channels; a decoder trains on them."""
import torch
from conftest import CASES
from torch import nn

from models import Masks, backbone, build_vit, compact


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
