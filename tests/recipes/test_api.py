"""Pruning from Python: what is handed over stays as it is, what comes back is as quick as asked, mistakes are said."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from benchmarks.one_shot_cost import table_of_macs
from models import ModelError
from models.from_timm import take
from recipes import api

ROOT = Path(__file__).parents[2]
SIZE = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **SIZE)


@pytest.fixture
def table(model):
    return table_of_macs(take(model).dims)


IMAGES = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_model_is_pruned_and_left_alone(model, table):
    before, lines = {name: value.clone() for name, value in model.state_dict().items()}, []
    small = api.prune(model, IMAGES, latency=0.5, table=table, progress=lines.append)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()) and model.training
    assert table.ratio(small.dims, take(model).dims) <= 0.5 and small(IMAGES).shape == (96, 5)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    assert 0 <= small.divergence < 0.1 and all(p.requires_grad for p in small.parameters())
    assert len(lines) == 3


def test_every_size_follows_from_one_analysis(model, table):
    study = api.analyse(model, IMAGES, table=table)
    sizes = study.curve([0.8, 0.5, 0.3])
    assert [size.latency <= wanted for size, wanted in zip(sizes, (0.8, 0.5, 0.3), strict=True)] == [True] * 3
    assert sizes[0].macs > sizes[1].macs > sizes[2].macs and sizes[0].divergence <= sizes[2].divergence
    assert study.prune(0.3).dims == sizes[2].dims and study.prune(0.8).dims == sizes[0].dims


def test_images_may_be_batches_or_a_folder(model, table, tmp_path):
    whole = api.analyse(model, IMAGES, table=table)
    batches = api.analyse(model, [(part, None) for part in IMAGES.split(40)], table=table)
    assert torch.equal(whole.analysis.images, batches.analysis.images)
    for i in range(70):
        path = tmp_path / ("nested" if i % 2 else ".") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 24), (3 * i, 0, 255)).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    study = api.analyse(model, tmp_path, table=table)
    assert study.analysis.images.shape == (70, 3, 16, 16)


def test_images_of_a_folder_are_prepared_as_the_weights_expect(table, tmp_path):
    """ViT's mean and standard deviation are 0.5: black is -1."""
    for i in range(64):
        Image.new("RGB", (20, 24)).save(tmp_path / f"{i}.png")
    theirs = timm.create_model("vit_small_patch16_224", num_classes=5, **SIZE)
    images = api.analyse(theirs, tmp_path, table=table).analysis.images
    torch.testing.assert_close(images, torch.full_like(images, -1.0))


def test_a_model_without_a_classifier_keeps_its_features(table):
    torch.manual_seed(0)
    backbone = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **SIZE)
    small = api.prune(backbone, IMAGES, latency=0.6, table=table, feature_tokens="all")
    assert small.dims.embed == 32 and small.forward_features(IMAGES).shape == (96, 17, 32)
    assert small.divergence < 0.3  # of the variance of all tokens


def test_recovery_brings_it_nearer(model, table):
    study = api.analyse(model, IMAGES, table=table)
    plain, recovered = study.prune(0.3), study.prune(0.3, recover_minutes=0.03, hflip=0.0)
    assert recovered.dims == plain.dims and 0 < recovered.divergence <= plain.divergence


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "deit_tiny_distilled_patch16_224"])
def test_a_linear_output_restores_the_width(name, table):
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0, **SIZE).eval()
    torch.testing.assert_close(api.with_linear_output(take(backbone))(IMAGES), backbone(IMAGES))
    small = api.prune(backbone, IMAGES, latency=0.2, table=table, keep_output=True)
    assert small(IMAGES).shape == backbone(IMAGES).shape and (small.dims.embed < 32 or "distilled" in name)
    with torch.no_grad():
        lost = (small(IMAGES) - backbone(IMAGES)).square().mean() / backbone(IMAGES).var(0).mean()
    assert lost < 0.5


def test_a_table_is_measured_where_none_is_given(model):
    table = api.measure_table(model, batch_size=2)
    assert table.meta["batch"] == 2 and table.model_seconds(take(model).dims) > 0
    table.check_covers(take(model).dims)


def test_what_is_saved_loads(model, table, tmp_path):
    small = api.prune(model, IMAGES, latency=0.5, table=table)
    again = api.load(api.save(small, tmp_path / "small"))
    assert torch.equal(again(IMAGES), small.eval()(IMAGES))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(latency=2), r"latency must be in \(0, 1\]"),
        (dict(latency=1e-6), "not reached: by the table"),
        (dict(images=IMAGES[:10]), "10 images are too few"),
        (dict(images=IMAGES[:, :, :8]), r"images must be floating-point \(n, 3, 16, 16\), not \(96, 3, 8, 16\)"),
        (dict(images=(255 * IMAGES).byte()), "images must be floating-point"),
        (dict(images=[1, 2]), "a tensor, an iterable of tensors or a folder, not of int"),
        (dict(images=[]), "images is empty"),
        (dict(images="/nowhere"), "there is no folder /nowhere"),
        (dict(objective="accuracy"), "objective is one of predictions, features"),
        (dict(keep_output=True), "keep_output is for a model without a classifier"),
        (dict(model=torch.nn.Linear(3, 3)), "a Linear is not a plain Vision Transformer"),
        (dict(model=timm.create_model("resnet10t")), "a ResNet is not a plain Vision Transformer"),
    ],
)
def test_mistakes_are_value_errors(model, table, change, message):
    arguments = dict(model=model, images=IMAGES, latency=0.5, table=table) | change
    with pytest.raises(ValueError, match=message):
        api.prune(arguments.pop("model"), arguments.pop("images"), **arguments)


class TestTake:
    """A model that exists already becomes one of ours, whatever its arguments were."""

    def test_families(self, family, randomise, images):
        theirs = randomise(timm.create_model(family["arch"], **{k: v for k, v in family.items() if k != "arch"})).eval()
        ours = take(theirs)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)

    def test_wrappers_are_taken_off(self, model):
        assert torch.equal(take(torch.nn.DataParallel(model)).head.weight, model.head.weight)
        assert torch.equal(take(torch.compile(model)).head.weight, model.head.weight)

    def test_a_model_that_was_changed_is_refused(self, model):
        model.blocks[0].mlp.act = torch.nn.ReLU()
        with pytest.raises(ModelError, match="was changed after it was built"):
            take(model)

    def test_ours_are_copied(self, model):
        ours = take(model)
        assert take(ours) is not ours and take(ours).dims == ours.dims


def test_the_hub_gives_the_functions_and_shadows_no_package(tmp_path):
    """`datasets` is a package of others, too."""
    (tmp_path / "datasets.py").write_text("MINE = True\n")
    code = (
        "import sys, torch\n"
        f"prune = torch.hub.load({str(ROOT)!r}, 'prune', source='local')\n"
        f"analyse = torch.hub.load({str(ROOT)!r}, 'analyse', source='local')\n"
        "assert 'datasets' not in sys.modules\n"
        "import datasets\n"
        "assert datasets.MINE and prune.__name__ == 'prune' and analyse.__name__ == 'analyse'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
