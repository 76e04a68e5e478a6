"""Processes that keep cores busy, as others on the same machine do: python -m benchmarks.busy 4 --seconds 60

In Python: `with busy(4): …`. Half of them compute in registers, half walk through more memory than the caches hold.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

import options

SPIN = "while True: pass"
WALK = "import array\nblock = array.array('d', bytes(1 << 26))\nwhile True: block.reverse()"


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes compute while the block runs."""
    processes = [subprocess.Popen([sys.executable, "-c", (SPIN, WALK)[i % 2]]) for i in range(count)]
    try:
        time.sleep(0.5 * bool(count))  # until they compute
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(__doc__, "example: python -m benchmarks.busy 2 --seconds 60", "benchmarks.busy")
    parser.add_argument("count", type=int, metavar="N", help="processes")
    parser.add_argument("--seconds", type=float, default=60, help="for how long (default: %(default)s)")
    return parser


def main(args: argparse.Namespace) -> None:
    with busy(args.count):
        time.sleep(args.seconds)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
