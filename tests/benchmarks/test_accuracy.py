"""The accuracy benchmarks on a tiny model: a row for every method, ratios met, rows not repeated, table and plot."""

import json
import sys

import pytest
import torch
from conftest import TINY
from jobs import table_file, token_table

from benchmarks import accuracy_per_ms, shrink_time, tokens
from benchmarks.pruners import GRADIENT
from models import build_vit

FOOTING = """
import timm, torch
IMAGES = torch.randint(0, 256, (160, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
def load_split(split, per_class=None): return IMAGES[:per_class], torch.arange(160)[:per_class] % 10
def normalise(x): return x.float() / 128 - 1
def load_base(path):
    content = torch.load(path, weights_only=True)
    model = timm.create_model(content["arch"], **content["kwargs"])
    model.load_state_dict(content["model"])
    return model.eval()
@torch.no_grad()
def top1(model, x, y): return 100 * (model(normalise(x)).argmax(1) == y).float().mean().item()
def latency_ratio(dense, model, rounds=1): return 1 - model.embed_dim / 100, 3.0, 2.0
def finetune(model, teacher, x, y, epochs, seed): assert all(p.requires_grad for p in model.parameters())
"""


@pytest.fixture
def words(tmp_path, randomise, monkeypatch):
    arch = "deit_tiny_distilled_patch16_224"
    model = randomise(build_vit(arch, **TINY))
    torch.save(dict(arch=arch, kwargs=TINY, model=model.state_dict()), tmp_path / "dense.pth")
    (tmp_path / "equal_footing.py").write_text(FOOTING)
    monkeypatch.delitem(sys.modules, "equal_footing", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return [
        "--initial-checkpoint",
        tmp_path / "dense.pth",
        "--bench",
        tmp_path,
        "--table",
        table_file(tmp_path / "table.json"),
        "--rows",
        tmp_path / "rows.jsonl",
        "--calib",
        128,
    ]


def run(words):
    accuracy_per_ms.main(accuracy_per_ms.get_args_parser().parse_args([str(word) for word in words]))


def test_a_row_for_every_method_once(words, tmp_path, capsys):
    methods = [*GRADIENT, "one-shot", "one-shot-not-refitted"]
    words += ["--targets", "0.6", "--methods", *methods, "--seeds", "0"]
    run(words)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == methods
    assert all(0.45 < row["latency"] <= 0.6 for row in rows), rows
    printed = capsys.readouterr().out
    run([*words, "--plot", tmp_path / "plot.png"])
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == len(rows)
    assert (tmp_path / "plot.png").stat().st_size > 5000
    lines = printed.splitlines()[-len(rows) :]
    assert [line.split()[0] for line in lines] == methods


def test_tokens_with_widths_and_alone(words, tmp_path):
    token_table(width=0.1).save(tmp_path / "tokens.json")
    methods = ["one-shot", "one-shot-tokens", "one-shot-tokens-alone"]
    run([*words, "--table", tmp_path / "tokens.json", "--targets", "0.3", "--methods", *methods, "--seeds", "0"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(0.2 < row["latency"] <= 0.3 for row in rows), rows
    widths, both, tokens = (row["dims"] for row in rows)
    assert {b["tokens"] for b in widths["blocks"]} == {18}
    assert min(b["tokens"] for b in both["blocks"]) < 18
    assert tokens["embed"] == 32 and {b["mlp"] for b in tokens["blocks"]} == {128}
    assert min(b["tokens"] for b in tokens["blocks"]) < 18


def test_recovery_is_a_row_of_its_own(words, tmp_path, capsys):
    words += ["--targets", "0.6", "0.5", "--methods", "random", "--seeds", "0"]
    run(words)
    run([*words, "--epochs", "1", "--per-class", "10"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["epochs"] for row in rows] == [0, 0, 1, 1]
    assert all(("finetuned" in row) == bool(row["epochs"]) for row in rows)
    assert rows[0]["oneshot"] == rows[2]["oneshot"]


def test_rows_are_measured_afterwards(words, tmp_path, capsys):
    words += ["--targets", "0.6", "--methods", "random", "--seeds", "0", "1"]
    run(words)
    before = (tmp_path / "rows.jsonl").read_text()
    capsys.readouterr()
    run([*words, "--check"])
    rows = [json.loads(line) for line in before.splitlines()]
    low, high = sorted(1 - row["dims"]["embed"] / 100 for row in rows)
    mean = sum(row["latency"] for row in rows) / 2
    (line,) = capsys.readouterr().out.splitlines()[-1:]
    assert line.split() == f"random 0.6 {mean:.3f} {(low + high) / 2:.3f} ({low:.3f} to {high:.3f})".split()
    assert (tmp_path / "rows.jsonl").read_text() == before


def test_tokens_by_every_method_once(words, tmp_path, capsys):
    table = words.index("--table")
    words[table : table + 2] = ["--batches", "2", "--epochs", "0"]
    methods = [*tokens.METHODS]
    words = [*map(str, words), "--seeds", "0", "--methods", *methods]
    tokens.main(tokens.get_args_parser().parse_args(["accuracy", *words]))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == methods
    lines = capsys.readouterr().out.splitlines()[-len(methods) :]
    assert all(line.startswith(method) for line, method in zip(lines, methods, strict=True))
    again = tokens.get_args_parser().parse_args(["accuracy", *words, "--depth_factor", "0.1", "--methods", "attn"])
    for _ in range(2):
        tokens.main(again)
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == len(methods) + 1


def test_shrinking_is_timed_in_pairs(monkeypatch, capsys):
    monkeypatch.setattr(shrink_time, "seconds", lambda flags, interval: 8.0 if interval else 10.0)
    shrink_time.main(shrink_time.get_args_parser().parse_args(["--rounds", "2", "--", "--pruning", "--epochs", "1"]))
    assert capsys.readouterr().out.splitlines()[-1] == "median 0.800 of the time"
