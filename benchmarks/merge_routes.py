"""How fast token merging could be: ways to gather or multiply patches into groups, ms per call.

    python -m benchmarks.merge_routes [--device cuda --dtype bf16] [--batch-size 256] [--tokens 197] [--kept 118]

Compared are gathers by `index_select`, by indexing and as rows of one matrix, and the matrix products that they stand
for, with the matrix stored as it is and with rows that start at multiples of 8 numbers. `copy` writes as many numbers
as the result has: what moving the data takes at least.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from latency.measure import DTYPES, settle_allocator, stopwatch, warm_up
from runtime.console import table
from runtime.device import device_name

ALIGNED = 8


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--dtype", default="fp32", choices=tuple(DTYPES), help="(default: %(default)s)")
    add("--batch-size", type=int, default=16, help="images (default: %(default)s)")
    add("--tokens", type=int, default=197, help="of an image (default: %(default)s)")
    add("--kept", type=int, default=118, help="tokens that they are merged into (default: %(default)s)")
    add("--embed", type=int, default=768, help="embedding width (default: %(default)s)")
    add("--rounds", type=int, default=9, help="measurements of each (default: %(default)s)")
    return parser


def padded(matrix: Tensor) -> Tensor:
    """The same matrix, its rows a multiple of 8 numbers apart."""
    rows, columns = matrix.shape
    return matrix.new_zeros(rows, -(-columns // ALIGNED) * ALIGNED)[:, :columns].copy_(matrix)


def gathers(x: Tensor, index: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Rows `index` (K,) of every image of x (B, T, E), as (B, K, E), by each way."""
    B, T, E = x.shape
    one_hot = torch.nn.functional.one_hot(index, T).to(x.dtype)
    rows = (index + T * torch.arange(B, device=x.device)[:, None]).flatten()
    aligned, result = padded(one_hot), x.new_empty(B, len(index), E)
    source = torch.randn_like(result)
    return {
        "copy": lambda: result.copy_(source),
        "index_select": lambda: x.index_select(1, index),
        "indexing": lambda: x[:, index],
        "rows of one matrix": lambda: x.view(B * T, E).index_select(0, rows).view(B, -1, E),
        "embedding": lambda: torch.nn.functional.embedding(rows, x.view(B * T, E)).view(B, -1, E),
        "product": lambda: one_hot @ x,
        "product, aligned rows": lambda: aligned @ x,
    }


@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    settle_allocator()
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    owner = torch.arange(args.tokens, device=device) * args.kept // args.tokens
    first = torch.searchsorted(owner, torch.arange(args.kept, device=device))
    columns = []
    for tokens, index in ((args.tokens, first), (args.kept, owner)):  # merging, and putting back
        x = torch.randn(args.batch_size, tokens, args.embed, device=device).to(dtype)
        calls, samples = gathers(x, index), {}
        for name, call in calls.items():
            warm_up(call, device, 3)
            samples[name] = []
        for _ in range(args.rounds):
            for name, call in calls.items():
                samples[name].append(stopwatch(call, 1 if device.type == "cpu" else 20, device))
        columns.append({name: f"{1e3 * statistics.median(times):.3f}" for name, times in samples.items()})
    print(f"batch {args.batch_size}, {args.tokens} to {args.kept} tokens, {args.dtype}, {device_name(args.device)}")
    print(table(["", "merge ms", "restore ms"], [[name, *(c[name] for c in columns)] for name in columns[0]]))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
