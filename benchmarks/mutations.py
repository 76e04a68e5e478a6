"""Do the tests notice when the mathematics of a method is wrong? One error at a time, each in a copy of the project.

    python -m benchmarks.mutations [NAME …] [--list]

Every mutation is a slip that leaves a program which runs, and whose accuracy often says nothing. It is made in a
temporary copy of the tracked files, where the tests that must fail then run. Prints which test killed it, or SURVIVED.
The exit code is 1 where one survived, or where the text to replace is not in its file exactly once.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutation(NamedTuple):
    """edits: texts that stand in `file` exactly once, and what takes their place; tests: pytest's names of those that
    must fail, of which the first to fail is enough."""

    name: str
    file: str
    edits: dict[str, str]
    tests: tuple[str, ...]

    def missing(self, root: Path) -> list[str]:
        """The texts to replace that are not in their file exactly once."""
        path = root / self.file
        source = path.read_text(encoding="utf-8") if path.exists() else ""
        return [old for old in self.edits if source.count(old) != 1]

    def apply_(self, root: Path) -> str:
        """Make the error in the project at `root`; returns the file as it was."""
        before = source = (root / self.file).read_text(encoding="utf-8")
        for old, new in self.edits.items():
            source = source.replace(old, new)
        (root / self.file).write_text(source, encoding="utf-8")
        return before


MUTATIONS = [
    # ------------------------------------------------------------------ refit
    Mutation(
        "refit towards the dense branch",
        "pruning/refit.py",
        {
            "targets = []": "targets, before = [], list(s.dense)",
            "zip(s.dense, s.pruned, merged, strict=True)\n    missing": (
                "zip(s.dense, [c(x[..., kept]) for x, c in zip(before, merged)], merged)\n    missing"
            ),
        },
        ("tests/pruning/test_refit.py::test_a_refitted_stream_has_the_mean_of_the_dense_one",),
    ),
    Mutation(
        "LayerScale not divided out",
        "pruning/refit.py",
        {"- z) / gamma)": "- z) / 1)"},
        ("tests/pruning/test_refit.py::test_a_refitted_stream_has_the_mean_of_the_dense_one",),
    ),
    Mutation(
        "last block refitted on all tokens",
        "pruning/refit.py",
        {"read = streams.read(dense) if": "read = slice(None) if"},
        ("tests/pruning/test_refit.py::test_a_refitted_stream_has_the_mean_of_the_dense_one",),
    ),
    Mutation(
        "held-out rows fitted",
        "pruning/refit.py",
        {"sets[held].add(x, target)": "[sets[i].add(x, target) for i in {False, held}]"},
        ("tests/pruning/test_refit.py::test_held_out_images_are_not_fitted",),
    ),
    Mutation(
        "ridge judged on rows that were fitted",
        "pruning/moments.py",
        {"corrected(*present, fit, ridge)": "corrected(*present, fit + held, ridge)"},
        ("tests/pruning/test_moments.py::test_the_ridge_that_is_best_on_rows_not_fitted_is_used_on_all",),
    ),
    Mutation(
        "smallest ridge always",
        "pruning/moments.py",
        {"RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)": "RIDGES = (1e-5,)"},
        ("tests/pruning/test_moments.py::test_the_ridge_that_is_best_on_rows_not_fitted_is_used_on_all",),
    ),
    # -------------------------------------------------------- align and probe
    Mutation(
        "keys not centred",
        "pruning/align.py",
        {"k - k.mean(2, keepdim=True)": "k"},
        ("tests/pruning/test_align.py::test_queries_and_keys_do_not_see_what_all_keys_share",),
    ),
    Mutation(
        "probes judged on the images that fitted them",
        "pruning/probe.py",
        {"judge[: max(1, len(images) // JUDGED)]": "fit[: max(1, len(images) // JUDGED)]"},
        ("tests/pruning/test_allocation.py::test_a_price_is_of_images_that_compensated_nothing",),
    ),
    # ------------------------------------------------- allocation and search
    Mutation(
        "qk and v priced as if all heads were left",
        "pruning/allocation.py",
        {"ch + (cq + cw) * h / full.heads": "ch + (cq + cw)"},
        ("tests/pruning/test_allocation.py::test_narrower_queries_and_values_cost_what_heads_are_left",),
    ),
    Mutation(
        "knapsack rounds times down",
        "pruning/allocation.py",
        {
            "np.ceil(block.seconds / unit)": "np.floor(block.seconds / unit)",
            "np.ceil(block.seconds[chosen[-1]] / unit)": "np.floor(block.seconds[chosen[-1]] / unit)",
        },
        ("tests/pruning/test_allocation.py::test_times_are_rounded_up",),
    ),
    Mutation(
        "grid of the MACs search never refined",
        "pruning/macs_search.py",
        {"low, high = np.maximum(centre - reach, 0), np.minimum(centre + reach, most)": "continue"},
        ("tests/pruning/test_macs_search.py::test_the_grid_ends_at_single_units",),
    ),
    Mutation(
        "overhead left out of the lambda-cost",
        "pruning/global_latency.py",
        {"max(outside, 0.0) +": "0.0 +"},
        ("tests/pruning/test_global_latency.py::test_the_embedding_also_costs_what_is_outside_the_blocks",),
    ),
    Mutation(
        "overhead left out of the seconds saved",
        "pruning/value.py",
        {"seconds += [self.table.overhead_seconds": "seconds += [0 * self.table.overhead_seconds"},
        ("tests/pruning/test_value.py::test_the_embedding_also_saves_what_is_outside_the_blocks",),
    ),
    # --------------------------------------------------------------- saliency
    Mutation(
        "gradient that passes a block by counted",
        "pruning/token_saliency.py",
        {"g = g - alone * out.grad": "g = g - 0 * alone * out.grad"},
        ("tests/test_token_axis.py::test_saliency_is_the_loss_along_the_way_to_the_common_mean",),
    ),
    Mutation(
        "gradients clipped before saliency is read",
        "engine.py",
        {" after_backward()": " nn.utils.clip_grad_norm_(model.parameters(), clip_grad or 1e9), after_backward()"},
        ("tests/test_engine.py::test_hooks_read_the_gradients_of_the_loss_itself",),
    ),
    Mutation(
        "gradients not unscaled",
        "engine.py",
        {"precision.scaler.unscale_(optimizer)": "pass"},
        ("tests/test_engine.py::test_hooks_read_the_gradients_of_the_loss_itself",),
    ),
]


def copy_project(folder: Path) -> Path:
    """The tracked files, as they are in the working tree. Raises CalledProcessError outside a git clone."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def killer(mutation: Mutation, root: Path) -> str | None:
    """The test that fails in the copy at `root` with the error made, None where all pass.

    Raises RuntimeError where they do not run, as where there is no such test.
    """
    before = mutation.apply_(root)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests]
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    finally:
        (root / mutation.file).write_text(before, encoding="utf-8")
    if done.returncode not in (0, 1):  # 1: some failed
        raise RuntimeError(f"{mutation.name}: pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)[1] if done.returncode else None


def verdicts(mutations: list[Mutation]) -> Iterator[tuple[Mutation, str | None]]:
    """Every mutation and what killed it."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = copy_project(Path(folder))
        for mutation in mutations:
            yield mutation, killer(mutation, root)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations whose names contain it (default: all)")
    parser.add_argument("--list", action="store_true", help="print names and files, and run nothing (default: run)")
    return parser


def main(args: argparse.Namespace) -> None:
    chosen = [m for m in MUTATIONS if not args.names or any(name in m.name for name in args.names)]
    if unknown := [name for name in args.names if not any(name in m.name for m in chosen)]:
        sys.exit(f"no mutation is called {', '.join(unknown)}; --list names them")
    if args.list:
        for mutation in chosen:
            print(f"{mutation.name}: {mutation.file}")
        return
    if rotten := [f"{m.name}: not exactly once in {m.file}: {old!r}" for m in chosen for old in m.missing(ROOT)]:
        sys.exit("\n".join(rotten))
    killed = 0
    for mutation, test in verdicts(chosen):
        killed += test is not None
        print(f"{mutation.name}: {f'killed by {test}' if test else 'SURVIVED'}", flush=True)
    print(f"{killed} of {len(chosen)} killed")
    sys.exit(killed < len(chosen))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
