"""The jobs of `benchmarks/faults.py`: what they are made from, their processes, and what they have written."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.fault_process import Process
from datasets import Digits
from files import checkpoint
from runtime.errors import RunFailed

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
    "--lr",
    "4e-3",
    "--kl_loss_coeff",
    "10000",
    "--original_loss_coeff",
    "1",
]
COMPARED = ("model", "model_ema", "masks", "optimizer", "lr_scheduler", "pruner", "epoch", "step", "rng", "dims")
PER_CLASS = 24  # images of the job that reads files


class Material:
    """What the jobs are made from, in a folder: dense weights, others, a table, a pruned model, images."""

    def __init__(
        self, root: Path, epochs: int, prune: Any, tune: Any, dense: Path | None = None, pruned: Path | None = None
    ) -> None:
        """dense, pruned: checkpoints that are there already (default: they are made)."""
        self.root, self.epochs, self.prune, self.tune = root, epochs, prune, tune
        self.table, self.images = root / "table.json", root / "images"
        self.table.write_text(json.dumps(_table()))
        self.dense = dense or self._make(
            tune,
            "dense/*/ft_checkpoint.pth",
            [
                "--scratch",
                *MODEL,
                "--data-set",
                "DIGITS",
                *PLAIN,
                "--kl_loss_coeff",
                "0",
                "--lr",
                "1e-2",
                "--epochs",
                "2",
                "--output_dir",
                str(root / "dense"),
            ],
        )
        self.pruned = pruned or self._make(
            prune, "global_prune_*/pruned_checkpoint.pth", [*self.prune_flags(4), "--output_dir", str(root)]
        )
        for split, train in (("train", True), ("val", False)):
            _write_images(self.images / split, Digits(train), PER_CLASS if train else PER_CLASS // 4)

    def _make(self, script: Any, result: str, flags: list[str]) -> Path:
        process = Process(script, flags, self.root / "log", None, {})
        if process.wait(600):
            raise RunFailed(f"the material cannot be made: {process.errors()[-500:]}")
        return next(self.root.glob(result))

    def prune_flags(self, epochs: int) -> list[str]:
        return [
            "--data-set",
            "DIGITS",
            *PLAIN,
            "--initial-checkpoint",
            str(self.dense),
            "--pruning",
            "--latency_look_up_table",
            str(self.table),
            "--latency_target",
            "0.6",
            "--latency_regularization",
            "1e-4",
            "--prune_per_iter",
            "16",
            "--interval_prune",
            "3",
            "--student_eval=True",
            "--epochs",
            str(4 * epochs),
        ]

    def other(self, path: Path) -> bytes:
        """The checkpoint with other weights."""
        content = checkpoint.load(path)
        content["model"] = {name: value * 1.01 for name, value in content["model"].items()}
        checkpoint.save(self.root / "other.pth", **content)
        return (self.root / "other.pth").read_bytes()


def _table() -> dict[str, Any]:
    """Seconds that follow the widths."""
    tree: dict[str, Any] = {}
    for e, h, q, v, m in product((4, 32), (1, 4), (1, 8), (1, 8), (1, 128)):
        leaf = tree.setdefault(f"EMB_{e}", {}).setdefault(f"QK_{h}_{q}", {}).setdefault(f"V_{v}", {})
        leaf[f"MLP_{m}"] = 1e-6 * e * (h * 2 * (q + v) + 2 * m + 20)
    return tree | dict(_meta=dict(batch=16))


def _write_images(folder: Path, digits: Digits, per_class: int) -> None:
    for target in range(10):
        (folder / str(target)).mkdir(parents=True)
        chosen = [image for image, t in zip(digits.images, digits.targets, strict=True) if t == target][:per_class]
        for i, image in enumerate(chosen):
            image.resize((16, 16)).save(folder / str(target) / f"{i}.png")


class Job:
    """One run in a folder of its own. name: prune, tune, ranks (finetuning on two) or images (finetuning on files)."""

    def __init__(self, material: Material, name: str, label: str, reference: Job | None = None) -> None:
        self.material, self.name, self.images = material, name, material.images
        self.root = material.root / "jobs" / f"{name}_{label}"
        self.root.mkdir(parents=True)
        self.folder, self.started = self.root / "run", 0
        self.folder.mkdir()
        self.script = material.prune if name == "prune" else material.tune
        self.start_from = material.dense if name == "prune" else self.folder / "pruned_checkpoint.pth"
        if name != "prune":
            self.start_from.write_bytes(material.pruned.read_bytes())
        self.seconds, self.operations, self.size = (
            (reference.seconds, reference.operations, reference.size) if reference else (0.0, 0, 0)
        )

    @property
    def patience(self) -> float:
        return 60 + 10 * self.seconds

    def flags(self) -> list[str]:
        data = ["--data-set", "DIGITS"]
        if self.name == "images":
            data = ["--data-set", "IMNET", "--data-path", str(self.images)]
        if self.name == "prune":
            own = [
                *self.material.prune_flags(self.material.epochs),
                "--output_dir",
                str(self.folder),
                "--batch-size",
                "64",
            ]
        else:
            own = [*data, *PLAIN, "--finetune", str(self.folder), "--epochs", str(self.material.epochs)]
        batch = dict(prune="64", tune="64", ranks="32", images="16")[self.name]
        return [*own, "--batch-size", batch, "--recovery-interval", "7", "--dist-timeout", "6", "--no-repeated-aug"]

    def checkpoints(self) -> list[Path]:
        """The newest and the one before it, where they are there."""
        newest = "checkpoint.pth" if self.name == "prune" else "ft_checkpoint.pth"
        paths = [*self.folder.glob(f"*/{newest}"), *self.folder.glob(f"*/{newest.replace('.pth', '.older.pth')}")]
        return paths

    def start(
        self, patch: Callable[[], None] | None = None, more: list[str] | None = None, **environment: str
    ) -> Process:
        self.started += 1
        log = self.root / f"log_{self.started}"
        return Process(self.script, [*self.flags(), *(more or [])], log, patch, environment)

    def start_ranks(self, more: list[str] | None = None) -> list[Process]:
        with socket.socket() as free:
            free.bind(("", 0))
            port = str(free.getsockname()[1])
        common = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
        return [self.start(None, more, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]

    def run(self, patch: Callable[[], None] | None = None, resume: bool = False) -> None:
        """To the end. Raises AssertionError where it does not end well."""
        more = ["--resume"] if resume else []
        processes = self.start_ranks(more) if self.name == "ranks" else [self.start(patch, more)]
        for process in processes:
            code = process.wait(self.patience)
            if code is None:
                process.send(signal.SIGKILL)
                process.wait(10)
            assert code == 0, f"resumed: exit code {code}: {process.errors()[-400:]}"

    def refused(self) -> str:
        """What the job says when it is not resumed."""
        process = self.start(None, ["--resume"])
        code = process.wait(self.patience)
        assert code == 2, f"exit code {code} where --resume should have been refused: {process.errors()[-300:]}"
        return process.errors().strip().splitlines()[-1]

    def strange_checkpoint(self) -> bytes:
        """What a run with the same flags from other weights writes."""
        job = Job(self.material, self.name, f"strange_{self.root.name}", self)
        job.start_from = job.root / "other.pth"
        job.start_from.write_bytes(self.material.other(self.start_from))
        more = ["--initial-checkpoint", str(job.start_from)]
        if self.name != "prune":
            os.replace(job.start_from, job.folder / "pruned_checkpoint.pth")
            more = []
        process = job.start(None, more)
        while not job.checkpoints() and process.wait(0.01) is None:
            pass
        process.send(signal.SIGKILL)
        process.wait(10)
        return job.checkpoints()[0].read_bytes()

    def result(self) -> dict[str, Any]:
        name = "pruned_checkpoint.pth" if self.name == "prune" else "ft_checkpoint.pth"
        (path,) = self.folder.glob(f"*/{name}")
        content = checkpoint.load(path)
        outcome = {key: checkpoint.digest(content[key]) for key in COMPARED} | dict(acc1=content["metrics"]["acc1"])
        summary = json.loads((path.parent / "summary.json").read_text())
        return outcome | dict(log=(path.parent / "log.txt").read_text(), top1=[s["top1"] for s in summary.values()])

    def differences(self, reference: Job) -> list[str]:
        mine, theirs = self.result(), reference.result()
        return [key for key in theirs if mine[key] != theirs[key]]

    def tracebacks(self) -> str:
        for log in sorted(self.root.glob("log_*")):
            if "Traceback (most recent call last)" in (text := log.read_text(errors="replace")):
                return f"{log.name}: {text[text.index('Traceback') :][-300:]}"
        return ""
