"""What durable checkpoints cost: python -m benchmarks.checkpoint_overhead --initial-checkpoint FILE [--images 50000]

Times the saves of one finetuning epoch (the newest and the best, each with optimizer and moving average, its checksum
and the flush to disk) against the updates of that epoch, of which --steps are measured, and prints the share.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from files import checkpoint
from models import build_vit
from models.pretrained import load_initial_, read_initial
from models.vit import TokenLogits
from runtime.seeds import rng_state


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial-checkpoint", required=True, help="the model that is finetuned")
    parser.add_argument("--images", type=int, default=50_000, help="of an epoch (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="updates that are timed (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=10, help="saves that are timed (default: %(default)s)")
    return parser


def time_step(action: Callable[[], object], count: int) -> float:
    """Median seconds of a call, after one that does not count."""
    seconds = []
    for _ in range(count + 1):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def main(args: argparse.Namespace) -> None:
    arch, kwargs, state = read_initial(args.initial_checkpoint)
    model = build_vit(arch, **kwargs)
    load_initial_(model, state, args.initial_checkpoint)
    both, optimizer = TokenLogits(model).train(), torch.optim.AdamW(model.parameters())
    stem, classes = model.patch_embed, kwargs.get("num_classes", 1000)
    images = torch.randn(args.batch_size, stem.proj.in_channels, *stem.img_size)
    targets = torch.randint(classes, (args.batch_size,))

    def update() -> None:
        optimizer.zero_grad()
        sum(nn.functional.cross_entropy(logits, targets) for logits in both(images)).backward()
        optimizer.step()

    step = time_step(update, args.steps)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "ft_checkpoint.pth"
        content = dict(
            arch=dict(name=arch, kwargs=kwargs),
            dims=model.dims.to_dict(),
            model=model.state_dict(),
            model_ema=model.state_dict(),
            optimizer=optimizer.state_dict(),
            rng=rng_state(),
        )
        save = time_step(lambda: checkpoint.save(path, keep_older=True, **content), args.saves)
        plain = time_step(lambda: torch.save(content, path), args.saves)
        size = path.stat().st_size
    epoch = step * (args.images // args.batch_size)
    print(f"one save of {size / 2**20:.1f} MiB: {1e3 * save:.0f} ms (torch.save alone {1e3 * plain:.0f} ms)")
    print(
        f"an epoch of {args.images:,} images: {epoch:.1f} s without reading them; two saves are "
        f"{200 * save / epoch:.2f} % of it"
    )


if __name__ == "__main__":
    main(get_args_parser().parse_args())
