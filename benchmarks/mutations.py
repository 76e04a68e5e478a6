"""Do the tests notice when the mathematics of a method is wrong? One error at a time, each in a copy of the project.

    python -m benchmarks.mutations [NAME …] [--list]

Every mutation is a slip that leaves a program which runs, and whose accuracy often says nothing. It is made in a
temporary copy of the tracked files, where the tests that must fail then run. Prints which test killed it, or SURVIVED.
The exit code is 1 where one survived, where the text to replace is not in its file exactly once, and where a test fails
as the code is.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.mutation_table import MUTATIONS, Mutation

ROOT = Path(__file__).parent.parent


def copy_project(folder: Path) -> Path:
    """The tracked files, as they are in the working tree. Raises CalledProcessError outside a git clone."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def failing(root: Path, tests: Iterable[str]) -> str | None:
    """The first of these tests that fails in the copy at `root`, None where all pass.

    Raises RuntimeError where they do not run, as where there is no such test.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if not done.returncode:
        return None
    if not (failed := re.search(r"^FAILED (\S+)", done.stdout, re.M)):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return failed[1]


def killer(mutation: Mutation, root: Path) -> str | None:
    """The test that fails in the copy at `root` with the error made, None where all pass."""
    before = mutation.apply_(root)
    try:
        return failing(root, mutation.tests)
    finally:
        (root / mutation.file).write_text(before, encoding="utf-8")


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
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = copy_project(Path(folder))
        if test := failing(root, sorted({test for m in chosen for test in m.tests})):
            sys.exit(f"{test} fails without any error made")
        for mutation in chosen:
            test = killer(mutation, root)
            killed += test is not None
            print(f"{mutation.name}: {f'killed by {test}' if test else 'SURVIVED'}", flush=True)
    print(f"{killed} of {len(chosen)} killed")
    sys.exit(killed < len(chosen))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
