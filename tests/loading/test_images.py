"""Images that cannot be read: named, counted over processes, never silent."""

import re

import pytest
import torch
from jobs import PLAIN
from test_datasets import data_args

import finetune_dense
from datasets import build_dataset
from loading.fingerprint import fingerprint
from loading.images import CorruptImage
from loading.loaders import build_loader, start_epoch
from runtime.run import current
from runtime.script import run_script

TINY = [
    "--model",
    "deit_tiny_distilled_patch16_224",
    "--model-kwargs",
    "img_size=16",
    "patch_size=4",
    "embed_dim=32",
    "depth=1",
    "num_heads=4",
]


@pytest.fixture
def folder(tmp_path, image_folder):
    root = image_folder(tmp_path / "data", per_class=6, side=20)
    bad = [root / "train" / "bee" / "2.png", root / "val" / "ant" / "1.png"]
    for path in bad:
        path.write_bytes(b"no image")
    return root, bad


def arguments(root, **more):
    return data_args(data_set="IMNET", data_path=str(root), bad_images="skip", repeated_aug=False, **more)


@pytest.mark.parametrize("workers", [0, 2])
def test_another_image_stands_in_and_evaluation_leaves_out(folder, capfd, workers):
    root, bad = folder
    sizes = []
    for is_train in (True, False):
        dataset, classes = build_dataset(is_train, arguments(root))
        loader = build_loader(dataset, arguments(root, num_workers=workers), is_train)
        sizes.append([len(targets) for _, targets in loader])
    current.say_last_words()
    said = capfd.readouterr().err
    assert classes == 2 and sizes == [[4, 4, 4], [5, 6]]
    for path in bad:
        assert re.search(rf"warning: cannot read image {path} .*: skipped", said)
    assert f"1 of 12 images of {root / 'train'} could not be read, others replaced them: {bad[0]}" in said
    assert f"1 of 12 images of {root / 'val'} could not be read, evaluation skipped them: {bad[1]}" in said


def test_what_stands_in_is_always_the_same(folder):
    root, _ = folder

    def images():
        loader = build_loader(build_dataset(True, arguments(root))[0], arguments(root), True)
        start_epoch(loader, 3)
        return torch.cat([x for x, _ in loader])

    assert torch.equal(images(), images())
    current.say_last_words()


def test_where_none_can_be_read(folder, capfd):
    root, _ = folder
    for path in root.glob("train/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(CorruptImage, match="no image of .*train can be read"):
        build_dataset(True, arguments(root))[0][0]
    current.say_last_words()
    assert "12 of 12 images" in capfd.readouterr().err


def test_a_run_says_at_its_end_what_it_left_out(folder, tmp_path, capfd):
    root, bad = folder
    data = [flag if flag != "DIGITS" else "IMNET" for flag in PLAIN]
    flags = [
        *TINY,
        *data,
        "--scratch",
        "--data-path",
        root,
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "--bad_images",
        "skip",
        "--kl_loss_coeff",
        "0",
        "--original_loss_coeff",
        "1",
        "--output_dir",
        tmp_path / "out",
    ]
    run_script(finetune_dense.main, finetune_dense.get_args_parser().parse_args(list(map(str, flags))))
    last = capfd.readouterr().err.splitlines()[-2:]
    assert all(line.startswith("warning: 1 of 12 images") for line in last)
    assert all(str(path) in " ".join(last) for path in bad)


def test_a_data_set_is_recognised(folder, tmp_path):
    root, bad = folder
    first = fingerprint(build_dataset(True, arguments(root))[0])
    bad[0].write_bytes(b"something else")
    second = fingerprint(build_dataset(True, arguments(root))[0])
    bad[0].unlink()
    third = fingerprint(build_dataset(True, arguments(root))[0])
    assert first["names"] == second["names"] != third["names"] and third["images"] == 11
    assert first["some_files"] != second["some_files"]
    digits = [fingerprint(build_dataset(train, data_args())[0]) for train in (True, False, True)]
    assert digits[0] == digits[2] != digits[1] and digits[0]["images"] == 1437
