"""Vision models of transformers: the same outputs under timm's names, pruned from Python, and their files read."""

import pytest
import torch

from benchmarks.one_shot_cost import table_of_macs
from models import ModelError
from models.foreign import adapt, extract
from models.from_timm import take
from models.from_transformers import convert
from recipes import api

transformers = pytest.importorskip("transformers")
SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
)
DINO = {name: value for name, value in SIZES.items() if name != "intermediate_size"} | dict(mlp_ratio=2)
IMAGES = torch.randn(80, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CASES = {
    "ViTModel": ("ViTConfig", SIZES),
    "ViTForImageClassification": ("ViTConfig", SIZES | dict(num_labels=5)),
    "DeiTModel": ("DeiTConfig", SIZES),
    "DeiTForImageClassification": ("DeiTConfig", SIZES | dict(num_labels=5)),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", SIZES | dict(num_labels=5)),
    "Dinov2Model": ("Dinov2Config", DINO),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", DINO),
    "CLIPVisionModel": ("CLIPVisionConfig", SIZES),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", SIZES | dict(hidden_act="gelu")),
    "SiglipVisionModel": ("SiglipVisionConfig", SIZES),
}


def build(name, **more):
    config, kwargs = CASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**kwargs | more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return model.train()


def read(name, model, images):
    """What a user of the model reads."""
    with torch.no_grad():
        given = model.eval()(pixel_values=images)
    if "Classification" in name:
        return given.logits
    if "CLIP" in name:
        inner = getattr(model, "vision_model", model)
        return inner(pixel_values=images).pooler_output.detach()
    return given.last_hidden_state


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_same(name):
    model = build(name)
    ours = convert(model)
    assert model.training and not ours.training
    with torch.no_grad():
        found = ours(IMAGES) if "Classification" in name or "CLIP" in name else ours.forward_features(IMAGES)
        if name.startswith("Siglip"):
            torch.testing.assert_close(ours(IMAGES), model(pixel_values=IMAGES).pooler_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, read(name, model, IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "Dinov2Model", "SiglipVisionModel"])
def test_they_are_pruned(name):
    model = build(name)
    small = api.prune(model, IMAGES, latency=0.6, table=table_of_macs(take(model).dims))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in convert(model).parameters())
    assert small.divergence < 0.5


@pytest.mark.parametrize("name", ["Dinov2Model", "Dinov2WithRegistersModel"])
def test_gated_mlps_come_too(name):
    """Those of DINOv2-g."""
    model = build(name, use_swiglu_ffn=True)
    ours = convert(model)
    with torch.no_grad():
        found = ours.forward_features(IMAGES)
    torch.testing.assert_close(found, read(name, model, IMAGES), rtol=1e-5, atol=1e-5)
    assert ours.dims.structure.packed and ours.dims.blocks[0].mlp > 0


@pytest.mark.parametrize("name", CASES)
def test_state_dicts_are_read(name):
    """torch.save(model.state_dict()): the names of this version of transformers."""
    model = build(name)
    ours = convert(model)
    if name.startswith("DeiT") and "Teacher" not in name:
        pytest.skip("a DeiT without its second classifier is no model of timm's")
    state, _ = extract({k: v.clone() for k, v in model.state_dict().items()}, "x.pth")
    state, _ = adapt(state, ours, ours.arch, "x.pth")
    assert ours.load_state_dict(state, strict=False).missing_keys == []
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    "name, more, message",
    [
        ("ViTModel", dict(hidden_act="relu"), "with the activation relu cannot be pruned"),
    ],
)
def test_what_cannot_be_converted_says_why(name, more, message):
    with pytest.raises(ModelError, match=message):
        convert(build(name, **more))


def test_other_models_are_named():
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SIZES))
    with pytest.raises(ModelError, match="a Siglip2VisionModel cannot be pruned; of transformers: vit, deit, dinov2"):
        take(model)
