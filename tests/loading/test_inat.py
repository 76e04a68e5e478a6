"""iNaturalist's files as delivered: classes at a level of the taxonomy, the same in both splits."""

import json
from argparse import Namespace

import pytest
from PIL import Image

from datasets import build_dataset
from loading.images import DataError

CATEGORIES = [
    dict(id=0, name="Apis mellifera", order="Hymenoptera"),
    dict(id=1, name="Bos taurus", order="Artiodactyla"),
    dict(id=2, name="Bison bison", order="Artiodactyla"),
]
IMAGES = dict(train=[2, 0, 1, 0], val=[1, 2])  # category of every image


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "categories.json").write_text(json.dumps(CATEGORIES))
    for split, chosen in IMAGES.items():
        images = [dict(id=10 * i, file_name=f"train_val2018/Animalia/{c}/{split}{i}.jpg") for i, c in enumerate(chosen)]
        annotations = [dict(image_id=10 * i, category_id=c) for i, c in enumerate(chosen)]
        for image in images:
            (path := tmp_path / image["file_name"]).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 16)).save(path)
        (tmp_path / f"{split}2018.json").write_text(json.dumps(dict(images=images, annotations=annotations[::-1])))
    return tmp_path


def args_of(folder, **changes):
    defaults = dict(
        data_set="INAT",
        data_path=str(folder),
        input_size=16,
        inat_category="name",
        aa="",
        color_jitter=0,
        hflip=0.5,
        train_interpolation="bicubic",
        reprob=0,
        remode="pixel",
        recount=1,
    )
    return Namespace(**defaults | changes)


def test_classes_are_those_of_the_level(folder):
    val, classes = build_dataset(False, args_of(folder))
    assert classes == 3 and val.classes == ["Apis mellifera", "Bison bison", "Bos taurus"] and val.targets == [2, 1]
    train, classes = build_dataset(True, args_of(folder, inat_category="order"))
    assert classes == 2 and train.targets == [0, 1, 0, 1] and train[0][0].shape == (3, 16, 16)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "train2018.json").unlink(), "no train2018.json in"),
        (lambda folder: (folder / "val2018.json").write_text("{"), "val2018.json is damaged"),
        (lambda folder: (folder / "categories.json").write_text("[]"), "are inconsistent"),
    ],
)
def test_damaged_files_are_named(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        build_dataset(False, args_of(folder))
