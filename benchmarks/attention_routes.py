"""Which route through attention is the fastest, per widths, device and dtype: where models.attention has its rule from.

    python -m benchmarks.attention_routes [--device cuda] [--dtype bf16] [--batch-size 8] [--heads 12] [--tokens 198]

Prints milliseconds per call of every route, interleaved in one process, the kernel behind the padded one, the relative
error of each against float64, and `<` at the route that the rule takes. q, k and v are slices of one fused product, as
in the model.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from latency.measure import DTYPES, settle_allocator, stopwatch, warm_up
from models.attention import ROUTES, attend, choose_route
from runtime.console import table
from runtime.device import device_name

WIDTHS = [
    (64, 64),
    (32, 32),
    (16, 16),
    (8, 8),
    (20, 20),
    (12, 12),
    (32, 64),
    (64, 32),
    (8, 64),
    (64, 8),
    (24, 40),
    (20, 28),
    (4, 32),
]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="fp32", choices=tuple(DTYPES), help="of weights and images (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images per call (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=12, help="attention heads (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=198, help="tokens of an image (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each (default: %(default)s)")
    return parser


@torch.inference_mode()
def compare(args: argparse.Namespace, qk: int, v: int) -> list[str]:
    """One row: widths, milliseconds of every route, and their errors."""
    device, dtype, H = torch.device(args.device), DTYPES[args.dtype], args.heads
    product = torch.randn(args.batch_size, args.tokens, H * (2 * qk + v), device=device).to(dtype)
    parts = product.split([H * qk, H * qk, H * v], dim=-1)
    q, k, v_ = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in parts)  # B H N d
    calls = {route: (lambda route=route: attend(q, k, v_, 0.125, route=route)) for route in ROUTES}
    exact = attend(q.double(), k.double(), v_.double(), 0.125, route="explicit")
    errors = {route: float((call() - exact).norm() / exact.norm()) for route, call in calls.items()}
    repeats = 1 if device.type == "cpu" else 20
    for call in calls.values():
        warm_up(call, device, 3)
    samples = {route: [] for route in calls}
    for _ in range(args.rounds):
        for route, call in calls.items():
            samples[route].append(stopwatch(call, repeats, device))
    chosen = choose_route(qk, v, device, dtype)
    cells = [f"{1e3 * statistics.median(samples[w]):.3f}{'<' if w == chosen else ' '}" for w in ROUTES]
    return [f"{qk}/{v}", *cells, *(f"{errors[w]:.0e}" for w in ROUTES)]


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    settle_allocator()
    device = device_name(args.device)
    print(f"batch {args.batch_size}, {args.heads} heads, {args.tokens} tokens, {args.dtype}, {device}")
    headers = ["qk/v", *(f"{route} ms" for route in ROUTES), *(f"{route} err" for route in ROUTES)]
    print(table(headers, [compare(args, qk, v) for qk, v in WIDTHS]), flush=True)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
