"""Merging by content: groups, the block formula, attention by size, counts, export, checkpoints, and the whole flow."""

import json

import pytest
import torch
from jobs import PLAIN, run, save_model
from token_models import compiles_and_runs_in_onnxruntime, trains_a_segmentation_head, with_tokens
from torch.nn import functional as F

import finetune_dense
import main_pm_vit
from files.checkpoint import CheckpointError
from models import Masks, build_vit, compact, load_dense
from models.content import ContentMerge, anchors_of
from models.tokens import layers, spread_merge, streamline_
from pruning import pm_vit, token_merging
from pruning.objective import divergence
from pruning.refit import refit_
from pruning.token_counts import choose_counts
from recipes import pm_vit_options
from runtime.errors import BadArguments, Problems
from tools import show_tokens


def anchored_(model):
    """Random anchors in every compressed block."""
    for _, tokens in layers(model):
        order = torch.randperm(len(tokens.anchors))[: int(tokens.anchors.sum())]
        tokens.set(torch.zeros_like(tokens.anchors).index_fill(0, order, True))
    return model


@pytest.fixture
def merged(tiny, randomise):
    """The tiny model at 9 and 7 of its 18 tokens."""
    dims = with_tokens(build_vit(**tiny).dims, 9, 7)
    return anchored_(randomise(build_vit(**tiny, dims=dims, content_merge=True)).eval())


def groups_by_hand(tokens, patches):
    """Lists of patches, one per group, of one image: (N, E)."""
    N, groups = len(patches), tokens.tokens - tokens.prefix
    anchors = [j for j in range(N) if tokens.anchors[j]]
    found, likeness = {a: [a] for a in anchors}, {}
    for j in set(range(N)) - set(anchors):
        cosines = [F.cosine_similarity(patches[j], patches[a], dim=0).item() for a in anchors]
        likeness[j] = max(cosines), anchors[cosines.index(max(cosines))]
    alone = sorted(likeness, key=lambda j: likeness[j][0])[: groups - len(anchors)]
    for j, (_, anchor) in likeness.items():
        if j not in alone:
            found[anchor].append(j)
    return [*found.values(), *([j] for j in alone)]


def by_hand(block, x):
    """The block of one image, (T, E): a group of n patches stands n times among the keys."""
    tokens, P, a = block.tokens, block.tokens.prefix, block.attn
    groups = [*([j] for j in range(P)), *([P + j for j in g] for g in groups_by_hand(tokens, x[P:]))]
    z = torch.stack([x[g].mean(0) for g in groups])
    q, k, v = (t.unflatten(-1, (a.num_heads, -1)) for t in a.qkv(block.norm1(z)).chunk(3, -1))  # K H d
    times = torch.tensor([len(g) for g in groups])
    k, v = k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)
    weights = (a.scale * torch.einsum("ihd,jhd->hij", q, k)).softmax(-1)
    out = z + a.proj(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
    out = out + block.mlp(block.norm2(out))
    result = x.clone()
    for g, before, after in zip(groups, z, out, strict=True):
        result[g] += after - before
    return result


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("route", [None, "explicit", "padded"])
def test_a_block_computes_the_formula(merged, grad, route):
    merged, x = merged.double(), torch.randn(3, 18, 32, dtype=torch.float64)
    for block in merged.blocks:
        block.attn.route = route
        with torch.set_grad_enabled(grad):
            expected = torch.stack([by_hand(block, one) for one in x])
            torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", range(1, 16))
def test_every_token_is_in_one_group(count):
    tokens = spread_merge(count, (4, 4), 3, 2, content=True)
    groups = tokens.groups_for(torch.randn(5, 18, 8))
    assert groups.member.shape == (5, 2 + count, 18) and (groups.member.sum(1) == 1).all()
    assert (groups.sizes > 0).all() and int(tokens.anchors.sum()) == anchors_of(count)
    assert (groups.sizes[:, :2] == 1).all() and (groups.sizes[:, 2 + anchors_of(count) :] == 1).all()
    assert torch.equal(groups.member.argmax(1), groups.owner)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_patches_of_zeros_are_like_none(dtype):
    tokens = ContentMerge(7, 18, 2)
    for zeros in (8, 16):
        x = torch.randn(1, 18, 32, dtype=dtype)
        x[:, -zeros:] = 0
        groups = tokens.groups_for(x)
        assert groups.sizes.sum() == 18 and (groups.sizes > 0).all() and groups.compress(x).isfinite().all()


def test_equal_patches_merge_without_a_loss(merged, images):
    with torch.no_grad():
        merged.pos_embed[:, 2:] = merged.pos_embed[:, 2:3]
        flat = images.mean((2, 3), keepdim=True).expand_as(images)
        dense = build_vit(merged.arch, **merged.arch_kwargs).eval()
        dense.load_state_dict(merged.state_dict(), strict=False)
        torch.testing.assert_close(merged(flat), dense(flat), rtol=1e-4, atol=1e-5)


def test_streamlined_masked_and_compact_models_compute_the_same(merged, images, prune):
    with torch.no_grad():
        expected = merged(images)
        torch.testing.assert_close(streamline_(merged)(images), expected, rtol=1e-4, atol=1e-5)
        assert merged.forward_features(images).shape[1] == 2
    masks = prune(Masks(merged.dims), ("embed", "heads", "qk", "v", "mlp"))
    masks.install_(merged)
    small = compact(merged, masks)
    assert [b.tokens for b in small.dims.blocks] == [9, 7]
    with torch.no_grad():
        assert (small(images) - merged(images)).norm() / merged(images).norm() < 1e-5


def test_patches_that_a_mask_removes_merge_by_content(tiny, randomise, images):
    model = randomise(build_vit(**tiny, content_merge=True)).eval()
    masks = Masks(model.dims, grid=(4, 4))
    masks.remove("blocks.1.tokens", torch.arange(9))
    masks.install_(model)
    assert isinstance(model.blocks[1].tokens, ContentMerge) and model.blocks[0].tokens is None
    small = compact(model, masks)
    assert [b.tokens for b in small.dims.blocks] == [18, 9]
    with torch.no_grad():
        torch.testing.assert_close(small(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_holds_the_anchors(merged, images, tmp_path):
    save_model(tmp_path / "c.pth", merged)
    with torch.no_grad():
        assert torch.equal(load_dense(tmp_path / "c.pth")(images), merged(images))
    save_model(tmp_path / "c.pth", merged, **{"blocks.0.tokens.anchors": torch.ones(16, dtype=torch.bool)})
    with pytest.raises(CheckpointError, match="16 anchors, but 7 groups have 3"):
        load_dense(tmp_path / "c.pth")


def test_a_segmentation_head_trains_on_all_tokens(merged, images):
    trains_a_segmentation_head(merged, images, bf16=True)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in merged.blocks.parameters())


def test_exports(merged, images):
    exported = torch.export.export(merged, (images,))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(images), merged(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiles_and_runs_in_onnxruntime(merged, images):
    compiles_and_runs_in_onnxruntime(merged, images)


def test_refit_sees_the_groups_of_every_image(tiny, randomise):
    """The predictions come nearer to the dense model's; what merged nothing stays."""
    dense = randomise(build_vit(**tiny)).eval().requires_grad_(False)
    structure = pm_vit.choose_centres(torch.rand(2, 16), range(2), 0.0, 0.4)
    small = token_merging.compress(dense, structure, token_merging.Merging("content"))
    calibration, fresh = torch.randn(200, 3, 16, 16), torch.randn(64, 3, 16, 16)
    before = divergence(small(fresh), dense(fresh)).mean()
    found = refit_(dense, small.requires_grad_(False), Masks(dense.dims), calibration, 64)
    assert divergence(small(fresh), dense(fresh)).mean() < before
    assert found == pytest.approx(
        float(divergence(small(calibration[-12:]), dense(calibration[-12:])).mean()), rel=1e-3
    )


def test_counts_are_shared_out_by_what_content_costs(tiny, randomise):
    model = randomise(build_vit(**tiny)).eval().requires_grad_(False)
    images = torch.randn(32, 3, 16, 16)
    structure = choose_counts(model, range(2), images, 12, 16, content=True)
    assert structure.centres.sum() == 12 and not structure.skipped.any()
    counts = structure.centres.sum(1).tolist()
    small = token_merging.compress(model, structure, token_merging.Merging("content"))
    assert [b.tokens - 2 for b in small.dims.blocks] == counts


def test_two_ways_of_merging_do_not_mix(tiny):
    model = build_vit(**tiny)
    one = pm_vit.choose_centres(torch.rand(1, 16), (0,), 0.0, 0.4)
    other = pm_vit.choose_centres(torch.rand(1, 16), (1,), 0.0, 0.4)
    for first, then in (("grid", "content"), ("content", "grid")):
        small = token_merging.compress(model, one, token_merging.Merging(first))
        with pytest.raises(pm_vit.CompressionError, match="merged by"):
            token_merging.compress(small, other, token_merging.Merging(then))
    small = token_merging.compress(small, other, token_merging.Merging("content"))
    assert [b.tokens for b in small.dims.blocks] == [8, 8]


@pytest.mark.parametrize("mode", ["attn", "probe"])
def test_prune_finetune_eval(runs, tmp_path, capsys, mode):
    dense = runs["dense"] / "ft_checkpoint.pth"
    run(
        main_pm_vit,
        *PLAIN,
        "--prune",
        "--prune_iter",
        "4",
        "--prune_mode",
        mode,
        "--resume",
        dense,
        "--output_dir",
        tmp_path / "p",
    )
    small = load_dense(tmp_path / "p" / "pruned_checkpoint.pth")
    assert sum(b.tokens for b in small.dims.blocks) == 2 * 2 + 2 * int(16 * 0.6)
    assert all(isinstance(tokens, ContentMerge) for _, tokens in layers(small))
    start = ["--resume", tmp_path / "p" / "pruned_checkpoint.pth"]
    run(main_pm_vit, *PLAIN, *start, "--final_finetune", "1", "--lr", "4e-3", "--output_dir", tmp_path / "f")
    run(main_pm_vit, *PLAIN, "--eval", "--resume", tmp_path / "f" / "ft_checkpoint.pth")
    tuned = json.loads((tmp_path / "f" / "summary.json").read_text())["finetuned"]
    assert f"top-1 {tuned['top1']:.2f}, top-5" in capsys.readouterr().out
    if mode == "attn":
        run(
            finetune_dense,
            *PLAIN,
            "--finetune",
            tmp_path / "p",
            "--epochs",
            "1",
            "--kl_loss_coeff",
            "0",
            "--original_loss_coeff",
            "1",
        )
        run(
            main_pm_vit,
            *PLAIN,
            *start,
            "--prune",
            "--prune_mode",
            "seq",
            "--keep_rate",
            "0.3",
            "--output_dir",
            tmp_path / "again",
        )
        assert sum(b.tokens for b in load_dense(tmp_path / "again" / "pruned_checkpoint.pth").dims.blocks) == 2 * 6
        for flags, words in (
            (["--freeze_param"], "has no matrices to train"),
            (["--prune"], "seq, random and probe compress it further"),
            (["--prune", "--merge", "grid"], "use --merge content"),
        ):
            with pytest.raises(BadArguments, match=words):
                run(main_pm_vit, *PLAIN, *start, *flags, "--output_dir", tmp_path / "no")


@pytest.mark.parametrize(
    "flags, merge",
    [
        ([], "content"),
        (["--prune_rate", "0"], "content"),
        (["--prune_mode", "probe"], "content"),
        (["--prune_rate", "0.1"], "grid"),
        (["--dense_merge", "--shortcut", "skipped"], "grid"),
        (["--merge", "raster"], "raster"),
        (["--prune_mode", "clus"], "grid"),
        (["--merge_entries", "published"], "grid"),
    ],
)
def test_content_unless_a_flag_asks_for_places(flags, merge):
    args = main_pm_vit.get_args_parser().parse_args(["--prune", "--resume", "x", "--output_dir", "y", *flags])
    pm_vit_options.check_flags(args, problems := Problems())
    problems.raise_if_any()
    assert args.merge == merge and args.prune_rate == (0.0 if merge == "content" else 0.1)


def test_what_merges_by_place_goes_on_by_place(runs, tmp_path, capsys):
    """And a pruned model's speed is measured as it will merge."""
    dense, small = runs["dense"] / "ft_checkpoint.pth", tmp_path / "grid" / "pruned_checkpoint.pth"
    run(
        main_pm_vit,
        *PLAIN,
        "--prune",
        "--prune_mode",
        "seq",
        "--merge",
        "grid",
        "--resume",
        dense,
        "--output_dir",
        small.parent,
    )
    with pytest.raises(BadArguments, match="merges by place; use --merge grid"):
        run(main_pm_vit, *PLAIN, "--prune", "--prune_mode", "seq", "--resume", small, "--output_dir", tmp_path / "no")
    built = []
    for flags in ([small], [dense], [dense, "--merge", "grid"], [runs["pruned"] / "pruned_checkpoint.pth"]):
        flags = ["--speed-only", "--device", "cpu", "--resume", *map(str, flags)]
        run_ = main_pm_vit.check_args(main_pm_vit.get_args_parser().parse_args(flags))
        built.append(run_.full.arch.merge == "content")
    assert built == [False, True, False, True]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prune_rate", "0.1"], "--merge content only merges: --prune_rate 0.1 does not go with it"),
        (["--dense_merge"], "--dense_merge is of matrices, which --merge content has none of"),
        (["--merge_entries", "published"], "--merge_entries published is of matrices"),
        (["--shortcut", "skipped"], "--shortcut skipped is of matrices"),
    ],
)
def test_mistakes(runs, tmp_path, flags, words):
    with pytest.raises(BadArguments, match=words):
        run(
            main_pm_vit,
            *PLAIN,
            "--prune",
            "--merge",
            "content",
            *flags,
            "--output_dir",
            tmp_path,
            "--resume",
            runs["dense"] / "ft_checkpoint.pth",
        )


def test_a_picture_shows_the_groups_of_its_image(merged):
    pixels = torch.rand(16, 16, 3)
    found = show_tokens.groups_of(merged, pixels)
    groups, back, owner = show_tokens.pictures(found[0], pixels, (4, 4))
    assert owner.min() == 2 and owner.max() == 8 and len(owner.unique()) == 7
    torch.testing.assert_close(back, pixels)  # every patch keeps what tells it from its group
    shown = show_tokens.patches_of(groups, (4, 4))[:, 0, 0]
    assert all(torch.equal(shown[i], shown[j]) for i in range(16) for j in range(16) if owner[i] == owner[j])
