"""main_pm_vit.py: the published flow on the digits, its modes, what goes in from other methods, and mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import PLAIN, run, same

import finetune_dense
import main_pm_vit
from datasets import build_dataset
from files import checkpoint
from models import load_dense
from models.tokens import SKIPPED, DenseTokenMerge, layers
from pruning.objective import divergence
from pruning.token_merging import uniform as uniform_tokens
from recipes import pm_vit
from runtime.errors import BadArguments, RunFailed

ROOT = Path(__file__).parent.parent
SCORE = [*PLAIN, "--prune", "--prune_iter", "4", "--merge", "grid"]
TUNE = [
    *PLAIN,
    "--final_finetune",
    "2",
    "--lr",
    "4e-3",
    "--distillation-type",
    "soft",
    "--distillation-tau",
    "20",
    "--distillation-alpha",
    "0.8",
]


@pytest.fixture(scope="module")
def pruned(runs, tmp_path_factory):
    """Folder of a compressed digits model."""
    folder = tmp_path_factory.mktemp("pm") / "pruned"
    run(main_pm_vit, *SCORE, "--resume", runs["dense"] / "ft_checkpoint.pth", "--output_dir", folder)
    return folder


@pytest.mark.parametrize("kind, forged", [("soft", ("none", 0.8, 320.0, 1.0)), ("hard", ("hard", 0.8 / 1.8, 0.0, 1.8))])
def test_older_checkpoints_hold_the_weights_of_the_loss_in_place_of_flags(runs, pruned, tmp_path, kind, forged):
    """They resume with the same flags, and with no others."""
    flags = [*TUNE, "--distillation-type", kind, "--teacher-path", runs["dense"] / "ft_checkpoint.pth"]
    flags += ["--output_dir", tmp_path]
    run(main_pm_vit, *flags, "--resume", pruned / "pruned_checkpoint.pth")
    path = tmp_path / "ft_checkpoint.pth"
    content = checkpoint.load(path)
    names = ("distillation_type", "distillation_alpha", "kl_loss_coeff", "original_loss_coeff")
    older = content["args"] | dict(zip(names, forged, strict=True))
    checkpoint.save(path, **content | dict(args=older))
    run(main_pm_vit, *flags, "--resume", path)
    checkpoint.save(path, **content | dict(args=older))
    with pytest.raises(BadArguments, match="was made with other arguments: .*alpha was|was made with .*coeff was"):
        run(main_pm_vit, *flags, "--distillation-alpha", "0.7", "--resume", path)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def tokens_of(path):
    return [b.tokens for b in load_dense(path).dims.blocks]


def test_prune_finetune_eval(runs, pruned, tmp_path, capsys):
    summary = summary_of(pruned)
    assert sum(tokens_of(pruned / "pruned_checkpoint.pth")) == 2 * 2 + 2 * int(16 * 0.6)
    assert summary["pruned"]["macs"] < summary["dense"]["macs"] and summary["dense"]["latency_measured"] == 1
    run(
        main_pm_vit,
        *TUNE,
        "--resume",
        pruned / "pruned_checkpoint.pth",
        "--output_dir",
        tmp_path,
        "--teacher-path",
        runs["dense"] / "ft_checkpoint.pth",
    )
    assert f"next: python -m tools.report {tmp_path}\n" in capsys.readouterr().out
    run(main_pm_vit, *PLAIN, "--eval", "--resume", tmp_path / "ft_checkpoint.pth")
    tuned = summary_of(tmp_path)["finetuned"]
    assert f"top-1 {tuned['top1']:.2f}, top-5" in capsys.readouterr().out
    assert tuned["macs"] == summary["pruned"]["macs"] and summary_of(tmp_path)["pruned"] == summary["pruned"]
    before, after = (load_dense(f) for f in (pruned / "pruned_checkpoint.pth", tmp_path / "ft_checkpoint.pth"))
    for (_, old), (_, new) in zip(layers(before), layers(after), strict=True):
        assert torch.equal(old.owner, new.owner) and not torch.equal(old.merge, new.merge)


def test_a_finetuning_run_goes_on_where_it_was(runs, pruned, tmp_path, monkeypatch):
    flags = [*TUNE, "--teacher-path", runs["dense"] / "ft_checkpoint.pth", "--output_dir"]
    run(main_pm_vit, *flags, tmp_path / "whole", "--resume", pruned / "pruned_checkpoint.pth")

    class Break(Exception):
        pass

    def fail_in_the_second_epoch(folder, **line):
        if line["epoch"]:
            raise Break

    with monkeypatch.context() as patch, pytest.raises(Break):
        patch.setattr("training.dense.append_log", fail_in_the_second_epoch)
        run(main_pm_vit, *flags, tmp_path / "broken", "--resume", pruned / "pruned_checkpoint.pth")
    run(main_pm_vit, *flags, tmp_path / "broken", "--resume", tmp_path / "broken" / "ft_checkpoint.pth")
    whole, resumed = (torch.load(tmp_path / n / "ft_checkpoint.pth", weights_only=True) for n in ("whole", "broken"))
    assert same(whole["model"], resumed["model"]) and same(whole["optimizer"], resumed["optimizer"])


@pytest.mark.parametrize("frozen, moved", [("--freeze_param", True), ("--freeze_matrix", False)])
def test_frozen_parts_stay(pruned, tmp_path, frozen, moved):
    """And the learning rate reaches what is not frozen."""
    run(
        main_pm_vit,
        *PLAIN,
        "--final_finetune",
        "1",
        "--lr",
        "1e-2",
        frozen,
        "--resume",
        pruned / "pruned_checkpoint.pth",
        "--output_dir",
        tmp_path,
    )
    before, after = (load_dense(f) for f in (pruned / "pruned_checkpoint.pth", tmp_path / "ft_checkpoint.pth"))
    new = dict(after.named_parameters())
    for name, old in before.named_parameters():
        if name != "blocks.1.tokens.reconstruct":  # the head does not read patches
            assert torch.equal(old, new[name]) != ((".tokens." in name) == moved), name


@pytest.mark.parametrize("mode", ["head", "head_entropy", "random", "seq", "clus", "probe"])
def test_the_other_modes(runs, pruned, tmp_path, mode):
    start = pruned / "pruned_checkpoint.pth" if mode == "clus" else runs["dense"] / "ft_checkpoint.pth"
    run(main_pm_vit, *SCORE, "--prune_mode", mode, "--keep_rate", "0.4", "--resume", start, "--output_dir", tmp_path)
    assert sum(tokens_of(tmp_path / "pruned_checkpoint.pth")) == 2 * 2 + 2 * 6
    if mode == "clus":
        old, new = (load_dense(f / "pruned_checkpoint.pth") for f in (pruned, tmp_path))
        for (_, a), (_, b) in zip(layers(old), layers(new), strict=True):
            assert torch.equal(a.owner == SKIPPED, b.owner == SKIPPED)


def test_as_published(runs, tmp_path):
    """Raster groups, the centre's entry 1, rebuilt from the group alone, matrices in full."""
    run(
        main_pm_vit,
        *SCORE,
        "--merge",
        "raster",
        "--merge_entries",
        "published",
        "--shortcut",
        "skipped",
        "--dense_merge",
        "--merge_list",
        "1",
        "--resume",
        runs["dense"] / "ft_checkpoint.pth",
        "--output_dir",
        tmp_path / "p",
    )
    run(
        main_pm_vit,
        *PLAIN,
        "--final_finetune",
        "1",
        "--resume",
        tmp_path / "p" / "pruned_checkpoint.pth",
        "--output_dir",
        tmp_path / "f",
    )
    ((i, tokens),) = layers(load_dense(tmp_path / "f" / "ft_checkpoint.pth"))
    assert i == 1 and isinstance(tokens, DenseTokenMerge) and (tokens.merge_matrix != 0).float().mean() > 0.9


@pytest.mark.parametrize("start", ["dense", "pruned"])
def test_a_refit_brings_the_predictions_back(runs, tmp_path, start):
    """Nearer to the model that was compressed; structure and token matrices as without it."""
    path = runs[start] / ("ft_checkpoint.pth" if start == "dense" else "pruned_checkpoint.pth")
    flags = [*SCORE, "--prune_mode", "seq", "--resume", path]
    run(main_pm_vit, *flags, "--output_dir", tmp_path / "cut")
    run(main_pm_vit, *flags, "--compensate", "--calib_images", "512", "--output_dir", tmp_path / "refitted")
    whole, cut, refitted = (
        load_dense(f).eval() for f in (path, *(tmp_path / n / "pruned_checkpoint.pth" for n in ("cut", "refitted")))
    )
    assert cut.dims == refitted.dims
    dataset, _ = build_dataset(False, main_pm_vit.get_args_parser().parse_args([*PLAIN, "--input-size", "16"]), False)
    images = torch.stack([image for image, _ in dataset])
    with torch.inference_mode():
        taught, *students = (model(images) for model in (whole, cut, refitted))
    before, after = (divergence(found, taught).mean() for found in students)
    assert after < 0.7 * before
    for (_, old), (_, new) in zip(layers(cut), layers(refitted), strict=True):
        assert same(old.state_dict(), new.state_dict())


def test_a_pruned_model_goes_in_and_comes_out(runs, tmp_path, capsys):
    """Widths by NViT, tokens by Prune and Merge, finetuned by finetune_dense.py."""
    run(main_pm_vit, *SCORE, "--resume", runs["pruned"] / "pruned_checkpoint.pth", "--output_dir", tmp_path)
    before, after = (load_dense(f / "pruned_checkpoint.pth").dims for f in (runs["pruned"], tmp_path))
    assert after.embed == before.embed and after.blocks[0].mlp == before.blocks[0].mlp
    assert after.blocks[0].tokens < before.blocks[0].tokens
    assert set(summary_of(tmp_path)) == {"pruned"}  # a start that was pruned is no dense model
    run(
        finetune_dense,
        *PLAIN,
        "--finetune",
        tmp_path,
        "--epochs",
        "1",
        "--kl_loss_coeff",
        "0",
        "--original_loss_coeff",
        "1",
    )
    (tuned,) = tmp_path.glob("ft_dense_*")
    assert load_dense(tuned / "ft_checkpoint.pth").dims == after


def test_what_full_matrices_cannot_hold_ends_in_a_line(runs, tmp_path):
    start = [*SCORE, "--resume", runs["dense"] / "ft_checkpoint.pth", "--shortcut", "skipped", "--dense_merge"]
    run(main_pm_vit, *start, "--output_dir", tmp_path)
    again = [*SCORE, "--prune_mode", "clus", "--keep_rate", "0.3", "--resume", tmp_path / "pruned_checkpoint.pth"]
    with pytest.raises(RunFailed, match="no place for merged patches' shortcut"):
        run(main_pm_vit, *again, "--output_dir", tmp_path / "again")
    with pytest.raises(RunFailed, match="patches that are not skipped"):
        run(main_pm_vit, *again, "--keep_rate", "1", "--prune_rate", "0", "--output_dir", tmp_path / "more")


def test_speed_needs_no_data(pruned, capsys):
    run(
        main_pm_vit,
        "--speed-only",
        "--device",
        "cpu",
        "--batch-size",
        "2",
        "--resume",
        pruned / "pruned_checkpoint.pth",
    )
    assert "dense" in (line := capsys.readouterr().out) and "compressed" in line and line.strip().endswith("x")


@pytest.mark.parametrize("name", ["tmvit_tiny_patch16_224", "tmit_tiny_patch16_224"])
def test_published_names_are_aliases(name, tmp_path):
    parser = main_pm_vit.get_args_parser()
    args = parser.parse_args(["--model", name, "--speed-only"])
    model = pm_vit.read_model(args)
    assert model.full.arch.name == "deit_tiny_patch16_224"
    assert uniform_tokens(model.dims, 0.6, 1).blocks[0].tokens == 118


@pytest.mark.slow
def test_two_processes_choose_what_one_does(runs, tmp_path):
    flags = [*SCORE, "--seed", "3", "--no-repeated-aug", "--resume", str(runs["dense"] / "ft_checkpoint.pth")]
    run(main_pm_vit, *flags, "--output_dir", tmp_path / "one")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "main_pm_vit.py",
            *map(str, flags),
            "--batch-size",
            "32",
            "--output_dir",
            str(tmp_path / "two"),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    one, two = (torch.load(tmp_path / n / "pruned_checkpoint.pth", weights_only=True) for n in ("one", "two"))
    assert one["dims"] == two["dims"]
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"] if k.endswith("owner"))


def complaint(*flags):
    with pytest.raises(BadArguments) as caught:
        run(main_pm_vit, *flags)
    return str(caught.value)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prune_rate", "0.5", "--keep_rate", "0.6"], "sum to more than 1"),
        (["--merge_list", "1", "0"], "ascending order, not 1 0"),
        (["--merge_list", "0", "7"], "names block 7, the model has blocks 0 to 1"),
        (["--prune_mode", "clus"], "compresses a compressed model"),
        (["--prune_mode", "probe", "--prune_rate", "0.1"], "probe only merges: --prune_rate 0.1 does not go with it"),
        (["--prune_mode", "probe", "--calib_images", "20"], "--calib_images must be at least 64"),
        (["--compensate", "--calib_images", "20"], "--calib_images must be at least 64"),
        (["--dense_merge"], "--dense_merge goes with --shortcut skipped"),
        (["--eval"], "three things to do"),
        (["--keep_rate", "0"], "--keep_rate must be in (0, 1]"),
        (["--keep_rate", "0.01"], "leaves a layer no centre"),
        (["--input-size", "32"], "is for images of 16"),
    ],
)
def test_mistakes(runs, tmp_path, flags, words):
    start = ["--resume", runs["dense"] / "ft_checkpoint.pth", "--output_dir", tmp_path / "o"]
    assert words in complaint(*SCORE, *start, *flags)


def test_a_model_without_token_structure(runs, tmp_path):
    start = ["--resume", runs["dense"] / "ft_checkpoint.pth", "--output_dir", tmp_path]
    assert "has no token structure" in complaint(*PLAIN, "--eval", *start)
    assert "has no token structure" in complaint(*PLAIN, *start)
    assert "--compensate goes with --prune" in complaint(*PLAIN, *start, "--compensate")
    assert "no dense model to distil from" not in complaint(*PLAIN, *start, "--distillation-type", "soft")
