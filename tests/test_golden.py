"""Files that an earlier revision wrote (tests/golden/README.md): read by today's code, with the results they had."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from jobs import PLAIN, only, run
from safetensors.torch import load_file

import hubconf
import main_full_global_latency
import main_savit
from latency import LatencyTable
from models import load_dense
from models.pretrained import read_dims
from models.swin_dims import dims_from_dict
from recipes import importance_files
from tools import formats

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
CHECKPOINTS = GOLDEN / "checkpoints"


def close(model, name, tolerance=1e-5):
    """Whether a model gives the logits that the earlier revision computed for the same file."""
    torch.manual_seed(0)
    images, expected = torch.rand(4, 3, 16, 16), torch.tensor(EXPECTED["logits"][name])
    with torch.no_grad():
        return float((model(images) - expected).norm() / expected.norm()) <= tolerance


@pytest.mark.parametrize("name", sorted({*EXPECTED["logits"]} - {"exported", "standalone"}))
def test_checkpoints_give_the_same_logits(name):
    for load in (load_dense, hubconf.vit_from_checkpoint):
        assert close(load(str(CHECKPOINTS / f"{name}.pth")), name)


def test_exported_folders_give_the_same_logits():
    assert close(load_dense(GOLDEN / "exported"), "exported")
    assert close(hubconf.vit_from_checkpoint(str(GOLDEN / "exported")), "exported")
    assert close(formats.FORMATS["standalone"].read(GOLDEN / "standalone"), "standalone")


@pytest.mark.parametrize("name, dims, seconds", EXPECTED["seconds"])
def test_tables_give_the_same_seconds(name, dims, seconds):
    assert LatencyTable.load(GOLDEN / name).model_seconds(dims_from_dict(dims)) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("name", EXPECTED["dims"])
def test_dims_are_read_as_they_were_written(name):
    assert read_dims(str(GOLDEN / name)).to_dict() == EXPECTED["dims"][name]


def test_importance_files_hold_the_same_values_and_prune_the_same_units(tmp_path):
    folder, dense = GOLDEN / "importance", CHECKPOINTS / "dense.pth"
    importance = importance_files.load(folder, importance_files.model_record(load_dense(dense)), "DIGITS", 2)
    written = load_file(folder / "importance.safetensors")
    for kind, values in dict(score=importance.scores, gradient=importance.gradients, fisher=importance.fisher).items():
        assert len(values) == 5 and all(torch.equal(values[axis], written[f"{kind}/{axis}"]) for axis in values)
    assert torch.equal(importance.hessian, written["hessian"])
    assert torch.equal(importance.error, written["hessian_error"])
    drop = PLAIN.index("--drop-path")
    flags = [*PLAIN[:drop], *PLAIN[drop + 2 :], "--pruning_feed_percent", "0.2", "--pruning_flops_percentage", "0.5"]
    run(main_savit, *flags, "--finetune", dense, "--pruning_pickle_from", folder, "--output_dir", tmp_path)
    before, now = (load_dense(path).dims for path in (CHECKPOINTS / "savit.pth", tmp_path / "pruned_checkpoint.pth"))
    assert now == before


def test_an_unfinished_run_goes_on_to_the_same_end(tmp_path):
    """Pruned twice before it was stopped in its first epoch, as often afterwards."""
    flags = [*PLAIN, "--pruning", "--latency_target", "0.7", "--latency_regularization", "1e-1", "--lr", "4e-3"]
    flags += ["--prune_per_iter", "32", "--interval_prune", "3", "--epochs", "2"]
    flags += [
        "--kl_loss_coeff",
        "10000",
        "--original_loss_coeff",
        "1",
        "--initial-checkpoint",
        CHECKPOINTS / "dense.pth",
    ]
    flags += ["--latency_look_up_table", GOLDEN / "table_rule.json", "--output_dir", tmp_path / "out"]
    shutil.copy(CHECKPOINTS / "unfinished.pth", tmp_path / "checkpoint.pth")
    run(main_full_global_latency, *flags, "--resume", tmp_path / "checkpoint.pth")
    end = only(tmp_path / "out", "global_*") / "pruned_checkpoint.pth"
    before, now = (load_dense(path) for path in (CHECKPOINTS / "pruned.pth", end))
    assert now.dims == before.dims
    assert close(now, "pruned", 1e-3)  # another processor rounds every one of the updates otherwise
