"""Launch any training script on a SLURM cluster: one process per GPU, and after a time limit or a pre-emption again.

example: python run_with_submitit.py --nodes 4 --ngpus 8 --partition gpu finetune_dense.py --finetune RUN
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import submitit

import options
from runtime.errors import BadArguments, RunFailed
from runtime.script import run_script

SCRIPTS = (
    "main_full_global_latency.py",
    "finetune_dense.py",
    "revit_scratch.py",
    "main_savit.py",
    "main_savit_deploy.py",
    "main_pm_vit.py",
)
ROOT = Path(__file__).resolve().parent


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(__doc__)
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--cluster",
        default=None,
        choices=("slurm", "local", "debug"),
        help="where jobs run (default: slurm where it is installed, else local)",
    )
    group.add_argument(
        "--ngpus", metavar="N", type=int, default=8, help="processes, and GPUs, per node (default: %(default)s)"
    )
    group.add_argument("--nodes", metavar="N", type=int, default=1, help="nodes (default: %(default)s)")
    group.add_argument(
        "--timeout",
        metavar="MINUTES",
        type=int,
        default=2800,
        help="time limit, after which the job is queued again (default: %(default)s)",
    )
    group.add_argument("--partition", metavar="NAME", default=None, help="SLURM partition (default: the cluster's)")
    group.add_argument("--constraint", metavar="FEATURE", default=None, help="e.g. volta32gb (default: none)")
    group.add_argument("--comment", metavar="TEXT", default=None, help="SLURM comment (default: none)")
    group.add_argument("--cpus", metavar="N", type=int, default=10, help="CPU cores per process (default: %(default)s)")
    group.add_argument(
        "--mem_gb", metavar="N", type=int, default=None, help="memory per node in GB (default: 40 per process)"
    )
    group.add_argument(
        "--job_dir",
        metavar="DIR",
        default="submitit/%j",
        help="submitit's logs, %%j is the job's number (default: submitit/%%j)",
    )
    parser.add_argument("script", choices=SCRIPTS, help="what to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its flags")
    return parser


class Job:
    """One process of a training script, started by submitit; queued again, it resumes from its newest checkpoint.

    folder: where it was submitted, which relative paths start from. It is pickled by value and imports from this
    project when it runs, so that it needs no module where submitit starts it.
    """

    def __init__(self, script: str, arguments: list[str], restarts: int = 0, folder: str = "") -> None:
        self.script, self.arguments, self.restarts = script, arguments, restarts
        self.folder = folder or os.getcwd()

    def __call__(self) -> None:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(self.restarts)  # as torchrun tells its workers
        os.chdir(self.folder)
        sys.path.insert(0, str(ROOT))
        from runtime.elastic import Terminated

        sys.argv = [self.script, *self.arguments]
        requeue, asked = signal.getsignal(signal.SIGUSR2), []

        def stop(*signal_and_frame: Any) -> None:  # first let the run write its checkpoint
            asked.append(signal_and_frame)
            os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(signal.SIGUSR2, stop)
        try:
            runpy.run_path(str(ROOT / self.script), run_name="__main__")
        except Terminated:
            if asked and callable(requeue):
                requeue(*asked[0])
            raise

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit when the job is about to be stopped."""
        again = Job(self.script, self.arguments, self.restarts + 1, self.folder)
        return submitit.helpers.DelayedSubmission(again)


def _wait_for(job: submitit.Job) -> None:
    """Raises RunFailed, with the last line that the job printed, where it fails."""
    try:
        job.results()
    except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError):
        said = (job.stderr() or "").strip().splitlines() or ["it printed nothing"]
        last = next((line for line in reversed(said) if line.startswith("error: ")), said[-1])
        raise RunFailed(
            f"job {job.job_id} failed, logs in {job.paths.folder}: {last.removeprefix('error: ')}"
        ) from None


def main(args: argparse.Namespace) -> None:
    parser = importlib.import_module(Path(args.script).stem).get_args_parser()
    parser.parse_args(args.arguments)  # a typo is noticed here, not in the queue
    for name in ("ngpus", "nodes", "timeout", "cpus"):
        if getattr(args, name) < 1:
            raise BadArguments([f"--{name} must be above 0, not {getattr(args, name)}"])
    cloudpickle.register_pickle_by_value(sys.modules[Job.__module__])
    executor = submitit.AutoExecutor(folder=args.job_dir, cluster=args.cluster, slurm_max_num_timeout=30)
    slurm = dict(partition=args.partition, constraint=args.constraint, comment=args.comment, signal_delay_s=120)
    executor.update_parameters(
        name=Path(args.script).stem,
        nodes=args.nodes,
        tasks_per_node=args.ngpus,
        gpus_per_node=args.ngpus,
        cpus_per_task=args.cpus,
        mem_gb=args.mem_gb or 40 * args.ngpus,
        timeout_min=args.timeout,
        **{f"slurm_{key}": value for key, value in slurm.items() if value is not None},
    )
    job = executor.submit(Job(args.script, args.arguments))
    print(f"job {job.job_id} submitted, logs in {job.paths.folder}", flush=True)
    if executor.cluster != "slurm":
        _wait_for(job)  # local ones end with this process


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
