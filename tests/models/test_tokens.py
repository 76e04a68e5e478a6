"""Blocks that compute on fewer tokens: the block formula, exactness, counts, export, and heads on all tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from jobs import save_model
from token_models import compiles_and_runs_in_onnxruntime, trains_a_segmentation_head, with_tokens
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from files import checkpoint
from files.checkpoint import CheckpointError
from latency.whole import build_random
from main_pm_vit import freeze_
from models import Arch, Masks, ModelError, build_vit, compact, load_dense, macs, params
from models.pretrained import from_checkpoint
from models.tokens import SKIPPED, DenseTokenMerge, TokenMerge, layers, streamline_


def random_structure_(tokens, skip=3, shortcut=False):
    """Random groups, some skipped patches, random entries."""
    patches, groups = tokens.total - tokens.prefix, tokens.tokens - tokens.prefix
    order = torch.randperm(patches)
    owner = torch.randint(tokens.prefix, tokens.tokens, (patches,))
    owner[order[:groups]] = tokens.prefix + torch.arange(groups)
    owner[order[groups : groups + skip]] = SKIPPED
    tokens.set(owner, torch.rand(patches), torch.rand(patches), (owner == SKIPPED) | torch.tensor(shortcut))
    return tokens


@pytest.fixture
def compressed(tiny, randomise):
    """The tiny model at 9 and 7 of its 18 tokens; the second block's merged patches have the shortcut."""
    model = randomise(build_vit(**tiny, dims=with_tokens(build_vit(**tiny).dims, 9, 7))).eval()
    for i, tokens in layers(model):
        random_structure_(tokens, shortcut=i == 1)
    return model


def by_the_formula(block, x):
    """out = R f(z) + s x with z = M x, and x + R (f(z) - z) with the shortcut of merged patches; patch by patch."""
    tokens, prefix = block.tokens, block.tokens.prefix
    z = torch.zeros(len(x), tokens.tokens, x.shape[2], dtype=x.dtype)
    z[:, :prefix] = x[:, :prefix]
    for j, k in enumerate(tokens.owner.tolist()):
        if k != SKIPPED:
            z[:, k] += tokens.merge[j] * x[:, prefix + j]
    out, result = block.branches(z), x.clone()
    result[:, :prefix] = out[:, :prefix]
    for j, k in enumerate(tokens.owner.tolist()):
        if k != SKIPPED:
            own = x[:, prefix + j] - tokens.reconstruct[j] * z[:, k] if tokens.shortcut[j] else 0
            result[:, prefix + j] = tokens.reconstruct[j] * out[:, k] + own
    return result


@pytest.mark.parametrize("grad", [False, True], ids=["gathers", "products"])
def test_a_block_computes_the_formula(compressed, grad):
    model, x = compressed.double(), torch.randn(2, 18, 32, dtype=torch.float64)
    for block in model.blocks:
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(block(x), by_the_formula(block, x), rtol=1e-12, atol=1e-12)


def test_a_skipped_patch_leaves_a_block_unchanged(compressed):
    x = torch.randn(2, 18, 32)
    for grad in (False, True):
        for block in compressed.blocks:
            with torch.set_grad_enabled(grad):
                out = block(x)
            passed = 2 + (block.tokens.owner == SKIPPED).nonzero().flatten()
            assert len(passed) == 3 and torch.equal(out[:, passed], x[:, passed])


@pytest.mark.parametrize("grad", [False, True], ids=["gathers", "products"])
def test_identity_matrices_give_the_dense_model_bit_for_bit(family, randomise, grad):
    """In every family, with its prefix tokens."""
    model = randomise(build_vit(**family)).eval()
    prefix, total = model.num_prefix_tokens, model.dims.blocks[0].tokens
    model.blocks[0].register_forward_pre_hook(lambda _, args: args[0].contiguous())  # sums depend on the strides
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    expected = model(images)
    for block in model.blocks:
        block.tokens = TokenMerge(total, total, prefix)
        patches = torch.arange(total - prefix)
        block.tokens.set(prefix + patches, torch.ones(len(patches)), torch.ones(len(patches)), patches < 0)
    with torch.set_grad_enabled(grad):
        assert torch.equal(model(images), expected)


def test_all_tokens_means_no_compression(tiny):
    assert not list(layers(build_vit(**tiny)))


@pytest.mark.parametrize(
    "merge",
    [
        {},
        dict(dense_merge=True),
        dict(content_merge=True),
        dict(lean_last=True),
        dict(content_merge=True, lean_last=True),
    ],
)
def test_counts_include_compression(tiny, merge, images):
    dims = with_tokens(build_vit(**tiny).dims, *((18, 9) if "lean_last" in merge else (9, 18)))
    kwargs = tiny | merge
    model = build_vit(**kwargs, dims=dims).eval()
    for _, tokens in layers(model):
        tokens.route = "products"
    for block in model.blocks:
        block.attn.route = "fused"
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images[:1])
    arch = kwargs.pop("arch")
    assert macs(arch, dims, **kwargs) == counter.get_total_flops() // 2
    assert params(arch, dims, **kwargs) == sum(p.numel() for p in model.parameters())


def test_dense_matrices_start_as_the_structure(compressed):
    tokens = compressed.blocks[0].tokens
    full = DenseTokenMerge(tokens.tokens, tokens.total, tokens.prefix)
    full.set(tokens)
    x = torch.randn(2, 18, 32)
    z = tokens.compress(x)
    torch.testing.assert_close(full.compress(x), z)
    torch.testing.assert_close(full.restore(2 * z, z, x), tokens.restore(2 * z, z, x))


def test_training_keeps_the_support(compressed, images):
    """What is trained are the entries of the support, and they are trained."""
    before = [tokens.matrices()[:2] for _, tokens in layers(compressed)]
    optimizer = torch.optim.SGD(compressed.parameters(), lr=0.1)
    compressed.train().forward_features(images).pow(3).sum().backward()
    optimizer.step()
    for (_, tokens), old in zip(layers(compressed), before, strict=True):
        for now, then in zip(tokens.matrices(), old, strict=False):
            assert torch.equal(now != 0, then != 0) and not torch.equal(now, then)


def test_masked_equals_compact_inside_the_groups(compressed, images, prune):
    masks = prune(Masks(compressed.dims), ("embed", "heads", "qk", "v", "mlp", "blocks.1.mlp=0"))
    masks.install_(compressed)
    small = compact(compressed, masks)
    assert [b.tokens for b in small.dims.blocks] == [9, 7]
    with torch.no_grad():
        difference = (small(images) - compressed(images)).norm() / compressed(images).norm()
    assert difference < 1e-5


def test_a_checkpoint_holds_the_structure(compressed, images, tmp_path):
    save_model(tmp_path / "c.pth", compressed)
    with torch.no_grad():
        assert torch.equal(load_dense(tmp_path / "c.pth")(images), compressed(images))
    for odd in (99, 0, 2):  # no such token, a prefix token, all in one group
        save_model(tmp_path / "c.pth", compressed, **{"blocks.0.tokens.owner": torch.full((16,), odd)})
        with pytest.raises(CheckpointError, match="groups"):
            load_dense(tmp_path / "c.pth")


def test_fresh_models_of_fewer_tokens_have_a_structure(tiny):
    arch = tiny.pop("arch")
    model = build_random(Arch.of(arch, **tiny), with_tokens(build_vit(arch, **tiny).dims, 9, 5), torch.device("cpu"))
    assert [len(t.owner.unique()) for _, t in layers(model)] == [7, 3]


@pytest.mark.parametrize("tokens", [2, 19])
def test_tokens_that_a_model_cannot_have(tiny, tokens):
    with pytest.raises(ModelError, match="of which 2 are never merged: 3 to 18"):
        build_vit(**tiny, dims=with_tokens(build_vit(**tiny).dims, tokens, 18))


def test_streamlined_models_classify_the_same(tiny, randomise, images):
    model = randomise(build_vit(**tiny, dims=with_tokens(build_vit(**tiny).dims, 6, 5))).eval()
    for _, tokens in layers(model):
        random_structure_(tokens, skip=0)
    with torch.no_grad():
        expected = model(images)
        assert streamline_(model).blocks[1].tokens.folded.shape == (5, 6)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        assert model.forward_features(images).shape[1] == 2


@pytest.mark.parametrize("route", [None, "explicit"])
def test_the_last_block_answers_what_the_head_reads(family, randomise, images, route):
    """Exactly, with all tokens and with merged ones; where the head reads an average, nothing changes."""
    full = randomise(build_vit(**family)).double().eval()
    total, prefix = full.dims.blocks[0].tokens, full.num_prefix_tokens
    merged = randomise(build_vit(**family, dims=with_tokens(full.dims, total, prefix + 5))).double().eval()
    images = images.double()
    for model in (full, merged):
        for block in model.blocks:
            block.attn.route = route
        with torch.no_grad():
            expected = model(images)
            assert (streamline_(model).blocks[1].num_queries == prefix) == (model.global_pool == "token")
            torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-12)
            assert model.forward_features(images).shape[1] == (prefix if model.global_pool == "token" else total)


@pytest.mark.parametrize("merge", [None, {}, dict(content_merge=True)], ids=["all tokens", "place", "content"])
def test_a_lean_last_block_gives_the_same_logits_and_gradients(family, merge, randomise, images):
    """Patches are its keys alone: they come out of it as they went in."""
    parent, images = build_vit(**family), images.double()
    compressed = parent.dims.blocks[0].tokens, 5 + parent.num_prefix_tokens
    dims = None if merge is None else with_tokens(parent.dims, *compressed)
    model = randomise(build_vit(**family | (merge or {}), dims=dims)).double()
    if parent.global_pool != "token":
        with pytest.raises(ModelError, match="lean_last does not go with a head that reads every token"):
            build_vit(**family, lean_last=True)
        return
    lean = build_vit(**family | (merge or {}) | dict(lean_last=True), dims=dims).double()
    lean.load_state_dict(model.state_dict())
    inside = []
    lean.blocks[-1].register_forward_hook(lambda block, x, out: inside.extend([x[0], out]))
    logits, expected = lean(images), model(images)
    for each in (logits, expected):
        pair = each if isinstance(each, tuple) else (each,)
        sum(out.square().sum() for out in pair).backward()
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    for (name, ours), theirs in zip(lean.named_parameters(), model.parameters(), strict=True):
        assert ours.requires_grad == (ours.grad is not None)  # else processes that train together wait for it
        if ours.grad is None:  # what would put patches back that nothing reads
            assert name == "blocks.1.tokens.reconstruct"
            continue
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=name)
    x, out = inside
    assert out.shape == x.shape and torch.equal(out[:, parent.num_prefix_tokens :], x[:, parent.num_prefix_tokens :])
    assert lean.forward_features(images).shape == model.forward_features(images).shape
    streamed = streamline_(lean.eval())
    torch.testing.assert_close(streamed(images), model.eval()(images), rtol=1e-10, atol=1e-12)


def test_what_a_lean_block_never_puts_back_stays_frozen(tiny, tmp_path):
    """In a checkpoint that is read, and where finetuning chooses what trains."""
    dims = with_tokens(build_vit(**tiny).dims, 18, 9)
    model = build_vit(**tiny, dims=dims, lean_last=True)
    save_model(path := tmp_path / "lean.pth", model)
    read = from_checkpoint(checkpoint.load_model(path), str(path))
    for case in (model, read):
        frozen = [name for name, p in case.named_parameters() if not p.requires_grad]
        assert frozen == ["blocks.1.tokens.reconstruct"]
    freeze_(SimpleNamespace(freeze_param=True, freeze_matrix=False), read)
    assert [name for name, p in read.named_parameters() if p.requires_grad] == ["blocks.1.tokens.merge"]
    freeze_(SimpleNamespace(freeze_param=True, freeze_matrix=True), read)
    assert not any(p.requires_grad for p in read.parameters())


def test_a_lean_block_takes_no_layer_apart_that_is_in_the_place_of_its_own(tiny, images):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    lean, full = (build_vit(**tiny, **kwargs).eval() for kwargs in (dict(lean_last=True), {}))
    lean.load_state_dict(full.state_dict())
    for model in (lean, full):
        model.blocks[-1].attn.qkv.__class__ = Doubled
    with torch.no_grad():
        torch.testing.assert_close(lean(images), full(images), rtol=1e-5, atol=1e-6)


def test_full_matrices_have_no_lean_last_block(tiny):
    with pytest.raises(ModelError, match="lean_last does not go with dense_merge"):
        build_vit(**tiny, dense_merge=True, lean_last=True)


def test_a_shortcut_is_not_folded_away(compressed, images):
    with torch.no_grad():
        expected = compressed(images)
        streamline_(compressed)
        assert compressed.blocks[1].tokens.folded is None
        torch.testing.assert_close(compressed(images), expected, rtol=1e-4, atol=1e-5)


def test_a_segmentation_head_trains_on_all_tokens(compressed, images):
    trains_a_segmentation_head(compressed, images)
    maps = compressed.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    assert [m.shape for m in maps] == [(3, 32, 4, 4)] * 2


def test_compressed_models_export(compressed, images):
    exported = torch.export.export(compressed, (images,))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(images), compressed(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compressed_models_compile_and_run_in_onnxruntime(compressed, images):
    compiles_and_runs_in_onnxruntime(compressed, images)
