"""python -m latency.build_table, end to end on a two-block model."""

import json
import shlex

import numpy as np
import pytest
import torch

import main_full_global_latency
from latency import LatencyTable, LatencyTableError, build_table
from latency.bench import Bench
from latency.build_table import get_args_parser, main, read_arch, warn_of_noise
from latency.points import grid_of
from latency.samples import Progress
from latency.whole import Measured
from models import BlockDims, ViTDims, skeleton

ARCH = "deit_tiny_distilled_patch16_224"
KWARGS = dict(img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=10)
POINTS = ["embed=2", "heads=2", "qk=2", "v=2", "mlp=2"]
COUNT = 2 * (2 * 2 * 2 + 2 + 1)


def arguments(output, *extra):
    kwargs = [f"{key}={value}" for key, value in KWARGS.items()]
    return get_args_parser().parse_args(
        ["--model", ARCH, "--model-kwargs", *kwargs, "--batch-size", "2", "--device", "cpu", "--points", *POINTS]
        + ["--output", str(output), *extra]
    )


def test_writes_one_table_that_covers_the_model(tmp_path, capsys):
    assert main(arguments(tmp_path / "t.json")) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
    *_, command, line = capsys.readouterr().out.strip().splitlines()
    flags = shlex.split(command.removeprefix("next: python main_full_global_latency.py "))
    following = main_full_global_latency.get_args_parser().parse_args(flags)
    assert following.latency_look_up_table == str(tmp_path / "t.json") and following.model_kwargs == KWARGS
    assert line.startswith(f"{tmp_path / 't.json'}: {COUNT} points in ") and line.endswith(" ms per batch of 2")
    table, dense = LatencyTable.load(tmp_path / "t.json"), ViTDims.of(skeleton(ARCH, **KWARGS))
    table.check_covers(dense)
    small = ViTDims(24, (BlockDims(1, 8, 8, 24, 18), BlockDims(0, 0, 0, 0, 18)))
    assert 0 < table.ratio(small, dense) < 1
    meta = table.meta
    assert meta["grid"] == dict(embed=[6, 48], heads=[1, 3], qk=[2, 16], v=[2, 16], mlp=[16, 192])
    assert (meta["model"], meta["model_kwargs"], meta["batch"], meta["dtype"]) == (ARCH, KWARGS, 2, "fp32")
    assert meta["tokens"] == 18 and meta["img_size"] == [16, 16] and meta["torch"] == torch.__version__
    assert meta["complete"] is True and meta["unit"] == "seconds per block" and meta["compile"] is None
    assert meta["noise"] >= 0 and set(meta["fit"]) == {"factor", "constant", "error"} and meta["threads"] >= 1
    parts = table.data["_parts"]
    total = parts["attention"]["EMB_48"]["QK_3_16"]["V_16"] + parts["mlp"]["EMB_48"]["MLP_192"]
    assert table.data["EMB_48"]["QK_3_16"]["V_16"]["MLP_192"] == pytest.approx(total, rel=1e-5)
    assert set(table.data["_overhead"]) == {"EMB_6", "EMB_48"}


def test_what_disagrees_is_measured_again_and_said(tmp_path, capsys, monkeypatch):
    """Whole models of any time, whatever their widths."""
    groups = []

    def measure_ratios(arch, chosen, *conditions, **effort):
        groups.append(len(chosen))
        return Measured(np.linspace(0.9, 0.1, len(chosen)), 1.0, 1, 1, 0.0)

    monkeypatch.setattr(build_table, "measure_ratios", measure_ratios)
    assert main(arguments(tmp_path / "t.json", "--rounds", "2")) == 0
    said = capsys.readouterr().err
    assert len(groups) == 2 and said.count("parts and whole models disagree by") == 2
    assert said.count("both are measured again") == 1
    meta = LatencyTable.load(tmp_path / "t.json").meta
    assert meta["fit"]["error"] > 0.1 and 0 <= meta["disturbed"] <= 1 and "threads_wanted" not in meta


def test_a_load_that_never_ends_keeps_what_was_measured(tmp_path, capsys):
    assert main(arguments(tmp_path / "t.json", "--max_minutes", "0")) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["t.json.part"]
    assert "not done after --max_minutes 0; the same command continues from" in capsys.readouterr().err


def test_noise_is_named_point_by_point(capsys):
    warn_of_noise(dict(quiet=0.01, loud=0.5, once=float("inf")))
    said = capsys.readouterr().err
    assert "2 of 3 points vary" in said and ": once (undisturbed only once), loud (50%); is the machine" in said


def test_an_interrupted_run_is_refused_as_a_table_and_continued(tmp_path, capsys, monkeypatch):
    measured, real = [], Bench.samples

    def samples(self, key, count=1):
        measured.append(key)
        if len(measured) == COUNT + 4:  # in the second round
            raise KeyboardInterrupt
        return real(self, key, count)

    monkeypatch.setattr(Bench, "samples", samples)
    assert main(arguments(tmp_path / "t.json")) == 130
    part = tmp_path / "t.json.part"
    assert [p.name for p in tmp_path.iterdir()] == [part.name]
    with pytest.raises(LatencyTableError, match="latency.build_table again"):
        LatencyTable.load(part)
    kept = json.loads(part.read_text())["_samples"]
    assert sum(map(len, kept.values())) == COUNT + 3
    assert "continues from" in capsys.readouterr().err

    measured[:] = [None] * 1000  # never interrupts again
    assert main(arguments(tmp_path / "t.json")) == 0
    assert f"continuing with {COUNT + 3} samples" in capsys.readouterr().err
    second_round = measured[1000 : 1000 + COUNT - 3]
    assert sorted(second_round) == sorted(tuple(k.split("/")) for k, s in kept.items() if len(s) == 1)
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
    LatencyTable.load(tmp_path / "t.json").check_covers(ViTDims.of(skeleton(ARCH, **KWARGS)))


def test_what_another_setting_left_is_not_continued(tmp_path, capsys):
    (tmp_path / "t.json.part").write_text('{"_meta": {"model": "other"}, "_samples": {"x": [[1, 0]]}, "_clock": [1]}')
    assert main(arguments(tmp_path / "t.json", "--rounds", "2")) == 0
    assert "measuring starts afresh" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "t.json.previous.part"]


def test_other_settings_are_named_and_the_old_samples_kept(tmp_path, capsys):
    settings = dict(batch=8, rounds=3, grid=dict(embed=[4, 8]))
    for rounds in (3, 5, 7):
        progress = Progress(str(tmp_path / "t.json"), settings | dict(rounds=rounds))
        progress.samples = {"mlp/EMB_4/MLP_8": [[1.0, 0]] * rounds}
        progress.save()
    part, kept = tmp_path / "t.json.part", f"{tmp_path}/t.json.previous"
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {part}: {what}; it is kept as {kept}{number}.part, and measuring starts afresh"
        for what, number in (("rounds was 3, now 5", ""), ("rounds was 5, now 7", "2"))
    ]
    Progress(str(tmp_path / "t.json"), settings | dict(rounds=7, grid=dict(embed=[4])))
    assert f"{part}: another grid; it is kept" in capsys.readouterr().err
    (tmp_path / "t.json.previous.part").rename(part)
    assert len(Progress(str(tmp_path / "t.json"), settings).samples["mlp/EMB_4/MLP_8"]) == 3
    part.write_text("no JSON")
    Progress(str(tmp_path / "t.json"), settings)
    assert f"{part}: no file of an interrupted measurement; it is kept" in capsys.readouterr().err


def test_all_wrong_arguments_are_listed_at_once(tmp_path, capsys):
    wrong = ["--model", "no_such_vit", "--batch-size", "0", "--dtype", "fp8", "--device", "tpu", "--rounds", "0"]
    wrong += ["--points", "depth=3", "--output", str(tmp_path / "nowhere" / "t.json")]
    assert main(get_args_parser().parse_args(wrong)) == 2
    lines = capsys.readouterr().err.splitlines()
    expected = [
        "--batch-size must be at least 1",
        "--rounds must be",
        "--dtype must be one of fp32, bf16, fp16",
        "--device must be cpu or cuda",
        "no folder",
        "no_such_vit",
        "depth=3",
    ]
    assert len(lines) == len(expected)
    assert [e for e, line in zip(expected, lines, strict=True) if e not in line] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--model-kwargs", "img_size"], "'img_size' is not of the form KEY=VALUE"),
        (["--model-kwargs", "embed_dim=47", "num_heads=3"], "timm cannot build"),
        (["--model", "resnet18"], "not a plain Vision Transformer"),
        (["--initial-checkpoint", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--points", "embed=100", "heads=100", "qk=100"], "combinations, of at most 200,000"),
    ],
)
def test_wrong_argument(tmp_path, capsys, extra, words):
    assert main(arguments(tmp_path / "t.json", *extra)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_where_there_is_none(tmp_path, capsys):
    assert main(arguments(tmp_path / "t.json", "--device", "cuda")) == 2
    assert capsys.readouterr().err == "error: --device cuda: torch finds no CUDA device here; use --device cpu\n"


def test_noise_is_warned_of_with_the_keys(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("latency.samples.Progress.spread", lambda self, key: 0.5 if key.startswith("mlp") else 0.01)
    assert main(arguments(tmp_path / "t.json", "--rounds", "2")) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))
    assert f"4 of {COUNT} points" in line and "mlp/EMB_6/MLP_16 (50%)" in line and "mlp/EMB_48/MLP_192 (50%)" in line


def test_out_of_memory_suggests_a_smaller_batch_and_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    real, calls = Bench.samples, []

    def samples(self, key, count=1):
        calls.append(key)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return real(self, key, count)

    monkeypatch.setattr(Bench, "samples", samples)
    assert main(arguments(tmp_path / "t.json")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "--batch-size 2, try 1" in line and "t.json.part" in line
    assert sum(map(len, json.loads((tmp_path / "t.json.part").read_text())["_samples"].values())) == 4


def test_blocks_of_fewer_tokens(tmp_path):
    assert main(arguments(tmp_path / "t.json", "--rounds", "2", "--tokens", "6")) == 0
    table = LatencyTable.load(tmp_path / "t.json")
    assert set(table.data["_parts"]["mlp"]) == {"N_6", "N_18"} and table.meta["grid"]["tokens"] == [6, 18]
    full, half = (table.block_seconds(48, BlockDims(3, 16, 16, 192, n)) for n in (18, 12))
    assert 0 < half and 0 < full
    assert set(table.data["_parts"]["tokens"]) == {"N_6", "N_17"}
    assert table.block_seconds(48, BlockDims(0, 0, 0, 0, 12)) > 0
    assert main(arguments(tmp_path / "u.json", "--tokens", "2")) == 2


def test_a_swin_transformer_merges_no_tokens(tmp_path, capsys):
    wrong = ["--model", "swin_tiny_patch4_window7_224", "--batch-size", "2", "--device", "cpu", "--tokens", "9"]
    wrong += ["--merge", "content", "--output", str(tmp_path / "t.json")]
    assert main(get_args_parser().parse_args(wrong)) == 2
    assert "--tokens: for plain ViTs" in capsys.readouterr().err


@pytest.mark.parametrize("merge", ["place", "content"])
def test_points_are_of_plain_blocks_however_a_checkpoint_compresses(tmp_path, merge):
    torch.save(
        dict(arch=ARCH, kwargs=KWARGS | dict(lean_last=True, content_merge=True), model=dict(w=torch.zeros(1))),
        tmp_path / "m.pth",
    )
    args = arguments(tmp_path / "t.json", "--initial-checkpoint", str(tmp_path / "m.pth"), "--merge", merge)
    kwargs = read_arch(args).kwargs
    assert kwargs == KWARGS | (dict(content_merge=True) if merge == "content" else {})


def test_model_from_a_checkpoint(tmp_path, capsys):
    torch.save(dict(arch=ARCH, kwargs=KWARGS, model=dict(w=torch.zeros(1))), tmp_path / "m.pth")
    given = ["--initial-checkpoint", str(tmp_path / "m.pth"), "--num-classes", "4", "--batch-size", "1", "--points"]
    args = get_args_parser().parse_args([*given, *POINTS, "--device", "cpu", "--output", str(tmp_path / "t.json")])
    assert main(args) == 0
    assert LatencyTable.load(tmp_path / "t.json").meta["model_kwargs"] == KWARGS | dict(num_classes=4)


def test_grids_reach_the_full_width_in_pruning_groups():
    deit_b = ViTDims(768, (BlockDims(12, 64, 64, 3072, 198),) * 12)
    grid = grid_of(dict(embed=5, heads=4, qk=5, v=8, mlp=9), deit_b)
    assert {axis: points[-1] for axis, points in grid.items()} == dict(embed=768, heads=12, qk=64, v=64, mlp=3072)
    assert grid["v"] == [8, 16, 24, 32, 40, 48, 56, 64] and grid["heads"][0] == 1 and len(grid["embed"]) == 5
    assert all(p % 16 == 0 for p in grid["embed"] + grid["mlp"])
    narrow = grid_of(dict(embed=8, heads=4, qk=8, v=2, mlp=2), ViTDims(96, (BlockDims(3, 32, 32, 384, 66),)))
    qk = [4, 8, 12, 16, 20, 24, 28, 32]
    assert narrow == dict(embed=[12, 24, 36, 48, 60, 72, 84, 96], heads=[1, 2, 3], qk=qk, v=[4, 32], mlp=[16, 384])
