"""The job that tests train, prune and finetune: a two-block model on the digits, seconds long."""

from __future__ import annotations

import inspect
import json
import os
import signal

import pytest
import torch

from files import checkpoint
from latency.table import LatencyTable
from training.keeper import Keeper
from training.results import Effort

QUICK = Effort(builds=1, rounds=3)
MODEL = [
    "--model",
    "deit_tiny_distilled_patch16_224",
    "--model-kwargs",
    "img_size=16",
    "patch_size=4",
    "embed_dim=32",
    "depth=2",
    "num_heads=4",
]
PLAIN = [
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
    "--drop-path",
    "0.1",
    "--batch-size",
    "64",
]
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
PRUNE = [
    *PLAIN,
    "--pruning",
    "--latency_target",
    "0.6",
    "--latency_regularization",
    "1e-4",
    "--prune_per_iter",
    "64",
    "--interval_prune",
    "2",
    "--student_eval=True",
    "--epochs",
    "5",
    "--lr",
    "4e-3",
    "--kl_loss_coeff",
    "10000",
    "--original_loss_coeff",
    "1",
]
TUNE = [*PLAIN, "--epochs", "2", "--lr", "4e-3", "--kl_loss_coeff", "10000", "--original_loss_coeff", "1"]


def run(script, *flags, effort=QUICK):
    """What the run measures at its end, if it does, it measures with that effort."""
    args = script.get_args_parser().parse_args([str(f) for f in flags])
    script.main(args, **(dict(effort=effort) if "effort" in inspect.signature(script.main).parameters else {}))


def table_file(path):
    """Seconds that follow the widths; the real table is tested with its own script."""
    data = {
        f"EMB_{e}": {
            f"QK_{h}_{q}": {
                f"V_{v}": {f"MLP_{m}": 1e-6 * e * (h * 2 * (q + v) + 2 * m + 20) for m in (1, 128)} for v in (1, 8)
            }
            for h in (1, 4)
            for q in (1, 8)
        }
        for e in (4, 32)
    }
    path.write_text(json.dumps(data | dict(_meta=dict(batch=16))))
    return path


def token_table(width=1.0, **meta):
    """Seconds that follow tokens and, to some part, widths, those of merging included."""
    seconds = {}
    for n in (6, 18):
        for e in (4, 32):
            seconds[f"tokens/N_{n}/EMB_{e}"] = 1e-6 * n
            seconds |= {f"mlp/N_{n}/EMB_{e}/MLP_{m}": 1e-8 * n * (400 + width * e * m) for m in (1, 128)}
            seconds |= {
                f"attention/N_{n}/EMB_{e}/QK_{h}_{q}/V_{v}": 1e-8 * n * (400 + width * h * (e + n) * (q + v))
                for h in (1, 4)
                for q in (1, 8)
                for v in (1, 8)
            }
    return LatencyTable.of_parts(seconds | {f"overhead/EMB_{e}": 1e-6 * e for e in (4, 32)}, dict(batch=16) | meta)


def save_model(path, model, **changes):
    """Write a checkpoint of a compact model, with some tensors replaced."""
    checkpoint.save(
        path,
        arch=dict(name=model.arch, kwargs=model.arch_kwargs),
        dims=model.dims.to_dict(),
        model=model.state_dict() | changes,
    )


def same(a, b):
    """Equal tensors and values, all the way down."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def terminate_after(monkeypatch, updates):
    """SIGTERM arrives while the update of that number (from 1) is computed."""
    after_step, done = Keeper.after_step, []

    def patched(self):
        done.append(1)
        if len(done) == updates:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(self)

    monkeypatch.setattr(Keeper, "after_step", patched)


def interrupted(monkeypatch, script, flags, updates):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        terminate_after(patch, updates)
        run(script, *flags)
    assert stopped.value.code == 143


def equal(folder, other, name):
    """Two runs' checkpoints and logs."""
    first, second = (torch.load(f / name, weights_only=True) for f in (folder, other))
    for key in ("model", "model_ema", "masks", "optimizer", "lr_scheduler", "pruner", "epoch", "step", "rng", "dims"):
        assert same(first[key], second[key]), key
    assert first["metrics"]["acc1"] == second["metrics"]["acc1"]
    assert (folder / "log.txt").read_text() == (other / "log.txt").read_text()


def only(folder, pattern):
    (found,) = folder.glob(pattern)
    return found
