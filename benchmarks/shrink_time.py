"""What `--shrink_interval` saves: wall time of one pruning run with it, over that of the same run without.

    python -m benchmarks.shrink_time [--every 4] [--rounds 3] -- FLAGS OF main_full_global_latency.py

Runs alternate, each in a process of its own, from start to result; the flags need no --output_dir. On an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=4, help="events between compactions (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs (default: %(default)s)")
    parser.add_argument("flags", nargs="+", help="of the run, behind --")
    return parser


def seconds(flags: list[str], interval: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "main_full_global_latency.py",
            *flags,
            "--shrink_interval",
            str(interval),
            "--output_dir",
            folder,
        ]
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begin


def main(args: argparse.Namespace) -> None:
    ratios = []
    for _ in range(args.rounds):
        masked, shrunk = (seconds(args.flags, interval) for interval in (0, args.every))
        ratios.append(shrunk / masked)
        print(f"masked {masked:.1f} s, shrunk every {args.every} events {shrunk:.1f} s: {ratios[-1]:.3f}", flush=True)
    print(f"median {statistics.median(ratios):.3f} of the time")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
