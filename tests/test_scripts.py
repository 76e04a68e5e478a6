"""Prune, compact and finetune end to end on the digits with a two-block model: files, figures, resume."""

import json
import re
from pathlib import Path

import pytest
import torch

import finetune_dense
import finetuning
import main_full_global_latency
from checkpoint import KEYS
from models import Masks, ViTDims, build_vit, load_dense
from models.vit import TokenLogits
from tools import report
from utils import BadArguments

ROOT = Path(__file__).parent.parent
MODEL = ["--model", "deit_tiny_distilled_patch16_224", "--model-kwargs",
         "img_size=16", "patch_size=4", "embed_dim=32", "depth=2", "num_heads=4"]  # fmt: skip
PLAIN = ["--data-set", "DIGITS", "--num_workers", "0", "--device", "cpu", "--mixup", "0", "--cutmix", "0", "--aa", "",
         "--color-jitter", "0", "--reprob", "0", "--drop-path", "0.1", "--batch-size", "64"]  # fmt: skip
TRAIN = [
    "--scratch",
    *MODEL,
    *PLAIN,
    "--epochs",
    "3",
    "--lr",
    "1e-2",
    "--kl_loss_coeff",
    "0",
    "--original_loss_coeff",
    "1",
]
PRUNE = [*PLAIN, "--pruning", "--latency_target", "0.6", "--latency_regularization", "1e-4", "--prune_per_iter", "64",
         "--interval_prune", "2", "--student_eval=True", "--epochs", "5", "--lr", "4e-3", "--kl_loss_coeff", "10000",
         "--original_loss_coeff", "1"]  # fmt: skip
TUNE = [*PLAIN, "--epochs", "2", "--lr", "4e-3", "--kl_loss_coeff", "10000", "--original_loss_coeff", "1"]


def run(script, *flags):
    script.main(script.get_args_parser().parse_args([str(f) for f in flags]))


def table_file(path):
    """Seconds that follow the widths; the real table is tested with its own script."""
    data = {
        f"EMB_{e}": {
            f"QK_{h}_{q}": {f"V_{v}": {f"MLP_{m}": 1e-6 * e * (h * 2 * (q + v) + 2 * m + 20) for m in (1, 128)}
                            for v in (1, 8)} for h in (1, 4) for q in (1, 8)
        } for e in (4, 32)
    }  # fmt: skip
    path.write_text(json.dumps(data | dict(_meta=dict(batch=16))))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a dense, a pruning and a finetuning run."""
    root = tmp_path_factory.mktemp("runs")
    run(finetune_dense, *TRAIN, "--output_dir", root / "dense")
    (dense,) = (root / "dense").glob("scratch_*")
    table = table_file(root / "table.json")
    run(main_full_global_latency, *PRUNE, "--initial-checkpoint", dense / "ft_checkpoint.pth", "--output_dir", root,
        "--latency_look_up_table", table)  # fmt: skip
    (pruned,) = root.glob("global_prune_*")
    run(finetune_dense, *TUNE, "--finetune", pruned)
    (tuned,) = pruned.glob("ft_dense_*")
    return dict(root=root, dense=dense, pruned=pruned, tuned=tuned, table=table)


def files(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("events.") and not p.is_dir())


def test_a_pruning_run_leaves_the_files_of_the_contract(runs):
    assert files(runs["pruned"]) == [
        "args.json", "checkpoint.pth", "dims.json", "log.txt", "pruned_checkpoint.pth", "summary.json"
    ]  # fmt: skip
    assert runs["pruned"].name == (
        "global_prune_DIGITS_deit_tiny_distilled_patch16_224_lr0.004_Global_0_lat_0.0001_target_0.6_ft_5"
    )
    debug = files(runs["pruned"] / "debug")
    assert debug[0] == "debugOutput_dimension_00000001.txt" and "debugOutput_pruning_00000001.txt" in debug
    rows = [(runs["pruned"] / "debug" / n).read_text().strip().split(",") for n in debug if "dimension" in n]
    assert all(len(row) == 1 + 4 * 2 for row in rows)
    dims = ViTDims.from_dict(json.loads((runs["pruned"] / "dims.json").read_text()))
    assert [int(n) for n in rows[-1]] == [
        dims.embed, *(getattr(b, a) for a in ("heads", "qk", "v", "mlp") for b in dims.blocks)
    ]  # fmt: skip
    assert list(runs["pruned"].glob("events.*"))


def test_the_target_is_met_and_the_summary_says_so(runs):
    summary = json.loads((runs["tuned"] / "summary.json").read_text())
    assert list(summary) == ["dense", "pruned", "finetuned"]
    keys = {"top1", "params", "macs", "latency_predicted", "latency_measured", "device", "batch", "dtype", "compiled",
            "dims"}
    assert all(set(stage) == keys for stage in summary.values())
    assert 0.5 < summary["pruned"]["latency_predicted"] <= 0.6
    assert summary["finetuned"]["params"] == summary["pruned"]["params"] < summary["dense"]["params"]
    assert 0 < summary["finetuned"]["latency_measured"] < 1.2


def test_a_finetuning_run_leaves_the_files_of_the_contract(runs):
    assert runs["tuned"].name == "ft_dense_2_lr_0.004_a_0.5_T_1.0"
    assert files(runs["tuned"]) == [
        "args.json", "dims.json", "ft_best.pth", "ft_checkpoint.pth", "log.txt", "summary.json"
    ]  # fmt: skip
    lines = [json.loads(line) for line in (runs["tuned"] / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    for key in ("train_lr", "train_loss", "train_main_loss_value", "train_orig_loss_value", "test_loss", "test_acc1",
                "test_acc5", "test_ema_acc1", "n_parameters"):  # fmt: skip
        assert key in lines[0]


def test_masked_pruned_and_compact_checkpoints_agree(runs):
    content = torch.load(runs["pruned"] / "pruned_checkpoint.pth", weights_only=True)
    assert sorted(content) == sorted(KEYS)
    student = build_vit(content["arch"]["name"], **content["arch"]["kwargs"]).eval()
    student.load_state_dict(content["model"])
    masks = Masks(student.dims)
    masks.load_state_dict(content["masks"])
    before = {k: v.clone() for k, v in student.state_dict().items()}
    masks.install_(student)
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())  # already zero in the file
    images = torch.randn(4, 3, 16, 16)
    dense = load_dense(runs["pruned"] / "pruned_checkpoint.pth")
    error = (dense(images) - student(images)).norm() / student(images).norm()
    assert error <= 1e-5 and dense.dims.to_dim() == content["dim"]


def test_training_learns(runs):
    for folder in ("dense", "tuned"):
        losses = [json.loads(line)["train_loss"] for line in (runs[folder] / "log.txt").read_text().splitlines()]
        assert losses[-1] < losses[0], folder


def test_the_finetuned_checkpoint_is_smaller_and_has_the_same_keys(runs):
    tuned, pruned = (torch.load(runs[k] / f, weights_only=True) for k, f in
                     (("tuned", "ft_checkpoint.pth"), ("pruned", "pruned_checkpoint.pth")))  # fmt: skip
    assert sorted(tuned) == sorted(pruned) and tuned["masks"] is None
    sizes = [
        (runs[k] / f).stat().st_size for k, f in (("tuned", "ft_checkpoint.pth"), ("pruned", "pruned_checkpoint.pth"))
    ]
    assert sizes[0] < sizes[1]


def test_evaluation_prints_what_was_saved(runs, capsys):
    run(finetune_dense, *PLAIN, "--eval", "--finetune", runs["tuned"] / "ft_checkpoint.pth")
    printed = capsys.readouterr().out
    content = torch.load(runs["tuned"] / "ft_checkpoint.pth", weights_only=True)
    assert f"top-1 {content['metrics']['acc1']:.2f}" in printed and "360 images" in printed
    run(finetune_dense, *PLAIN, "--eval", "--finetune", runs["pruned"])
    assert re.search(r"top-1 \d+\.\d\d", capsys.readouterr().out)


def same(a, b):
    """Equal tensors and values, all the way down."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Stop(Exception):
    pass


def stop_after(monkeypatch, script, epochs):
    """Make the script's `save` raise after it has written the given number of epochs."""
    original, count = script.save, []

    def save(name, *rest):
        original(name, *rest)
        count.append(name)
        if count.count("ft_checkpoint.pth") + count.count("checkpoint.pth") == epochs:
            raise Stop

    monkeypatch.setattr(script, "save", save)


def test_finetuning_resumes_bit_for_bit(runs, tmp_path, monkeypatch):
    flags = [*TUNE, "--finetune", tmp_path / "pruned", "--epochs", "2"]
    (tmp_path / "pruned").mkdir()
    for name in ("pruned_checkpoint.pth", "summary.json"):
        (tmp_path / "pruned" / name).write_bytes((runs["pruned"] / name).read_bytes())
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, finetuning, 1)
        run(finetune_dense, *flags)
    with pytest.raises(BadArguments, match="--start_epoch is 0 .* epoch 1"):
        run(finetune_dense, *flags, "--resume", "--start_epoch", "0")
    run(finetune_dense, *flags, "--resume", "--start_epoch", "1")
    (folder,) = (tmp_path / "pruned").glob("ft_dense_*")
    resumed, straight = (torch.load(f / "ft_checkpoint.pth", weights_only=True) for f in (folder, runs["tuned"]))
    for key in ("model", "model_ema", "optimizer", "lr_scheduler", "rng", "metrics"):
        assert same(resumed[key], straight[key]), key


def test_pruning_resumes_bit_for_bit(runs, tmp_path, monkeypatch):
    flags = [*PRUNE, "--initial-checkpoint", runs["dense"] / "ft_checkpoint.pth", "--output_dir", tmp_path,
             "--latency_look_up_table", runs["table"], "--prune_per_iter", "16", "--interval_prune", "6"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(main_full_global_latency, *flags, "--output_dir", whole)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, main_full_global_latency, 1)
        run(main_full_global_latency, *flags, "--output_dir", broken)
    run(main_full_global_latency, *flags, "--output_dir", broken, "--resume")
    straight, resumed = (
        torch.load(next(f.glob("global_*")) / "pruned_checkpoint.pth", weights_only=True) for f in (whole, broken)
    )
    assert straight["step"] > 22  # the run went on past the epoch after which it was broken off
    for key in ("model", "masks", "optimizer", "pruner", "step", "dims"):
        assert same(straight[key], resumed[key]), key


def test_both_heads_are_averaged_in_evaluation(tiny, images):
    model = build_vit(**tiny).eval()
    cls, dist = TokenLogits(model)(images)
    torch.testing.assert_close((cls + dist) / 2, model(images))


def test_the_report_of_a_run(runs, tmp_path, capsys):
    run(report, runs["tuned"], "--output", tmp_path)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("dense", "pruned", "finetuned", "measured latency", "speed-up"))
    assert files(tmp_path) == ["summary.json", "widths.png"]
    assert (tmp_path / "summary.json").read_text() == (runs["tuned"] / "summary.json").read_text()
    with pytest.raises(BadArguments, match="not the folder of a finished run"):
        run(report, tmp_path / "nothing")


def test_torch_hub_loads_a_checkpoint(runs):
    path = runs["tuned"] / "ft_checkpoint.pth"
    model = torch.hub.load(str(ROOT), "vit_from_checkpoint", str(path), source="local")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), load_dense(path)(images))
