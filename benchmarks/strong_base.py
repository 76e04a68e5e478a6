"""Train a dense ViT on CIFAR-10 that is hard to prune: 12 blocks of width 192, to as high a top-1 as the time allows.

    python -m benchmarks.strong_base --archive cifar10-full-60k.tar.gz --output strong.pth --minutes 5 [--device cuda]

Crop, flip and RandAugment of torchvision on the device, timm's mixup and cutmix, AdamW, warm-up and cosine over the
time given, an exponential moving average of the weights, autocast to bfloat16. The last tenth of the time trains
without mixing. The archive has images in folders `train/CLASS` and `val/CLASS`. `--resume` continues from
`OUTPUT.state`, which is written every minute. The file holds arch, kwargs, model, top1 and epoch, as
`--initial-checkpoint` reads it.
"""

from __future__ import annotations

import argparse
import io
import math
import tarfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, accuracy
from torch import Tensor, nn
from torchvision.transforms import v2

from runtime.device import device_name

ARCH = "deit_tiny_distilled_patch16_224"
MEAN, STD = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
GROUP = 500  # images that share an operation of RandAugment
SHARES = dict(warm_up=0.04, unmixed=0.1)  # of the time
SAVE_SECONDS = 60.0


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--archive", required=True, metavar="FILE", help="tar archive of images in train/CLASS and val/CLASS")
    add("--output", required=True, type=Path, metavar="FILE", help="the checkpoint to write")
    add("--resume", action="store_true", help="continue from OUTPUT.state (default: start afresh)")
    add("--minutes", type=float, default=5.0, help="of training, over all resumed parts (default: %(default)s)")
    add("--width", type=int, default=192, help="embedding width (default: %(default)s)")
    add("--depth", type=int, default=12, help="blocks (default: %(default)s)")
    add("--batch-size", type=int, default=512, help="(default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="highest learning rate (default: %(default)s)")
    add("--images", type=int, metavar="N", help="training images to use (default: all)")
    add("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--compile", action="store_true", help="train through torch.compile (default: eager)")
    return parser


def load(archive: str, split: str) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, H, W) and class numbers (N,), by file name."""
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar if m.isfile() and f"/{split}/" in m.name), key=lambda m: m.name)
        classes = sorted({m.name.split("/")[-2] for m in members})
        images = [np.asarray(Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB")) for m in members]
    labels = torch.tensor([classes.index(m.name.split("/")[-2]) for m in members])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels


def normalise(images: Tensor) -> Tensor:
    return (images.float() / 255 - MEAN.to(images.device)) / STD.to(images.device)


def crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """A crop and a flip of its own for every one of (N, 3, H, W) images."""
    N, _, H, W = images.shape
    padded = F.pad(images.float(), (padding,) * 4, mode="reflect").to(images.dtype)
    top, left = torch.randint(0, 2 * padding + 1, (2, N, 1), device=images.device)
    rows, columns = top + torch.arange(H, device=images.device), left + torch.arange(W, device=images.device)
    columns = torch.where(torch.rand(N, 1, device=images.device) < 0.5, columns.flip(1), columns)
    index = torch.arange(N, device=images.device)
    return padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def augment_epoch(images: Tensor, order: Tensor, augment: nn.Module) -> Tensor:
    """All images in a new order, augmented."""
    return torch.cat([augment(crop_and_flip(images[part])) for part in order.split(GROUP)])


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent."""
    model.eval()
    with torch.autocast(images.device.type, torch.bfloat16):
        logits = torch.cat([model(normalise(part)).float() for part in images.split(1000)])
    return float(accuracy(logits, labels)[0])


def learning_rate(highest: float, share: float) -> float:
    """At this share of the time: linear warm-up, then a cosine to a thousandth."""
    if share < SHARES["warm_up"]:
        return highest * share / SHARES["warm_up"]
    rest = (share - SHARES["warm_up"]) / (1 - SHARES["warm_up"])
    return highest * (1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0))))


class Training:
    """Model, optimizer and average, and how long they have been trained."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.kwargs = dict(
            img_size=32,
            patch_size=4,
            embed_dim=args.width,
            depth=args.depth,
            num_heads=args.width // 64,
            num_classes=10,
        )
        self.args, self.device = args, torch.device(args.device)
        self.model = timm.create_model(ARCH, **self.kwargs, drop_path_rate=0.05).to(self.device)
        self.model.set_distilled_training(True)  # both heads learn the labels
        self.average = ModelEmaV3(self.model, decay=0.9995, use_warmup=True)
        self.optimizer = create_optimizer_v2(self.model, "adamw", lr=args.lr, weight_decay=0.05, fused=True)
        self.forward = torch.compile(self.model) if args.compile else self.model
        self.mixed = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)
        self.unmixed = Mixup(0.0, 0.0, prob=0.0, label_smoothing=0.1, num_classes=10)
        self.seconds, self.epoch, self.updates, self.augmenting = 0.0, 0, 0, 0.0

    @property
    def share(self) -> float:
        """Of the time, how much is spent."""
        return self.seconds / (60 * self.args.minutes)

    def run_epoch(self, images: Tensor, labels: Tensor, augment: nn.Module) -> None:
        """Train on every image once, or until the time is up."""
        torch.manual_seed(self.args.seed + self.epoch)
        np.random.seed(self.args.seed + self.epoch)  # of timm's Mixup
        begin, spent, batch = time.monotonic(), self.seconds, self.args.batch_size
        order = torch.randperm(len(images), device=self.device)
        images, labels = augment_epoch(images, order, augment), labels[order]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.augmenting = time.monotonic() - begin
        self.model.train()
        for start in range(0, len(images) - batch + 1, batch):
            self.seconds = spent + time.monotonic() - begin
            if self.share >= 1:
                return
            mixing = self.unmixed if self.share > 1 - SHARES["unmixed"] else self.mixed
            self.update(*mixing(normalise(images[start : start + batch]), labels[start : start + batch]))
        self.epoch += 1

    def update(self, images: Tensor, targets: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.args.lr, self.share)
        with torch.autocast(self.device.type, torch.bfloat16):
            heads = self.forward(images)
        loss = sum(F.cross_entropy(head.float(), targets) for head in heads) / 2
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.updates += 1
        self.average.update(self.model, step=self.updates)

    def state_dict(self) -> dict[str, object]:
        parts = dict(model=self.model, average=self.average.module, optimizer=self.optimizer)
        counts = dict(seconds=self.seconds, epoch=self.epoch, updates=self.updates)
        return {name: part.state_dict() for name, part in parts.items()} | counts

    def load_state_dict(self, state: dict[str, object]) -> None:
        for name, part in dict(model=self.model, average=self.average.module, optimizer=self.optimizer).items():
            part.load_state_dict(state[name])
        self.seconds, self.epoch, self.updates = state["seconds"], state["epoch"], state["updates"]


def save(content: dict[str, object], path: Path) -> None:
    torch.save(content, part := path.with_name(path.name + ".part"))
    part.replace(path)


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    training, state_file = Training(args), args.output.with_name(args.output.name + ".state")
    if args.resume and state_file.exists():
        training.load_state_dict(torch.load(state_file, weights_only=True, map_location=args.device))
    (images, labels), val = (tuple(t.to(args.device) for t in load(args.archive, s)) for s in ("train", "val"))
    if args.images:
        images, labels = images[:: len(images) // args.images], labels[:: len(labels) // args.images]
    augment = v2.RandAugment(num_ops=2, magnitude=9)
    print(f"{ARCH} {training.kwargs}, {len(images)} images, batch {args.batch_size}, {device_name(args.device)}")
    reported = training.seconds
    while training.share < 1:
        training.run_epoch(images, labels, augment)
        if training.seconds - reported > SAVE_SECONDS or training.share >= 1:
            reported = training.seconds
            save(training.state_dict(), state_file)
            score = top1(training.average.module, *val)
            print(f"epoch {training.epoch}, {training.seconds:.0f} s: top-1 {score:.2f}", end=", ")
            print(f"augmenting an epoch {training.augmenting:.1f} s", flush=True)
    state = {name: value.float().cpu() for name, value in training.average.module.state_dict().items()}
    content = dict(arch=ARCH, kwargs=training.kwargs, model=state, top1=score, epoch=training.epoch)
    save(content, args.output)
    print(f"{args.output}: top-1 {score:.2f} after {training.epoch} epochs")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
