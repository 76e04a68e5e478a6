"""main_savit.py and main_savit_deploy.py end to end on the digits: files, budget, reuse of importance, compositions."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import equal, interrupted, run
from safetensors.torch import load_file
from torch import nn

import finetune_dense
import main_savit
import main_savit_deploy
from files import checkpoint
from models import Masks, ViTDims, build_vit, load_dense, macs
from pruning.savit import published_sizes
from recipes import savit
from runtime.errors import BadArguments
from tools import convert_importance, export, formats

ROOT = Path(__file__).parent.parent
ARCH = "deit_tiny_distilled_patch16_224"
KWARGS = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10)
DATA = [
    "--data-set",
    "DIGITS",
    "--num_workers",
    "0",
    "--device",
    "cpu",
    "--mixup",
    "0",
    "--cutmix",
    "0",
    "--aa",
    "",
    "--color-jitter",
    "0",
    "--reprob",
    "0",
    "--batch-size",
    "64",
]
PRUNE = [*DATA, "--pruning_flops_percentage", "0.5", "--pruning_feed_percent", "0.2"]


def problems(script, *flags):
    with pytest.raises(BadArguments) as error:
        run(script, *flags)
    assert all("\n" not in problem for problem in error.value.problems)
    return error.value.problems


def one(found):
    assert len(found) == 1, found
    return found[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A dense model, a run with interactions and one without, a finetuning run."""
    root = tmp_path_factory.mktemp("savit")
    torch.manual_seed(0)
    torch.save(dict(arch=ARCH, kwargs=KWARGS, model=build_vit(ARCH, **KWARGS).state_dict()), root / "dense.pth")
    start = ["--finetune", root / "dense.pth"]
    run(main_savit, *PRUNE, *start, "--need_hessian", "--output_dir", root / "with")
    run(main_savit, *PRUNE, *start, "--output_dir", root / "without", "--pruning_silent")
    run(
        main_savit_deploy,
        *DATA,
        "--masked_model",
        root / "with" / "pruned_checkpoint.pth",
        "--model",
        f"{ARCH}_deploy",
        "--epochs",
        "1",
        "--lr",
        "1e-3",
        "--resume=",
        "--pruning_flops_percentage=0",
        "--finetune_op=1",
        "--cooldown-epochs=0",
        "--output_dir",
        root / "tuned",
        "--distillation-type-full",
        "soft",
    )
    return root


@pytest.mark.parametrize("named", ["published", "old", "auto", "damaged"])
def test_finetuning_goes_on_from_either_name(runs, tmp_path, monkeypatch, named, capsys):
    """The published script's, and that of runs from before there was a second name; the one before a damaged one."""
    flags = [*DATA, "--masked_model", runs / "with" / "pruned_checkpoint.pth", "--lr", "1e-3", "--output_dir", tmp_path]
    flags += ["--epochs", "2", "--recovery-interval", "3"]
    interrupted(monkeypatch, main_savit_deploy, [*flags, "--resume="], 30)
    published = tmp_path / "checkpoint.pth"
    assert published.is_symlink() and checkpoint.load(published)["epoch"] == 0
    if named in ("old", "auto"):
        published.unlink()
    if named == "damaged":
        published.write_bytes(published.read_bytes()[:-100])
    resume = dict(old=f"={tmp_path / 'ft_checkpoint.pth'}", auto="").get(named, f"={published}")
    run(main_savit_deploy, *flags, f"--resume{resume}")
    assert "resumed: continuing with epoch 1" in capsys.readouterr().out and published.is_symlink()
    run(main_savit_deploy, *flags, "--output_dir", tmp_path / "whole")
    equal(tmp_path, tmp_path / "whole", "checkpoint.pth")


def test_a_finished_run_that_is_resumed_elsewhere_has_its_checkpoint_there(runs, tmp_path):
    flags = ["--masked_model", runs / "with" / "pruned_checkpoint.pth", "--epochs", "1", "--lr", "1e-3", *DATA]
    flags += ["--distillation-type-full", "soft", "--output_dir", tmp_path]
    run(main_savit_deploy, *flags, "--resume", runs / "tuned" / "ft_checkpoint.pth")
    equal(runs / "tuned", tmp_path, "checkpoint.pth")


def test_anothers_checkpoint_of_the_published_name_is_kept(runs, tmp_path):
    """A pruning run's, in the same folder."""
    (tmp_path / "checkpoint.pth").write_text("another run's")
    masked = ["--masked_model", runs / "with" / "pruned_checkpoint.pth"]
    run(main_savit_deploy, *DATA, *masked, "--epochs", "1", "--output_dir", tmp_path)
    assert (tmp_path / "checkpoint.previous.pth").read_text() == "another run's"
    assert checkpoint.load(tmp_path / "checkpoint.pth")["epoch"] == 0


def files(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("events."))


def test_files_of_a_run(runs):
    common = ["args.json", "dims.json", "logs", "pruned_checkpoint.pth", "run.json", "summary.json"]
    assert files(runs / "with") == sorted([*common, "importance.json", "importance.safetensors"])
    assert files(runs / "without") == common
    assert files(runs / "with" / "logs") == ["savit.json", "savit.log"]
    assert files(runs / "tuned") == [
        "args.json",
        "checkpoint.pth",
        "dims.json",
        "ft_best.pth",
        "ft_checkpoint.pth",
        "log.txt",
        "run.json",
        "summary.json",
    ]


def test_the_budget_is_met_and_the_summary_and_logs_say_so(runs):
    summary = json.loads((runs / "tuned" / "summary.json").read_text())
    assert list(summary) == ["dense", "pruned", "finetuned"]
    dims = ViTDims.from_dict(json.loads((runs / "with" / "dims.json").read_text()))
    assert summary["pruned"]["macs"] == macs(ARCH, dims, **KWARGS) <= summary["dense"]["macs"] // 2
    logs = json.loads((runs / "with" / "logs" / "savit.json").read_text())
    assert sum(logs["macs_after"].values()) == summary["pruned"]["macs"] <= logs["macs_budget"]
    assert logs["components"]["mlp"]["left_per_block"] == [b.mlp for b in dims.blocks]
    assert logs["components"]["embed"]["removed"] == 32 - dims.embed
    text = (runs / "with" / "logs" / "savit.log").read_text()
    assert re.search(r"component mlp: pruned_neurons \d+ \(\d+\.\d\d %\)", text)
    assert f"blocks.1.mlp: units {dims.blocks[1].mlp}, pruned_perc:[{128 - dims.blocks[1].mlp}, 128]" in text
    assert re.search(r"removed: attn \S+ %, ffn \S+ %, total 5\d\.\d+ % of MACs", text)


def test_importance_files_give_the_same_result(runs, tmp_path):
    flags = [*PRUNE, "--finetune", runs / "dense.pth", "--pruning_pickle_from", runs / "with"]
    run(main_savit, *flags, "--output_dir", tmp_path / "again")
    run(main_savit, *flags, "--no-need_hessian", "--output_dir", tmp_path / "alone")
    read = {
        f: torch.load(f / "pruned_checkpoint.pth", weights_only=True)["masks"]
        for f in (runs / "with", runs / "without", tmp_path / "again", tmp_path / "alone")
    }
    for ours, theirs in ((tmp_path / "again", runs / "with"), (tmp_path / "alone", runs / "without")):
        assert all(torch.equal(read[ours][axis], keep) for axis, keep in read[theirs].items())


def test_importance_files_of_something_else_are_refused(runs, tmp_path):
    flags = [*PRUNE, "--output_dir", tmp_path / "out", "--pruning_pickle_from", runs / "with"]
    torch.manual_seed(1)
    other = dict(arch=ARCH, kwargs=KWARGS, model=build_vit(ARCH, **KWARGS).state_dict())
    torch.save(other, tmp_path / "weights.pth")
    found = one(problems(main_savit, *flags, "--finetune", tmp_path / "weights.pth"))
    assert "another model: its weights differ" in found
    kwargs = KWARGS | dict(embed_dim=16)
    torch.save(dict(arch=ARCH, kwargs=kwargs, model=build_vit(ARCH, **kwargs).state_dict()), tmp_path / "narrow.pth")
    found = one(problems(main_savit, *flags, "--finetune", tmp_path / "narrow.pth"))
    assert "another model: kwargs" in found and "'embed_dim': 32" in found
    good = [*flags, "--finetune", runs / "dense.pth"]
    assert "no importance of v" in one(problems(main_savit, *good, "--pruning_layers", "mlp,v"))
    assert "--pruning_method 2, not 3" in one(problems(main_savit, *good, "--pruning_method", "3"))
    assert "convert_importance" in one(problems(main_savit, *good, "--pruning_pickle_from", tmp_path))
    (tmp_path / "importance.json").write_text("{}")
    assert "needs the keys format" in one(problems(main_savit, *good, "--pruning_pickle_from", tmp_path))
    (tmp_path / "importance.json").write_bytes((runs / "with" / "importance.json").read_bytes())
    (tmp_path / "importance.safetensors").write_bytes(b"nothing")
    assert "no safetensors" in one(problems(main_savit, *good, "--pruning_pickle_from", tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_compositions(runs, tmp_path):
    """A SAViT result through finetune_dense.py; pruned and finetuned ones into main_savit.py, and on from there."""
    (tmp_path / "pruned_checkpoint.pth").write_bytes((runs / "with" / "pruned_checkpoint.pth").read_bytes())
    run(
        finetune_dense,
        *DATA,
        "--finetune",
        tmp_path,
        "--epochs",
        "1",
        "--kl_loss_coeff",
        "1000",
        "--original_loss_coeff",
        "1",
        "--no-model-ema",
    )
    (tuned,) = tmp_path.glob("ft_dense_*")
    for number, start in enumerate((runs / "with" / "pruned_checkpoint.pth", tuned / "ft_checkpoint.pth")):
        before = load_dense(start).dims
        out = tmp_path / f"{number}"
        run(
            main_savit,
            *PRUNE,
            "--finetune",
            start,
            "--pruning_flops_percentage",
            "0.3",
            "--output_dir",
            out,
            "--pruning_layers",
            "heads,mlp,embed,qk,v",
        )
        after = load_dense(out / "pruned_checkpoint.pth")
        assert macs(ARCH, after.dims, **KWARGS) <= 0.7 * macs(ARCH, before, **KWARGS)
        assert list(json.loads((out / "summary.json").read_text())) == ["pruned"]
        run(
            main_savit_deploy,
            *DATA,
            "--masked_model",
            out / "pruned_checkpoint.pth",
            "--epochs",
            "1",
            "--output_dir",
            out / "tuned",
        )
        assert load_dense(out / "tuned" / "ft_checkpoint.pth").dims == after.dims


def test_an_nvit_pruned_checkpoint_is_pruned_further(tmp_path, prune):
    model = build_vit(ARCH, **KWARGS)
    masks = prune(Masks(model.dims), ("embed", "heads", "qk", "v", "mlp", "blocks.0.heads=0"))
    masks.install_(model)
    checkpoint.save(
        tmp_path / "nvit.pth",
        arch=dict(name=ARCH, kwargs=KWARGS),
        dims=masks.dims.to_dict(),
        masks=masks.state_dict(),
        model=model.state_dict(),
        args={},
    )
    run(main_savit, *PRUNE, "--finetune", tmp_path / "nvit.pth", "--need_hessian", "--output_dir", tmp_path / "out")
    left = load_dense(tmp_path / "out" / "pruned_checkpoint.pth").dims
    assert macs(ARCH, left, **KWARGS) <= 0.5 * macs(ARCH, masks.dims, **KWARGS)
    assert left.blocks[0].heads == 0 and left.blocks[1].qk == masks.dims.blocks[1].qk


def test_bfloat16_agrees_or_is_left(runs, tmp_path, capsys):
    flags = [*PRUNE, "--finetune", runs / "dense.pth", "--amp"]
    run(main_savit, *flags, "--output_dir", tmp_path)
    found = capsys.readouterr()
    assert re.search(r"scoring in bfloat16: .*correlation 0\.99|scoring in fp32: bfloat16", found.out + found.err)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_gives_the_same_importance(runs, tmp_path, processes):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",  # on a port that is free
        f"--nproc_per_node={processes}",
        "main_savit.py",
        *PRUNE,
        "--finetune",
        str(runs / "dense.pth"),
        "--need_hessian",
        "--output_dir",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    folders = (runs / "with", tmp_path)
    alone, shared = (torch.load(f / "pruned_checkpoint.pth", weights_only=True)["masks"] for f in folders)
    assert all(torch.equal(alone[axis], shared[axis]) for axis in alone)
    one_process, several = (load_file(f / "importance.safetensors") for f in folders)
    for name, values in one_process.items():
        torch.testing.assert_close(several[name], values, rtol=1e-6, atol=1e-12)


def test_bad_input(runs, tmp_path):
    good = [*PRUNE, "--finetune", runs / "dense.pth", "--output_dir", tmp_path / "out"]
    found = one(problems(main_savit, *good, "--pruning_flops_percentage", "0.99"))
    most = float(re.search(r"cannot be reached: removing heads, mlp, embed .* at most (0\.\d+)", found)[1])
    assert one(problems(main_savit, *good, "--pruning_flops_percentage", most + 2e-4))
    run(main_savit, *good, "--pruning_flops_percentage", most - 2e-4, "--output_dir", tmp_path / "possible")
    many = problems(
        main_savit,
        *DATA,
        "--pruning_flops_percentage",
        "0",
        "--pruning_feed_percent",
        "2",
        "--pruning_floor",
        "1",
        "--hessian_formula",
        "published",
        "--pruning_layers",
        "mlp,v",
    )
    assert len(many) == 6
    few = problems(main_savit, *good, "--need_hessian", "--batch-size", "1000")
    assert "at least 2 batches, the 1437 training images make 1 of 1000: --batch-size can be at most 718" in one(few)
    assert "does not exist" in one(problems(main_savit, *good, "--finetune", tmp_path / "nothing.pth"))
    found = one(problems(main_savit_deploy, *DATA, "--output_dir", tmp_path / "out"))
    assert "--masked_model FILE is required" in found
    assert not (tmp_path / "out").exists()


def load_model(runs):
    model = build_vit(ARCH, **KWARGS)
    model.load_state_dict(torch.load(runs / "dense.pth", weights_only=True)["model"])
    return model


class Hard(nn.Module):
    """Counts as an activation, and cannot be differentiated twice."""

    def forward(self, x):
        from tests.pruning.test_interaction import Once

        return Once.apply(x)


def test_a_layer_without_second_derivative_and_a_component_that_is_not_there(runs, tmp_path, monkeypatch, prune):
    good = [*PRUNE, "--output_dir", tmp_path / "out"]
    original = savit.build

    def patched(*args):
        model = original(*args)
        model.blocks[0].mlp.act = Hard()
        return model

    with monkeypatch.context() as patch:
        patch.setattr(savit, "build", patched)
        found = one(problems(main_savit, *good, "--finetune", runs / "dense.pth", "--need_hessian"))
        assert "layer blocks.0.mlp.act (Hard)" in found and "--hessian_form finite" in found
    model = build_vit(ARCH, **KWARGS)
    masks = prune(Masks(model.dims), ("blocks.0.mlp=0", "blocks.1.mlp=0"))
    masks.install_(model)
    checkpoint.save(
        tmp_path / "bare.pth",
        arch=dict(name=ARCH, kwargs=KWARGS),
        dims=masks.dims.to_dict(),
        masks=masks.state_dict(),
        model=model.state_dict(),
        args={},
    )
    found = one(problems(main_savit, *good, "--finetune", tmp_path / "bare.pth"))
    assert found == "--pruning_layers: the model has no mlp to prune"


def test_published_pickles_are_converted(runs, tmp_path, capsys):
    rng = np.random.default_rng(0)
    sizes = ([4, 4], [128, 128], [32])
    for number, lengths in enumerate(sizes):
        arrays = [rng.random(n).astype(np.float32) for n in lengths]
        (tmp_path / f"criteria_m2l{number}_final.pickle").write_bytes(pickle.dumps(arrays))
    hessian = rng.standard_normal((3, 3)).astype(np.float32)
    (tmp_path / "hessian.pickle").write_bytes(pickle.dumps(hessian))
    kwargs = [f"{k}={v}" for k, v in KWARGS.items()]
    flags = [tmp_path, "--model", ARCH, "--model-kwargs", *kwargs, "--data-set", "DIGITS"]
    run(convert_importance, *flags, "--output", tmp_path / "out")
    assert "about to unpickle" in capsys.readouterr().out
    run(
        main_savit,
        *PRUNE,
        "--finetune",
        runs / "dense.pth",
        "--pruning_pickle_from",
        tmp_path / "out",
        "--hessian_formula",
        "published",
        "--output_dir",
        tmp_path / "pruned",
    )
    tensors = load_file(tmp_path / "out" / "importance.safetensors")
    c = np.array(list(published_sizes(ViTDims.of(load_model(runs)), 6.0).values()))
    assert tensors["hessian"][0, 2].item() == pytest.approx(hessian[0, 2] * c[0] * c[2])
    assert tensors["hessian"][2, 0] == tensors["hessian"][0, 2]
    (tmp_path / "hessian.pickle").write_bytes(pickle.dumps(Path("evil")))
    found = one(problems(convert_importance, *flags, "--output", tmp_path / "bad"))
    assert "no array" in found and not (tmp_path / "bad").exists()
    flags[2] = "deit_tiny_patch16_224"
    assert any(
        "another model: shapes" in p
        for p in problems(convert_importance, *flags[:3], "--data-set", "DIGITS", "--output", tmp_path / "bad")
    )


@pytest.mark.slow
def test_the_pruned_model_is_handed_over(runs, tmp_path):
    pytest.importorskip("onnxruntime")
    path, images = runs / "with" / "pruned_checkpoint.pth", torch.randn(3, 3, 16, 16)
    expected = load_dense(path)(images)
    for kind in ("safetensors", "standalone", "torch-export", "onnx"):
        run(export, path, "--format", kind, "--output", tmp_path / kind)
        with torch.inference_mode():
            found = formats.FORMATS[kind].read(tmp_path / kind)(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
