"""Images that cannot be read: named, counted over processes, never silent."""

import re
import shutil

import numpy as np
import pytest
import torch
from jobs import PLAIN
from PIL import ExifTags, Image, ImageOps
from test_datasets import data_args

import finetune_dense
from datasets import build_dataset
from loading.fingerprint import fingerprint
from loading.images import SCALED, TURNED, CorruptImage, DataError, open_image, read_image, to_rgb
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


def grey_picture():
    """A gradient of 40 x 32 pixels, in 8 bits."""
    return np.add.outer(np.arange(32) * 5, np.arange(40) * 2).astype(np.uint8)


WIDE = {
    "png of 16 bits": ("x.png", lambda grey: grey.astype(np.uint16) * 257),
    "tiff of 16 bits": ("x.tif", lambda grey: grey.astype(np.uint16) * 257),
    "tiff of 32 bits with a range of 16": ("x.tif", lambda grey: grey.astype(np.int32) * 257),
    "tiff of 32 bits": ("x.tif", lambda grey: (grey / 255 * (2**31 - 1)).astype(np.int32)),
    "floating point from 0 to 1": ("x.tif", lambda grey: (grey / 255).astype(np.float32)),
}


class TestPictures:
    @pytest.mark.parametrize("kind", WIDE)
    def test_wide_greyscale_is_scaled_by_the_range_of_its_type(self, kind, tmp_path):
        name, widen = WIDE[kind]
        Image.fromarray(widen(grey_picture())).save(tmp_path / name)
        image, bits = open_image(str(tmp_path / name))
        assert bits == SCALED and image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - grey_picture()[:, :, None]).max() <= 1

    @pytest.mark.parametrize(
        "value, kind, reason",
        [
            (1.5, np.float32, "from 1.5 to 1.5, expected 0"),
            (np.nan, np.float32, "expected 0"),
            (-3, np.int32, "down to -3"),
        ],
    )
    def test_values_without_a_range_name_the_file(self, value, kind, reason, tmp_path):
        Image.fromarray(np.full((4, 4), value, kind)).save(tmp_path / "x.tif")
        with pytest.raises(CorruptImage, match=f"x.tif .*{reason}"):
            read_image(str(tmp_path / "x.tif"))

    @pytest.mark.parametrize("content, reason", [(b"", "the file is empty"), (b"GARBAGE", "not an image")])
    def test_what_is_no_image_is_said_so(self, content, reason, tmp_path):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(CorruptImage, match=rf"cannot read image .*x.png \({reason}[^<]*\)$"):
            read_image(str(tmp_path / "x.png"))

    @pytest.mark.parametrize("orientation", range(10))
    def test_images_are_turned_as_their_exif_says(self, orientation, tmp_path):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        picture.save(path := tmp_path / "x.png", exif=exif)
        upright, bits = open_image(str(path))
        assert bits == (TURNED if 2 <= orientation <= 8 else 0)
        assert upright.size == ((6, 9) if 5 <= orientation <= 8 else (9, 6))
        assert np.array_equal(np.asarray(upright), np.asarray(ImageOps.exif_transpose(Image.open(path))))
        assert np.array_equal(np.asarray(read_image(str(path), exif=False)), np.asarray(picture))

    @pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV"])
    def test_other_modes_are_left_to_pillow(self, mode):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)).convert(mode)
        image, bits = to_rgb(picture)
        assert bits == 0 and image.tobytes() == picture.convert("RGB").tobytes()


class TestFolders:
    def test_more_formats_are_read_and_the_rest_is_counted(self, tmp_path, image_folder, capsys):
        root = image_folder(tmp_path / "data")
        picture = Image.fromarray(grey_picture()).convert("RGB")
        for ending, kind in dict(jfif="JPEG", jpe="JPEG", gif="GIF", avif="AVIF", jp2="JPEG2000").items():
            picture.save(root / "train" / "ant" / f"x.{ending}", format=kind)
        for name in ("notes.txt", "more.txt", "README"):
            (root / "train" / "bee" / name).write_text("no image")
        dataset = build_dataset(True, arguments(root))[0].dataset
        assert [dataset.targets.count(i) for i in range(2)] == [3 + 5, 3]
        assert f"{root / 'train'}: files left out: 2 .txt, 1 without an ending" in capsys.readouterr().out

    def test_what_notebooks_and_file_managers_leave_is_no_image(self, tmp_path, image_folder, capsys):
        root = image_folder(tmp_path / "data")
        some = next(root.glob("train/ant/*.png"))
        for folder in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
            (inner := some.parent / folder).mkdir()
            shutil.copy(some, inner / "copy.png")
        shutil.copy(some, some.with_name("._0.png"))
        (root / "train" / ".hidden").mkdir()
        dataset, classes = build_dataset(True, arguments(root))
        assert classes == 2 and len(dataset) == 6
        assert "files left out: 5 hidden" in capsys.readouterr().out

    def test_one_class_is_refused_but_for_calibration(self, tmp_path, image_folder):
        root = image_folder(tmp_path / "data", classes=("ant",))
        with pytest.raises(DataError, match="one class, ant: there is nothing to tell apart"):
            build_dataset(True, arguments(root))
        assert build_dataset(True, arguments(root, one_shot=True))[1] == 1

    @pytest.mark.parametrize("workers", [0, 2])
    def test_what_was_done_to_images_is_counted_once(self, workers, tmp_path, image_folder, capfd):
        root = image_folder(tmp_path / "data")
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        Image.fromarray(grey_picture()).save(root / "train" / "ant" / "0.png", exif=exif)
        Image.fromarray(grey_picture().astype(np.uint16) * 257).save(root / "train" / "bee" / "0.png")
        dataset, _ = build_dataset(True, arguments(root))
        for epoch in range(2):
            loader = build_loader(dataset, arguments(root, num_workers=workers, batch_size=2), True)
            start_epoch(loader, epoch)
            list(loader)
        current.say_last_words()
        said = capfd.readouterr().err
        assert said.count("1 of 6 images of") == 2
        assert f"{root / 'train'} were turned as their EXIF orientation says" in said
        assert f"{root / 'train'} were scaled to 8 bits from a wider type" in said
