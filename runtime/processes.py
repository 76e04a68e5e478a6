"""How the processes of a run meet: device, process group, heartbeat, seed."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist

from runtime import elastic
from runtime.console import say
from runtime.errors import RunFailed, first_line
from runtime.run import current
from runtime.seeds import seed_everything

BACKENDS = dict(cpu="gloo", cuda="cpu:gloo,cuda:nccl")  # tensors of either device may be reduced


def init_distributed(device: str, timeout: float) -> torch.device:
    """Join the process group that torchrun (or launch --use_env) describes, if there is one.

    timeout: seconds after which a silent rank ends the run. Raises ValueError if this machine has fewer GPUs than
    processes.
    """
    device = torch.device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"--nproc_per_node is {here} but this machine has {gpus} GPUs (or --device cpu)")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=timeout + 60)  # the heartbeat times out first, since it can name the rank
    try:
        current.join(_meet(BACKENDS[device.type], timeout, limit))
    except RuntimeError as error:
        raise RunFailed(f"the processes could not connect to each other: {error}") from None
    return device


def _meet(backend: str, timeout: float, limit: datetime.timedelta) -> elastic.Heartbeat:
    store, number, processes = next(dist.rendezvous("env://", timeout=limit))
    store = elastic.arrive(store, number)
    dist.init_process_group(backend, store=store, rank=number, world_size=processes, timeout=limit)
    own = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=limit,
    )
    prefix = dist.PrefixStore(
        f"heartbeat_{elastic.restarts()}", own
    )  # a connection of its own: no other thread may block it
    heartbeat = elastic.Heartbeat(prefix, number, processes, timeout)
    dist.barrier()
    heartbeat.begin()
    return heartbeat


def start_processes(args: Any) -> torch.device:
    """Choose the device, join the other processes and seed this one. Raises ValueError for an unusable device."""
    wanted = args.device
    if wanted == "cuda" and not torch.cuda.is_available():
        wanted = "cpu"
        say("no CUDA device here: running on the CPU")
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} is not usable: {first_line(error)}") from None
    device = init_distributed(wanted, args.dist_timeout)
    seed_everything(args.seed)
    return device
