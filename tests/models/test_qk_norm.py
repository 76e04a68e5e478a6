"""A model that normalises queries and keys: everything but qk is pruned, and it says so."""

import dataclasses
import json
import random

import pytest
import timm
import torch
from conftest import CASES, TINY
from jobs import PLAIN, PRUNE, run

import finetune_dense
import main_full_global_latency
from latency import LatencyTable, build_table
from latency.points import random_dims
from models import Masks, ModelError, ViTDims, build_vit, compact, left_alone, macs, params

MODEL = dict(arch="vit_tiny_patch16_224", qk_norm=True) | TINY | dict(embed_dim=36)
ALONE = [case for case in CASES if "qk" not in CASES[case]]


def test_full_width_is_timms_function(images, randomise):
    theirs = randomise(timm.create_model(MODEL["arch"], **{k: v for k, v in MODEL.items() if k != "arch"})).eval()
    ours = build_vit(**MODEL).eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-6)
    assert params(**MODEL) == sum(p.numel() for p in theirs.parameters()) and macs(**MODEL) > 0


@pytest.mark.parametrize("case", ALONE)
def test_masked_is_compact(case, images, randomise, prune):
    model = randomise(build_vit(**MODEL)).eval()
    masks = prune(Masks(model.dims), CASES[case])
    masks.install_(model)
    expected = model(images)
    assert ((compact(model, masks)(images) - expected).norm() / expected.norm()).item() <= 1e-5


def test_a_narrower_qk_is_refused():
    dims = ViTDims.of(build_vit(**MODEL))
    blocks = tuple(dataclasses.replace(b, qk=4) for b in dims.blocks)
    with pytest.raises(ModelError, match="qk must stay 9: queries and keys are normalised over it"):
        build_vit(dims=dataclasses.replace(dims, blocks=blocks), **MODEL)
    assert not left_alone("vit_tiny_patch16_224") and list(left_alone(**MODEL)) == ["qk"]


def test_pruning_says_so_and_leaves_it(runs, tmp_path, capsys):
    kwargs = [f"{k}={v}" for k, v in (TINY | dict(qk_norm=True)).items() if k != "num_classes"]
    run(
        finetune_dense,
        "--scratch",
        "--model",
        MODEL["arch"],
        "--model-kwargs",
        *kwargs,
        *PLAIN,
        "--epochs",
        "1",
        "--kl_loss_coeff",
        "0",
        "--original_loss_coeff",
        "1",
        "--output_dir",
        tmp_path,
    )
    (dense,) = tmp_path.glob("scratch_*")
    run(
        main_full_global_latency,
        *PRUNE,
        "--initial-checkpoint",
        dense / "ft_checkpoint.pth",
        "--output_dir",
        tmp_path,
        "--latency_look_up_table",
        runs["table"],
    )
    assert "qk is left alone: queries and keys are normalised over it" in capsys.readouterr().out
    (pruned,) = tmp_path.glob("global_*")
    summary = json.loads((pruned / "summary.json").read_text())["pruned"]
    assert {block["qk"] for block in summary["dims"]["blocks"]} == {8} and summary["latency_predicted"] <= 0.6


def test_its_table_holds_the_full_qk_alone(tmp_path):
    kwargs = [f"{k}={v}" for k, v in MODEL.items() if k != "arch"]
    path = tmp_path / "table.json"
    points = ["--points", "embed=2", "heads=2", "v=2", "mlp=2", "--rounds", "2"]
    model = ["--model", MODEL["arch"], "--model-kwargs", *kwargs]
    run(build_table, *model, "--batch-size", "2", "--output", path, *points)
    table = LatencyTable.load(path)
    assert table.meta["grid"]["qk"] == [9]
    dims = random_dims(ViTDims.of(build_vit(**MODEL)), random.Random(0), left_alone(**MODEL))
    assert table.model_seconds(dims) > 0 and {b.qk for b in dims.blocks} == {9}
