"""Measure a latency table on this device: python -m latency.build_table --model NAME --batch-size N --output FILE

Measured are the parts a block is made of, through the modules that the compact model uses: the attention branch
(norm, attention, residual) over embed x heads x qk x v, the MLP branch over embed x mlp, and what is outside the blocks
over embed. A few whole models, dense and compact, then set the scale. `--runtime` measures the same parts elsewhere,
as ONNX files: in onnxruntime, or by any command that prints milliseconds.
"""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import options
from latency.assemble import assemble
from latency.disturbance import MOSTLY
from latency.disturbance import describe as disturbances
from latency.fit import choose_models
from latency.measure import DTYPES, compile_mode
from latency.quick import describe
from latency.runtimes import RuntimeBench, RuntimeFailed
from latency.samples import NOISY, OutOfTime, Progress
from latency.steady import steady_threads
from latency.swin_bench import make_bench
from latency.table import LatencyTable
from latency.table_plan import find_problems, grid_for, read_arch, runtime_of
from latency.whole import Measured, measure_ratios
from models import Arch
from models.swin_dims import Dims
from runtime.console import complain, say_next, say_result
from runtime.device import device_name

FIT_BUILDS, FIT_ROUNDS = 2, 5
SHOWN_KEYS = 10


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "example: python -m latency.build_table --initial-checkpoint dense.pth --batch-size 8 "
        "--dtype fp32\n  --output table.json",
        "latency.build_table",
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help="timm model, the upper end of the table (default: that of the checkpoint)")
    add("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="timm's, e.g. img_size=16 embed_dim=96")
    add("--initial-checkpoint", metavar="FILE", help="take model and arguments from a checkpoint (arch, kwargs, model)")
    add("--input-size", type=int, metavar="PIXELS", help="image size (default: the model's)")
    add("--num-classes", type=int, metavar="N", help="classes (default: the model's)")
    add = parser.add_argument_group("what will be deployed").add_argument
    add("--batch-size", type=int, default=64, metavar="N", help="deployment batch (default: %(default)s)")
    add("--dtype", default="fp32", help=f"{', '.join(DTYPES)}; weights and images (default: %(default)s)")
    available = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=available, help="cpu or cuda (default: cuda where there is one)")
    add("--compile", action="store_true", help="measure under torch.compile, on fewer points")
    add(
        "--runtime",
        nargs="+",
        default=[],
        metavar="WORD",
        help="onnxruntime, or command 'CMD {onnx}', which prints milliseconds (default: torch)",
    )
    add = parser.add_argument_group("measurement").add_argument
    add(
        "--rounds",
        type=int,
        default=3,
        metavar="N",
        help="measurements of each point, at least 2 (default: %(default)s)",
    )
    add(
        "--max_minutes",
        type=float,
        default=240,
        metavar="MIN",
        help="end with exit code 1 where the parts are not measured after this long; the same command then continues "
        "(default: %(default)s)",
    )
    add("--points", nargs="*", default=[], metavar="AXIS=N", help="points per axis, e.g. embed=5 heads=4 qk=5 v=5")
    add(
        "--tokens",
        nargs="*",
        type=int,
        default=[],
        metavar="N",
        help="also measure blocks of fewer tokens, for models that compress them (default: the model's alone)",
    )
    add(
        "--merge",
        choices=("place", "content"),
        default="place",
        help="how those blocks merge tokens (default: %(default)s)",
    )
    add("--output", required=True, metavar="FILE", help="the table to write (JSON)")
    return parser


def settings_of(args: argparse.Namespace, arch: Arch, grid: dict) -> dict[str, Any]:
    """What the measurements depend on: the table's `_meta`, and what an interrupted run must share to be continued."""
    where = runtime_of(args)
    device = where.device if where else device_name(args.device)
    usual = describe(arch, grid, args.batch_size, args.dtype, device, args.rounds)
    compiled = compile_mode(args.device) if args.compile else None
    return usual | dict(runtime=where.name if where else "torch", compile=compiled)


def warn_of_noise(spreads: dict[str, float]) -> None:
    """Name the points whose rounds disagree."""
    if noisy := sorted((k for k in spreads if spreads[k] > NOISY), key=lambda k: -spreads[k]):
        keys = ", ".join(f"{key} ({_share(spreads[key])})" for key in noisy[:SHOWN_KEYS])
        more = f" and {len(noisy) - SHOWN_KEYS} more" if len(noisy) > SHOWN_KEYS else ""
        complain(
            "warning",
            f"{len(noisy)} of {len(spreads)} points vary by more than {NOISY:.0%} between rounds: "
            f"{keys}{more}; is the machine in use by others?",
        )


def _share(spread: float) -> str:
    return f"{spread:.0%}" if spread < math.inf else "undisturbed only once"


def build(args: argparse.Namespace) -> tuple[LatencyTable, int]:
    """The measured table, saved, and the number of points measured. Continues an interrupted run.

    Where others disturb it, it is measured with fewer threads.
    """
    arch, wanted = read_arch(args), torch.get_num_threads()
    if args.runtime or args.compile:
        return _build(args, arch, wanted)
    device = torch.device(args.device)
    with steady_threads(arch, args.batch_size, device, args.dtype, partial(complain, "warning")):
        return _build(args, arch, wanted)


def _build(args: argparse.Namespace, arch: Arch, wanted: int) -> tuple[LatencyTable, int]:
    dims, fixed, until = arch.dims, arch.left_alone, time.perf_counter() + 60 * args.max_minutes
    grid, where = grid_for(args, dims, fixed), runtime_of(args)
    progress = Progress(args.output, settings := settings_of(args, arch, grid))
    if where:
        bench = RuntimeBench(arch, grid, args.batch_size, args.dtype, where)
        measure = bench.measure_ratios
    else:
        bench = make_bench(arch, grid, args.batch_size, args.device, args.dtype, args.compile)
        measure = partial(_measure_models, args, arch, bench.device)
    models, say = choose_models(dims, fixed), partial(complain, "warning")
    table = assemble(
        bench, progress, args.rounds, dims, models, measure, meta=settings, wanted=wanted, say=say, until=until
    )
    spreads = {key: progress.spread(key) for key in progress.samples}
    warn_of_noise(spreads)
    if (disturbed := table.meta["disturbed"]) > MOSTLY:
        say(f"the latency table: {disturbances(torch.get_num_threads(), wanted, disturbed)}")
    table.meta["noise"] = float(np.median([s for s in spreads.values() if s < math.inf] or [1]))
    table.save(args.output)
    progress.path.unlink()
    return table, len(progress.samples)


def _measure_models(args: argparse.Namespace, arch: Arch, device: torch.device, chosen: Sequence[Dims]) -> Measured:
    return measure_ratios(
        arch,
        chosen,
        args.batch_size,
        device,
        args.dtype,
        args.compile,
        rounds=FIT_ROUNDS,
        builds=FIT_BUILDS,
        progress=partial(tqdm, desc="whole models", leave=False, disable=None),
    )


def _stop(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def failure(error: Exception, args: argparse.Namespace) -> str:
    """One line for a failed measurement; out of memory, what would fit and what is kept."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    if not isinstance(error, torch.OutOfMemoryError):
        return line
    kept = f"; what was measured is kept in {args.output}.part" if Path(f"{args.output}.part").exists() else ""
    return f"out of memory at --batch-size {args.batch_size}, try {max(1, args.batch_size // 2)} ({line}){kept}"


def main(args: argparse.Namespace) -> int:
    if problems := find_problems(args):
        for problem in problems:
            complain("error", problem)
        return 2
    begin = time.perf_counter()
    try:
        table, points = build(args)
    except KeyboardInterrupt:
        print(f"interrupted; the same command continues from {args.output}.part", file=sys.stderr)
        return 130
    except OutOfTime:
        line = f"not done after --max_minutes {args.max_minutes:g}; the same command continues from {args.output}.part"
        complain("error", line)
        return 1
    except (torch.OutOfMemoryError, OSError, RuntimeFailed) as error:
        complain("error", failure(error, args))
        return 1
    say_end(args, table, points, time.perf_counter() - begin)
    return 0


def say_end(args: argparse.Namespace, table: LatencyTable, points: int, seconds: float) -> None:
    """What was measured, and what it is for."""
    model = (
        ["--initial-checkpoint", args.initial_checkpoint]
        if args.initial_checkpoint
        else ["--model", args.model, "--pretrained"]
    )
    model += ["--model-kwargs", *args.model_kwargs] if args.model_kwargs else []
    model += ["--input-size", str(args.input_size)] if args.input_size else []
    how = (
        "--one_shot --tokens content"
        if args.merge == "content"
        else ("--pruning --latency_regularization 5e-4 --original_loss_coeff 1")
    )
    say_next(
        f"-m latency.validate {shlex.quote(args.output)}",
        f"main_full_global_latency.py {shlex.join(model)} --data-path IMAGES {how} "
        f"--latency_look_up_table {shlex.quote(args.output)} --latency_target 0.5 --output_dir runs",
    )
    dense = 1e3 * table.model_seconds(read_arch(args).dims)
    say_result(
        f"{args.output}: {points} points in {seconds:.0f} s; dense model {dense:.2f} ms per batch of {args.batch_size}"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main(get_args_parser().parse_args()))
