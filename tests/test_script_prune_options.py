"""Options of pruning with training, end to end on the digits: the target, masked equals compact, resume, two ranks."""

import json

import pytest
import torch
from jobs import PRUNE, equal, interrupted, only, run
from test_distributed import EXACT, distance, launch, launcher

import main_full_global_latency
from models import load_dense
from runtime.errors import RunFailed

ALL = [
    "--selection",
    "value",
    "--saliency",
    "gate_samples",
    "--saliency_loss",
    "teacher",
    "--align",
    "--compensate",
    "event",
    "--shrink_interval",
    "2",
    "--calib_images",
    "128",
]


@pytest.fixture(scope="module")
def prune(runs):
    flags = [f for k, f in enumerate(PRUNE) if "--latency_regularization" not in PRUNE[max(0, k - 1) : k + 1]]
    return [
        *flags,
        "--initial-checkpoint",
        runs["dense"] / "ft_checkpoint.pth",
        "--latency_look_up_table",
        runs["table"],
        "--prune_per_iter",
        "16",
        "--interval_prune",
        "3",
    ]


def checkpoint_of(folder, name="pruned_checkpoint.pth"):
    return torch.load(only(folder, "global_*") / name, weights_only=True)


@pytest.mark.slow
def test_everything_at_once_meets_the_target_and_goes_on(prune, tmp_path, monkeypatch):
    """check_compact in the script compares masked and compact; here the run is also broken off and resumed."""
    run(main_full_global_latency, *prune, *ALL, "--output_dir", tmp_path / "whole")
    summary = json.loads((only(tmp_path / "whole", "global_*") / "summary.json").read_text())
    assert 0.5 < summary["pruned"]["latency_predicted"] <= 0.6
    content = checkpoint_of(tmp_path / "whole")
    small = load_dense(only(tmp_path / "whole", "global_*") / "pruned_checkpoint.pth")
    assert small.dims.to_dict() == content["dims"] and content["pruner"]["shrunk"] is not None
    flags = [*prune, *ALL, "--output_dir", tmp_path / "broken"]
    interrupted(monkeypatch, main_full_global_latency, flags, 8)
    run(main_full_global_latency, *flags, "--resume")
    equal(*(only(tmp_path / name, "global_*") for name in ("whole", "broken")), "pruned_checkpoint.pth")


@pytest.mark.parametrize(
    "more", [(), pytest.param(("--selection", "value", "--saliency", "gates"), marks=pytest.mark.slow)]
)
def test_shrinking_changes_nothing_but_the_time(prune, tmp_path, more):
    """--opt sgd: Adam makes whole steps of the rounding of gradients that are 0."""
    flags = [*prune, *more, "--drop-path", "0", "--opt", "sgd", "--lr", "0.1", "--clip-grad", "1"]
    for name, shrink in (("masked", 0), ("small", 1)):
        run(main_full_global_latency, *flags, "--shrink_interval", shrink, "--output_dir", tmp_path / name)
    masked, small = (checkpoint_of(tmp_path / name) for name in ("masked", "small"))
    assert masked["dims"] == small["dims"]
    assert all(torch.equal(masked["masks"][axis], keep) for axis, keep in small["masks"].items())
    assert distance(small["model"].values(), masked["model"].values()) < 1e-4
    debug = [sorted((only(tmp_path / name, "global_*") / "debug").glob("*dimension*")) for name in ("masked", "small")]
    assert [p.read_text() for p in debug[0]] == [p.read_text() for p in debug[1]] and len(debug[0]) > 2


@pytest.mark.parametrize("interrupt", [0, 8])
def test_the_count_of_prune_dict_holds_over_shrinking(prune, tmp_path, monkeypatch, interrupt):
    """A compact student no longer shows what has gone: the count does not begin again, nor after a resume."""
    flags = [*prune, "--latency_target", "0.1", "--prune_dict", '{"Global": 40}', "--shrink_interval", "1"]
    flags += ["--latency_regularization", "1e-4", "--epochs", "30", "--output_dir", tmp_path]
    if interrupt:
        interrupted(monkeypatch, main_full_global_latency, flags, interrupt)
        flags += ["--resume"]
    with pytest.raises(RunFailed, match="nothing more may be removed"):
        run(main_full_global_latency, *flags)
    assert 24 < sum(int((~keep).sum()) for keep in checkpoint_of(tmp_path, "checkpoint.pth")["masks"].values()) <= 40


@pytest.mark.slow
def test_compensation_at_the_end_is_against_the_aligned_dense_model(prune, tmp_path, monkeypatch, capsys):
    flags = [*prune, "--align", "all", "--compensate", "end", "--calib_images", "128", "--output_dir"]
    run(main_full_global_latency, *flags, tmp_path / "whole")
    printed = capsys.readouterr().out
    assert printed.count("compensated: divergence") == 1 and "aligned on 128 images: every axis" in printed
    interrupted(monkeypatch, main_full_global_latency, [*flags, tmp_path / "broken"], 5)
    run(main_full_global_latency, *flags, tmp_path / "broken", "--resume")
    equal(*(only(tmp_path / name, "global_*") for name in ("whole", "broken")), "pruned_checkpoint.pth")


@pytest.mark.slow
def test_two_ranks_prune_as_one(prune, tmp_path):
    """Not with labels drawn from the teacher or a refit, for which ranks draw and hold out others; nor with alignment,
    as bases of directions that are worth the same follow from rounding."""
    more = [
        "--selection",
        "value",
        "--saliency",
        "gate_samples",
        "--shrink_interval",
        "2",
        *EXACT,
        "--opt",
        "sgd",
        "--lr",
        "1e-2",
        "--epochs",
        "2",
        "--prune_per_iter",
        "32",
        "--latency_target",
        "0.8",
    ]
    launch(
        [*launcher(2), "main_full_global_latency.py"],
        [*prune, *more, "--batch-size", "32", "--output_dir", tmp_path / "2"],
    )
    run(main_full_global_latency, *prune, *more, "--output_dir", tmp_path / "1")
    one, two = (checkpoint_of(tmp_path / n) for n in "12")
    assert one["step"] == two["step"] and one["dims"] == two["dims"]
    assert all(torch.equal(one["masks"][axis], keep) for axis, keep in two["masks"].items())
    assert distance(two["model"].values(), one["model"].values()) < 1e-4


@pytest.mark.slow
def test_two_ranks_stay_one_model_with_everything(prune, tmp_path):
    """At every event the ranks compare saliency and masks, which follow from every weight."""
    flags = [*prune, *ALL, "--batch-size", "32", "--prune_per_iter", "32", "--output_dir", tmp_path]
    done = launch([*launcher(2), "main_full_global_latency.py"], flags)
    assert "aligned on 128 images" in done.stdout and done.stdout.count("compensated: divergence") > 3


@pytest.mark.slow
def test_mixed_precision_with_everything(prune, tmp_path):
    run(main_full_global_latency, *prune, *ALL, "--amp", "--output_dir", tmp_path)
    summary = json.loads((only(tmp_path, "global_*") / "summary.json").read_text())
    assert summary["pruned"]["latency_predicted"] <= 0.6


def test_flags_that_do_not_go_together_are_named(prune, tmp_path):
    flags = [
        *prune,
        "--output_dir",
        tmp_path,
        "--saliency_loss",
        "teacher",
        "--selection",
        "value",
        "--latency_regularization",
        "1e-4",
        "--shrink_interval",
        "2",
        "--opt",
        "lookahead_adam",
        "--compensate",
        "end",
        "--calib_images",
        "32",
    ]
    with pytest.raises(Exception) as error:
        run(main_full_global_latency, *flags)
    found = " ".join(error.value.problems)
    for words in ("--saliency_loss teacher needs", "--selection value has none", "slow weights", "at least 64"):
        assert words in found
    assert not list(tmp_path.iterdir())
