"""Ten minutes of a fuzzer without a traceback: python -m benchmarks.fuzz_run TARGET [--minutes 10]

With atheris, where it is installed, guided by the coverage of this project's modules and begun at valid inputs; else
with hypothesis, on valid inputs with something odd in them. What fails is printed, and the exit code is not 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

NAMES = ("table", "dims", "config", "checkpoint", "arguments")
OURS = ("files", "latency", "models", "options", "pruning", "recipes", "runtime")
BATCH = 500  # examples between looks at the clock


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=NAMES, help="what reads the inputs")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: %(default)s)")
    parser.add_argument(
        "--with",
        dest="engine",
        choices=("atheris", "hypothesis"),
        default=None,
        help="(default: atheris where it is installed)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of hypothesis (default: %(default)s)")
    return parser


def with_atheris(name: str, minutes: float) -> None:
    import atheris

    with atheris.instrument_imports(include=list(OURS)):
        from benchmarks.fuzz_targets import TARGETS, seeds

    with tempfile.TemporaryDirectory() as corpus:
        for i, data in enumerate(seeds(name)):
            (Path(corpus) / f"valid-{i}").write_bytes(data)
        limits = [f"-max_total_time={int(60 * minutes)}", "-rss_limit_mb=8000", "-timeout=60", "-max_len=65536"]
        atheris.Setup([sys.argv[0], *limits, corpus], TARGETS[name])
        atheris.Fuzz()  # ends the process


def with_hypothesis(name: str, minutes: float, start: int) -> int:
    """The number of examples. What a target lets out is raised, with the example."""
    from benchmarks.fuzz_targets import STRATEGIES, TARGETS

    end, done = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:

        @seed(start + done)
        @settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(STRATEGIES[name])
        def batch(data: object) -> None:
            TARGETS[name](data)

        batch()
        done += BATCH
    return done


def main(args: argparse.Namespace) -> None:
    installed = importlib.util.find_spec("atheris") is not None
    if args.engine == "atheris" and not installed:
        print(
            "error: atheris is not installed (pip install atheris); --with hypothesis needs nothing more",
            file=sys.stderr,
        )
        sys.exit(2)
    if args.engine != "hypothesis" and installed:
        with_atheris(args.target, args.minutes)
        return
    if not args.engine:
        print("atheris is not installed: hypothesis makes the inputs, without looking at coverage", flush=True)
    begin = time.monotonic()
    done = with_hypothesis(args.target, args.minutes, args.seed)
    print(f"{args.target}: {done:,} examples in {(time.monotonic() - begin) / 60:.1f} min, 0 tracebacks")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
