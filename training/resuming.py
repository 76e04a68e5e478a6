"""Going on where a run was broken off: which checkpoint, and whether it fits."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import options
from engine import Progress
from files import checkpoint
from files.atomic import aside, older
from loading.fingerprint import fingerprint
from loading.preparation import Preparation
from models import Arch, dims_from_dict
from runtime import elastic
from runtime.console import say, warn
from runtime.errors import BadArguments, RunFailed
from runtime.folders import write_text
from runtime.ranks import is_main, rank, world_size
from runtime.seeds import set_rng_state
from training.class_names import check_class_names
from training.preparing import read_preparation

NOT_FLAGS = {
    "world_size",
    "inputs",
    "class_names",
    "initial_ema",
}  # what a checkpoint holds beside the arguments, compared on its own
PRUNED = ("pruned_checkpoint.pth", "dims.json", "summary.json", "debug", "logs")  # what a pruning run ends with
TUNED = ("ft_best.pth", "ASP_checkpoint.pth")  # and dense training, which adds to the summary it finds
SUMMARY = ("dims.json", "summary.json")
RECORDS = ("log.txt", "args.json", "run.json")
EVENTS = "events.out.tfevents.*"


def saved_args(
    args: Any, origin: str, inputs: dict[str, str] | None = None, names: Sequence[str] = ()
) -> dict[str, Any]:
    """The arguments as a checkpoint holds them: what is computed, not where things lie or how the run was resumed.

    origin: path of the dense weights; inputs: see `inputs_of`; names: of the classes.
    """
    left_out = {name for name, flag in options.FLAGS.items() if flag.path} | {"resume", "start_epoch"}
    kept = {name: value for name, value in vars(args).items() if name not in left_out}
    ema = getattr(args, "initial_ema", getattr(args, "use_ema", False))
    beside = dict(initial_checkpoint=origin, initial_ema=ema, world_size=world_size(), inputs=inputs or {})
    return kept | beside | dict(class_names=list(names))


def inputs_of(data: Any, **states: Any) -> dict[str, str]:
    """Digests of what a run is made from: its images, and named weights and tables (None: there is none)."""
    images = {
        f"{split} images": fingerprint(loader.dataset)["names"]
        for split, loader in (("training", data.train), ("validation", data.val))
        if loader is not None
    }
    return images | {name: checkpoint.digest(state) for name, state in states.items() if state is not None}


def _global_batch(args: dict[str, Any]) -> int:
    return args["batch_size"] * args.get("grad_accum_steps", 1) * args.get("world_size", 1)


def _show(value: Any) -> Any:
    return value if value != "" else "''"  # as it is typed


def _differences(now: dict[str, Any], before: dict[str, Any], may_differ: set[str]) -> list[str]:
    may_differ = {n for n, flag in options.FLAGS.items() if flag.path or flag.may_differ} | may_differ | NOT_FLAGS
    names = [n for n in now if n in before and n not in may_differ and now[n] != before[n]]
    differences = [f"{options.flag(name)} was {_show(before[name])}, now {_show(now[name])}" for name in names]
    if _global_batch(now) != _global_batch(before):
        differences.append(f"global batch was {_global_batch(before)}, now {_global_batch(now)}")
    return differences


def _preparation_differences(args: Any, preparation: Preparation, content: dict[str, Any]) -> list[str]:
    """How the preparation of images differs from that of a checkpoint, whichever flags it came from."""
    before = read_preparation(content, "", preparation.size)
    differences = [
        f"{options.flag(name)} was {then}, now {now}" for name, (now, then) in preparation.differences(before).items()
    ]
    now = args.train_interpolation or preparation.interpolation
    then = content["args"].get("train_interpolation") or before.interpolation
    return differences + ([f"--train-interpolation was {then}, now {now}"] if now != then else [])


def _newest(path: Path) -> tuple[dict[str, Any], Path]:
    """A checkpoint, or where it is missing or damaged the one before it, which is said. Raises CheckpointError."""
    try:
        return checkpoint.load(path), path
    except checkpoint.DamagedError as error:
        if not (before := older(path)).exists():
            raise
        content = checkpoint.load(before)
        warn(f"{error}; resuming from the one before it, {before}")
        return content, before


def find(args: Any, folder: Path, name: str, resume: str | None = None) -> Path | None:
    """The checkpoint to resume from: what --resume names, or after a restart the run's own; None to start anew.

    resume: in place of --resume.
    """
    own, resume = folder / name, args.resume if resume is None else resume
    if elastic.restarts() and (own.exists() or older(own).exists()):
        return own
    return (own if resume == "auto" else Path(resume)) if resume else None


def read(
    args: Any,
    folder: Path,
    name: str,
    *,
    data: Any,
    run: str,
    fitting: dict[str, Any],
    needed: str,
    inputs: dict[str, str] | None = None,
    may_differ: set[str] = frozenset(),
    resume: str | None = None,
    losses: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The checkpoint to resume from, read: see `find`.

    data: this run's; run: what kind of run it must be of; fitting: what some of its keys must hold;
    needed: a key that it must have; inputs: what the run must have been made from; resume: in place of --resume;
    losses: under flags' names the weights of this run's loss, where older files hold them. Raises ValueError for one
    that does not fit, or whose epoch or hyper-parameters are not the arguments'.
    """
    if (path := find(args, folder, name, resume)) is None:
        return None
    content, path = _newest(path)
    whole = content[needed] is not None and content["epoch"] is not None
    if not whole or not all(_fits(key, content[key], value) for key, value in fitting.items()):
        raise ValueError(f"--resume: {path} is not a {run} run of this model")
    if args.start_epoch not in (None, content["epoch"] + 1):
        raise ValueError(f"--start_epoch is {args.start_epoch} but {path} continues with epoch {content['epoch'] + 1}")
    now = saved_args(args, "")
    if losses and "kl_loss_coeff" in content["args"]:
        now |= losses
    differing = _differences(now, content["args"], set(may_differ))
    if differing := differing + _preparation_differences(args, data.preparation, content):
        raise ValueError(f"--resume: {path} was made with other arguments: {'; '.join(differing)}")
    check_class_names(content["args"].get("class_names") or [], data.names, f"--resume: {path}")
    made_from = content["args"].get("inputs", {})
    if others := [name for name, digest in (inputs or {}).items() if made_from.get(name, digest) != digest]:
        raise ValueError(f"--resume: {path} was made from other {', '.join(others)} than this run has")
    return content | dict(path=path)


def _fits(key: str, stored: Any, wanted: Any) -> bool:
    """Whether a checkpoint holds what it must under a key; older dims do not hold the queries of a lean last block."""
    if stored is not None and key == "dims":
        stored, wanted = (dims_from_dict(dims).with_queries(None) for dims in (stored, wanted))
    elif stored is not None and key == "arch":
        stored, wanted = map(Arch.of_record, (stored, wanted))
    return stored == wanted


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Around putting a checkpoint's states in place: RunFailed where they do not fit."""
    try:
        yield
    except RunFailed:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise RunFailed(f"cannot resume from {path}: {type(error).__name__}: {reason}") from None


def restore(
    content: dict[str, Any], progress: Progress, folder: Path, results: Sequence[str] = TUNED
) -> dict[str, Any]:
    """Put progress, generators and log where the checkpoint left them; returns the metrics of the last whole epoch.

    results: see `start_anew`.
    Raises BadArguments where an epoch has another number of updates now.
    """
    if (before := content["metrics"]["updates"]) != progress.updates:
        raise BadArguments(
            [
                f"--resume: an epoch had {before} updates, now {progress.updates}: the data, or how it is "
                "shared out among processes, is another"
            ]
        )
    progress.load_state_dict(content)
    if rank() == 0:
        set_rng_state(content["rng"])
    if is_main():
        _put_damaged_aside(content["path"])
        _take_over_logs(content["path"], content["epoch"], folder, results)
    where = f"epoch {progress.epoch}" + (f", update {progress.step} of {progress.updates}" if progress.step else "")
    say(f"resumed: continuing with {where}")
    return {name: value for name, value in content["metrics"].items() if name not in ("running", "updates")}


def _put_damaged_aside(path: Path) -> None:
    """Where `path` is the one before the newest, the newest is damaged, and must not become the one before the next."""
    newest = path.with_name(path.name.replace(".older.pth", ".pth"))
    if newest != path and newest.exists():
        newest.replace(newest.with_suffix(".damaged.pth"))


def _take_over_logs(path: Path, epoch: int, folder: Path, results: Sequence[str]) -> None:
    """The log up to the checkpoint's epoch, from its folder."""
    source = path.parent
    if source.resolve() != folder.resolve():
        start_anew(folder, path.name.replace(".older.pth", ".pth"), results)
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


def start_anew(folder: Path, name: str, results: Sequence[str] = TUNED) -> None:
    """Rename what earlier runs left in the folder: none of it is this run's, and nothing that is finished is lost.

    name: of the newest checkpoint; results: what this kind of run writes besides. The logs of a run that left neither
    are cleared.
    """
    if not is_main():
        return
    newest, before = folder / name, older(folder / name)
    if before.exists() and not newest.exists():
        before.replace(newest)
    before.unlink(missing_ok=True)
    if any((folder / own).is_file() for own in (name, *results)):
        set_aside(folder, (name, *results, *SUMMARY, *RECORDS))
    elif any((folder / other).is_file() for other in (*PRUNED, *TUNED)):
        set_aside(folder, RECORDS)
    debug = folder.glob("debug/debugOutput_*") if "debug" in results else ()
    for left in (folder / "log.txt", *debug, *folder.glob(EVENTS)):
        left.unlink(missing_ok=True)


def set_aside(folder: Path, names: Sequence[str]) -> None:
    """Rename files and folders, as far as there are any, to `….previous…`, or where that is taken to `….previous2…`.

    All of one call get the same number; curves go into a folder of it.
    """
    there = [folder / name for name in dict.fromkeys(names) if (folder / name).exists()]
    curves, *new = aside([folder / "curves", *there])
    for path, name in zip(there, new, strict=True):
        path.replace(name)
    for path in folder.glob(EVENTS):
        curves.mkdir(exist_ok=True)
        path.replace(curves / path.name)
    if there:
        first = "checkpoint" if there[0].suffix == ".pth" else there[0].name
        say(f"{folder} holds an earlier run: its {first} is now {new[0].name}")
