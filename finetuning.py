"""Training a dense model to its end: epochs, checkpoints and log, shared by finetuning and training from scratch."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import checkpoint
import results
import training
from datasets import start_epoch
from engine import Precision, evaluate, nothing, train_one_epoch
from models.vit import TokenLogits
from utils import append_log, is_main, naming_the_last_good, say, write_json


@dataclass
class Run:
    """What the arguments named, loaded and checked. origin: path of the dense weights; resumed: the checkpoint."""

    device: torch.device
    full: training.FullModel
    data: training.Data
    model: nn.Module
    teacher: nn.Module | None = None
    cnn: nn.Module | None = None
    folder: Path = Path()
    origin: str = ""
    resumed: dict[str, Any] | None = None


@dataclass
class State:
    """What training moves, and so what a checkpoint holds."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    precision: Precision


def save(name: str, run: Run, state: State, args: Any, epoch: int, metrics: dict[str, Any]) -> None:
    if not is_main():
        return
    dims = run.model.dims
    checkpoint.save(
        run.folder / name, arch=run.full.record, dims=dims.to_dict(), dim=dims.to_dim(),
        model=run.model.state_dict(), model_ema=state.ema.module.state_dict() if state.ema else None,
        optimizer=state.optimizer.state_dict(), lr_scheduler=state.scheduler.state_dict(),
        scaler=state.precision.scaler.state_dict(), epoch=epoch, rng=checkpoint.rng_state(), metrics=metrics,
        args=vars(args) | dict(initial_checkpoint=run.origin),
    )  # fmt: skip


def read_resumed(args: Any, run: Run, folder: Path) -> dict[str, Any] | None:
    """The checkpoint that --resume names, None without it. Raises ValueError where it does not fit the arguments."""
    if not args.resume:
        return None
    path = folder / "ft_checkpoint.pth" if args.resume == "auto" else Path(args.resume)
    content = checkpoint.load(path)
    if content["dims"] != run.model.dims.to_dict() or content["arch"] != run.full.record:
        raise ValueError(f"--resume: {path} holds another architecture")
    if content["optimizer"] is None or content["lr_scheduler"] is None:
        raise ValueError(f"--resume: {path} is not of a finetuning run")
    if args.start_epoch not in (None, content["epoch"] + 1):
        raise ValueError(f"--start_epoch is {args.start_epoch} but {path} goes on with epoch {content['epoch'] + 1}")
    return content


def restore(args: Any, run: Run, state: State) -> tuple[int, dict[str, Any]]:
    """Go on from the resumed checkpoint; returns the next epoch and the metrics so far."""
    content = run.resumed
    run.model.load_state_dict(content["model"])
    if state.ema and content["model_ema"]:
        state.ema.module.load_state_dict(content["model_ema"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.scheduler.load_state_dict(content["lr_scheduler"])
    state.precision.scaler.load_state_dict(content["scaler"])
    training.restore_random_state(args, content)
    return content["epoch"] + 1, content["metrics"]


def train(args: Any, run: Run) -> dict[str, Any]:
    """Train to the last epoch, or go on from a checkpoint; returns the last epoch's metrics. Raises RunFailed."""
    # ---------------------------------------------------------------- parts
    train_loader, val_loader = run.data.train, run.data.val
    model = training.for_training(run.model, run.device)
    ema = ModelEmaV3(run.model, decay=args.model_ema_decay) if args.model_ema else None
    follow = (lambda loss: ema.update(run.model)) if ema else nothing
    optimizer = training.make_optimizer(args, run.model)
    scheduler = training.make_scheduler(args, optimizer, len(train_loader))
    precision = training.precision(args, run.device)
    state = State(model, ema, optimizer, scheduler, precision)
    criterion = training.make_loss(args, run.cnn, run.teacher, tau=args.distillation_tau, per_token=True)
    mixup = training.make_mixup(args, run.data.classes)
    write_json(run.folder / "args.json", vars(args))
    writer = SummaryWriter(run.folder) if is_main() else None
    parameters = sum(p.numel() for p in run.model.parameters())
    tested = TokenLogits(run.model)

    # ---------------------------------------------------------------- train
    if run.resumed:
        first, metrics = restore(args, run, state)
    else:
        training.clear_logs(run.folder)
        before = evaluate(tested, val_loader, precision, args.dist_eval)
        say(f"before: top-1 {before['acc1']:.2f}, {parameters:,} parameters, widths {run.model.dims.to_dim()}")
        first, metrics = 0, before | dict(best=0.0)
    for epoch in range(first, args.epochs):
        start_epoch(train_loader, epoch)
        model.train()
        with naming_the_last_good(run.folder / "ft_checkpoint.pth"):
            stats = train_one_epoch(
                model, criterion, train_loader, optimizer, precision, epoch, mixup=mixup, clip_grad=args.clip_grad,
                before_step=scheduler.step_update, after_step=follow, log_interval=args.log_interval,
            )  # fmt: skip
            test = evaluate(tested, val_loader, precision, args.dist_eval)
        line = results.log_line(stats, test)
        if ema is not None:
            line["test_ema_acc1"] = evaluate(TokenLogits(ema.module), val_loader, precision, args.dist_eval)["acc1"]
        metrics = test | dict(best=max(metrics["best"], test["acc1"]))
        if test["acc1"] >= metrics["best"]:
            save("ft_best.pth", run, state, args, epoch, metrics)
        save("ft_checkpoint.pth", run, state, args, epoch, metrics)
        append_log(run.folder, **line, epoch=epoch, n_parameters=parameters)
        for tag, value in line.items() if writer else ():
            writer.add_scalar(tag.replace("_", "/", 1), value, epoch)
        shown = f", EMA {line['test_ema_acc1']:.2f}" if ema is not None else ""
        say(f"epoch {epoch}: loss {stats['loss']:.4f}, top-1 {test['acc1']:.2f}{shown}, best {metrics['best']:.2f}")
    return metrics
