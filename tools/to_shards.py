"""Write a folder of images as webdataset shards: python -m tools.to_shards FOLDER DIR

FOLDER has train/ and val/ (one of them is enough) with a folder of images per class. DIR gets train-000000.tar and so
on with the image files as they are, training images in random order, and _info.json. Read them with --data-set wds/NAME
--data-path DIR.
"""

from __future__ import annotations

import argparse
import random
import shlex
from pathlib import Path
from typing import Any

import options
from loading.folders import ClassFolders
from loading.shards import INFO, KEYS
from runtime.console import say, say_next
from runtime.errors import BadArguments, Problems, RunFailed
from runtime.folders import make_folder, write_json
from runtime.script import run_script

SPELLINGS = dict(jpeg="jpg", jpe="jpg", jfif="jpg", tiff="tif")
EXTENSIONS = {f".{key}": SPELLINGS.get(key, key) for key in (*KEYS.split(";"), *SPELLINGS)}


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__, "example: python -m tools.to_shards images shards --images-per-shard 1000", "tools.to_shards"
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder with train/ and val/")
    parser.add_argument("output", metavar="DIR", type=Path, help="folder to write")
    parser.add_argument(
        "--images-per-shard",
        metavar="N",
        type=int,
        default=1000,
        help="images of a shard; there must be a shard for every loader process (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the order of training images (default: %(default)s)"
    )
    return parser


def read_split(split: Path) -> ClassFolders:
    """The images of a split. Raises ValueError."""
    data = ClassFolders(split)
    if odd := [path for path, _ in data.samples if Path(path).suffix.lower() not in EXTENSIONS]:
        raise ValueError(f"{odd[0]} is none of {', '.join(EXTENSIONS)}, which is what shards hold")
    return data


def check_args(args: argparse.Namespace) -> dict[str, ClassFolders]:
    """The splits by name. Everything wrong is reported at once; raises BadArguments."""
    problems = Problems()
    try:
        import webdataset  # noqa: F401
    except ImportError:
        problems.add('tools.to_shards needs webdataset: pip install ".[streaming]"')
    if args.images_per_shard < 1:
        problems.add(f"--images-per-shard must be at least 1, not {args.images_per_shard}")
    present = [name for name in ("train", "val") if (args.folder / name).is_dir()]
    if not present:
        problems.add(f"{args.folder} has neither train/ nor val/")
    splits = {name: problems.attempt(read_split, args.folder / name) for name in present}
    problems.raise_if_any()
    if len({tuple(split.classes) for split in splits.values()}) > 1:
        raise BadArguments([f"train/ and val/ of {args.folder} hold different class folders"])
    return splits


def write(name: str, samples: list[tuple[str, int]], output: Path, per_shard: int) -> dict[str, Any]:
    """Write one split; returns what _info.json says of it. Raises RunFailed."""
    import webdataset

    filenames, lengths = [], []
    for begin in range(0, len(samples), per_shard):
        filenames.append(f"{name}-{len(filenames):06d}.tar")
        lengths.append(len(samples[begin : begin + per_shard]))
        with webdataset.TarWriter(str(output / filenames[-1])) as writer:
            for i, (path, target) in enumerate(samples[begin : begin + per_shard], begin):
                try:
                    image = Path(path).read_bytes()
                except OSError as error:
                    raise RunFailed(f"cannot read {path}: {error.strerror}") from None
                kind = EXTENSIONS[Path(path).suffix.lower()]
                writer.write({"__key__": f"{i:09d}", kind: image, "cls": str(target).encode()})
    return dict(name=name, num_samples=len(samples), filenames=filenames, shard_lengths=lengths)


def main(args: argparse.Namespace) -> None:
    splits = check_args(args)
    try:
        output = make_folder(args.output)
    except ValueError as error:
        raise BadArguments([str(error)]) from None
    info = {}
    for name, split in splits.items():
        samples = list(split.samples)
        if name == "train":
            random.Random(args.seed).shuffle(samples)
        info[name] = write(name, samples, output, args.images_per_shard)
    write_json(output / INFO, dict(splits=info, classes=next(iter(splits.values())).classes))
    counts = ", ".join(f"{i['num_samples']:,} {n} images in {len(i['filenames'])}" for n, i in info.items())
    say_next(
        f"finetune_dense.py --finetune RUN --data-set wds/{shlex.quote(output.name)} --data-path "
        f"{shlex.quote(str(output))} --num_workers {min(len(i['filenames']) for i in info.values())}"
    )
    say(f"{output}: shards, {counts}")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
