"""What is needed to repeat a run, in its folder: arguments; command, versions, revision, device, data of each start."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from files import schema
from loading.fingerprint import fingerprint
from runtime.device import device_name
from runtime.folders import write_json
from runtime.ranks import is_main, world_size

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "scipy")
STARTS = 100  # that are kept: a run that is pre-empted every hour starts often


def _versions() -> dict[str, str]:
    versions = dict(python=platform.python_version())
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def revision() -> str | None:
    """git's name of the code's revision, with "-dirty" where files were changed; None where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _earlier(path: Path) -> list[Any]:
    try:
        starts = schema.read_json(path)["starts"]
        return starts[-STARTS + 1 :] if isinstance(starts, list) else []
    except (schema.SchemaError, KeyError, TypeError):
        return []


def record(args: Any, folder: Path, device: torch.device, data: Any, inputs: dict[str, str]) -> None:
    """Write args.json, and add this start of the run to run.json. inputs: see `resuming.inputs_of`."""
    if not is_main():
        return
    write_json(folder / "args.json", vars(args))
    start = dict(
        when=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=[sys.executable, *sys.argv],
        revision=revision(),
        versions=_versions(),
        device=device_name(device),
        system=platform.platform(),
        processes=world_size(),
        threads=torch.get_num_threads(),
        inputs=inputs,
        data_config=data.preparation.record,
        data={
            split: fingerprint(loader.dataset)
            for split, loader in dict(train=data.train, val=data.val).items()
            if loader is not None
        },
    )
    path = folder / "run.json"
    write_json(path, dict(starts=[*(_earlier(path) if getattr(args, "resume", "") else []), start]))
