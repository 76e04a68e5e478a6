"""Batches for one of several processes: which samples it reads, and in which order."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, default_collate

from loading.images import DataError
from loading.shards import ShardLoader
from runtime import elastic
from runtime.console import warn
from runtime.seeds import preserved_random_state, seed_generators

warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # `_warn_of_many` says it in one line


class ShardSampler(Sampler[int]):
    """Samples rank, rank + world_size, …: every sample on exactly one process, with no padding."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class Reproducible(Dataset):
    """A training set whose augmentation depends only on the seed, the epoch and the place in the epoch's order.

    What the model sees then does not depend on the number of workers, on where a run was interrupted, or, at an equal
    global batch, on the number of processes. Keys are (index, epoch, place).
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Any, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> list[tuple[Any, int]]:
        with preserved_random_state():
            return [self._augment(*key) for key in keys]

    def _augment(self, index: int, epoch: int, place: int) -> tuple[Any, int]:
        seed_generators(self.seed, epoch, place)
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


class EpochOrder(Sampler[tuple[int, int, int]]):
    """What one process reads in an epoch, as keys of `Reproducible`, without the first `skip` samples."""

    def __init__(self, sampler: Sampler, rank: int, world_size: int) -> None:
        self.sampler, self.rank, self.world_size = sampler, rank, world_size
        self.epoch = self.skip = 0

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        self.sampler.set_epoch(self.epoch)
        for place, index in enumerate(self.sampler):
            if place >= self.skip:
                yield index, self.epoch, place * self.world_size + self.rank

    def __len__(self) -> int:
        return len(self.sampler)


class RepeatedAugSampler(RepeatAugSampler):
    """timm's sampler (three augmented views of a third of the images per epoch), ordered by the seed as well."""

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int, seed: int) -> None:
        rounding = 256 if len(dataset) >= 256 else 0  # older timm would round a smaller data set to nothing
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, selected_round=rounding)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(self.seed + epoch)


@lru_cache  # once
def _warn_of_many(workers: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if workers > cores:
        warn(f"--num_workers {workers} on {cores} CPU cores: more workers than cores may slow loading down")


def build_loader(
    dataset: Dataset, args: Any, is_train: bool, rank: int = 0, world_size: int = 1
) -> DataLoader[tuple[Tensor, Tensor]] | ShardLoader:
    """Batches of images (B, 3, S, S) and targets (B,) for one of `world_size` processes.

    Training: shuffled and divided among the processes, in full batches of args.batch_size, with repeated augmentation
    if there are several processes and args.repeated_aug is set. Call `start_epoch` before each epoch. Validation: in
    order, in batches 1.5 times as large, each sample once on every process, or once in all with args.dist_eval. Loading
    never draws from this process's generators. Raises DataError if a process has fewer training images than one batch.
    """
    _warn_of_many(args.num_workers)
    if isinstance(dataset, IterableDataset):
        return ShardLoader(dataset, args, is_train, rank, world_size)
    batch = args.batch_size if is_train else int(1.5 * args.batch_size)
    sampler = (_train_sampler if is_train else _val_sampler)(dataset, args, rank, world_size)
    if is_train and len(sampler) < batch:
        raise DataError(
            f"{len(sampler)} training images per process are fewer than one batch of {batch}; "
            f"--batch-size can be at most {len(sampler)}"
        )
    return DataLoader(
        Reproducible(dataset, args.seed) if is_train else dataset,
        batch_size=batch,
        sampler=sampler,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and torch.cuda.is_available(),
        drop_last=is_train,
        collate_fn=None if is_train else _collate_readable,
        generator=torch.Generator(),  # otherwise the seeds of the workers come from this process's generator
        worker_init_fn=_ignore_signals,
    )


def _collate_readable(samples: list[tuple[Tensor, int] | None]) -> Any:
    """A batch without unreadable images; it may be empty."""
    there = [sample for sample in samples if sample is not None]
    return default_collate(there) if there else (torch.empty(0), torch.empty(0, dtype=torch.int64))


def _ignore_signals(_: int) -> None:
    """Ignore signals that launchers and terminals send to whole groups: the main process ends its workers."""
    for number in elastic.STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _train_sampler(dataset: Dataset, args: Any, rank: int, world_size: int) -> Sampler:
    if args.repeated_aug and world_size > 1:
        inner = RepeatedAugSampler(dataset, world_size, rank, args.seed)
    else:
        inner = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=args.seed, drop_last=True)
    return EpochOrder(inner, rank, world_size)


def _val_sampler(dataset: Dataset, args: Any, rank: int, world_size: int) -> Sampler[int]:
    return ShardSampler(len(dataset), rank, world_size) if args.dist_eval else ShardSampler(len(dataset), 0, 1)


def start_epoch(loader: DataLoader | ShardLoader, epoch: int, skip: int = 0) -> None:
    """Make the next pass over a training loader that of `epoch`, without its first `skip` batches."""
    if isinstance(loader, ShardLoader):
        loader.start_epoch(epoch, skip)
        return
    loader.sampler.epoch, loader.sampler.skip = epoch, skip * loader.batch_size
