"""A teacher is fed by its own preparation, from the student's batch."""

import numpy as np
import pytest
import timm
import torch
from jobs import PLAIN, TRAIN, only, run
from PIL import Image

import finetune_dense
from files import checkpoint
from loading.preparation import Preparation
from models import Arch
from training.full_model import FullModel, freeze
from training.parts import Data
from training.sources import Checkpoint, Teacher
from training.teachers import Renormalized, adapt, load_cnn, load_full, of_full_teacher

CPU = torch.device("cpu")
HALF, IMAGENET = (0.5, 0.5, 0.5), Preparation.usual(48)
OWN = Preparation(48, (0.3, 0.4, 0.5), (0.5, 0.25, 0.2), 0.9)
ARCH = Arch.of("vit_small_patch16_224", img_size=48, embed_dim=12, depth=1, num_heads=3, num_classes=2)


def data(preparation):
    return Data(None, None, 2, preparation=preparation)


def test_its_batch_equals_its_own_transform_of_the_image():
    image = Image.fromarray(np.random.randint(0, 256, (48, 48, 3), dtype=np.uint8))
    given, own = (Preparation(48, p.mean, p.std, 1.0) for p in (IMAGENET, OWN))
    teacher = Renormalized(torch.nn.Identity(), given, own)
    found = teacher(given.eval_transform()(image)[None])[0]
    torch.testing.assert_close(found, own.eval_transform()(image), rtol=0, atol=2e-6)


def test_a_teacher_of_the_same_mean_and_std_is_left_as_it_is(capsys):
    teacher = torch.nn.Linear(3, 2)
    assert adapt(teacher, "teacher x", IMAGENET, IMAGENET) is teacher
    assert capsys.readouterr().out == ""
    cropped = Preparation(48, crop_pct=0.95, interpolation="bilinear")
    assert adapt(teacher, "teacher x", cropped, IMAGENET) is teacher
    assert capsys.readouterr().out == (
        "teacher x expects crop_pct 0.95, interpolation bilinear: in training it sees the student's random crops\n"
    )


def test_a_teacher_of_another_size_is_refused():
    with pytest.raises(ValueError, match="teacher x takes images of 48 pixels, the student 224: both see the same"):
        adapt(torch.nn.Linear(3, 2), "teacher x", OWN, Preparation.usual(224))


def test_a_cnn_and_a_vit_of_timm_are_fed_as_timm_says(tmp_path, capsys):
    for name, kwargs in (("resnet10t", {}), ("vit_small_patch16_224", {})):
        model = timm.create_model(name, num_classes=2, **kwargs).eval()
        torch.save(model.state_dict(), path := str(tmp_path / f"{name}.pth"))
        given, images = Preparation.usual(224), torch.randn(2, 3, 224, 224)
        teacher = load_cnn(Teacher(name, path), data(given), CPU)
        assert isinstance(teacher, Renormalized) == (name == "vit_small_patch16_224")
        own = Preparation.of_timm(model.pretrained_cfg, 224)
        expected = model(Renormalized(torch.nn.Identity(), given, own)(images))
        torch.testing.assert_close(teacher(images), expected, rtol=0, atol=0)
    said = capsys.readouterr().out
    assert "teacher vit_small_patch16_224 is fed by its own mean 0.5 0.5 0.5 and std 0.5 0.5 0.5" in said
    with pytest.raises(ValueError, match="teacher vit_small_patch16_224 takes images of 224 pixels, the student 48"):
        load_cnn(Teacher("vit_small_patch16_224", path), data(IMAGENET), CPU)
    assert load_cnn(None, data(IMAGENET), CPU) is None


def test_the_full_model_is_fed_as_its_file_says_or_as_what_was_made_from_it(tmp_path):
    weights, path = ARCH.build().state_dict(), str(tmp_path / "dense.pth")
    torch.save(weights, path)
    full = FullModel(ARCH, path, weights)
    timms = Preparation(48, HALF, HALF, 0.9)
    assert of_full_teacher(full, path, OWN) == OWN and of_full_teacher(full, "/other.pth", OWN) == timms
    common = dict(arch=ARCH.record, dims=ARCH.dims.to_dict(), model=weights)
    checkpoint.save(path, **common, data_config=IMAGENET.record)
    assert of_full_teacher(full, path, OWN) == IMAGENET
    checkpoint.save(tmp_path / "small.pth", **common, data_config=OWN.record, args=dict(initial_checkpoint=path))
    teacher = load_full(full, data(OWN), CPU, Checkpoint.load(tmp_path / "small.pth"))
    images = torch.randn(2, 3, 48, 48)
    expected = freeze(full.build(), CPU)(Renormalized(torch.nn.Identity(), OWN, IMAGENET)(images))
    assert all(torch.equal(a, b) for a, b in zip(teacher(images), expected, strict=True))
    assert not isinstance(load_full(full, data(OWN), CPU), Renormalized)


def test_finetuning_with_another_mean_says_how_the_full_model_is_fed(tmp_path, capsys):
    once = [*TRAIN, "--epochs", "1", "--no-model-ema"]
    run(finetune_dense, *once, "--output_dir", tmp_path)
    dense = only(tmp_path, "scratch_*") / "ft_checkpoint.pth"
    capsys.readouterr()
    words = [*PLAIN, "--epochs", "1", "--kl_loss_coeff", "1000", "--no-model-ema", "--output_dir", tmp_path / "tuned"]
    run(finetune_dense, *words, "--finetune", dense, "--initial-checkpoint", dense, "--mean", "0.5", "all")
    said = capsys.readouterr()
    assert f"teacher {dense} is fed by its own mean 0.485 0.456 0.406 and std 0.229 0.224 0.225" in said.out
    assert f"warning: images are prepared otherwise than for {dense}: --mean is 0.5 0.5 0.5, not 0.485" in said.err
