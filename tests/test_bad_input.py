"""A user's mistakes: one clear line each, all at once, exit code 2, before anything is written or trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finetune_dense
import losses
import main_full_global_latency as prune
from files import checkpoint
from latency.table import LatencyTable
from models import build_vit
from runtime.device import device_name
from runtime.errors import BadArguments, RunFailed
from runtime.script import run_script

ROOT = Path(__file__).parent.parent
KWARGS = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10)
ARCH = "deit_tiny_distilled_patch16_224"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A good dense model and a good table, in a folder that must stay as it is."""
    root = tmp_path_factory.mktemp("place")
    torch.save(dict(arch=ARCH, kwargs=KWARGS, model=build_vit(ARCH, **KWARGS).state_dict()), root / "dense.pth")
    write_table(root / "table.json")
    return root


def write_table(path, embed=(4, 32), value=None, hole=False):
    def leaf(e, h, q, v, m):
        return value if value is not None and (e, h, q, v, m) == (32, 4, 8, 8, 128) else 1e-6 * e * (h * (q + v) + m)

    data = {
        f"EMB_{e}": {
            f"QK_{h}_{q}": {f"V_{v}": {f"MLP_{m}": leaf(e, h, q, v, m) for m in (1, 128)} for v in (1, 8)}
            for h in (1, 4)
            for q in (1, 8)
        }
        for e in embed
    }
    if hole:
        del data["EMB_32"]["QK_4_8"]["V_8"]["MLP_128"]
    path.write_text(json.dumps(data))
    return path


def prune_problems(place, *flags):
    """The complaints about a good command line with `flags` added; nothing may be written."""
    good = [
        "--data-set",
        "DIGITS",
        "--initial-checkpoint",
        place / "dense.pth",
        "--device",
        "cpu",
        "--pruning",
        "--latency_look_up_table",
        place / "table.json",
        "--latency_target",
        "0.9",
        "--original_loss_coeff",
        "1",
        "--output_dir",
        place / "out",
    ]
    args = prune.get_args_parser().parse_args([str(f) for f in [*good, *flags]])
    with pytest.raises(BadArguments) as error:
        prune.main(args)
    assert not (place / "out").exists()
    assert all("\n" not in problem for problem in error.value.problems)
    return error.value.problems


def one(problems):
    assert len(problems) == 1, problems
    return problems[0]


def test_the_good_command_line_is_good(place):
    setup = prune.check_args(
        prune.get_args_parser().parse_args(
            [
                "--data-set",
                "DIGITS",
                "--initial-checkpoint",
                str(place / "dense.pth"),
                "--device",
                "cpu",
                "--latency_target",
                "0.9",
                "--latency_look_up_table",
                str(place / "table.json"),
                "--output_dir",
                str(place / "fine"),
                "--original_loss_coeff",
                "1",
            ]
        )
    )
    assert isinstance(setup.table, LatencyTable) and setup.data.classes == 10


def test_data_folders(place, tmp_path):
    folder = ["--data-set", "IMNET", "--data-path"]
    assert "nowhere" in one(prune_problems(place, *folder, tmp_path / "nowhere"))
    assert "train" in one(prune_problems(place, *folder, tmp_path))
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert "class" in one(prune_problems(place, *folder, tmp_path))
    assert "this project downloads no data" in one(
        prune_problems(place, "--data-set", "CIFAR10", "--data-path", tmp_path)
    )


def test_models(place):
    fresh = ["--initial-checkpoint", ""]
    message = prune_problems(place, *fresh, "--model", "deit_tiny_distiled_patch16_224")[0]
    assert "knows no model" in message and ARCH in message
    assert "not a plain" in prune_problems(place, *fresh, "--model", "resnet18")[0]
    assert "blocks are not plain" in prune_problems(place, *fresh, "--model", "vit_small_patch16_18x2_224")[0]
    assert "holds deit_tiny" in one(prune_problems(place, "--model", "vit_tiny_patch16_224"))
    assert "--initial-checkpoint FILE or --pretrained" in prune_problems(place, *fresh, "--model", ARCH)[-1]


def test_tables(place, tmp_path):
    flag, path = "--latency_look_up_table", tmp_path / "bad.json"
    assert "bad.json" in one(prune_problems(place, flag, path))
    for text in ("", "{}", "{nonsense", "[1]"):
        path.write_text(text)
        assert "bad.json" in one(prune_problems(place, flag, path))
    path = write_table(path, hole=True)
    assert "MLP_128" in one(prune_problems(place, flag, path))
    for value in (-1.0, "fast", True, float("nan")):
        assert "MLP_128" in one(prune_problems(place, flag, write_table(path, value=value))), value
    problem = one(prune_problems(place, flag, write_table(path, embed=(4, 16))))
    assert "16" in problem and "32" in problem


@pytest.mark.parametrize("target", ["0", "-1", "1.5", "nan"])
def test_targets_outside_the_unit_interval(place, target):
    assert "(0, 1]" in one(prune_problems(place, "--latency_target", target))


def test_a_target_below_the_floors_names_the_lowest(place):
    assert "least that the group sizes allow" in one(prune_problems(place, "--latency_target", "0.0001"))
    for flag, limit, unit in (
        ("--latency_target_ms", "1e-4", "ms per batch of"),
        ("--macs_target", "1e-4", "MACs"),
        ("--params_target", "20", "parameters"),
    ):
        problem = one(prune_problems(place, flag, limit))
        assert flag in problem and unit in problem and "least that the group sizes allow" in problem


def test_targets_that_are_no_amounts(place):
    for flag in ("--latency_target_ms", "--macs_target", "--params_target", "--width_multiple"):
        assert f"{flag} must be above 0" in one(prune_problems(place, flag, "-1"))


def test_a_table_of_other_conditions_warns_with_both(place, tmp_path, capsys):
    table = json.loads((place / "table.json").read_text()) | dict(_meta=dict(device="Tesla V100", dtype="bf16"))
    (tmp_path / "t.json").write_text(json.dumps(table))
    args = prune.get_args_parser().parse_args(
        [
            "--data-set",
            "DIGITS",
            "--initial-checkpoint",
            str(place / "dense.pth"),
            "--device",
            "cpu",
            "--latency_look_up_table",
            str(tmp_path / "t.json"),
            "--output_dir",
            str(tmp_path),
            "--num_workers",
            "0",
            "--original_loss_coeff",
            "1",
        ]
    )
    prune.check_args(args)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    assert "Tesla V100" in warnings[0] and device_name("cpu") in warnings[0]
    assert "bf16" in warnings[1] and "fp32" in warnings[1]


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def test_checkpoints(place, tmp_path):
    path = tmp_path / "bad.pth"
    assert "does not exist" in one(prune_problems(place, "--initial-checkpoint", path))
    torch.save(dict(model=Evil()), path)
    assert "unpickling of code" in one(prune_problems(place, "--initial-checkpoint", path))
    path.write_bytes((place / "dense.pth").read_bytes()[:3000])
    assert "truncated" in one(prune_problems(place, "--initial-checkpoint", path))
    torch.save(dict(arch=ARCH, kwargs=KWARGS, model=dict(w=torch.zeros(1))), path)
    assert "do not fit" in one(prune_problems(place, "--initial-checkpoint", path))
    tune = finetune_dense.get_args_parser().parse_args(
        ["--finetune", str(place / "dense.pth"), "--data-set", "DIGITS", "--device", "cpu"]
    )
    with pytest.raises(BadArguments, match="not written by this project"):
        finetune_dense.main(tune)


def test_an_output_folder_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("")
    problems = prune_problems(place, "--output_dir", tmp_path / "file" / "out")
    assert "cannot be written" in one(problems)


def test_every_problem_is_reported_at_once(place):
    problems = prune_problems(
        place,
        "--latency_target",
        "2",
        "--batch-size",
        "63",
        "--prune_dict",
        "[]",
        "--interval_prune",
        "1",
        "2",
        "--pruning_config",
        "none.json",
        "--latency_look_up_table",
        "none.json",
        "--drop-path",
        "2",
        "--opt",
        "adamv",
    )
    assert len(problems) == 8


def test_finetuning_flags_that_contradict_each_other(tmp_path):
    def problems(*flags):
        args = finetune_dense.get_args_parser().parse_args(["--data-set", "DIGITS", "--device", "cpu", *flags])
        with pytest.raises(BadArguments) as error:
            finetune_dense.main(args)
        return error.value.problems

    assert problems("--eval") == ["--eval needs --finetune FILE_OR_FOLDER"]
    assert len(problems("--kl_loss_coeff", "0", "--start_epoch", "2")) == 4
    assert "goes with --resume" in problems("--scratch", "--start_epoch", "3", "--output_dir", str(tmp_path))[0]
    assert "no full model to distil from" in problems("--scratch", "--model", ARCH, "--output_dir", str(tmp_path))[0]
    assert not list(tmp_path.iterdir())


def test_a_corrupt_image_stops_the_run_with_its_name(place, tmp_path, image_folder, capsys):
    root = image_folder(tmp_path / "data", per_class=6, side=20)
    (bad := root / "train" / "bee" / "2.png").write_bytes(b"no image")
    args = finetune_dense.get_args_parser().parse_args(
        [
            "--data-path",
            str(root),
            "--num_workers",
            "0",
            "--batch-size",
            "4",
            "--device",
            "cpu",
            "--output_dir",
            str(tmp_path / "out"),
            "--lr",
            "0.1",
            "--epochs",
            "1",
            "--kl_loss_coeff",
            "0",
            "--original_loss_coeff",
            "1",
            "--initial-checkpoint",
            str(place / "dense.pth"),
        ]
    )
    with pytest.raises(SystemExit) as stop:
        run_script(finetune_dense.main, args)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and str(bad) in error and "no checkpoint was written yet" in error
    assert error.startswith("error: ") and "\n" not in error


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(place, tmp_path, monkeypatch):
    flags = [
        "--data-set",
        "DIGITS",
        "--num_workers",
        "0",
        "--batch-size",
        "256",
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path),
        "--epochs",
        "3",
        "--kl_loss_coeff",
        "0",
        "--original_loss_coeff",
        "1",
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--initial-checkpoint",
        str(place / "dense.pth"),
    ]
    original, calls = losses.NViTLoss.forward, []

    def poisoned(self, *args):
        calls.append(1)
        loss, parts = original(self, *args)
        return (loss * float("nan") if len(calls) == 8 else loss), parts  # 5 steps an epoch: epoch 1, step 2

    monkeypatch.setattr(losses.NViTLoss, "forward", poisoned)
    with pytest.raises(RunFailed, match=r"epoch 1, step 2; the last good checkpoint is .*ft_checkpoint\.pth"):
        finetune_dense.main(finetune_dense.get_args_parser().parse_args(flags))
    (good,) = tmp_path.glob("*/ft_checkpoint.pth")
    content = checkpoint.load(good)
    assert content["epoch"] == 0 and all(torch.isfinite(t).all() for t in content["model"].values())


def test_weights_that_the_last_step_spoilt_are_not_saved(place, tmp_path, monkeypatch):
    flags = [
        "--data-set",
        "DIGITS",
        "--num_workers",
        "0",
        "--batch-size",
        "256",
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path),
        "--epochs",
        "2",
        "--kl_loss_coeff",
        "0",
        "--original_loss_coeff",
        "1",
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--initial-checkpoint",
        str(place / "dense.pth"),
        "--no-model-ema",
    ]
    original, calls = torch.optim.AdamW.step, []

    def spoilt(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 10:  # the last step of epoch 1: its loss was finite
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", spoilt)
    with pytest.raises(RunFailed, match=r"not finite; the last good checkpoint is .*ft_checkpoint\.pth"):
        finetune_dense.main(finetune_dense.get_args_parser().parse_args(flags))
    (good,) = tmp_path.glob("*/ft_checkpoint.pth")
    assert checkpoint.load(good)["epoch"] == 0


def test_weights_for_other_classes_are_no_teacher(place, image_folder, tmp_path):
    root = image_folder(tmp_path / "data", per_class=40, side=20)
    problems = prune_problems(place, "--data-set", "IMNET", "--data-path", root)
    assert "know 10 classes, the data has 2" in one(problems)


def test_resuming_from_nothing_writes_nothing(place):
    assert "checkpoint.pth does not exist" in one(prune_problems(place, "--resume"))
    assert "is not a pruning run" in one(prune_problems(place, "--resume", write_compact(place / "compact.pth")))


def write_compact(path):
    model = build_vit(ARCH, **KWARGS)
    checkpoint.save(path, arch=dict(name=ARCH, kwargs=KWARGS), dims=model.dims.to_dict(), model=model.state_dict())
    return path


def test_pretrained_without_network_names_the_local_flag(tmp_path):
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    command = [
        sys.executable,
        "finetune_dense.py",
        "--pretrained",
        "--model",
        ARCH,
        "--data-set",
        "DIGITS",
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path / "out"),
        "--kl_loss_coeff",
        "0",
        "--original_loss_coeff",
        "1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be downloaded" in done.stderr and "--initial-checkpoint FILE" in done.stderr
    assert not (tmp_path / "out").exists()
