"""The leaderboard on a tiny model: a row for every method, latencies met or void, no row twice, table and picture."""

import json
import sys

import pytest
import torch
from conftest import TINY
from jobs import table_file, token_table
from torch import nn

from benchmarks import footing, leaderboard
from benchmarks.board_figures import markdown
from benchmarks.pruners import GRADIENT
from models import build_vit

FOOTING = """
import timm, torch
from torch.utils.flop_counter import FlopCounterMode
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
@torch.no_grad()
def flops(model):
    with FlopCounterMode(display=False) as counter: model(normalise(IMAGES[:1]))
    return counter.get_total_flops()
def latency_ratio(dense, model, batch, rounds, repeats): return flops(model) / flops(dense), 3.0, 2.0
def finetune(model, teacher, x, y, epochs, seed):
    assert all(p.requires_grad for p in model.parameters())
    torch.nn.init.zeros_(model.head.weight), torch.nn.init.zeros_(model.head.bias)
"""
BASELINE = """
import timm
def bind(model): return model
def gradients(model, crit, images, labels, batch): return crit, len(images), batch
def prune(base, sparsity, gradients, flags):
    assert gradients == (None if flags.crit == "l2" else (flags.crit, 128, 1 if flags.crit == "hessian-fixed" else 64))
    if sparsity > 0.9: raise RuntimeError("no channels are left")
    kwargs = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10)
    return timm.create_model("deit_tiny_distilled_patch16_224", mlp_ratio=4 - 4 * sparsity, **kwargs).eval()
"""


SNAPVIT = {  # what is called of it
    "src/models/enums.py": "class PrunableModelType: DINO = 1",
    "src/utils/ga/loss.py": "class GALossType: COSINE_SIMILARITY = 1",
    "src/utils/ga/__init__.py": """
import numpy
class GAOptimizerType: XNES = 1
def optimize_function_ga(type_, fitness_function, ndim_problem, max_function_evaluations, seed, starting_point):
    assert starting_point.shape == (ndim_problem,) == (2 + 8,)
    fitness_function(starting_point)
    return starting_point.astype(numpy.float32), 0.0, {}
""",
    "src/utils/ga/fitness.py": """
def build_fitness_function(model, teacher, pruning_data_loader, eval_data_loader, device, pruning_function,
                           loss_types, num_pca_components):
    crops, _ = next(iter(pruning_data_loader))
    model.say(f"{len(pruning_data_loader.dataset)} images, {crops.shape[1]} crops")
    return lambda solution: pruning_function(model=model, solution=solution)
""",
    "src/utils/models.py": "import copy\ndeepcopy_model = copy.deepcopy\ndef freeze_model(model, exclusions): pass",
    "src/utils/modules.py": """
import torch
class DynamicHeadsAttention(torch.nn.Module):
    @classmethod
    def from_timm_attn(cls, attention):
        self = cls()
        self.of, self.num_heads, self.head_dim = attention, attention.num_heads, attention.head_dim
        return self
    def forward(self, x, attn_mask): return self.of(x)
def OptionalLinear(linear): return linear
""",
    "src/models/prunable.py": """
import torch
from pathlib import Path
class Prunable(torch.nn.Module):
    num_blocks, default_num_heads = 2, 4
    def __init__(self, model):
        super().__init__()
        self.model, self.teacher = model, model
    def say(self, line):
        with open(Path(__file__).parents[2] / "calls.txt", "a") as file: file.write(line + "\\n")
    def prune(self, data_loader, pruning_ratio, pruning_ratio_heads, block_weights, estimate_pruning_weights):
        assert data_loader is None and not estimate_pruning_weights and block_weights.shape == (10,)
        self.say(f"{pruning_ratio} {pruning_ratio_heads}")
        for mlp in (block.mlp for block in self.model.blocks):
            kept = int(128 * (1 - pruning_ratio))
            mlp.fc1.weight.data, mlp.fc1.bias.data = mlp.fc1.weight.data[:kept], mlp.fc1.bias.data[:kept]
            mlp.fc2.weight.data = mlp.fc2.weight.data[:, :kept]
def load_prunable_model(type_, model, transform, device, min_hidden_dim_keep_ratio, min_head_keep_ratio):
    return Prunable(model), lambda image: image.float().repeat(12, 1, 1, 1)
""",
}


@pytest.fixture
def words(tmp_path, randomise, monkeypatch):
    arch = "deit_tiny_distilled_patch16_224"
    model = randomise(build_vit(arch, **TINY))
    torch.save(dict(arch=arch, kwargs=TINY, model=model.state_dict()), tmp_path / "dense.pth")
    (tmp_path / "equal_footing.py").write_text(FOOTING)
    (tmp_path / "torch_pruning_baseline.py").write_text(BASELINE)
    for name in ("equal_footing", "torch_pruning_baseline"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    flags = dict(base=tmp_path / "dense.pth", bench=tmp_path, rows=tmp_path / "rows.jsonl", calib=128, seeds=0)
    flags["table"] = table_file(tmp_path / "table.json")
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def run(words):
    """The rows that the file holds afterwards, but for the dense model's."""
    args = leaderboard.get_args_parser().parse_args([str(word) for word in words])
    leaderboard.main(args)
    return [json.loads(line) for line in args.rows.read_text().splitlines()][1:]


@pytest.fixture
def coarse(monkeypatch):
    """Latencies are met within what the few channels of the tiny model allow."""
    monkeypatch.setattr(footing, "CLOSE", 0.06)
    monkeypatch.setattr(footing, "VOID", 0.06)


def test_a_row_for_every_method_once(words, coarse, tmp_path, capsys):
    methods = [*leaderboard.USUAL, "nvit-all", "one-shot-tokens-content"]
    words += ["--targets", "0.7", "--methods", *methods]
    words[words.index("--table") + 1] = tmp_path / "tokens.json"
    token_table(width=0.1).save(tmp_path / "tokens.json")
    rows = run(words)
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert abs(row["latency"] - 0.7) <= 0.06 and 0 <= row["top1"]["right after"] <= 100, row
    printed = capsys.readouterr().out
    assert run([*words, "--plot", tmp_path / "plot.png"]) == rows
    assert (tmp_path / "plot.png").stat().st_size > 5000
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(rows) and "**one-shot (ours)**" in printed


def test_a_latency_that_is_not_met_is_void_and_shown(words, capsys):
    (row,) = run([*words, "--targets", "0.05", "--methods", "tome"])
    assert "top1" not in row and row["latency"] > 0.1
    assert f"| ToMe | void (nearest is {row['latency']:.3f}) |" in capsys.readouterr().out
    row = run([*words, "--targets", "0.3", "--methods", "torch-pruning-l2"])[-1]  # which fails at many aims
    assert row["void"] == f"nearest is {row['latency']:.3f}"


def test_recovery_and_finetuning_are_stages_of_a_row(words, coarse, capsys):
    methods = ["--methods", "one-shot", "random", "--targets", "0.7"]
    rows = run([*words, *methods, "--epochs", "2", "--recover_minutes", "0.005"])
    assert [[*row["top1"]] for row in rows] == [["right after", "recovered", "finetuned"], ["right after", "finetuned"]]
    assert len({row["top1"]["finetuned"] for row in rows}) == 1
    printed = capsys.readouterr().out
    assert (
        "| **one-shot (ours)** + 0.005 min of recovery |" in printed
        and "| random + 2 epochs of finetuning |" in printed
    )
    assert run([*words, *methods]) == rows, "stages that are not asked for do no harm"
    assert len(run([*words, *methods, "--epochs", "1"])) == 4


def test_only_the_tokens_of_a_token_method_go(words, coarse):
    (row,) = run([*words, "--targets", "0.6", "--methods", "prune-and-merge-content-refitted"])
    dims = row["dims"]
    assert dims["embed"] == 32 and {block["mlp"] for block in dims["blocks"]} == {128}
    assert min(block["tokens"] for block in dims["blocks"]) < 18


def test_snapvit_by_its_own_code(words, coarse, tmp_path, monkeypatch):
    for path, text in SNAPVIT.items():
        (tmp_path / "code" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / path).write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        monkeypatch.delitem(sys.modules, name)
    words += ["--targets", "0.7", "--methods", "random", "--snapvit", tmp_path / "code"]
    _, row = run(words)
    assert row["method"] == "snapvit" and abs(row["latency"] - 0.7) <= 0.06
    assert {block["mlp"] for block in row["dims"]["blocks"]} < {*range(20, 128)}
    calls = (tmp_path / "code" / "calls.txt").read_text().splitlines()
    assert calls[:5] == ["128 images, 12 crops", "0.15 0.0", "0.35 0.2", "0.55 0.4", "0.65 0.5"]
    assert all(0 <= float(hidden) - float(heads) <= 0.1501 for hidden, heads in map(str.split, calls[5:]))
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        monkeypatch.delitem(sys.modules, name)


class _Steps(footing.Pruner):
    """A model that is nothing but its aim; below 0.1 there is none."""

    def __call__(self, aim):
        if aim < 0.1:
            raise RuntimeError("too low")
        model = nn.Identity()
        model.aim = aim
        return model


@pytest.mark.parametrize("target", [0.9, 0.5, 0.2])
def test_the_aim_is_searched_until_the_latency_is_met(monkeypatch, target):
    bench = object.__new__(footing.Bench)
    monkeypatch.setattr(bench, "latency", lambda model, rounds: model.aim**2 * 0.9 + 0.1, raising=False)
    met = bench.meet(_Steps(), target)
    assert abs(met.latency - target) <= footing.CLOSE and met.latency == met.model.aim**2 * 0.9 + 0.1
    assert bench.meet(_Steps(), 0.01).latency < 0.13


def test_one_wrong_measurement_does_not_mislead_the_search(monkeypatch):
    bench = object.__new__(footing.Bench)
    wrong = iter([0.44])  # at an aim of 0.5, which gives 0.53
    monkeypatch.setattr(bench, "latency", lambda model, rounds: next(wrong, 0.06 + 0.94 * model.aim), raising=False)
    assert abs(bench.meet(_Steps(), 0.5).model.aim - 0.44 / 0.94) < 0.015


def test_a_method_that_is_slow_again_at_low_aims_is_met_above_them(monkeypatch):
    bench, steps = object.__new__(footing.Bench), _Steps()
    steps.seen.append((0.6, 0.7))
    slow_again = lambda model, rounds: 1.25 * model.aim - 0.05 if model.aim > 0.17 else 0.55  # noqa: E731
    monkeypatch.setattr(bench, "latency", slow_again, raising=False)
    assert abs(bench.meet(steps, 0.19).latency - 0.19) <= footing.CLOSE


def test_a_method_that_always_fails_says_why():
    bench = object.__new__(footing.Bench)

    class Broken(footing.Pruner):
        def __call__(self, aim):
            raise RuntimeError("no gradients")

    with pytest.raises(ValueError, match="RuntimeError: no gradients"):
        bench.meet(Broken(), 0.5)


def test_lines_hold_mean_spread_latency_and_voids():
    same = dict(base="net", target=0.5, epochs=0, recover_minutes=0.0, load=1.5)
    rows = [
        same | dict(method="tome", seed=seed, latency=latency, top1={"right after": top1})
        for seed, latency, top1 in ((0, 0.49, 70.0), (1, 0.51, 71.0), (0, 0.50, 72.0))
    ]
    rows += [same | dict(method="tome", seed=2, latency=0.6, void="nearest is 0.600")]
    rows += [
        same | dict(method=method, seed=0, latency=0.504, top1={"right after": top1})
        for method, top1 in (("one-shot", 72.5), ("torch-pruning-l2", 20.0), ("nvit-align", 71.5))
    ]
    assert markdown(rows, dict(net=73.0)).splitlines() == [
        "| net, points lost of 73.00 | at 0.5 |",
        "| --- | --- |",
        "| **one-shot (ours)** | 0.50 at 0.504 |",
        "| ToMe | 1.50 (1.00 to 2.00; 2 seeds) at 0.505, 1 void |",
        "| nvit align | 1.50 at 0.504 |",
        "| Torch-Pruning: l2 | 53.00 at 0.504 |",
        "",
        "Load average of the machine while measuring: 1.5 to 1.5.",
    ]


def test_every_variant_of_the_rule_starts_from_it():
    assert GRADIENT["nvit"] == {} and all(set(change) for name, change in GRADIENT.items() if name != "nvit")
