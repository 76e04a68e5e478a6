"""Whether loading keeps up with training: images per second of the loader alone and of training steps alone.

    python -m benchmarks.loader --data-set wds/NAME --data-path DIR --model deit_small_patch16_224 --num_workers 8

The flags of data, augmentation and model are the training scripts'. The first batches, with which loader processes
start and kernels are chosen, do not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import options
from runtime.console import say, table
from runtime.device import device_name
from runtime.errors import BadArguments, Problems
from runtime.processes import start_processes
from runtime.script import run_script
from training.full_model import read_full_model
from training.parts import drop_rate_kwargs, load_data, make_precision
from training.preparing import settle
from training.sources import Source

WARM_UP = 3  # batches, and steps


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(__doc__)
    options.add_model_args(parser)
    options.add_data_args(parser)
    options.add_augmentation_args(parser)
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--batches", metavar="N", type=int, default=30, help="batches and steps to time (default: %(default)s)"
    )
    group.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda, and cpu where there is no GPU)")
    group.add_argument("--amp", action="store_true", help="train in mixed precision (default: off)")
    group.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the order and augmentation (default: %(default)s)"
    )
    parser.set_defaults(amp_dtype=None, dist_timeout=600, dist_eval=False)
    return parser


def endless(loader) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after another."""
    while True:
        yield from loader


def loading(loader, batches: int) -> float:
    """Images per second of the loader alone."""
    source, count = endless(loader), 0
    for _ in range(WARM_UP):
        next(source)
    begin = time.perf_counter()
    for _ in range(batches):
        count += len(next(source)[1])
    return count / (time.perf_counter() - begin)


def stepping(model: nn.Module, images: Tensor, targets: Tensor, precision, batches: int) -> float:
    """Images per second of forward, backward and AdamW on one batch that is there."""
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with precision.autocast():
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()

    def wait() -> None:
        if images.is_cuda:
            torch.cuda.synchronize()

    for _ in range(WARM_UP):
        step()
    wait()
    begin = time.perf_counter()
    for _ in range(batches):
        step()
    wait()
    return batches * len(images) / (time.perf_counter() - begin)


def main(args: argparse.Namespace) -> None:
    problems = Problems()
    device = problems.attempt(start_processes, args)
    full = problems.attempt(read_full_model, Source.of(args))
    problems.raise_if_any()
    preparation = problems.attempt(settle, args, full)
    problems.raise_if_any()
    data = problems.attempt(load_data, args, preparation)
    problems.raise_if_any()
    full = full.for_data(data)
    if args.batches < 1:
        raise BadArguments([f"--batches must be at least 1, not {args.batches}"])
    images, targets = (t.to(device) for t in next(iter(data.train)))
    model = full.build(**drop_rate_kwargs(args)).to(device).train()
    rates = dict(
        loader=loading(data.train, args.batches),
        step=stepping(model, images, targets, make_precision(args, device), args.batches),
    )
    say(table(["", "images/s"], [[name, f"{rate:,.0f}"] for name, rate in rates.items()]))
    verdict = "keeps up with" if rates["loader"] >= rates["step"] else "is slower than"
    say(
        f"{args.data_set}, batch {args.batch_size}, {args.num_workers} loader processes, {device_name(device)}: the "
        f"loader {verdict} the model"
    )


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
