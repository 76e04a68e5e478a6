"""Faults injected into a running job, again and again: is its result the undisturbed one, bit for bit?

    python -m benchmarks.faults --rows runs/faults.jsonl [--faults 200] [--minutes 30]

Jobs of some seconds prune, finetune, finetune on two ranks, and train from image files, all on the digits; each runs in
a process of its own, forked from this one. After every fault the job continues with --resume, or anew where nothing was
written yet, to its end; weights, masks, optimizer, generators and log are then compared with an undisturbed run's. A
traceback anywhere is a failure, and so is a run that ends well with another result. Rows that --rows holds are not
repeated.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.fault_jobs import Job, Material
from benchmarks.fault_kinds import KINDS, counting
from benchmarks.rows import read
from runtime.console import table

OF_KIND = {"rank killed": "ranks", "rank stopped": "ranks", "data file lost": "images"}  # the others take turns
TURNS = ("prune", "tune")
SCRIPTS = ("main_full_global_latency", "finetune_dense")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("runs/faults.jsonl"), help="results, one fault a line")
    parser.add_argument("--faults", type=int, default=200, help="to inject, in all (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="(default: all)")
    parser.add_argument("--minutes", type=float, default=1e9, help="start none after so many (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="of a job (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and places (default: %(default)s)")
    return parser


def plan(kinds: list[str], count: int) -> list[tuple[str, int]]:
    """(kind, number) of every fault: the kinds in turn."""
    return [(kinds[i % len(kinds)], i // len(kinds)) for i in range(count)]


def run_undisturbed(material: Material, name: str) -> Job:
    """A job's run without a fault: its time, its result, and how many steps its saves have."""
    job = Job(material, name, "undisturbed")
    steps = multiprocessing.Value("i", 0)

    def seen(number: int) -> bool:
        steps.value = number
        return False

    begin = time.monotonic()
    job.run(counting(seen))
    job.seconds, job.operations = time.monotonic() - begin, steps.value
    job.size = job.checkpoints()[0].stat().st_size
    return job


def inject(reference: Job, kind: str, number: int, seed: int) -> dict[str, Any]:
    """One fault, what came of it, and whether the result is the reference's."""
    rng = random.Random(f"{seed} {kind} {number}")
    job = Job(reference.material, reference.name, f"{kind} {number}".replace(" ", "_"), reference)
    begin = time.monotonic()
    row = dict(kind=kind, number=number, job=job.name, seed=seed, did="", failure="")
    try:
        row["did"] = KINDS[kind](job, rng)
        job.run(resume=bool(job.checkpoints()))
        if differing := job.differences(reference):
            row["failure"] = f"other than the undisturbed run's: {', '.join(differing)}"
    except AssertionError as error:
        row["failure"] = str(error)
    if not row["failure"] and (text := job.tracebacks()):
        row["failure"] = f"a traceback: {text}"
    if not row["failure"]:
        shutil.rmtree(job.root)
    return row | dict(seconds=round(time.monotonic() - begin, 1))


def report(rows: list[dict[str, Any]]) -> str:
    """The table by kind."""
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    lines = [[kind, *_counts(by_kind[kind])] for kind in KINDS if by_kind[kind]]
    return table(["fault", "injected", "same result", "failed", "s each"], [*lines, ["in all", *_counts(rows)]])


def _counts(rows: list[dict[str, Any]]) -> list[str]:
    failed = sum(bool(row["failure"]) for row in rows)
    seconds = sum(row["seconds"] for row in rows) / max(1, len(rows))
    return [str(len(rows)), str(len(rows) - failed), str(failed), f"{seconds:.1f}"]


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = read(args.rows)
    done, begin = {(row["kind"], row["number"]) for row in rows}, time.monotonic()
    todo = [fault for fault in plan(args.kinds, args.faults) if fault not in done]
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        material = Material(Path(folder), args.epochs, *map(importlib.import_module, SCRIPTS))
        references: dict[str, Job] = {}
        for kind, number in todo:
            if time.monotonic() - begin > 60 * args.minutes:
                break
            name = OF_KIND.get(kind, TURNS[(number + list(KINDS).index(kind)) % 2])
            if name not in references:
                references[name] = run_undisturbed(material, name)
                print(
                    f"{name}: {references[name].seconds:.1f} s undisturbed, {references[name].operations} steps of "
                    "saves",
                    flush=True,
                )
            rows.append(inject(references[name], kind, number, args.seed))
            with open(args.rows, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            if rows[-1]["failure"]:
                print(f"{kind} {number} ({rows[-1]['did']}): {rows[-1]['failure']}", flush=True)
                shutil.copytree(material.root / "jobs", args.rows.parent / "failed", dirs_exist_ok=True)
    print(report(rows))
    sys.exit(any(row["failure"] for row in rows))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(get_args_parser().parse_args())
