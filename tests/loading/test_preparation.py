"""Images as the weights expect them: timm's own transform, bit for bit, and today's for files that do not say."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_datasets import data_args
from timm.data import create_transform, resolve_model_data_config
from torchvision import transforms

from datasets import build_dataset, build_transform
from loading.images import DataError
from loading.preparation import Preparation
from training.full_model import read_full_model
from training.preparing import of_weights
from training.sources import Source

HALF, CLIP = (0.5, 0.5, 0.5), (0.48145466, 0.4578275, 0.40821073)
IMAGENET = (0.485, 0.456, 0.406)
MODELS = {
    "vit_small_patch16_224": (HALF, 0.9, "center", 224),
    "vit_base_patch16_clip_224.openai": (CLIP, 0.9, "center", 224),
    "vit_small_patch14_dinov2": (IMAGENET, 1.0, "center", 518),
    "deit_base_distilled_patch16_224": (IMAGENET, 0.9, "center", 224),
    "swin_tiny_patch4_window7_224": (IMAGENET, 0.9, "center", 224),
}


def picture(width, height):
    return Image.fromarray(np.random.randint(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", MODELS)
def test_validation_images_equal_those_of_timm(name, tmp_path, image_folder):
    mean, crop, mode, size = MODELS[name]
    found = of_weights(read_full_model(Source(name, pretrained=True), swin=True))
    assert (found.mean, found.crop_pct, found.crop_mode, found.size) == (mean, crop, mode, size)
    with torch.device("meta"):
        model = timm.create_model(name)
    own = create_transform(**resolve_model_data_config(model))
    root = image_folder(tmp_path / "data", per_class=1)
    for i, (width, height) in enumerate(((301, 260), (90, 700))):
        picture(width, height).save(root / "val" / "ant" / f"{i}.png")
    dataset, _ = build_dataset(False, data_args(data_set="IMNET", data_path=str(root)), preparation=found)
    assert len(dataset) == 3
    for (path, _), (image, _) in zip(dataset.samples, dataset, strict=True):
        assert torch.equal(image, own(Image.open(path).convert("RGB"))) and image.shape == (3, size, size)


@pytest.mark.parametrize("size", [16, 32, 48, 224, 384])
def test_files_that_do_not_say_mean_what_was_always_done(size):
    steps = [transforms.Resize(size if size <= 32 else size * 256 // 224, transforms.InterpolationMode.BICUBIC)]
    steps += [transforms.CenterCrop(size), transforms.ToTensor()]
    old = transforms.Compose([*steps, transforms.Normalize(IMAGENET, (0.229, 0.224, 0.225))])
    image = picture(270, 403)
    assert torch.equal(Preparation.usual(size).eval_transform()(image), old(image))
    assert torch.equal(build_transform(False, data_args(input_size=size))(image), old(image))


@pytest.mark.parametrize("data_set, size", [("DIGITS", 16), ("CIFAR10", 32), ("IMNET", 48)])
def test_training_images_are_normalised_alike(data_set, size):
    args = data_args(data_set=data_set, aa="", color_jitter=0, reprob=0, hflip=0)
    white = Image.new("RGB", (size, size), "white")
    found = build_transform(True, args, Preparation(size, HALF, (0.25, 0.5, 1.0)))(white)
    assert found.amax((1, 2)).tolist() == [2.0, 1.0, 0.5]


def test_training_images_are_resized_as_the_weights_expect_unless_told_otherwise():
    for flag, expected in ((None, "bilinear"), ("bicubic", "bicubic")):
        args = data_args(data_set="IMNET", train_interpolation=flag)
        assert expected in repr(build_transform(True, args, Preparation(48, interpolation="bilinear")))


def test_a_record_comes_back_through_a_file():
    found = Preparation(224, CLIP, HALF, 1.15, "squash", "lanczos")
    assert Preparation.of_record(json.loads(json.dumps(found.record)), 224) == found
    assert str(found) == (
        "mean 0.48145466 0.4578275 0.40821073, std 0.5 0.5 0.5, crop 1.15 (squash), lanczos, 224 pixels"
    )
    assert found.differences(Preparation(224, CLIP, HALF, 0.9, "squash", "lanczos")) == dict(crop_pct=("1.15", "0.9"))


@pytest.mark.parametrize(
    "change",
    [
        dict(mean=[0.5]),
        dict(std=[0.5, 0.5, 0.0]),
        dict(std=[0.5, 0.5, float("nan")]),
        dict(mean="0.5"),
        dict(mean=None),
        dict(crop_pct=0),
        dict(crop_pct=99.0),
        dict(crop_mode="center; rm"),
        dict(interpolation=["bicubic"]),
        dict(interpolation="cubic"),
    ],
)
def test_a_record_that_is_none_is_refused(change):
    with pytest.raises(DataError, match=r"^data_config .{5,120}$"):
        Preparation.of_record(Preparation.usual(224).record | change, 224)
