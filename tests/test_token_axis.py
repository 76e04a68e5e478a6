"""The sixth axis: the patches that a block computes on, pruned with the widths to one target."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import PLAIN, PRUNE, equal, interrupted, only, run, same, save_model, token_table

import finetune_dense
import main_full_global_latency
import main_pm_vit
from models import Masks, build_vit, compact, load_dense, macs
from models.arch import Arch
from models.tokens import layers
from pruning.allocation import allocate, interpolate
from pruning.config import PruningConfig
from pruning.global_latency import GlobalPruner
from pruning.objective import divergence
from pruning.pricing import price
from pruning.refit import refit_
from pruning.token_counts import choose_counts, share_out
from pruning.token_saliency import TokenSaliency
from pruning.value import ValuePruner
from runtime.errors import BadArguments
from training.results import EFFORT

GRID = (4, 4)


@pytest.fixture
def model(tiny, randomise):
    return randomise(build_vit(**tiny)).double().eval()


@pytest.mark.parametrize("axes", [("tokens",), ("tokens", "embed", "heads", "qk", "v", "mlp")])
def test_masked_equals_compact(model, images, prune, axes):
    masks = prune(Masks(model.dims, grid=GRID), axes)
    assert [b.tokens for b in masks.dims.blocks] == [18 - 5, 18 - 8]
    masks.install_(model)
    small = compact(model, masks)
    assert small.dims == masks.dims and len(list(layers(small))) == 2
    with torch.no_grad():
        masked, images = model(images.double()), images.double()
        assert float((small(images) - masked).norm() / masked.norm()) < 1e-10


def test_a_patch_that_goes_joins_the_nearest_survivor(model):
    masks = Masks(model.dims, grid=GRID)
    masks.remove("blocks.1.tokens", torch.arange(1, 16))
    masks.install_(model)
    assert model.blocks[0].tokens is None and model.blocks[1].tokens.owner.tolist() == [2] * 16
    masks = Masks(model.dims, grid=GRID)
    masks.remove("blocks.0.tokens", torch.tensor([0, 1, 7]))  # (0, 0), (0, 1) and (1, 3)
    masks.install_(model)
    owner = model.blocks[0].tokens.owner
    survivors = masks.keep["blocks.0.tokens"].nonzero().flatten().tolist()
    assert [survivors[o - 2] for o in owner.tolist()] == [4, 2, *range(2, 7), 3, *range(8, 16)]
    assert model.blocks[1].tokens is None


def test_an_empty_block_merges_nothing(model):
    masks = Masks(model.dims, grid=GRID)
    for axis in ("heads", "mlp", "tokens"):
        masks.remove(f"blocks.0.{axis}", torch.arange(4 if axis != "mlp" else 128))
    masks.install_(model)
    assert masks.dims.blocks[0].tokens == 18 and model.blocks[0].tokens is None


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("removed", [0, 9])
def test_saliency_is_the_loss_along_the_way_to_the_common_mean(model, images, removed, index):
    """Against central differences of the loss of every image by itself; of block 0, patches also pass the block by."""
    masks = Masks(model.dims, grid=GRID)
    masks.remove(axis := f"blocks.{index}.tokens", torch.randperm(16)[:removed])
    masks.install_(model)
    images, labels = images.double(), torch.tensor([1, 5, 7])
    saliency = TokenSaliency(model, masks, 0.0, torch.amp.GradScaler("cpu", enabled=False))
    F.cross_entropy(model(images), labels).backward()
    saliency.step()
    found = saliency.close_window()[axis]

    survivors = masks.keep[axis].nonzero().flatten().tolist()
    block, merge = model.blocks[index], model.blocks[index].tokens
    with torch.no_grad():
        x = model.blocks[:index](model._pos_embed(model.patch_embed(images)))
        M, R = (torch.eye(18).double(),) * 2 if merge is None else merge.matrices()[:2]
    distance = {(a, b): (a // 4 - b // 4) ** 2 + (a % 4 - b % 4) ** 2 for a in range(16) for b in range(16)}

    def loss(moved):
        z = M @ x + moved
        logits = model.forward_head(model.norm(model.blocks[index + 1 :](x + R @ (block.branches(z) - z))))
        return F.cross_entropy(logits, labels, reduction="none")

    expected = torch.zeros(16).double()
    for k, patch in enumerate(survivors):
        near = min((s for s in survivors if s != patch), key=lambda s: (distance[patch, s], s))
        d, n = survivors.index(near), [int((R[:, 2 + i] > 0).sum()) for i in range(len(survivors))]
        z = M @ x
        mean = (n[k] * z[:, 2 + k] + n[d] * z[:, 2 + d]) / (n[k] + n[d])
        way = torch.zeros_like(z)
        way[:, 2 + k], way[:, 2 + d] = mean - z[:, 2 + k], mean - z[:, 2 + d]
        with torch.no_grad():
            expected[patch] = ((loss(1e-5 * way) - loss(-1e-5 * way)) / 2e-5).square().mean()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)
    assert (found > 0).sum() == 16 - removed


@pytest.mark.parametrize("kind", [GlobalPruner, ValuePruner])
@pytest.mark.parametrize("target", [0.7, 0.4])
def test_tokens_compete_with_widths(model, kind, target):
    """Where they are worth little they go, where they are worth much they stay; the target is met either way."""
    left = []
    for worth in (1e-4, 1e4):
        masks = Masks(model.dims, grid=GRID)
        groups = PruningConfig().group_sizes(masks)
        pruner = kind(masks, token_table(), groups, regularization=0.0, target=target, per_event=3)
        scores = {
            axis: torch.rand(n).double() * (worth if "tokens" in axis else 1) for axis, n in masks.sizes().items()
        }
        while not (event := pruner.event(scores)).reached:
            assert event.groups
        assert target - 0.1 < pruner.ratio <= target
        assert pruner.ratio == pytest.approx(token_table().ratio(masks.dims, model.dims))
        left.append(sum(b.tokens for b in masks.dims.blocks))
    assert left[0] + 4 < left[1] and left[1] > 30


def test_refit_reads_merged_tokens(model, images):
    """A refit towards the dense model gains what a merge has lost, and never sees a label."""
    model, images = model.float(), torch.randn(256, 3, 16, 16)
    dims = [b.tokens for b in model.dims.blocks]
    masks = Masks(model.dims, grid=GRID)
    for i in range(2):
        masks.remove(f"blocks.{i}.tokens", torch.arange(0, 16, 2))
    small = compact(model, masks)
    assert [b.tokens for b in small.dims.blocks] == [n - 8 for n in dims]
    with torch.no_grad():
        lost = float(divergence(small(images[-16:]), model(images[-16:])).mean())
        found = refit_(model, small, masks, images, 64)
        again = float(divergence(small(images[-16:]), model(images[-16:])).mean())
    assert found == pytest.approx(again, rel=1e-3) and again < 0.9 * lost


def test_one_shot_prices_tokens(model):
    model = model.float().requires_grad_(False)
    masks = Masks(model.dims, grid=GRID)
    groups = PruningConfig().group_sizes(masks)
    curves, embed = price(model, torch.randn(128, 3, 16, 16), groups, 64)
    for curve in curves:
        assert set(curve["tokens"]) == {4, 6, 10, 14, 18} and curve["tokens"][18] == 0 < curve["tokens"][4]
    free = [c | dict(tokens=dict.fromkeys(c["tokens"], 0.0)) for c in curves]
    (dims, _), *_ = allocate(token_table(), model.dims, groups, free, embed, 0.5)
    assert all(b.tokens < 18 == 14 + b.heads and b.qk == 8 for b in dims.blocks)  # nothing else has to go
    assert token_table().ratio(dims, model.dims) <= 0.5


def test_the_total_is_shared_out_by_measured_need(model):
    """Exactly, for any total; the best of all ways to share it where prices add up; the model is left as it is."""
    curves = [{2: 4.0, 8: 1.0, 16: 0.5}, {2: 0.4, 8: 0.1, 16: 0.05}, {2: 0.4, 8: 0.1, 16: 0.05}]
    for total in (3, 7, 20, 33, 48):
        found = share_out(curves, 16, total)
        prices = [interpolate(curve, np.arange(1, 17)) for curve in curves]
        ways = [w for w in itertools.product(range(1, 17), repeat=3) if sum(w) == total]
        best = min(ways, key=lambda w: sum(p[n - 1] for p, n in zip(prices, w, strict=True)))
        assert sum(found) == total
        assert sum(p[n - 1] for p, n in zip(prices, found, strict=True)) == pytest.approx(
            sum(p[n - 1] for p, n in zip(prices, best, strict=True))
        )
    model = model.float()
    with torch.no_grad():
        model.blocks[1].attn.proj.weight.zero_()  # nothing that block 1 says of patches is read any more
        model.blocks[1].attn.proj.bias.zero_()
    structure = choose_counts(model, (0, 1), torch.randn(64, 3, 16, 16), 20, 32)
    first, second = structure.centres.sum(1).tolist()
    assert first + second == 20 and first > second and not structure.skipped.any()
    assert all(block.tokens is None for block in model.blocks)


# -------------------------------------------------------------------------------------------------------------- scripts
@pytest.fixture
def job(runs, tmp_path):
    token_table(width=0.1).save(tmp_path / "table.json")
    return [
        *PRUNE,
        "--initial-checkpoint",
        runs["dense"] / "ft_checkpoint.pth",
        "--latency_look_up_table",
        tmp_path / "table.json",
        "--prune_per_iter",
        "64",
        "--interval_prune",
        "3",
        "--tokens",
    ]


def test_pruned_with_widths_resumed_and_finetuned(job, tmp_path, monkeypatch):
    flags = [*job, "--latency_target", "0.5", "--latency_regularization", "1"]
    run(main_full_global_latency, *flags, "--output_dir", tmp_path / "whole")
    folder = only(tmp_path / "whole", "global_*")
    summary = json.loads((folder / "summary.json").read_text())["pruned"]
    assert 0.4 < summary["latency_predicted"] <= 0.5
    small = load_dense(folder / "pruned_checkpoint.pth")
    assert any(b.tokens < 18 for b in small.dims.blocks) and small.dims.to_dict() == json.loads(
        (folder / "dims.json").read_text()
    )
    interrupted(monkeypatch, main_full_global_latency, [*flags, "--output_dir", tmp_path / "broken"], 8)
    run(main_full_global_latency, *flags, "--output_dir", tmp_path / "broken", "--resume")
    equal(*(only(tmp_path / name, "global_*") for name in ("whole", "broken")), "pruned_checkpoint.pth")
    run(
        finetune_dense,
        *PLAIN,
        "--finetune",
        folder,
        "--epochs",
        "1",
        "--kl_loss_coeff",
        "0",
        "--original_loss_coeff",
        "1",
    )
    (tuned,) = folder.glob("ft_dense_*")
    tuned = load_dense(tuned / "ft_checkpoint.pth")
    assert tuned.dims == small.dims
    i, tokens = next(layers(tuned))
    assert not torch.equal(tokens.merge, small.blocks[i].tokens.merge)  # M trains, on its support


def test_a_dry_run_tries_steps_that_score_tokens(job, tmp_path, monkeypatch, capsys):
    step, seen = TokenSaliency.step, []
    monkeypatch.setattr(TokenSaliency, "step", lambda self: (step(self), seen.append(float(self.accumulated.sum()))))
    run(main_full_global_latency, *job, "--latency_target", "0.5", "--dry-run", "--output_dir", tmp_path / "out")
    assert re.search(r"estimate: [\d.]+ s a step, .* GiB of memory", capsys.readouterr().out)
    assert len(seen) == 3 and min(seen) > 0 and not (tmp_path / "out").exists()


def test_recomputed_blocks_are_scored_once(job, tmp_path):
    """--grad-checkpointing runs a block again in the backward pass: the scores are those of the first time."""
    flags = [*job, "--latency_target", "0.5", "--latency_regularization", "1", "--drop-path", "0", "--epochs", "2"]
    for name, more in (("kept", []), ("recomputed", ["--grad-checkpointing"])):
        run(main_full_global_latency, *flags, *more, "--output_dir", tmp_path / name)
    kept, recomputed = (
        torch.load(only(tmp_path / name, "global_*") / "pruned_checkpoint.pth", weights_only=True)
        for name in ("kept", "recomputed")
    )
    assert same(kept["masks"], recomputed["masks"]) and kept["dims"] == recomputed["dims"]


def test_one_shot_with_tokens(job, tmp_path):
    flags = [f for f in job if f not in ("--latency_regularization", "1e-4")]
    run(
        main_full_global_latency,
        *flags,
        "--one_shot",
        "--calib_images",
        "256",
        "--latency_target",
        "0.3",
        "--output_dir",
        tmp_path,
    )
    folder = only(tmp_path, "one_shot_*")
    small = load_dense(folder / "pruned_checkpoint.pth")
    assert json.loads((folder / "summary.json").read_text())["pruned"]["latency_predicted"] <= 0.3
    assert any(b.tokens < 18 for b in small.dims.blocks)


def test_one_shot_with_tokens_by_content(job, runs, tmp_path):
    """Priced, allocated, refitted, and finetuned further; the table must have been measured so."""
    flags = [f for f in job if f not in ("--latency_regularization", "1e-4", "--tokens")] + ["--tokens", "content"]
    flags += ["--output_dir", tmp_path]
    with pytest.raises(BadArguments, match="--tokens content goes with --one_shot"):
        run(main_full_global_latency, *flags, "--latency_target", "0.5")
    flags += ["--one_shot", "--calib_images", "256", "--latency_target", "0.3"]
    with pytest.raises(BadArguments, match="tokens merged by place: build one with .* --merge content"):
        run(main_full_global_latency, *flags)
    token_table(width=0.1, model_kwargs=dict(content_merge=True)).save(tmp_path / "table.json")
    run(main_full_global_latency, *flags, "--latency_look_up_table", tmp_path / "table.json")
    folder = only(tmp_path, "one_shot_*_tokens_content")
    small = load_dense(folder / "pruned_checkpoint.pth")
    assert any(b.tokens < 18 for b in small.dims.blocks)
    assert small.arch_kwargs["content_merge"] and small.arch_kwargs["lean_last"] and small.blocks[-1].num_queries == 2
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["dense"]["macs"] == Arch.of_model(small).plain.macs()
    assert summary["pruned"]["macs"] == macs(small.arch, small.dims, **small.arch_kwargs)
    run(
        finetune_dense,
        *PLAIN,
        "--finetune",
        folder,
        "--epochs",
        "1",
        "--kl_loss_coeff",
        "0",
        "--original_loss_coeff",
        "1",
    )
    run(
        finetune_dense,
        *PLAIN,
        "--finetune",
        folder,
        "--epochs",
        "1",
        "--kl_loss_coeff",
        "0",
        "--original_loss_coeff",
        "1",
        "--scratch",
    )
    fresh = load_dense(only(folder, "scratch_*") / "ft_checkpoint.pth")
    for (_, ours), (_, theirs) in zip(layers(fresh), layers(small), strict=True):
        assert torch.equal(ours.anchors, theirs.anchors)


def test_a_lean_model_of_full_width_is_not_the_dense_one(job, runs, tmp_path):
    """Finetuned, it does not take the dense model's place in the summary."""
    dense = load_dense(runs["dense"] / "ft_checkpoint.pth")
    lean = build_vit(dense.arch, **dense.arch_kwargs | dict(lean_last=True))
    lean.load_state_dict(dense.state_dict())
    save_model(tmp_path / "lean.pth", lean)
    run(
        finetune_dense,
        *PLAIN,
        "--finetune",
        tmp_path / "lean.pth",
        "--epochs",
        "1",
        "--kl_loss_coeff",
        "0",
        "--original_loss_coeff",
        "1",
        effort=EFFORT,
    )
    summary = json.loads((only(tmp_path, "ft_dense_*") / "summary.json").read_text())
    assert list(summary) == ["finetuned"] and summary["finetuned"]["latency_measured"] < 1
    assert summary["finetuned"]["macs"] == macs(lean.arch, **lean.arch_kwargs)


@pytest.mark.parametrize(
    "merge, more",
    [
        ("grid", []),
        ("content", []),
        ("content", ["--shrink_interval", "1"]),
        ("grid", ["--selection", "value"]),
    ],
)
def test_widths_of_a_token_compressed_model(job, runs, tmp_path, monkeypatch, merge, more):
    """Tokens first, then widths: the structure stays, the ratio is to the dense model, the result finetunes."""
    run(
        main_pm_vit,
        *PLAIN,
        "--prune",
        "--prune_iter",
        "2",
        "--keep_rate",
        "0.7",
        "--merge_list",
        "1",
        "--merge",
        merge,
        "--resume",
        runs["dense"] / "ft_checkpoint.pth",
        "--output_dir",
        tmp_path / "tokens",
    )
    start = tmp_path / "tokens" / "pruned_checkpoint.pth"
    flags = [f for f in job if f != "--tokens"] + ["--initial-checkpoint", start, "--latency_target", "0.5"]
    flags += more if "--selection" not in more else [*more, "--latency_regularization", "0"]
    run(main_full_global_latency, *flags, "--output_dir", tmp_path / "whole")
    folder = only(tmp_path / "whole", "global_*")
    before, after = load_dense(start), load_dense(folder / "pruned_checkpoint.pth")
    assert [b.tokens for b in after.dims.blocks] == [b.tokens for b in before.dims.blocks] == [18, 13]
    assert params_of(after) < params_of(before)
    assert same(*(dict(model.blocks[1].tokens.named_buffers()) for model in (before, after)))
    summary = json.loads((folder / "summary.json").read_text())
    dense = build_vit(before.arch, **before.arch_kwargs).dims
    predicted = token_table(width=0.1).ratio(after.dims, dense)
    assert set(summary) == {"pruned"} and summary["pruned"]["latency_predicted"] == pytest.approx(predicted, abs=1e-4)
    assert 0.4 < predicted <= 0.5
    interrupted(monkeypatch, main_full_global_latency, [*flags, "--output_dir", tmp_path / "broken"], 8)
    run(main_full_global_latency, *flags, "--output_dir", tmp_path / "broken", "--resume")
    equal(*(only(tmp_path / name, "global_*") for name in ("whole", "broken")), "pruned_checkpoint.pth")
    run(
        finetune_dense,
        *PLAIN,
        "--finetune",
        folder,
        "--epochs",
        "1",
        "--kl_loss_coeff",
        "1000",
        "--original_loss_coeff",
        "1",
    )


def params_of(model):
    return sum(p.numel() for p in model.parameters())


def test_pruned_widths_are_pruned_further(job, runs, tmp_path):
    """From a checkpoint in its masked form; what needs a full-width model says so."""
    start = runs["pruned"] / "pruned_checkpoint.pth"
    flags = [f for f in job if f != "--tokens"] + [
        "--initial-checkpoint",
        start,
        "--latency_target",
        "0.4",
        "--latency_look_up_table",
        runs["table"],
    ]
    run(main_full_global_latency, *flags, "--output_dir", tmp_path / "more")
    folder = only(tmp_path / "more", "global_*")
    before, after = load_dense(start), load_dense(folder / "pruned_checkpoint.pth")
    assert params_of(after) < params_of(before) and set(json.loads((folder / "summary.json").read_text())) == {"pruned"}
    with pytest.raises(BadArguments) as error:
        run(
            main_full_global_latency,
            *flags,
            "--tokens",
            "--align",
            "--compensate",
            "end",
            "--calib_images",
            "128",
            "--output_dir",
            tmp_path,
        )
    for flag in ("--tokens", "--align", "--compensate"):
        assert f"{flag} starts from a full-width model; {start} is pruned" in str(error.value)


def test_what_does_not_go_with_tokens(job, runs, tmp_path):
    flags = [
        *job,
        "--compile",
        "--shrink_interval",
        "2",
        "--latency_look_up_table",
        runs["table"],
        "--output_dir",
        tmp_path / "out",
    ]
    with pytest.raises(BadArguments) as error:
        run(main_full_global_latency, *flags)
    assert all(
        text in str(error.value)
        for text in (
            "--tokens does not go with --compile",
            "--tokens does not go with --shrink_interval",
            "knows one token count alone: build it with python -m latency.build_table",
        )
    )
