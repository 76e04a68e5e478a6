"""One-shot pruning of a model that is used for its features: no classifier, and any folder of images.

The objective are the features (`pruning.objective.Features`). What is left of them is judged by their divergence on
images that no fit has seen and, where images have classes, by nearest neighbours and a linear classifier.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from datasets import build_dataset, reads_exif
from latency.table import LatencyTable
from loading.folders import Pictures, Skipping
from loading.preparation import Preparation
from models.arch import Arch
from recipes import api, calibration, one_shot_options, tables
from recipes.one_shot import bisect_drop
from runtime.console import say, say_next, say_result, table
from runtime.errors import Problems, RunFailed
from runtime.folders import make_folder, write_json
from runtime.ranks import world_size
from training import probes, provenance, results, resuming
from training.full_model import FullModel
from training.parts import Data
from training.preparing import settle

NAMES = dict(knn="k-NN top-1", linear="linear top-1")


@dataclass(frozen=True)
class Setup:
    """A checked run: the dense headless model, its images, a latency table, and where results go.

    images: without labels, to calibrate on; bank, queries: with labels, None where images have no classes.
    """

    device: torch.device
    full: FullModel
    model: nn.Module
    table: LatencyTable
    preparation: Preparation
    images: Dataset
    bank: Dataset | None
    queries: Dataset | None
    folder: Path


def is_for(args: Any, full: FullModel) -> bool:
    """Whether --one_shot keeps features: --objective says so, or the weights are timm's own and have no classifier."""
    if not args.one_shot or args.objective:
        return args.one_shot and args.objective == "features"
    return full.pretrained and full.state is None and not full.arch.skeleton.pretrained_cfg.get("num_classes", 1)


def find_images(args: Any, preparation: Preparation) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """(images to calibrate on, labelled bank, labelled queries); the last two are None where there are no classes.

    A folder without train/ and val/ is read as it is, with all folders in it. Raises DataError.
    """
    root = Path(args.data_path or ".")
    if args.data_set == "IMNET" and args.data_path and not all((root / name).is_dir() for name in ("train", "val")):
        within = root / "train" if (root / "train").is_dir() else root
        images = Pictures(within, preparation.eval_transform(), reads_exif(args))
        return (Skipping(images, stand_in=True) if args.bad_images == "skip" else images), None, None
    bank, _ = build_dataset(True, args, augment=False, preparation=preparation)
    queries, _ = build_dataset(False, args, preparation=preparation)
    return bank, bank, queries


def check_args(
    args: Any, problems: Problems, device: torch.device | None, full: FullModel, table: LatencyTable | None, path: Path
) -> Setup:
    """Load what the arguments name; what is wrong is reported with what `problems` has already. Raises BadArguments.

    table: the one that is named, None to find or measure one.
    """
    for flag in ("tokens", "analysis"):
        if getattr(args, flag):
            problems.add(f"--{flag} goes with --objective predictions")
    if full.arch.is_swin or full.start:
        problems.add("--objective features takes a plain Vision Transformer of full size")
    if world_size() > 1:
        problems.add("--objective features runs on one process")
    if not full.has_weights:
        problems.add("pruning starts from a trained model: give --initial-checkpoint FILE or --pretrained")
    problems.raise_if_any()
    full = full.without_classifier()
    preparation = problems.attempt(settle, args, full)
    found = problems.attempt(find_images, args, preparation) if preparation else None
    if found:
        problems.attempt(calibration.check, args, len(found[0]))
        if args.linear_probe and found[1] is None:
            problems.add("--linear_probe needs classes: --data-path with train/ and val/, and a folder for each class")
        if args.max_drop is not None and found[1] is None:
            problems.add("--max_drop needs classes to measure: --data-path with train/ and val/")
    model = problems.attempt(full.build)
    problems.raise_if_any()
    if table is None:
        table = tables.find(args, full, device, None, None)
    else:
        problems.attempt(table.check_covers, model.dims)
        tables.check(args, table, device, None, problems)
    problems.raise_if_any()
    folder = problems.attempt(make_folder, path)
    problems.raise_if_any()
    tables.keep(args, table, folder)
    return Setup(device, full, model.to(device).eval(), table, preparation, *found, folder)


def _judge(args: Any, setup: Setup, model: nn.Module) -> dict[str, float]:
    """Top-1 of features by each probe, {} where images have no classes."""
    if setup.bank is None:
        return {}
    pair = [probes.embed(model, which, args.batch_size, args.num_workers) for which in (setup.bank, setup.queries)]
    scores = dict(knn=probes.neighbours(*pair))
    return scores | (dict(linear=probes.linear(*pair)) if args.linear_probe else {})


def _stage(setup: Setup, study: api.Study, model: nn.Module, scores: dict[str, float]) -> dict[str, Any]:
    """One object of summary.json."""
    arch, dims = Arch.of_model(study.analysis.dense), model.dims
    dense = dims == study.analysis.dense.dims
    conditions = results.Conditions.of(setup.table, api.LATENCY_BATCH)
    return dict(
        **{name: round(score, 3) for name, score in scores.items()},
        divergence=0.0 if dense else model.divergence,
        params=arch.params(dims),
        macs=arch.macs(dims),
        latency_predicted=1.0 if dense else round(study.ratio(dims), 5),
        latency_measured=1.0 if dense else round(study.measure(dims), 5),
        batch=conditions.batch,
        dtype=conditions.dtype,
        dims=dims.to_dict(),
    )


def _say_scores(scores: dict[str, float]) -> str:
    return ", ".join(f"{NAMES[name]} {score:.2f}" for name, score in scores.items())


def _write(setup: Setup, folder: Path, model: nn.Module, stages: dict[str, dict[str, Any]]) -> None:
    model.data_config = setup.preparation.record
    api.save(model, folder)
    write_json(folder / "dims.json", model.dims.to_dict())
    write_json(folder / "summary.json", stages)
    pruned = stages["pruned"]
    shown = {name: pruned[name] for name in NAMES if name in pruned}
    say(
        f"{folder / 'model.safetensors'}: divergence {pruned['divergence']:.2e} of the variance"
        + (f", {_say_scores(shown)}" if shown else "")
        + f", latency predicted {pruned['latency_predicted']:.3f}, measured {pruned['latency_measured']:.3f} of dense"
    )


def _prune(args: Any, setup: Setup, study: api.Study, target: float) -> nn.Module:
    measured = tables.measures_target(args, setup.table, setup.device)
    try:
        return study.prune(target, measured, args.recover_minutes, args.hflip)
    except ValueError as error:  # NotReached
        raise RunFailed(str(error)) from None


def _quickest(args: Any, setup: Setup, study: api.Study, dense: dict[str, float]) -> tuple[nn.Module, dict[str, float]]:
    """The quickest model that loses at most --max_drop points of k-NN top-1, and its scores. dense: the dense ones."""

    def attempt(target: float) -> tuple[float, tuple[nn.Module, dict[str, float]]]:
        model = study.prune(target, recover_minutes=args.recover_minutes, hflip=args.hflip)
        scores = _judge(args, setup, model)
        return dense["knn"] - scores["knn"], (model, scores)

    return bisect_drop(attempt, args.max_drop)


def run(args: Any, setup: Setup) -> None:
    """--one_shot with --objective features, from beginning to end."""
    data = Data(DataLoader(setup.images), setup.queries and DataLoader(setup.queries), 0, preparation=setup.preparation)
    inputs = resuming.inputs_of(data, weights=setup.model.state_dict(), table=setup.table.data)
    provenance.record(args, setup.folder, setup.device, data, inputs)
    images = calibration.images_of(args, setup.preparation, setup.images)
    scores = _judge(args, setup, setup.model)
    say(f"dense model: {_say_scores(scores) or 'no classes to judge features by'}")
    study = api.analyse(
        setup.model,
        images,
        table=setup.table,
        objective="features",
        feature_tokens=args.feature_tokens,
        keep_output=args.keep_output,
        batch_size=args.batch_size,
        pricing=args.pricing,
        progress=say,
    )
    dense = _stage(setup, study, study.analysis.dense, scores)
    wanted, rows = one_shot_options.targets(args), []
    if args.max_drop is not None:
        model, its = _quickest(args, setup, study, scores)
        _write(setup, setup.folder, model, dict(dense=dense, pruned=_stage(setup, study, model, its)))
    for target in wanted:
        folder = make_folder(setup.folder / f"target_{target:g}", lock=False) if len(wanted) > 1 else setup.folder
        model = _prune(args, setup, study, target)
        pruned = _stage(setup, study, model, _judge(args, setup, model))
        _write(setup, folder, model, dict(dense=dense, pruned=pruned))
        rows.append(dict(target=target, folder=folder.name) | pruned)
    if len(rows) > 1:
        _say_sizes(setup.folder, dense, rows)
    last = shlex.quote(str(setup.folder if len(rows) <= 1 else setup.folder / rows[-1]["folder"]))
    say_next(f"-m tools.export {last} --format onnx")
    say_result(f"{max(1, len(rows))} pruned of {setup.full.arch.name}, as config.json and model.safetensors: {last}")


def _say_sizes(folder: Path, dense: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """sizes.json and a table of every size."""
    write_json(folder / "sizes.json", dict(dense=dense, sizes=rows))
    names = [name for name in NAMES if name in dense]
    headers = ["target", "predicted", "measured", *(f"{NAMES[name]} (dense {dense[name]:.2f})" for name in names)]
    cells = [
        [f"{row['target']:g}", f"{row['latency_predicted']:.3f}", f"{row['latency_measured']:.3f}"]
        + [f"{row[name]:.2f}" for name in names]
        + [f"{row['params']:,}", f"{row['divergence']:.1e}"]
        for row in rows
    ]
    say(table([*headers, "params", "divergence"], cells))
