"""Going on where a run was broken off: which checkpoint, whether it fits, and when one is written inside an epoch."""
from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoint
import elastic
import options
from engine import Progress
from utils import BadArguments, RunFailed, check_identical, is_main, rank, say, world_size, write_text

# What may differ between a run and its continuation: the checkpoint holds the model, paths are only where things lie,
# and the rest changes how a step is computed but not what it computes.
MAY_DIFFER = {
    "model", "model_kwargs", "input_size", "initial_checkpoint", "finetune", "teacher_path", "data_path", "output_dir",
    "latency_look_up_table", "pruning_config", "resume", "start_epoch", "device", "num_workers", "pin_mem", "dist_eval",
    "dist_timeout", "log_interval", "recovery_interval", "compile", "grad_checkpointing", "batch_size",
    "grad_accum_steps", "world_size", "dims", "dry_run",
}  # fmt: skip


def saved_args(args: Any, origin: str) -> dict[str, Any]:
    """The arguments as a checkpoint holds them; origin: path of the dense weights."""
    return vars(args) | dict(initial_checkpoint=origin, world_size=world_size())


def _global_batch(args: dict[str, Any]) -> int:
    return args["batch_size"] * args.get("grad_accum_steps", 1) * args.get("world_size", 1)


def _differences(now: dict[str, Any], before: dict[str, Any], may_differ: set[str]) -> list[str]:
    names = [n for n in now if n in before and n not in may_differ and now[n] != before[n]]
    found = [f"{options.flag(name)} was {before[name]}, now {now[name]}" for name in names]
    if _global_batch(now) != _global_batch(before):
        found.append(f"global batch was {_global_batch(before)}, now {_global_batch(now)}")
    return found


def read(args: Any, folder: Path, name: str, *, run: str, fitting: dict[str, Any], needed: str,
         may_differ: set[str] = frozenset()) -> dict[str, Any] | None:  # fmt: skip
    """The checkpoint to go on from: what --resume names, or after a restart by torchrun the newest; None to start anew.

    run: what kind of run it must be of; fitting: what some of its keys must hold; needed: a key that it must have.
    Raises ValueError for one that does not fit, or whose epoch or hyper-parameters are not the arguments'.
    """
    own = folder / name
    if elastic.restarts() and own.exists():
        path = own
    elif args.resume:
        path = own if args.resume == "auto" else Path(args.resume)
    else:
        return None
    content = checkpoint.load(path)
    if content[needed] is None or any(content[key] != value for key, value in fitting.items()):
        raise ValueError(f"--resume: {path} is not a {run} run of this model")
    if args.start_epoch not in (None, content["epoch"] + 1):
        raise ValueError(f"--start_epoch is {args.start_epoch} but {path} goes on with epoch {content['epoch'] + 1}")
    if differing := _differences(saved_args(args, ""), content["args"], MAY_DIFFER | may_differ):
        raise ValueError(f"--resume: {path} was made with other arguments: {'; '.join(differing)}")
    return content | dict(path=path)


def restore(content: dict[str, Any], progress: Progress, folder: Path) -> dict[str, Any]:
    """Put progress, generators and log where the checkpoint left them; returns the metrics of the last whole epoch.

    Raises BadArguments where an epoch has another number of updates now.
    """
    if (before := content["metrics"]["updates"]) != progress.updates:
        raise BadArguments([f"--resume: an epoch had {before} updates, now {progress.updates}: the data, or how it is "
                            "shared out among processes, is another"])  # fmt: skip
    progress.load_state_dict(content)
    if rank() == 0:
        checkpoint.set_rng_state(content["rng"])
    if is_main():
        _take_over_logs(content["path"], content["epoch"], folder)
    where = f"epoch {progress.epoch}" + (f", update {progress.step} of {progress.updates}" if progress.step else "")
    say(f"resumed: going on with {where}")
    return {name: value for name, value in content["metrics"].items() if name not in ("running", "updates")}


def _take_over_logs(path: Path, epoch: int, folder: Path) -> None:
    """The log up to the checkpoint's epoch, from its folder."""
    source = path.parent
    if source.resolve() != folder.resolve():
        start_anew(folder, path.name)
        if (source / "debug").is_dir():
            shutil.copytree(source / "debug", folder / "debug", dirs_exist_ok=True)
    log = source / "log.txt"
    lines = log.read_text().splitlines(True) if log.exists() else []
    write_text(folder / "log.txt", "".join(line for line in lines if _epoch_of(line) <= epoch))


def _epoch_of(line: str) -> float:
    """A line that a crash tore off belongs to no epoch."""
    try:
        return json.loads(line)["epoch"]
    except json.JSONDecodeError:
        return math.inf


def start_anew(folder: Path, name: str) -> None:
    """Clear the folder of an earlier run's logs, and set its checkpoint aside: this run's restart must not find it."""
    if not is_main():
        return
    for old in (folder / "log.txt", *folder.glob("debug/debugOutput_*"), *folder.glob("events.out.tfevents.*")):
        old.unlink(missing_ok=True)
    if (old := folder / name).exists():
        old.replace(aside := old.with_suffix(".previous.pth"))
        say(f"{folder} holds an earlier run: its checkpoint is now {aside.name}")


class Keeper:
    """Writes a run's checkpoint inside an epoch: every `interval` updates, and when SIGTERM asks the run to end.

    A context around the training loop; a run that fails in there names its last good checkpoint.
    """

    def __init__(self, progress: Progress, path: Path, interval: int, save: Callable[[], None]) -> None:
        self.progress, self.path, self.interval, self.save = progress, path, interval, save
        self.request = elastic.StopRequest()

    def __enter__(self) -> None:
        check_identical("epoch and update to go on with", repr((self.progress.epoch, self.progress.step)).encode())
        self.request.listen()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        self.request.close(waiting=error is None)
        if isinstance(error, RunFailed):
            good = f"the last good checkpoint is {self.path}" if self.path.exists() else "no checkpoint was written yet"
            raise type(error)(f"{error}; {good}") from error

    def after_step(self) -> None:
        """Called after every update, by all ranks. Raises elastic.Terminated."""
        if self.request.agreed():
            self._end()
        if self.interval and self.progress.step % self.interval == 0:
            self.save()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around evaluation, which SIGTERM may break off: it is done again."""
        try:
            with self.request.at_once():
                yield
        except elastic.Terminated:
            self._end()

    def _end(self) -> None:
        self.save()
        say(f"stopped by SIGTERM: {self.path} is written, go on with --resume")
        raise elastic.Terminated
