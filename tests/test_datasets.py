"""Data sets, their errors, and loaders whose every pass is a function of seed and epoch."""

import pickle
import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import CIFAR10, CIFAR100

from datasets import DATA_SETS, Digits, build_dataset, build_transform
from loading.images import CorruptImage, DataError, read_image
from loading.loaders import Reproducible, build_loader, start_epoch


def data_args(**changes):
    defaults = dict(
        data_set="DIGITS",
        data_path="",
        input_size=16,
        batch_size=4,
        num_workers=0,
        pin_mem=True,
        device="cpu",
        seed=0,
        color_jitter=0.4,
        aa="rand-m9-mstd0.5-inc1",
        train_interpolation="bicubic",
        reprob=0.25,
        remode="pixel",
        recount=1,
        hflip=0.5,
        repeated_aug=True,
        dist_eval=False,
    )
    return Namespace(**defaults | changes)


@pytest.fixture
def folder_args(tmp_path, image_folder):
    return data_args(data_set="IMNET", data_path=str(image_folder(tmp_path / "data")))


def order(loader):
    """What a loader over `numbers` gives, in order."""
    return torch.cat([batch[0] for batch in loader]).tolist()


def numbers(n):
    return TensorDataset(torch.arange(n))


class TestDigits:
    def test_sizes_and_classes(self):
        sizes = [(len(dataset), classes) for dataset, classes in (build_dataset(t, data_args()) for t in (True, False))]
        assert sizes == [(1437, 10), (360, 10)]

    def test_the_split_is_disjoint_stratified_and_always_the_same(self):
        train, val = Digits(True), Digits(False)
        for split in (train, val):
            shares = np.bincount(split.targets) / len(split)
            whole = np.bincount(train.targets + val.targets) / 1797
            assert np.abs(shares - whole).max() < 0.002
        again = Digits(False)
        assert val.targets == again.targets
        assert all(a.tobytes() == b.tobytes() for a, b in zip(val.images, again.images, strict=True))
        pixels = [{(t, i.tobytes()) for i, t in zip(d.images, d.targets, strict=True)} for d in (train, val)]
        assert not pixels[0] & pixels[1]

    @pytest.mark.parametrize("size", [8, 16, 32, 64])
    def test_images_have_the_size_asked_for(self, size):
        for is_train in (True, False):
            image, target = build_dataset(is_train, data_args(input_size=size))[0][5]
            assert image.shape == (3, size, size) and image.dtype == torch.float32 and 0 <= target < 10

    def test_validation_shows_the_digits_themselves(self):
        dataset = build_dataset(False, data_args(input_size=8))[0]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        pixels = dataset[0][0] * std + mean
        expected = torch.from_numpy(np.array(dataset.images[0])).permute(2, 0, 1) / 255
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
        assert pixels.max() > 0.9 and pixels.min() < 0.1

    def test_training_images_vary_and_are_not_mirrored(self):
        dataset = build_dataset(True, data_args())[0]
        assert not torch.equal(dataset[0][0], dataset[0][0]) and "Flip" not in repr(dataset.transform)


class TestTransforms:
    @pytest.mark.parametrize("size, source, resized", [(224, 300, 256), (48, 96, 54), (32, 96, 32), (32, 32, 32)])
    def test_evaluation_resizes_and_crops_the_centre(self, size, source, resized):
        transform = build_transform(False, data_args(data_set="IMNET", input_size=size))
        resize, crop = transform.transforms[:2]
        assert (resize.size, tuple(crop.size), resize.interpolation.value) == (resized, (size, size), "bicubic")
        assert transform(Image.new("RGB", (source, source))).shape == (3, size, size)

    @pytest.mark.parametrize("size, first, second", [(224, "RandomResizedCrop", "Flip"), (32, "Resize(", "RandomCrop")])
    def test_small_images_are_padded_and_cropped(self, size, first, second):
        transform = build_transform(True, data_args(data_set="CIFAR10", input_size=size))
        assert repr(transform.transforms[0]).startswith(first) and second in repr(transform.transforms[1])
        for source in ((32, 32), (50, 80)):
            assert transform(Image.new("RGB", source)).shape == (3, size, size)

    @pytest.mark.parametrize(
        "aa, jitter, present",
        [
            ("rand-m9-mstd0.5-inc1", 0.4, "RandAugment"),
            ("", 0.4, "ColorJitter"),
            (None, 0.4, "ColorJitter"),
            ("none", 0.0, None),
            ("None", None, None),
        ],
    )
    def test_augmentation_flags(self, aa, jitter, present):
        text = repr(build_transform(True, data_args(data_set="IMNET", aa=aa, color_jitter=jitter)))
        assert [name for name in ("RandAugment", "ColorJitter") if name in text] == ([present] if present else [])
        assert "RandomErasing" in text
        assert "RandomErasing" not in repr(build_transform(True, data_args(data_set="IMNET", reprob=0.0)))

    def test_an_unknown_policy_is_named(self):
        with pytest.raises(DataError, match="--aa rnd-m9: timm knows no such policy"):
            build_transform(True, data_args(data_set="IMNET", aa="rnd-m9"))

    def test_randaugment_at_its_strongest_takes_every_image(self):
        """No bit is left of a posterized one; Pillow 13 refuses what older ones made black."""
        policy = build_transform(True, data_args(data_set="IMNET", input_size=48, aa="rand-m10-n15-inc1"))
        images = [policy(Image.new("RGB", (60, 60), (9 * i, 200, 30))) for i in range(20)]
        assert all(image.shape == (3, 48, 48) and image.isfinite().all() for image in images)


class TestImageFolder:
    def test_too_many_workers_are_said_in_one_line(self, folder_args, capsys):
        folder_args.num_workers = 999
        for is_train in (True, False):
            build_loader(build_dataset(is_train, folder_args)[0], folder_args, is_train)
        assert capsys.readouterr().err.count("warning: --num_workers 999 on ") == 1

    def test_end_to_end(self, folder_args):
        for is_train, batches in ((True, [4]), (False, [6])):
            dataset, classes = build_dataset(is_train, folder_args)
            assert (len(dataset), classes, dataset.classes) == (6, 2, ["ant", "bee"])
            found = list(build_loader(dataset, folder_args, is_train))
            assert [len(targets) for _, targets in found] == batches
            assert all(images.shape[1:] == (3, 16, 16) for images, _ in found)
        assert found[0][1].tolist() == [0, 0, 0, 1, 1, 1]

    def test_validation_images_alone_are_enough_to_evaluate(self, tmp_path, image_folder):
        root = image_folder(tmp_path)
        (root / "train").rename(tmp_path / "elsewhere")
        args = data_args(data_set="IMNET", data_path=str(root))
        assert len(build_dataset(False, args)[0]) == 6
        with pytest.raises(DataError, match="no train/ in .*must hold train/ and val/"):
            build_dataset(True, args)

    def test_missing_folders(self, tmp_path):
        for path, complaint in (("", "needs --data-path"), (str(tmp_path / "no"), "no data folder .*no; --data-path")):
            with pytest.raises(DataError, match=complaint):
                build_dataset(True, data_args(data_set="IMNET", data_path=path))
        for is_train, complaint in ((True, "no train/ in"), (False, "no val/ in")):
            with pytest.raises(DataError, match=complaint):
                build_dataset(is_train, data_args(data_set="IMNET", data_path=str(tmp_path)))

    def test_no_class_folders(self, tmp_path):
        (tmp_path / "train").mkdir()
        with pytest.raises(DataError, match="no class folders in .*train"):
            build_dataset(True, data_args(data_set="IMNET", data_path=str(tmp_path)))

    def test_different_classes(self, tmp_path, image_folder):
        root = image_folder(tmp_path, classes=("a", "b", "c", "d", "e", "z"), per_class=1)
        for name in "abcde":
            (root / "train" / name).rename(tmp_path / f"moved_{name}")
        (root / "train" / "extra").mkdir()
        for is_train in (True, False):
            with pytest.raises(DataError) as caught:
                build_dataset(is_train, data_args(data_set="IMNET", data_path=str(root)))
            assert "only in train/: extra" in str(caught.value) and "\n" not in str(caught.value)
            assert "only in val/: a, b, c and 2 more" in str(caught.value)

    def test_a_class_without_images(self, folder_args):
        for image in list(Path(folder_args.data_path, "val", "bee").iterdir()):
            image.rename(image.with_suffix(".txt"))
        assert len(build_dataset(True, folder_args)[0]) == 6
        with pytest.raises(DataError, match="without images: bee;"):
            build_dataset(False, folder_args)

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "truncated"])
    def test_a_corrupt_image_is_named_in_one_line(self, folder_args, workers, content):
        folder_args.num_workers = workers
        dataset, _ = build_dataset(False, folder_args)
        path = dataset.samples[3][0]
        whole = open(path, "rb").read()
        with open(path, "wb") as file:
            file.write(whole[: len(whole) // 2] if content is None else content)
        message = ""
        try:
            list(build_loader(dataset, folder_args, False))
        except CorruptImage as error:
            message, error.__traceback__ = str(error), None  # a traceback would keep the loader's processes
        assert message.startswith(f"cannot read image {path} (") and "\n" not in message

    def test_every_mode_is_read_as_rgb(self, tmp_path):
        for mode in ("L", "P", "RGBA", "I;16", "1", "CMYK"):
            path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
            Image.new(mode, (5, 4)).save(path)
            image = read_image(str(path))
            assert (image.mode, image.size) == ("RGB", (5, 4))
        with pytest.raises(CorruptImage, match="no.png"):
            read_image(str(tmp_path / "no.png"))


class TestCifar:
    @pytest.fixture
    def fake_cifar(self, tmp_path, monkeypatch):
        """CIFAR folders of 6 and 4 random images, with torchvision's check sums switched off."""
        for kind, classes, key in ((CIFAR10, 10, "labels"), (CIFAR100, 100, "fine_labels")):
            folder = tmp_path / kind.base_folder
            folder.mkdir()
            monkeypatch.setattr(kind, "train_list", [["train", None]])
            monkeypatch.setattr(kind, "test_list", [["test", None]])
            monkeypatch.setattr(kind, "meta", dict(filename="meta", key="names", md5=None))
            for name, count in (("train", 6), ("test", 4)):
                data = np.random.randint(0, 256, (count, 3072), dtype=np.uint8)
                (folder / name).write_bytes(pickle.dumps({"data": data, key: list(range(count))}))
            (folder / "meta").write_bytes(pickle.dumps(dict(names=[str(i) for i in range(classes)])))
        return tmp_path

    @pytest.mark.parametrize("name, classes", [("CIFAR10", 10), ("CIFAR100", 100), ("CIFAR", 100)])
    def test_sizes(self, fake_cifar, name, classes, capsys):
        args = data_args(data_set=name, data_path=str(fake_cifar), input_size=32)
        for is_train, count in ((True, 6), (False, 4)):
            dataset, found = build_dataset(is_train, args)
            assert (len(dataset), found, dataset[0][0].shape) == (count, classes, (3, 32, 32))
        assert ("CIFAR is CIFAR-100" in capsys.readouterr().out) == (name == "CIFAR")

    @pytest.mark.parametrize("name, folder", [("CIFAR10", "cifar-10-batches-py"), ("CIFAR100", "cifar-100-python")])
    def test_missing_or_damaged_files(self, tmp_path, name, folder):
        args = data_args(data_set=name, data_path=str(tmp_path))
        remedy = f"put the extracted {folder} folder under DATA_PATH; this project downloads no data"
        with pytest.raises(DataError, match=f"no {folder} in .*: {remedy}"):
            build_dataset(True, args)
        (tmp_path / folder).mkdir()
        with pytest.raises(DataError, match=f"missing or damaged: {remedy}"):
            build_dataset(False, args)


class TestLoaders:
    def test_training_order_is_a_function_of_seed_and_epoch(self):
        def epochs(seed):
            loader = build_loader(numbers(12), data_args(seed=seed), True)
            return [order(start_epoch(loader, epoch) or loader) for epoch in (0, 1, 2)]

        first = epochs(0)
        assert all(sorted(found) == list(range(12)) for found in first)
        assert first == epochs(0) != epochs(7)
        assert first[0] != first[1] != first[2] != list(range(12))
        resumed = build_loader(numbers(12), data_args(), True)
        assert order(start_epoch(resumed, 2) or resumed) == first[2]

    def test_augmentation_depends_on_seed_epoch_and_place_alone(self):
        def epoch(number, seed=0, workers=0, skip=0, world=1):
            args = data_args(num_workers=workers, batch_size=64 // world, repeated_aug=False, seed=seed)
            dataset = Subset(build_dataset(True, args)[0], range(192))
            torch.manual_seed(workers)
            random.seed(workers)
            shares = []
            for rank in range(world):
                loader = build_loader(dataset, args, True, rank, world)
                start_epoch(loader, number, skip)
                shares.append(torch.stack([images for images, _ in loader]))  # batches, images of one, 3, S, S
            return torch.stack(shares, 2).flatten(1, 2).flatten(0, 1)

        whole = epoch(3)
        assert len(whole) == 192 and torch.equal(whole, epoch(3, workers=2))
        assert torch.equal(whole[64:], epoch(3, workers=2, skip=1))
        assert torch.equal(whole, epoch(3, world=2))
        for other in (epoch(4), epoch(3, seed=1)):
            assert not torch.equal(whole, other)

    def test_an_image_read_twice_is_augmented_differently(self):
        dataset = Reproducible(build_dataset(True, data_args())[0], seed=0)
        first, again = dataset[5, 0, 10], dataset[5, 0, 11]
        assert first[1] == again[1] and not torch.equal(first[0], again[0])
        assert torch.equal(first[0], dataset[5, 0, 10][0]) and not torch.equal(first[0], dataset[5, 1, 10][0])

    def test_loading_leaves_the_global_generator_alone(self):
        loader = build_loader(build_dataset(True, data_args())[0], data_args(), True)
        before = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
        next(iter(loader))
        after = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]

    def test_training_batches_are_whole_and_too_few_images_are_an_error(self):
        assert [len(b[0]) for b in build_loader(numbers(11), data_args(), True)] == [4, 4]
        with pytest.raises(DataError, match="3 training images per process are fewer than one batch of 4"):
            build_loader(numbers(6), data_args(repeated_aug=False), True, 0, 2)
        assert len(build_loader(numbers(3), data_args(), False)) == 1

    def test_processes_share_a_training_epoch_out(self):
        args = data_args(repeated_aug=False)
        shares = [order(build_loader(numbers(16), args, True, rank, 2)) for rank in (0, 1)]
        assert sorted(shares[0] + shares[1]) == list(range(16))

    def test_repeated_augmentation_gives_three_views_across_processes(self):
        def shares(epoch, seed=0):
            args = data_args(batch_size=20, seed=seed)
            loaders = [build_loader(numbers(60), args, True, rank, 3) for rank in range(3)]
            return [order(start_epoch(loader, epoch) or loader) for loader in loaders]

        first = shares(0)
        assert set(np.bincount(sum(first, []))) <= {0, 3}
        assert all(len(set(share)) == len(share) == 20 for share in first)
        assert first == shares(0) and first != shares(1) and first != shares(0, seed=5)

    @pytest.mark.parametrize("n, world", [(11, 4), (12, 4), (3, 4), (7, 1)])
    def test_validation_counts_every_sample_once(self, n, world):
        args = data_args(dist_eval=True)
        shares = [
            [i for batch in build_loader(numbers(n), args, False, rank, world) for i in batch[0].tolist()]
            for rank in range(world)
        ]
        assert sorted(sum(shares, [])) == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        for rank in range(world):
            assert order(build_loader(numbers(n), data_args(), False, rank, world)) == list(range(n))

    def test_validation_takes_one_and_a_half_batches(self):
        assert [len(b[0]) for b in build_loader(numbers(14), data_args(batch_size=5), False)] == [7, 7]
        assert len(next(iter(build_loader(numbers(2), data_args(batch_size=1), False)))[0]) == 1


def test_unknown_data_sets_are_named():
    assert DATA_SETS == ("DIGITS", "CIFAR10", "CIFAR100", "CIFAR", "IMNET", "INAT", "INAT19")
    with pytest.raises(DataError, match="no data set 'MNIST'; --data-set is one of DIGITS, CIFAR10"):
        build_dataset(False, data_args(data_set="MNIST"))
