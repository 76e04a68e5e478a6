"""Every name whose structure is more than that of a plain block, shrunken: the same function, masked, compact, counted.

The references are timm's own model and torch's own counter.
"""

import re

import pytest
import timm
import torch
from conftest import CASES, TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.one_shot_cost import table_of_macs
from models import Masks, ModelError, build_vit, compact, left_alone, macs, params
from models.from_timm import take
from models.pooling import new_classifier_
from models.vit import Attention
from pruning.align import align_
from pruning.gates import Gates
from recipes import api
from tools import formats
from tools.plain_timm import plain_timm

STRUCTURES = dict(
    pool=r"siglip_\d+$|_map_256$|^test_vit3$",
    packed_glu=r"giant_patch14_(dinov2|reg)",
    rms_norm_glu="aimv2",
    inner_norms="beit3",
    rms_norm="^test_vit4$",
)
LISTED = timm.list_models(module="vision_transformer")
NAMES = {kind: [name for name in LISTED if re.search(rule, name)] for kind, rule in STRUCTURES.items()}
EVERY = sorted({name for names in NAMES.values() for name in names})
REPRESENTATIVES = [names[0] for names in NAMES.values()]
PARAMS = [pytest.param(name, marks=[] if name in REPRESENTATIVES else [pytest.mark.slow]) for name in EVERY]
SIZE = TINY | dict(embed_dim=36)
IMAGES = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def relative_error(found, expected):
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.fixture
def model(request, randomise):
    return randomise(build_vit(request.param, **SIZE)).double().eval()


every = pytest.mark.parametrize("model", PARAMS, indirect=True)
representative = pytest.mark.parametrize("model", REPRESENTATIVES, indirect=True)


@pytest.mark.parametrize("classes", [0, 10])
@pytest.mark.parametrize("name", PARAMS)
def test_full_width_is_timms_function_and_counted_as_torch_counts(name, classes, images, randomise, monkeypatch):
    monkeypatch.setattr(Attention, "route", "fused")
    kwargs = SIZE | dict(num_classes=classes)
    theirs = randomise(timm.create_model(name, **kwargs)).double().eval()
    ours = take(theirs)
    assert ours.arch == name and [*ours.state_dict()] == [*theirs.state_dict()]
    assert relative_error(ours(images.double()), theirs(images.double())) <= 1e-12
    for model in (ours, compact(ours, Masks.first(ours.dims, smaller(ours.dims)))):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(images[:1].double())
        assert 2 * macs(name, model.dims, **kwargs) == counter.get_total_flops()
        assert params(name, model.dims, **kwargs) == sum(p.numel() for p in model.parameters())


def smaller(dims):
    """About half of every axis, none of it a multiple of anything."""
    alone = left_alone(EVERY[0])
    return dims.resized({axis: n // 2 + 1 for axis, n in dims.sizes().items() if axis.split(".")[-1] not in alone})


@every
@pytest.mark.parametrize("case", CASES)
def test_masked_is_compact(model, case, images, prune):
    images = images.double()
    dense, masks = model(images), prune(Masks(model.dims), CASES[case])
    masks.install_(model)
    masked = model(images)
    assert relative_error(masked, dense) > 1e-6  # something was removed that mattered
    assert relative_error(compact(model, masks)(images), masked) <= 1e-10


@every
def test_alignment_keeps_the_function(model, images):
    images = images.double()
    expected = model(images)
    align_(model, [IMAGES.double()])
    assert relative_error(model(images), expected) <= 1e-9


@every
def test_gates_of_zero_and_one_are_masks(model, images, prune):
    """The derivatives that NViT and SAViT rank by are of the function that masks give."""
    images = images.double()
    masks = prune(Masks(model.dims), CASES["every_width"])
    for behind in (False, True):
        gates = Gates(model, behind)
        gates.values = {axis: keep.double()[None] for axis, keep in masks.keep.items()}
        with gates.attach():
            gated = model(images)
        assert relative_error(gated, compact(model, masks)(images)) <= 1e-10


def one_shot(model, tmp_path):
    """A model pruned to half of the MACs, saved and loaded again: (dense, pruned)."""
    dense = take(model)
    table = table_of_macs(dense.dims)
    small = api.prune(model.float(), IMAGES, latency=0.5, table=table).eval()
    assert table.ratio(small.dims, dense.dims) <= 0.5 and small.divergence < 1
    loaded = api.load(api.save(small, tmp_path))
    assert loaded.dims == small.dims and torch.equal(loaded(IMAGES), small(IMAGES))
    return dense, small


@every
def test_one_shot_to_the_end(model, tmp_path):
    dense, small = one_shot(model, tmp_path)
    assert small(IMAGES).shape == dense.float()(IMAGES).shape == (96, 10) and small.dims.embed < dense.dims.embed


def test_a_stream_of_rms_norms_is_rotated(images, randomise):
    """No norm stands before the first block, as in AIMv2, and no layer needs a bias."""
    model = randomise(build_vit("vit_tiny_patch16_224", norm_layer="rmsnorm", qkv_bias=False, **SIZE)).double().eval()
    images = images.double()
    expected, before = model(images), model.cls_token.clone()
    assert align_(model, [IMAGES.double()]) == []
    assert relative_error(model(images), expected) <= 1e-9
    moved = (model.cls_token[..., None] - before[..., None, :]).abs().amin(-1)
    assert moved.max() > 0.1  # no order of the channels gives the old token


def test_new_classes_are_read_off_the_pool(randomise):
    model = randomise(build_vit(NAMES["pool"][0], **SIZE))
    small = compact(model, Masks.first(model.dims, smaller(model.dims)))
    new_classifier_(small, 7)
    assert small.dims.embed < 36 and small(IMAGES).shape == (96, 7)


def test_plain_timm_has_no_pool_of_another_width_and_pads_no_norm(randomise):
    for name, message in ((NAMES["pool"][0], "and these were pruned"), (NAMES["inner_norms"][0], "count the zeros")):
        model = randomise(build_vit(name, **SIZE))
        sizes = smaller(model.dims).sizes() | {"embed": 24, "blocks.0.v": 3}
        with pytest.raises(ModelError, match=message):
            plain_timm(compact(model, Masks.first(model.dims, model.dims.resized(sizes))))


@pytest.mark.parametrize("narrower", [0, 5])
@pytest.mark.parametrize("name", REPRESENTATIVES[1:])
def test_uniform_widths_are_plain_timms(name, narrower, randomise):
    """A gated MLP, padded or not, and norms of one width, as timm's own modules."""
    if narrower and name in NAMES["inner_norms"]:
        pytest.skip("its norms take no padding")
    model = randomise(build_vit(name, **SIZE)).eval()
    sizes = {axis: 12 if axis.endswith("mlp") else n for axis, n in model.dims.sizes().items()}
    sizes["blocks.1.mlp"] -= narrower
    small = compact(model, Masks.first(model.dims, model.dims.resized(sizes)))
    assert relative_error(plain_timm(small)(IMAGES), small(IMAGES)) <= 1e-5


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_half_precision(name, images, randomise, prune):
    model = randomise(build_vit(name, **SIZE)).eval()
    masks = prune(Masks(model.dims), CASES["every_width"])
    masks.install_(model)
    expected = model(images)
    for student in (model, compact(model, masks)):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            assert relative_error(student(images).float(), expected) <= 0.05


@pytest.mark.parametrize("tokens", ["pooled", "patches"])
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_features_keep_their_width(name, tokens, randomise):
    """What a pool by attention gives is as wide as before, though the embedding is narrower; other features are it."""
    model = randomise(build_vit(name, **SIZE | dict(num_classes=0))).eval()
    small = api.prune(model, IMAGES, latency=0.5, table=table_of_macs(model.dims), feature_tokens=tokens).eval()
    assert small(IMAGES).shape == (96, 36) and small.divergence < 1
    assert (small.dims.embed < 36) == (tokens == "pooled" and model.attn_pool is not None)


@representative
@pytest.mark.parametrize("kind", ["standalone", "onnx"])
def test_a_pruned_model_is_exported(model, kind, tmp_path):
    if missing := formats.FORMATS[kind].missing:
        pytest.skip(f"needs {missing}")
    _, small = one_shot(model, tmp_path / "saved")
    (tmp_path / "out").mkdir()
    formats.FORMATS[kind].write(small, tmp_path / "out")
    assert relative_error(formats.FORMATS[kind].read(tmp_path / "out")(IMAGES[:3]), small(IMAGES[:3])) <= 1e-5
