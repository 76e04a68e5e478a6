"""Streaming: shards written from a folder, every image once, shared out among processes, in an order of the seed."""

import json
from argparse import Namespace

import pytest
import torch
from jobs import MODEL, run

import finetune_dense
from benchmarks import loader as loader_benchmark
from datasets import build_dataset
from loading.images import DataError
from loading.loaders import build_loader, start_epoch
from loading.shards import ShardError
from runtime.errors import BadArguments, RunFailed
from tools import to_shards

pytest.importorskip("webdataset")
CLASSES = ("ant", "bee", "cow")
FLAGS = [
    "--num_workers",
    "0",
    "--device",
    "cpu",
    "--mixup",
    "0",
    "--cutmix",
    "0",
    "--aa",
    "",
    "--batch-size",
    "8",
    "--epochs",
    "2",
    "--lr",
    "1e-2",
    "--kl_loss_coeff",
    "0",
    "--original_loss_coeff",
    "1",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of 72 images in train/ and val/, and the same as 9 shards each. An image's shade is its number."""
    from PIL import Image

    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        for i in range(72):
            (folder := root / "images" / split / CLASSES[i % 3]).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (3 * i,) * 3).save(folder / f"{i:02d}.png")
    run(to_shards, root / "images", root / "shards", "--images-per-shard", "8")
    return root


def args_of(place, **changes):
    defaults = dict(
        data_set="wds/tiny",
        data_path=str(place / "shards"),
        input_size=16,
        batch_size=8,
        num_workers=0,
        pin_mem=False,
        dist_eval=False,
        seed=0,
        aa="",
        color_jitter=0,
        hflip=0,
        reprob=0,
        remode="pixel",
        recount=1,
        train_interpolation="bicubic",
        repeated_aug=False,
    )
    return Namespace(**defaults | changes)


def loader_of(args, is_train, rank=0, world_size=1):
    return build_loader(build_dataset(is_train, args)[0], args, is_train, rank, world_size)


def numbers(batches):
    """Which images came, from their shade."""
    shades = torch.cat([images.amax((2, 3))[:, 0] * 0.229 + 0.485 for images, _ in batches])
    return (shades * 255 / 3).round().int().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_validation_image_comes_once_with_its_class(place, workers):
    loader = loader_of(args_of(place, num_workers=workers), is_train=False)
    batches = list(loader)
    found = numbers(batches)
    assert sorted(found) == list(range(72)) and len(loader.dataset) == 72
    assert [i % 3 for i in found] == torch.cat([targets for _, targets in batches]).tolist()


@pytest.mark.parametrize("dist_eval", [True, False])
def test_validation_on_two_processes(place, dist_eval):
    parts = [numbers(loader_of(args_of(place, dist_eval=dist_eval), False, rank, 2)) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == (list(range(72)) if dist_eval else sorted(2 * list(range(72))))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_order_follows_seed_and_epoch_and_resumes_inside_it(place, workers):
    def epoch(number, skip=0, seed=0):
        torch.manual_seed(0)
        loader = loader_of(args_of(place, seed=seed, num_workers=workers), is_train=True)
        start_epoch(loader, number, skip)
        return [images for images, _ in loader], len(loader)

    (first, length), (again, _), (other, _), (late, _) = epoch(0), epoch(0), epoch(1), epoch(0, skip=3)
    assert length == len(first) >= 9 and all(len(images) == 8 for images in first)
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))
    assert len(late) == length - 3 and all(map(torch.equal, first[3:], late))


def test_training_shards_are_shared_out(place):
    order = [list(loader_of(args_of(place), True, rank, 2)) for rank in (0, 1)]
    parts = [numbers([(images[:, :, 8:9, 8:9], None) for images, _ in part]) for part in order]
    assert len(parts[0]) == len(parts[1]) == 40 and not set(parts[0]) & set(parts[1])


def test_shards_and_folder_give_the_same_accuracy(place, tmp_path, capsys):
    run(
        finetune_dense,
        "--scratch",
        *MODEL,
        *FLAGS,
        "--data-set",
        "wds/tiny",
        "--data-path",
        place / "shards",
        "--output_dir",
        tmp_path,
    )
    (out,) = tmp_path.glob("scratch_*")
    top1 = json.loads((out / "summary.json").read_text())["dense"]["top1"]
    run(finetune_dense, *FLAGS, "--eval", "--finetune", out, "--data-path", place / "images")
    assert f"top-1 {top1:.2f}" in capsys.readouterr().out


def test_an_image_that_cannot_be_read_is_missed(place, tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "images" / "val" / name).mkdir(parents=True)
        source = place / "images" / "val" / name
        for i, path in enumerate(sorted(source.iterdir())[:4]):
            (tmp_path / "images" / "val" / name / path.name).write_bytes(path.read_bytes()[: 40 if i == 2 else None])
    run(to_shards, tmp_path / "images", tmp_path / "shards")
    with pytest.raises(RunFailed, match="6 of 8 validation images"):
        list(loader_of(args_of(tmp_path), is_train=False))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data_set="wsd/tiny"), "closest: wds/tiny"),
        (dict(data_set="DIGIT"), "closest: DIGITS; --data-set is one of"),
        (dict(data_set="imnet"), "closest: IMNET"),
        (dict(data_set="hfds/food101"), "tools.to_shards"),
        (dict(data_path=""), "needs --data-path"),
    ],
)
def test_a_spec_that_cannot_be_meant(place, changes, message):
    with pytest.raises((DataError, ShardError), match=message):
        build_dataset(False, args_of(place, **changes))


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no _info.json in"),
        ("gone", "no folder .*shards: python -m tools.to_shards"),
        ("{", "is incomplete"),
        ('{"splits": {}}', "is incomplete .*classes"),
        ('{"splits": {"val": {"num_samples": 3, "filenames": ["a.tar"], "shard_lengths": [2]}}}', "3 samples, but"),
        ('{"splits": {"val": {"num_samples": 2, "filenames": ["a.tar"], "shard_lengths": [2]}}}', "names a.tar, which"),
    ],
)
def test_a_folder_of_shards_that_is_none(tmp_path, text, message):
    if text != "gone":
        (tmp_path / "shards").mkdir()
    if text not in (None, "gone"):
        (tmp_path / "shards" / "_info.json").write_text(text)
    with pytest.raises(ShardError, match=message):
        build_dataset(False, args_of(tmp_path))


def test_too_few_shards(place, capsys):
    with pytest.raises(ShardError, match="9 shards of train are too few for 10 processes"):
        loader_of(args_of(place), True, 0, 10)
    loader = loader_of(args_of(place, num_workers=10), True)
    assert loader.loader.num_workers == 9 and "9 loader processes instead of 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["nowhere", "out"], "nowhere has neither train/ nor val/"),
        (["nowhere", "out", "--images-per-shard", "0"], "must be at least 1"),
    ],
)
def test_to_shards_of_nothing(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadArguments, match=message):
        run(to_shards, *flags)


def test_the_loader_benchmark_prints_both_rates(place, capsys):
    run(
        loader_benchmark,
        *MODEL,
        *FLAGS[:-8],
        "--data-set",
        "wds/tiny",
        "--data-path",
        place / "shards",
        "--batches",
        "2",
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:-1]] == ["loader", "step"] and "the model" in lines[-1]
