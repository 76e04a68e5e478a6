"""Swin Transformers of any widths: timm's function at full width, and masked equals compact for every axis."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from files import checkpoint
from models import (
    Arch,
    BlockDims,
    DimsError,
    FeaturePyramid,
    Masks,
    ModelError,
    SwinDims,
    ViTDims,
    backbone,
    build_vit,
    compact,
    dims_from_dict,
    dims_of,
    load_dense,
    macs,
    params,
    skeleton,
)
from models.foreign import adapt
from models.norms import LayerNorm
from pruning.saliency import Saliency
from pruning.shrink import Student

ARCH = "swin_tiny_patch4_window7_224"
SMALL = dict(img_size=16, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=10)
FAMILIES = {
    "shifted": {},
    "padded": dict(img_size=20, depths=(1, 2, 2), num_heads=(2, 2, 4)),  # 10, 5 and 3 patches in windows of 4
    "windows_by_stage": dict(window_size=[2, 3], always_partition=True),
    "one_window": dict(window_size=8, head_dim=6, qkv_bias=False),
    "any_size": dict(dynamic_img_size=True),
}
CASES = {
    **{axis: (axis,) for axis in ("embed", "heads", "qk", "v", "mlp")},
    "one_embedding": ("one",),
    "no_attention": ("layers.0.blocks.0.heads=0",),
    "no_mlp": ("layers.1.blocks.1.mlp=0",),
    "everything": ("embed", "heads", "qk", "v", "mlp", "layers.0.blocks.0.heads=0", "layers.1.blocks.1.mlp=0"),
}


@pytest.fixture(params=FAMILIES)
def swin(request):
    return dict(arch=ARCH) | SMALL | FAMILIES[request.param]


@pytest.fixture(params=CASES)
def swin_case(request):
    return CASES[request.param]


@pytest.fixture
def remove(prune):
    """As `prune`; "one" is a third of the second stage's embedding alone."""

    def removed(masks, what):
        if what == ("one",):
            masks.remove("layers.1.embed", torch.arange(5))
            return masks
        return prune(masks, what)

    return removed


def random_images(kwargs, count=3):
    return torch.randn(count, 3, kwargs["img_size"], kwargs["img_size"]).double()


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_full_width_is_timms_function_under_timms_names(swin, randomise):
    model = randomise(build_vit(**swin)).double().eval()
    timms = timm.create_model(swin["arch"], **{k: v for k, v in swin.items() if k != "arch"}).double().eval()
    timms.load_state_dict(model.state_dict())
    images = random_images(swin)
    assert error(model(images), timms(images)) <= 1e-12
    assert model.dims == SwinDims.of(timms) == dims_of(skeleton(**swin))


def test_compact_computes_what_masked_does(swin, swin_case, randomise, remove):
    """Function and gradients, in eval and training mode alike."""
    model = randomise(build_vit(**swin, drop_path_rate=0.0)).double().train()
    images = random_images(swin)
    dense = model(images)
    masks = remove(Masks(model.dims), swin_case)
    masks.install_(model)
    small = compact(model, masks)
    masked = model(images)
    assert error(small(images), masked) <= 1e-10 and error(small.eval()(images), masked) <= 1e-10
    assert error(masked, dense) > 1e-3  # something was removed that mattered
    assert small.dims == masks.dims
    model.zero_grad()
    for each in (model, small):
        each(images).square().sum().backward()
    full = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        expected = masks.cut(name, full[name].grad)
        assert (parameter.grad - expected).norm() <= 1e-10 * (1 + expected.norm()), name


def test_a_branch_without_units_is_not_built(randomise, remove):
    model = build_vit(ARCH, **SMALL)
    small = compact(model, remove(Masks(model.dims), CASES["everything"]))
    names = {name for name, _ in small.named_parameters()}
    assert not any(name.startswith(("layers.0.blocks.0.attn", "layers.0.blocks.0.norm1")) for name in names)
    assert not any(name.startswith(("layers.1.blocks.1.mlp", "layers.1.blocks.1.norm2")) for name in names)
    table = small.layers[1].blocks[0].attn.relative_position_bias_table
    assert table.shape == (49, small.dims.stages[1].blocks[0].heads) and table.shape[1] < 4


def test_the_norm_between_stages_runs_over_four_copies_of_the_survivors():
    model = build_vit(ARCH, **SMALL)
    masks = Masks(model.dims)
    masks.remove("layers.0.embed", torch.tensor([0, 3]))
    masks.install_(model)
    kept = masks.kept("layers.1.downsample.norm.weight", 0)
    assert kept.tolist() == [16 * copy + i for copy in range(4) for i in range(16) if i not in (0, 3)]
    assert model.layers[1].downsample.norm.averager is not None and model.norm.averager is None
    assert all(isinstance(m, LayerNorm) for m in model.modules() if "Norm" in type(m).__name__)


def test_counts_are_torchs(swin, remove):
    model = build_vit(**swin).eval()
    kwargs = {k: v for k, v in swin.items() if k != "arch"}
    small = compact(model, remove(Masks(model.dims), CASES["everything"]))
    for each in (model, small):
        for module in each.modules():
            if hasattr(module, "route"):
                module.route = "fused"
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            each(torch.randn(1, 3, swin["img_size"], swin["img_size"]))
        assert macs(ARCH, each.dims, **kwargs) == counter.get_total_flops() // 2
        assert params(ARCH, each.dims, **kwargs) == sum(p.numel() for p in each.parameters())
    parts = Arch.of(ARCH, **kwargs).macs_by_part()
    assert sum(parts.values()) == macs(ARCH, **kwargs) and parts["downsampling"] > 0


def test_published_counts():
    """Swin-T and Swin-B of arXiv 2103.14030: 29 M parameters, 4.5 G MACs; 88 M, 15.4 G."""
    assert round(params(ARCH) / 1e6) == 28 and macs(ARCH) / 1e9 == pytest.approx(4.5, abs=0.15)
    base = "swin_base_patch4_window7_224"
    assert round(params(base) / 1e6) == 88 and macs(base) / 1e9 == pytest.approx(15.4, abs=0.2)


def test_weights_under_the_published_names_load(randomise):
    """Downsampling at the end of a stage, a bare head, and buffers, as in the first release."""
    model = randomise(build_vit(ARCH, **SMALL))
    state = {
        k.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head"): v
        for k, v in model.state_dict().items()
    }
    state |= {"layers.0.blocks.1.attn_mask": torch.zeros(1), "layers.0.blocks.0.attn.relative_position_index": None}
    found, _ = adapt(state, skeleton(ARCH, **SMALL), ARCH, "weights.pth")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())


def test_pretrained_weights_are_timms(monkeypatch):
    create, wanted = timm.create_model, timm.create_model(ARCH, **SMALL)

    def downloading(arch, pretrained=False, **kwargs):
        return wanted if pretrained else create(arch, **kwargs)

    monkeypatch.setattr(timm, "create_model", downloading)
    model = build_vit(ARCH, pretrained=True, **SMALL)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), wanted.parameters(), strict=True))
    assert "pretrained" not in model.arch_kwargs


def test_a_compact_model_takes_another_classifier(remove):
    small = compact(build_vit(ARCH, **SMALL), remove(Masks(SwinDims.of(skeleton(ARCH, **SMALL))), ("embed",)))
    small.reset_classifier(7)
    assert small(torch.randn(2, 3, 16, 16)).shape == (2, 7)


def test_dims_travel_as_plain_values():
    dims = SwinDims.of(skeleton(ARCH, **SMALL))
    assert dims_from_dict(json.loads(json.dumps(dims.to_dict()))) == dims
    assert dims.to_dim() == dict(
        EMB=[16, 32], head=[[2, 2], [4, 4]], QK=[[8, 8]] * 2, V=[[8, 8]] * 2, MLP=[[64, 64], [128, 128]]
    )
    assert [b.tokens for b in dims.blocks] == [64, 64, 16, 16]
    assert dims.resized(dims.sizes()) == dims
    less = dims.resized({"layers.1.embed": 20, "layers.0.blocks.1.qk": 3})
    assert less.stages[1].embed == 20 and less.stages[0].blocks[1].qk == 3
    assert {a for a, n in less.sizes().items() if n != dims.sizes()[a]} == {"layers.1.embed", "layers.0.blocks.1.qk"}


STAGE = dict(embed=4, blocks=[])


@pytest.mark.parametrize(
    "data, message",
    [
        (dict(stages=[]), "1 to 16 stages"),
        (dict(stages=[STAGE] * 17), "1 to 16 stages"),
        (dict(stages=5), "exactly the key stages"),
        (dict(stages=[STAGE], embed=4), "exactly the key stages"),
        (dict(stages=[STAGE, dict(embed=0, blocks=[])]), "stage 1: embed must be at least 1"),
    ],
)
def test_odd_dims_are_refused(data, message):
    with pytest.raises(DimsError, match=message):
        dims_from_dict(data)


def test_what_cannot_be_pruned_is_refused_in_a_line():
    for arch in ("swinv2_tiny_window8_256", "swinv2_cr_tiny_224"):
        with pytest.raises(ModelError, match=f"{arch} is not a Swin Transformer of the first version"):
            skeleton(arch)
    with pytest.raises(ModelError, match="timm cannot build"):
        skeleton(ARCH, **SMALL | dict(num_heads=(2, 0)))
    with pytest.raises(ModelError, match="a stage of it has no blocks"):
        skeleton(ARCH, **SMALL | dict(depths=(2, 0)))
    with pytest.raises(ModelError, match="the masks of its windows hold"):
        skeleton(ARCH, **SMALL | dict(img_size=60_000))
    for depths in ([1] * 17, [2_000, 2], 5, ["2", 2]):
        with pytest.raises(ModelError, match="depths must be up to 16 whole numbers"):
            skeleton(ARCH, **SMALL | dict(depths=depths))
    with pytest.raises(ModelError, match="takes SwinDims, not ViTDims"):
        build_vit(ARCH, ViTDims(8, ()), **SMALL)
    dims = SwinDims.of(skeleton(ARCH, **SMALL))
    with pytest.raises(ModelError, match=r"has stages of \[2, 2\] blocks, the dims have \[2\]"):
        build_vit(ARCH, SwinDims(dims.stages[:1]), **SMALL)
    with pytest.raises(ModelError, match="at another image size: blocks of 64 tokens, not 256"):
        build_vit(ARCH, dims, **SMALL | dict(img_size=32))


@pytest.mark.parametrize(
    "axis", ["layers.0.embed", "layers.1.embed", "layers.0.blocks.1.heads", "layers.1.blocks.0.mlp"]
)
def test_saliency_is_the_squared_sum_over_what_the_unit_writes_and_reads(axis, randomise):
    """The embedding of a stage counts in its blocks, in its own downsampling and in the next one's."""
    model = randomise(build_vit(ARCH, **SMALL, drop_path_rate=0.0)).double()
    saliency = Saliency(model, model.dims, "taylor_sq")
    F.cross_entropy(model(random_images(SMALL, 8)), torch.arange(8)).backward()
    saliency.step()
    wanted = {"heads": ("attn.qkv",), "mlp": ("mlp.fc1",)}.get(
        axis.split(".")[-1], ("patch_embed.proj", "qkv.weight", "attn.proj", "fc1.weight", "fc2", "reduction")
    )
    total = 0.0
    for name, p in model.named_parameters():
        if not any(word in name for word in wanted):
            continue
        alone = Masks(model.dims)
        alone.remove(axis, torch.arange(1, len(alone.keep[axis])))
        kept = torch.ones_like(p)
        alone.zero_(name, kept)
        if not kept.all():  # else it is not of this axis
            total += (kept * p * p.grad).sum().item()
    constant = {"embed": 1 / 2, "heads": 1 / 12, "mlp": 1.0}[axis.split(".")[-1]]
    assert saliency.close_window()[axis][0] == pytest.approx((constant * total) ** 2, rel=1e-5)


def test_a_shrunk_student_trains_as_the_masked_one(randomise, remove):
    torch.manual_seed(0)
    model = randomise(build_vit(ARCH, **SMALL, drop_path_rate=0.0)).double()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    masks = Masks(model.dims)
    student = Student(model, masks)
    student.prepare(optimizer, lambda model: model)
    remove(masks, CASES["everything"])
    images, targets = random_images(SMALL, 4), torch.arange(4)
    masks.install_(model, optimizer)
    F.cross_entropy(model(images), targets).backward()
    masks.drop_gradients_(model)
    optimizer.step()
    masks.zero_weights_(model)
    left = masks.dims
    student.shrink()
    assert student.model.dims == left
    full, found = student.expand()
    assert error(full(images), model(images)) <= 1e-10 and found.dims == left


def test_it_is_a_backbone(randomise, remove):
    model = randomise(build_vit(ARCH, **SMALL)).double().eval()
    masks = remove(Masks(model.dims), CASES["everything"])
    masks.install_(model)
    images = random_images(SMALL)
    features = backbone(compact(model, masks), [0, 1])
    expected = model.forward_intermediates(images, intermediates_only=True)
    assert features.feature_info.channels() == [stage.embed for stage in masks.dims.stages]
    assert features.feature_info.reduction() == [2, 4]
    for i, (found, full) in enumerate(zip(features(images), expected, strict=True)):
        assert error(found, full[:, masks.keep[f"layers.{i}.embed"]]) <= 1e-10
    assert len(backbone(compact(model, masks), [0]).model.dims.stages) == 1
    with pytest.raises(ValueError, match="stages are a pyramid already"):
        FeaturePyramid(model)


def test_blocks_of_no_width_may_be_all_there_is():
    """A model whose blocks are all gone still downsamples and classifies."""
    dims = SwinDims.of(skeleton(ARCH, **SMALL))
    empty = dims.with_stages(
        [ViTDims(s.embed, tuple(BlockDims(0, 0, 0, 0, b.tokens) for b in s.blocks)) for s in dims.stages]
    )
    model = build_vit(ARCH, empty, **SMALL).eval()
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == params(ARCH, empty, **SMALL)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_far_below_half(randomise, share):
    """Every axis of every stage is cut: still the same function."""
    model = randomise(build_vit(ARCH, **SMALL)).double().eval()
    dims = model.dims.resized({axis: max(1, int(share * n)) for axis, n in model.dims.sizes().items()})
    masks = Masks.first(model.dims, dims)
    masks.install_(model)
    small = compact(model, masks)
    assert small.dims == dims
    assert error(small(random_images(SMALL)), model(random_images(SMALL))) > 0.01  # of other images it is another
    images = random_images(SMALL)
    assert error(small(images), model(images)) <= 1e-10


def small_checkpoint(**odd):
    """What a pruned checkpoint holds, but for `odd`."""
    model = build_vit(ARCH, **SMALL)
    masks = Masks(model.dims)
    masks.remove("layers.0.embed", torch.arange(4))
    masks.install_(model)
    kwargs = {k: list(v) if isinstance(v, tuple) else v for k, v in SMALL.items()}
    return (
        dict(
            arch=dict(name=ARCH, kwargs=kwargs),
            dims=masks.dims.to_dict(),
            masks=masks.state_dict(),
            model=model.state_dict(),
        )
        | odd
    )


def changed(**kwargs):
    return dict(name=ARCH, kwargs=SMALL | kwargs)


ONE = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    "odd",
    [
        dict(arch=changed(depths=[900, 900])),
        dict(arch=changed(img_size=99_999)),
        dict(arch=changed(num_heads=[2, 0])),
        dict(arch=changed(window_size=999)),
        dict(arch=changed(depths=[2, 3])),
        dict(arch=dict(name="swinv2_tiny_window8_256", kwargs={})),
        dict(arch=dict(name="vit_tiny_patch16_224", kwargs={})),
        dict(dims=dict(embed=8, blocks=[])),
        dict(dims=dict(stages=[dict(embed=8, blocks=[])])),
        dict(dims=dict(stages=[])),
        dict(masks={}),
        dict(masks={"layers.9.embed": ONE}),
        dict(masks={"blocks.0.tokens": ONE}),
        dict(masks={"x": ONE}),
        dict(masks=Masks(SwinDims.of(skeleton(ARCH, **SMALL))).state_dict() | {"blocks.0.tokens": ONE}),
    ],
    ids=str,
)
def test_a_checkpoint_that_lies_is_refused_in_a_line(tmp_path, odd):
    checkpoint.save(tmp_path / "good.pth", **small_checkpoint())
    assert load_dense(tmp_path / "good.pth").dims.stages[0].embed == 12
    content = small_checkpoint(**odd)
    checkpoint.save(tmp_path / "bad.pth", **content)
    with pytest.raises(checkpoint.CheckpointError) as refused:
        load_dense(tmp_path / "bad.pth")
    assert "\n" not in str(refused.value)
