"""Benchmarks run and print what they promise."""

import itertools
import json
import re

import pytest
import torch

from benchmarks import (
    attention_routes,
    checkpoint_overhead,
    depth_scaling,
    handmade,
    one_shot_cost,
    pruning_overhead,
    savit,
    shrink_time,
)
from benchmarks import latency as latency_targets
from benchmarks.prices import compare
from benchmarks.tome import tome
from latency.table import LatencyTable
from models import ViTDims, build_vit
from pruning.probe import Prices


def test_pruning_overhead_prints_ratios(capsys):
    pruning_overhead.main(pruning_overhead.get_args_parser().parse_args(["--batch-size", "2", "--rounds", "3"]))
    printed = capsys.readouterr().out
    assert len(re.findall(r"removed[^:]*: \d\.\d{3} x a step without pruning", printed)) == 2
    assert re.search(r"one selection: \d+\.\d ms", printed)


def test_attention_routes_mark_the_rules_choice(capsys):
    words = ["--batch-size", "1", "--heads", "2", "--tokens", "9", "--rounds", "1"]
    attention_routes.main(attention_routes.get_args_parser().parse_args(words))
    rows = {line.split()[0]: line.split()[1:4] for line in capsys.readouterr().out.splitlines()[3:]}
    assert len(rows) == len(attention_routes.WIDTHS)
    assert [cell.endswith("<") for cell in rows["64/64"]] == [True, False, False]
    assert [cell.endswith("<") for cell in rows["8/64"]] == [False, False, True]


ARCH = "deit_tiny_distilled_patch16_224"
KWARGS = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10)


def test_the_model_by_hand_computes_what_ours_does(capsys):
    words = ["--model", ARCH, "--model-kwargs", *(f"{k}={v}" for k, v in KWARGS.items())]
    words += ["--batch-size", "2", "--random", "2", "--rounds", "1"]
    handmade.main(handmade.get_args_parser().parse_args(words))
    lines = capsys.readouterr().out.splitlines()
    assert all(float(line.split()[-1]) < 1e-5 for line in lines[3:5])
    assert re.fullmatch(r"lowest \d\.\d{3}, median \d\.\d{3}", lines[5])


def test_latency_at_targets(tmp_path, capsys):
    seconds = {f"overhead/EMB_{e}": 1e-6 for e in (4, 32)}
    for e, h, q, v in itertools.product((4, 32), (1, 4), (1, 8), (1, 8)):
        seconds[f"attention/EMB_{e}/QK_{h}_{q}/V_{v}"] = 1e-6 * e * h * (q + v)
    seconds |= {f"mlp/EMB_{e}/MLP_{m}": 1e-6 * e * m for e in (4, 32) for m in (16, 128)}
    meta = dict(model=ARCH, model_kwargs=KWARGS, batch=2, dtype="fp32", compile=None, device="some CPU, 2 threads")
    LatencyTable.of_parts(seconds, meta).save(tmp_path / "t.json")
    words = [
        str(tmp_path / "t.json"),
        "--targets",
        "0.7",
        "0.3",
        "--rounds",
        "1",
        "--builds",
        "1",
        "--dims-dir",
        str(tmp_path),
    ]
    latency_targets.main(latency_targets.get_args_parser().parse_args(words))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["0.7", "0.3"]
    assert all(0.8 * float(row[0]) < float(row[1]) <= float(row[0]) for row in rows)
    assert ViTDims.from_dict(json.loads((tmp_path / "dims_0.3.json").read_text())).embed < 32


@pytest.mark.slow
def test_savit_scoring_prints_time_and_memory(tmp_path, capsys, tiny):
    kwargs = {key: value for key, value in tiny.items() if key != "arch"}
    torch.save(dict(arch=tiny["arch"], kwargs=kwargs, model=build_vit(**tiny).state_dict()), tmp_path / "dense.pth")
    flags = ["--initial-checkpoint", str(tmp_path / "dense.pth"), "--batches", "20", "--batch-size", "4"]
    savit.main(savit.get_args_parser().parse_args(flags))
    printed = capsys.readouterr().out
    assert re.search(r"published schedule \d+\.\d s .*ours \d+\.\d s: \d\.\d{3} of it", printed)
    assert re.findall(r"memory of a batch, (\w+): \d+ MiB", printed) == ["published", "exact", "finite", "scores"]


def test_one_shot_cost_prints_its_stages(capsys, monkeypatch, tiny):
    monkeypatch.setattr(one_shot_cost, "build_vit", lambda _: build_vit(**tiny))
    one_shot_cost.main(one_shot_cost.get_args_parser().parse_args(["--images", "32"]))
    printed = re.findall(r"^(.+): \d+\.\d s$", capsys.readouterr().out, re.M)
    assert printed == ["align", "price every width", "allocate", "refit", "in all"]


def test_prices_are_compared_where_both_have_one():
    found = Prices([dict(mlp={0: 2.0, 8: 0.2, 16: 0.0})], {4: 1.0, 8: 0.0})
    expected = Prices([dict(mlp={0: 1.0, 8: 0.1, 16: 0.0})], {4: 0.5, 2: 3.0, 8: 0.0})
    count, correlation, quantiles = compare(found, expected)
    assert count == 3 and correlation == pytest.approx(1.0) and quantiles == pytest.approx([2.0] * 5)


def test_depth_scaling_prints_a_row_a_depth(capsys):
    words = ["--depths", "1", "3", "--embed-dim", "32", "--images", "16", "--rounds", "1"]
    medians = depth_scaling.main(depth_scaling.get_args_parser().parse_args(words))
    assert len(medians) == 2 and re.findall(r"^(\d+)  +\d+ ", capsys.readouterr().out, re.M) == ["1", "3"]


def test_checkpoint_overhead_prints_the_share(tmp_path, capsys):
    torch.save(dict(arch=ARCH, kwargs=KWARGS, model=build_vit(ARCH, **KWARGS).state_dict()), tmp_path / "dense.pth")
    words = ["--initial-checkpoint", str(tmp_path / "dense.pth"), "--batch-size", "4", "--steps", "2", "--saves", "2"]
    checkpoint_overhead.main(checkpoint_overhead.get_args_parser().parse_args(words))
    assert re.search(r"two saves are \d+\.\d\d % of it", capsys.readouterr().out)


def test_bipartite_merging_of_the_benchmark(tiny, randomise, images):
    """With nothing merged it is the dense model; equal patches merge without a loss, and tokens get fewer block by
    block."""
    model = randomise(build_vit(**tiny)).eval()
    with torch.no_grad():
        for nothing in ([0, 0], [0, None]):
            torch.testing.assert_close(tome(model, nothing)(images), model(images), rtol=1e-4, atol=1e-5)
        merged = tome(model, [3, 3])
        counts = []
        for block in merged.blocks:
            block.register_forward_hook(lambda _, __, out: counts.append(out.shape[1]))
        merged(images)
        assert counts == [15, 12]
        model.pos_embed[:, 2:] = model.pos_embed[:, 2:3]
        flat = images.mean((2, 3), keepdim=True).expand_as(images)
        torch.testing.assert_close(tome(model, [3, 3])(flat), model(flat), rtol=1e-4, atol=1e-5)


def test_shrinking_is_timed_in_pairs(monkeypatch, capsys):
    monkeypatch.setattr(shrink_time, "seconds", lambda flags, interval: 8.0 if interval else 10.0)
    shrink_time.main(shrink_time.get_args_parser().parse_args(["--rounds", "2", "--", "--pruning", "--epochs", "1"]))
    assert capsys.readouterr().out.splitlines()[-1] == "median 0.800 of the time"
