"""From checked arguments to the parts of a run, shared by every script.

`args` is a Namespace with the flags of `options`: full-size model, data, losses, optimizer and results follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

import options
from datasets import build_dataset
from loading.loaders import build_loader
from loading.preparation import Preparation
from losses import DistillationLoss, NViTLoss, base_criterion
from models.vit import TokenLogits
from runtime.console import warn
from runtime.precision import Precision
from runtime.ranks import rank, world_size
from training.class_names import class_names_of

FALLS_TO_MIN_LR = ("cosine", "tanh", "poly")


def drop_rate_kwargs(args: Any) -> dict[str, float]:
    """timm's arguments for --drop and --drop-path."""
    return dict(pos_drop_rate=args.drop, proj_drop_rate=args.drop, drop_path_rate=args.drop_path)


@dataclass
class Data:
    """Loaders, what the model needs to know of the data, the updates of an epoch, and what images come out as.

    names: of the classes.
    """

    train: Any
    val: Any
    classes: int
    updates: int = 0
    preparation: Preparation | None = None
    names: tuple[str, ...] = ()


def load_data(args: Any, preparation: Preparation, train: bool = True) -> Data:
    """Loaders of both splits (val alone where train is False), of images prepared so. Raises ValueError."""
    val, classes = build_dataset(False, args, preparation=preparation)
    place = dict(rank=rank(), world_size=world_size())
    data = Data(None, build_loader(val, args, is_train=False, **place), classes, preparation=preparation)
    data.names = tuple(class_names_of(val))
    if train:
        train_set, _ = build_dataset(True, args, preparation=preparation)
        data.train = build_loader(train_set, args, is_train=True, **place)
        data.updates = len(data.train) // getattr(args, "grad_accum_steps", 1)  # a script that does not train has none
        if not data.updates:
            raise ValueError(
                f"--grad-accum-steps {args.grad_accum_steps} is more than the {len(data.train)} batches of an epoch"
            )
    return data


def make_precision(args: Any, device: torch.device) -> Precision:
    """`--amp`: bfloat16 where the device has it, else float16; `--amp-dtype` overrides."""
    if not args.amp:
        return Precision(device, None)
    if args.amp_dtype:
        return Precision(device, getattr(torch, args.amp_dtype))
    brain = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    return Precision(device, torch.bfloat16 if brain else torch.float16)


def wrap_for_training(args: Any, model: nn.Module, device: torch.device) -> nn.Module:
    """Both tokens' logits, as --grad-checkpointing and --compile say, under DistributedDataParallel among several."""
    model.set_grad_checkpointing(args.grad_checkpointing)
    both = TokenLogits(model).to(device)
    if args.compile:
        both.compile()
    if world_size() == 1:
        return both
    return nn.parallel.DistributedDataParallel(both, device_ids=[device] if device.type == "cuda" else None)


def make_mixup(args: Any, classes: int) -> Mixup | None:
    if args.mixup <= 0 and args.cutmix <= 0 and args.cutmix_minmax is None:
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=classes,
    )


def scale_lr(args: Any) -> float:
    """The published linear rule: --lr is for a global batch of 512."""
    return args.lr * images_per_update(args) / 512


def images_per_update(args: Any) -> int:
    """The global batch: of all processes and accumulated batches."""
    return args.batch_size * args.grad_accum_steps * world_size()


def make_optimizer(args: Any, model: nn.Module) -> torch.optim.Optimizer:
    """timm's, with weight decay on matrices only. Raises ValueError for a name timm does not know."""
    options = dict(eps=args.opt_eps) | (dict(betas=args.opt_betas) if args.opt_betas else {})
    if args.opt in ("sgd", "momentum", "nesterov"):  # these have neither
        options = {}
    return create_optimizer_v2(
        model, opt=args.opt, lr=scale_lr(args), weight_decay=args.weight_decay, momentum=args.momentum, **options
    )


def make_scheduler(args: Any, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> tuple[Any, int]:
    """(timm's, stepped every update, epochs to train): --epochs of schedule and --cooldown-epochs at its end.

    The rate never rises after its warm-up, nor falls in it: --min-lr and --warmup-lr are at most the scaled --lr.
    """
    lr = scale_lr(args)
    ends = dict(min_lr=args.sched in FALLS_TO_MIN_LR or args.cooldown_epochs, warmup_lr=args.warmup_epochs)
    for name, matters in ends.items():
        if matters and getattr(args, name) > lr:
            warn(
                f"--lr {args.lr:g} is {lr:g} for a global batch of {images_per_update(args)}, below "
                f"{options.flag(name)} {getattr(args, name):g}, which is {lr:g} in this run"
            )
    return create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        decay_epochs=args.decay_epochs,
        decay_milestones=args.decay_milestones,
        cooldown_epochs=args.cooldown_epochs,
        decay_rate=args.decay_rate,
        min_lr=min(args.min_lr, lr),
        warmup_lr=min(args.warmup_lr, lr),
        warmup_epochs=args.warmup_epochs,
        noise=args.lr_noise,
        noise_pct=args.lr_noise_pct,
        noise_std=args.lr_noise_std,
        noise_seed=args.seed,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )


@dataclass(frozen=True)
class LossWeights:
    """What `NViTLoss` weighs its parts by.

    original, kl: coefficients of the task's loss and of the full model's KL; kind, alpha, tau: of the distillation
    within the former; kl_tau: temperature of the latter.
    """

    original: float
    kl: float
    kind: str
    alpha: float
    tau: float
    kl_tau: float

    @classmethod
    def of(cls, args: Any, kl_tau: float | None = None) -> LossWeights:
        """As the flags say. kl_tau: by default --distillation-tau."""
        tau = args.distillation_tau
        kind, alpha = args.distillation_type, args.distillation_alpha
        return cls(args.original_loss_coeff, args.kl_loss_coeff, kind, alpha, tau, kl_tau or tau)

    def as_flags(self) -> dict[str, Any]:
        """Under the names of the flags that give them elsewhere, as older checkpoints hold them; temperatures apart."""
        loss = dict(kl_loss_coeff=self.kl, original_loss_coeff=self.original)
        return loss | dict(distillation_type=self.kind, distillation_alpha=self.alpha)


def make_loss(
    args: Any, weights: LossWeights, cnn: nn.Module | None, full: nn.Module | None, per_token: bool
) -> NViTLoss:
    """The published loss, on the targets that --mixup, --cutmix and --smoothing make; cnn, full: its teachers."""
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    kind = weights.kind if cnn is not None else "none"
    original = DistillationLoss(base_criterion(mixing, args.smoothing), cnn, kind, weights.alpha, weights.tau)
    return NViTLoss(original, weights.original, full, weights.kl, weights.kl_tau, per_token)
