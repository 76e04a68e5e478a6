"""What a latency is worth beside busy processes: python -m benchmarks.beside [--busy 0 2 4] [--threads 1]

Prints the ratios of two narrow models to their dense one (6 blocks of width 128) beside so many busy processes, and the
errors of a coarse table that was built beside the most of `--table`, on random models measured without them.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace

import numpy as np
import torch

import options
from benchmarks.busy import busy
from latency.points import random_dims
from latency.quick import measure_table
from latency.steady import steady_threads
from latency.whole import measure_ratios
from models import Arch, ViTDims
from runtime.device import device_name

ARCH = Arch.of(
    "deit_tiny_distilled_patch16_224",
    img_size=32,
    patch_size=4,
    embed_dim=128,
    depth=6,
    num_heads=4,
    num_classes=10,
)
CPU = torch.device("cpu")


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(__doc__, "example: python -m benchmarks.beside --busy 0 2 4", "benchmarks.beside")
    add = parser.add_argument
    add("--busy", type=int, nargs="+", default=[0, 2, 4], metavar="N", help="busy processes (default: 0 2 4)")
    add("--table", type=int, default=2, metavar="N", help="busy processes beside the table's build (default: 2)")
    add("--threads", type=int, default=0, metavar="N", help="threads to begin with (default: 0, what torch uses)")
    add("--batch-size", type=int, default=16, metavar="N", help="(default: %(default)s)")
    add("--builds", type=int, default=3, metavar="N", help="fresh builds of each model (default: %(default)s)")
    add("--models", type=int, default=6, metavar="K", help="random models of the table's check (default: %(default)s)")
    return parser


def two_models() -> list[ViTDims]:
    """About a quarter and a half of the dense model's latency."""
    dims = ARCH.dims
    shapes = ((64, 2, 128), (96, 3, 256))
    return [ViTDims(e, tuple(replace(b, heads=h, mlp=m) for b in dims.blocks)) for e, h, m in shapes]


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"batch {args.batch_size}, fp32, {device_name(CPU)}")
    for count in args.busy:
        begin = time.perf_counter()
        with busy(count):
            measured = measure_ratios(ARCH, two_models(), args.batch_size, CPU, builds=args.builds)
        seconds = time.perf_counter() - begin
        print(f"beside {count}: ratios {measured.ratios.round(4)} in {seconds:.0f} s; {measured.note or 'undisturbed'}")
    if not args.models:
        return
    begin = time.perf_counter()
    with busy(args.table), steady_threads(ARCH, args.batch_size, CPU, progress=print) as threads:
        table = measure_table(ARCH, args.batch_size, progress=print)
    seconds, disturbed = time.perf_counter() - begin, table.meta["disturbed"]
    print(f"table beside {args.table}: {seconds:.0f} s, {disturbed:.0%} of its samples disturbed")
    rng = random.Random(0)
    chosen = [random_dims(ARCH.dims, rng) for _ in range(args.models)]
    measured = measure_ratios(ARCH, chosen, args.batch_size, CPU, builds=args.builds, threads=threads)
    errors = np.array([table.ratio(dims, ARCH.dims) for dims in chosen]) / measured.ratios - 1
    print(f"on {len(chosen)} models without them: mean error {abs(errors).mean():.1%}, worst {abs(errors).max():.1%}")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
