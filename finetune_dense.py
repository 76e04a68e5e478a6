"""Compact a pruned checkpoint into a dense model, and finetune, train from scratch or evaluate it."""
from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import checkpoint
import options
import training
from checkpoint import CheckpointError
from datasets import start_epoch
from engine import Precision, evaluate, nothing, train_one_epoch
from models import ViTDims, build_vit, load_dense
from models.pretrained import from_checkpoint
from models.vit import TokenLogits
from utils import Problems, RunFailed, append_log, is_main, make_folder, run_script, say, write_json


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "examples: python finetune_dense.py --finetune runs/pruned_run --data-set DIGITS --epochs 10\n"
        "          python finetune_dense.py --eval --finetune runs/pruned_run/ft_dense_…/ft_checkpoint.pth",
    )
    options.add_model_args(parser)
    options.add_data_args(parser)
    options.add_augmentation_args(parser)
    options.add_optimizer_args(parser)
    options.add_schedule_args(parser)
    options.add_distillation_args(parser)
    options.add_tau_arg(parser, "of the full model's KL and of soft CNN distillation")
    options.add_ema_args(parser)
    options.add_run_args(parser, "where the run's folder is made when there is no --finetune")
    group = parser.add_argument_group("finetuning")
    group.add_argument("--finetune", metavar="PATH", default="",
                       help="folder of a pruning run, or a checkpoint (default: train --model itself, with --scratch)")
    group.add_argument("--scratch", action="store_true", help="keep the widths but not the weights (default: off)")
    group.add_argument("--resume", metavar="FILE", nargs="?", const="auto", default="",
                       help="go on from FILE, or from ft_checkpoint.pth of this run's folder (default: start anew)")
    group.add_argument("--start_epoch", metavar="E", type=int, default=None,
                       help="epoch to go on with; must agree with the checkpoint (default: the checkpoint's)")
    group.add_argument("--eval", action="store_true", help="print top-1 and top-5 of --finetune and end")
    return parser


@dataclass
class Setup:
    """What the arguments named, loaded and checked."""

    device: torch.device
    full: training.FullModel
    data: training.Data
    model: nn.Module
    teacher: nn.Module | None
    cnn: nn.Module | None
    folder: Path | None
    parent: dict[str, Any] | None  # the pruned checkpoint


def checkpoint_path(path: str) -> Path:
    """The checkpoint that --finetune names: a file, or the pruned checkpoint of a folder."""
    return Path(path) / "pruned_checkpoint.pth" if Path(path).is_dir() else Path(path)


def run_folder(args: argparse.Namespace) -> Path:
    """As published: the arguments that matter are in the name."""
    kind = "scratch" if args.scratch else "ft_dense"
    name = f"{kind}_{args.epochs}_lr_{args.lr}_a_{args.distillation_alpha}_T_{args.distillation_tau}"
    if not args.kl_loss_coeff:
        name += "_CNN_only"
    parent = checkpoint_path(args.finetune).parent if args.finetune else Path(args.output_dir)
    return parent / name


def _full_model(args: argparse.Namespace, parent: dict[str, Any] | None) -> training.FullModel:
    """The full-size model: the pruned checkpoint's where there is one, its weights from where that run had them."""
    if parent is None:
        return training.full_model(args)
    if args.model and args.model != parent["arch"]["name"]:
        raise ValueError(f"--model is {args.model} but {args.finetune} holds {parent['arch']['name']}")
    inherited = argparse.Namespace(**vars(args))
    inherited.model = parent["arch"]["name"]
    if args.kl_loss_coeff and not args.initial_checkpoint and not args.pretrained:
        inherited.initial_checkpoint = parent["args"].get("initial_checkpoint", "")
        inherited.pretrained = bool(parent["args"].get("pretrained")) and not inherited.initial_checkpoint
    structure = {
        k: v for k, v in parent["arch"]["kwargs"].items() if k != "num_classes" and not k.endswith("drop_rate")
    }
    inherited.model_kwargs = structure | args.model_kwargs
    return training.full_model(inherited)


def _check_classes(parent: dict[str, Any], data: training.Data, path: str) -> None:
    classes = parent["arch"]["kwargs"].get("num_classes", 1000)
    if classes != data.classes:
        raise ValueError(f"{path} has {classes} classes, the data has {data.classes}")


def _model(args: argparse.Namespace, full: training.FullModel, parent: dict[str, Any] | None) -> nn.Module:
    drops = dict(pos_drop_rate=args.drop, proj_drop_rate=args.drop, drop_path_rate=args.drop_path)
    if parent is None:
        return build_vit(full.arch, **full.kwargs | drops) if args.scratch else full.build(**drops)
    if args.scratch:
        return build_vit(full.arch, ViTDims.from_dict(parent["dims"]), **full.kwargs | drops)
    return from_checkpoint(parent, checkpoint_path(args.finetune), **drops)


def _teacher(args: argparse.Namespace, full: training.FullModel, device: torch.device) -> nn.Module | None:
    if not args.kl_loss_coeff:
        return None
    if not full.has_weights:
        raise ValueError("no full model to distil from: give --initial-checkpoint FILE, or --kl_loss_coeff 0")
    return training.frozen(full.build(), device)


def check_args(args: argparse.Namespace) -> Setup:
    """Load everything the arguments name; everything that is wrong is reported at once. Raises BadArguments."""
    problems = Problems()
    training.check_numbers(args, problems)
    if args.eval and not args.finetune:
        problems.add("--eval needs --finetune FILE_OR_FOLDER")
    if not args.finetune and not args.scratch and not args.initial_checkpoint and not args.pretrained:
        problems.add("give --finetune FOLDER, or --scratch to train --model itself")
    if not args.finetune and not args.output_dir:
        problems.add("--output_dir is required without --finetune")
    if not args.eval and not args.kl_loss_coeff and not args.original_loss_coeff:
        problems.add("--kl_loss_coeff 0 and --original_loss_coeff 0 leave no loss")
    parent = problems.attempt(checkpoint.load, checkpoint_path(args.finetune)) if args.finetune else None
    device = problems.attempt(training.start, args)
    problems.raise_if_any()
    full = problems.attempt(_full_model, args, parent)
    problems.raise_if_any()
    data = problems.attempt(training.load_data, args, full, train=not args.eval)
    problems.raise_if_any()
    if parent is not None:
        problems.attempt(_check_classes, parent, data, args.finetune)
    problems.raise_if_any()
    model = problems.attempt(_model, args, full, parent)
    teacher = cnn = folder = None
    if not args.eval:
        teacher = problems.attempt(_teacher, args, full, device)
        cnn = problems.attempt(training.cnn_teacher, args, data.classes, device)
    problems.raise_if_any()
    if not args.eval:
        folder = problems.attempt(make_folder, run_folder(args))
    problems.raise_if_any()
    return Setup(device, full, data, model, teacher, cnn, folder, parent)


@dataclass
class State:
    """What training moves, and so what a checkpoint holds."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    precision: Precision


def save(name: str, setup: Setup, state: State, args: argparse.Namespace, epoch: int, metrics: dict[str, Any]) -> None:
    if not is_main():
        return
    dims = setup.model.dims
    origin = setup.full.path or (setup.parent or {}).get("args", {}).get("initial_checkpoint", "")
    checkpoint.save(
        setup.folder / name, arch=setup.full.record, dims=dims.to_dict(), dim=dims.to_dim(),
        model=setup.model.state_dict(), model_ema=state.ema.module.state_dict() if state.ema else None,
        optimizer=state.optimizer.state_dict(), lr_scheduler=state.scheduler.state_dict(),
        scaler=state.precision.scaler.state_dict(), epoch=epoch, rng=checkpoint.rng_state(), metrics=metrics,
        args=vars(args) | dict(initial_checkpoint=origin),
    )  # fmt: skip


def resume(args: argparse.Namespace, setup: Setup, state: State) -> tuple[int, dict[str, Any]]:
    """Restore a run; returns the epoch to go on with and the metrics so far."""
    path = setup.folder / "ft_checkpoint.pth" if args.resume == "auto" else Path(args.resume)
    problems = Problems()
    content = problems.attempt(checkpoint.load, path)
    problems.raise_if_any()
    if content["dims"] != setup.model.dims.to_dict() or content["arch"] != setup.full.record:
        problems.add(f"--resume: {path} holds another architecture")
    epoch = content["epoch"] + 1
    if args.start_epoch not in (None, epoch):
        problems.add(f"--start_epoch is {args.start_epoch} but {path} goes on with epoch {epoch}")
    problems.raise_if_any()
    setup.model.load_state_dict(content["model"])
    if state.ema and content["model_ema"]:
        state.ema.module.load_state_dict(content["model_ema"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.scheduler.load_state_dict(content["lr_scheduler"])
    state.precision.scaler.load_state_dict(content["scaler"])
    checkpoint.set_rng_state(content["rng"])
    return epoch, content["metrics"]


def finish(args: argparse.Namespace, setup: Setup, metrics: dict[str, Any]) -> dict[str, Any]:
    """summary.json and dims.json of a finished run; the earlier stages come from the pruning run's summary."""
    earlier = checkpoint_path(args.finetune).parent / "summary.json" if args.finetune else None
    summary = json.loads(earlier.read_text()) if earlier and earlier.exists() else {}
    pruned = summary.get("pruned", {})
    dims, batch = setup.model.dims, pruned.get("batch", args.batch_size)
    dense = dims == training.dims_of(setup.full)
    measured = 1.0 if dense else training.measured_ratio(setup.full, dims, batch, setup.device)
    predicted = 1.0 if dense else pruned.get("latency_predicted")
    name = "dense" if dense else "finetuned"
    summary[name] = training.stage(
        setup.full, dims, metrics["acc1"], predicted=predicted, measured=measured, batch=batch, device=setup.device
    )
    write_json(setup.folder / "dims.json", dims.to_dict())
    write_json(setup.folder / "summary.json", summary)
    return summary[name]


def evaluate_only(args: argparse.Namespace, setup: Setup) -> None:
    path = checkpoint_path(args.finetune)
    try:
        model = load_dense(path, setup.device)
    except CheckpointError as error:
        raise RunFailed(str(error)) from None
    result = evaluate(model, setup.data.val, training.precision(args, setup.device), args.dist_eval)
    say(f"{path}: top-1 {result['acc1']:.2f}, top-5 {result['acc5']:.2f}, loss {result['loss']:.4f} "
        f"on {int(result['samples'])} images")


def main(args: argparse.Namespace) -> None:
    setup = check_args(args)
    if args.eval:
        evaluate_only(args, setup)
        return

    # ---------------------------------------------------------------- parts
    train_loader, val_loader = setup.data.train, setup.data.val
    model = training.for_training(setup.model, setup.device)
    ema = ModelEmaV3(setup.model, decay=args.model_ema_decay) if args.model_ema else None
    follow = (lambda loss: ema.update(setup.model)) if ema else nothing
    optimizer = training.make_optimizer(args, setup.model)
    scheduler = training.make_scheduler(args, optimizer, len(train_loader))
    precision = training.precision(args, setup.device)
    state = State(model, ema, optimizer, scheduler, precision)
    criterion = training.make_loss(args, setup.cnn, setup.teacher, tau=args.distillation_tau, per_token=True)
    mixup = training.make_mixup(args, setup.data.classes)
    write_json(setup.folder / "args.json", vars(args))
    writer = SummaryWriter(setup.folder) if is_main() else None
    parameters = sum(p.numel() for p in setup.model.parameters())
    tested = TokenLogits(setup.model)

    # ---------------------------------------------------------------- train
    first, metrics = resume(args, setup, state) if args.resume else (args.start_epoch or 0, {})
    if not args.resume:
        before = evaluate(tested, val_loader, precision, args.dist_eval)
        say(f"before: top-1 {before['acc1']:.2f}, {parameters:,} parameters, widths {setup.model.dims.to_dim()}")
        metrics = before | dict(best=0.0)
    for epoch in range(first, args.epochs):
        start_epoch(train_loader, epoch)
        model.train()
        stats = train_one_epoch(
            model, criterion, train_loader, optimizer, precision, epoch, mixup=mixup, clip_grad=args.clip_grad,
            before_step=scheduler.step_update, after_step=follow, log_interval=args.log_interval,
        )  # fmt: skip
        test = evaluate(tested, val_loader, precision, args.dist_eval)
        line = {f"train_{k}": v for k, v in stats.items()} | {f"test_{k}": v for k, v in test.items()}
        if ema is not None:
            line["test_ema_acc1"] = evaluate(TokenLogits(ema.module), val_loader, precision, args.dist_eval)["acc1"]
        append_log(setup.folder, **line, epoch=epoch, n_parameters=parameters)
        metrics = test | dict(best=max(metrics["best"], test["acc1"]))
        if test["acc1"] >= metrics["best"]:
            save("ft_best.pth", setup, state, args, epoch, metrics)
        save("ft_checkpoint.pth", setup, state, args, epoch, metrics)
        for tag, value in line.items() if writer else ():
            writer.add_scalar(tag.replace("_", "/", 1), value, epoch)
        shown = f", EMA {line['test_ema_acc1']:.2f}" if ema is not None else ""
        say(f"epoch {epoch}: loss {stats['loss']:.4f}, top-1 {test['acc1']:.2f}{shown}, best {metrics['best']:.2f}")

    # ---------------------------------------------------------------- result
    result = finish(args, setup, metrics)
    say(f"{setup.folder / 'ft_checkpoint.pth'}: top-1 {result['top1']:.2f}, {result['params']:,} parameters, "
        f"{result['macs'] / 1e6:,.1f} M MACs, measured latency {result['latency_measured']:.3f} of dense")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
