"""Which preparation a run takes: the checkpoint's, else timm's of the model and its tag; flags override it."""

import json

import pytest
import torch
from jobs import MODEL, PLAIN, TRAIN, only, run

import finetune_dense
import main_full_global_latency
import main_savit
import revit_scratch
from files import checkpoint
from loading.images import DataError
from loading.preparation import Preparation
from models import Arch
from runtime.errors import BadArguments
from runtime.script import run_script
from training.full_model import FullModel
from training.preparing import settle

ARCH = Arch.of("vit_small_patch16_224", embed_dim=12, depth=1, num_heads=3)
HALF, OTHER = (0.5, 0.5, 0.5), (0.1, 0.2, 0.3)
TIMM = Preparation(224, HALF, HALF, 0.9)
FLAGS = ["--mean", "0.5", "all", "--std", "0.2", "0.4", "0.5", "--interpolation", "lanczos", "--crop_pct", "0.8"]
ONCE = [*TRAIN, "--epochs", "1", "--train-interpolation", "bicubic"]


def flags(*words):
    return finetune_dense.get_args_parser().parse_args(words)


@pytest.fixture
def files(tmp_path):
    """Bare weights, and checkpoints of this project with and without a preparation."""
    weights = ARCH.build().state_dict()
    torch.save(weights, tmp_path / "bare.pth")
    common = dict(arch=ARCH.record, dims=ARCH.dims.to_dict(), model=weights)
    checkpoint.save(tmp_path / "ours.pth", **common, data_config=Preparation(224, OTHER, OTHER).record)
    checkpoint.save(tmp_path / "old.pth", **common)
    content = torch.load(tmp_path / "old.pth", weights_only=True)
    del content["data_config"], content["format"]["sha256"]
    torch.save(content, tmp_path / "old.pth")
    return lambda name: FullModel(ARCH, str(tmp_path / f"{name}.pth"))


def test_weights_say_it_themselves_or_timm_does_and_it_is_said(files, capsys):
    assert settle(flags(), FullModel(ARCH, pretrained=True)) == TIMM
    assert settle(flags(), files("ours")) == Preparation(224, OTHER, OTHER)
    assert capsys.readouterr().out == ""
    assert settle(flags(), files("bare")) == TIMM
    assert capsys.readouterr().out == (
        f"{files('bare').path} does not say how its images were prepared; assumed, as for timm's "
        "vit_small_patch16_224.augreg_in21k_ft_in1k: mean 0.5 0.5 0.5, std 0.5 0.5 0.5, crop 0.9, bicubic, 224 pixels "
        "(--mean, --std, --crop_pct and --interpolation override it)\n"
    )
    assert settle(flags(), files("old")) == Preparation.usual(224)
    assert "is from before the preparation of images was kept; as then: mean 0.485" in capsys.readouterr().out


def test_the_tag_of_the_model_decides():
    dino = FullModel(Arch.of("vit_small_patch16_224.dino"), pretrained=True)
    assert settle(flags(), dino).mean == (0.485, 0.456, 0.406)


def test_flags_override_it_and_a_contradiction_is_said(files, capsys):
    assert settle(flags(*FLAGS), files("ours")) == Preparation(224, HALF, (0.2, 0.4, 0.5), 0.8, "center", "lanczos")
    said = capsys.readouterr().err
    assert said.startswith(f"warning: images are prepared otherwise than for {files('ours').path}: --mean is 0.5 0.5")
    assert "--crop_pct is 0.8, not 0.875" in said and len(said.splitlines()) == 1
    assert settle(flags("--mean", "0.1", "0.2", "0.3"), files("ours")).mean == OTHER
    assert capsys.readouterr().err == ""


def test_small_images_are_prepared_as_ever_unless_timm_has_their_weights(files):
    small = ARCH.with_kwargs(img_size=32)
    assert settle(flags(), FullModel(small)) == Preparation.usual(32)
    assert settle(flags(), FullModel(small, files("bare").path)) == Preparation.usual(32)
    assert settle(flags(), FullModel(small, pretrained=True)) == Preparation(32, HALF, HALF, 1.0)


def test_a_file_with_an_odd_preparation_is_named(files, tmp_path):
    content = torch.load(files("ours").path, weights_only=True)
    torch.save(content | dict(data_config=dict(mean=3)), tmp_path / "odd.pth")
    with pytest.raises(DataError, match=r"odd.pth: data_config is incomplete"):
        settle(flags(), files("odd"))


@pytest.mark.parametrize(
    "words, problem",
    [
        ("--mean 0.5", "--mean takes three numbers, or one for every channel as in --mean 0.5 all, not 0.5"),
        ("--mean 0.5 0.5", "--mean takes three numbers, or one for every channel as in --mean 0.5 all, not 0.5 0.5"),
        ("--std a b c", "--std takes three numbers, or one for every channel as in --std 0.5 all, not a b c"),
        ("--std 0 all", "--std must be from 0.001 to 1, not 0.0 0.0 0.0"),
        ("--std 1e-40 all", "--std must be from 0.001 to 1, not 1e-40 1e-40 1e-40"),
        ("--mean 123.7 116.3 103.5", "--mean must be in [0, 1], not 123.7 116.3 103.5"),
        ("--mean nan all", "--mean must be in [0, 1], not nan nan nan"),
        ("--crop_pct 0", "--crop_pct must be in (0, 1], not 0.0"),
        ("--crop_pct 87.5", "--crop_pct must be in (0, 1], not 87.5"),
        ("--interpolation cubic", "argument --interpolation: invalid choice: 'cubic'"),
        ("--model-kwargs img_size=(32,16)", "takes images that are not square, which the data transforms do not make"),
    ],
)
@pytest.mark.parametrize("script", [main_savit, finetune_dense, main_full_global_latency])
def test_mistakes_are_one_line_each(script, words, problem, tmp_path, capsys):
    common = ["--data-set", "DIGITS", "--device", "cpu", "--output_dir", str(tmp_path / "out"), "--pretrained"]
    with pytest.raises(SystemExit) as end:
        run_script(script.main, script.get_args_parser().parse_args([*common, *words.split()]))
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line and problem in line]
    assert end.value.code == 2 and len(said) == 1 and not (tmp_path / "out").exists()


def test_it_is_kept_and_followed_and_resuming_with_another_is_refused(tmp_path, capsys):
    prepared = Preparation(16, HALF, (0.2, 0.4, 0.5), 0.8, "center", "lanczos")
    run(finetune_dense, *ONCE, *FLAGS, "--output_dir", tmp_path)
    folder = only(tmp_path, "scratch_*")
    content = checkpoint.load(folder / "ft_checkpoint.pth")
    assert Preparation.of_record(content["data_config"], 16) == prepared
    assert (
        Preparation.of_record(json.loads((folder / "run.json").read_text())["starts"][0]["data_config"], 16) == prepared
    )
    again = [*ONCE, "--output_dir", tmp_path, "--resume"]
    with pytest.raises(BadArguments, match=r"--crop_pct was 0\.8, now 0\.7"):
        run(finetune_dense, *again, "--crop_pct", "0.7")
    with pytest.raises(BadArguments, match="--train-interpolation was bicubic, now lanczos"):
        run(finetune_dense, *[word for word in again if word not in ("--train-interpolation", "bicubic")])
    run(finetune_dense, *again)  # without the flags
    run(finetune_dense, *again, *FLAGS)
    capsys.readouterr()
    run(finetune_dense, *PLAIN, "--eval", "--finetune", folder)
    usual = capsys.readouterr().out
    run(finetune_dense, *PLAIN, "--eval", "--finetune", folder, "--mean", "0.9", "all")
    assert usual.startswith(str(folder)) and capsys.readouterr().out != usual


def test_a_pruned_model_is_finetuned_as_it_was_pruned(tmp_path):
    torch.manual_seed(0)
    words = [*MODEL[2:], *PLAIN]
    kwargs = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10)
    arch = Arch.of("deit_tiny_distilled_patch16_224", **kwargs)
    torch.save(dict(arch=arch.name, kwargs=kwargs, model=arch.build().state_dict()), tmp_path / "dense.pth")
    drop = words.index("--drop-path")
    savit = [*words[:drop], *words[drop + 2 :], "--pruning_feed_percent", "0.1", "--pruning_silent"]
    run(main_savit, *savit, *FLAGS, "--finetune", tmp_path / "dense.pth", "--output_dir", tmp_path / "pruned")
    first = checkpoint.load(tmp_path / "pruned" / "pruned_checkpoint.pth")["data_config"]
    assert first["mean"] == HALF and first["crop_pct"] == 0.8
    tune = [*PLAIN, "--epochs", "1", "--kl_loss_coeff", "0", "--original_loss_coeff", "1"]
    run(finetune_dense, *tune, "--finetune", tmp_path / "pruned")
    tuned = only(tmp_path / "pruned", "ft_dense_*") / "ft_checkpoint.pth"
    assert checkpoint.load(tuned)["data_config"] == first


@pytest.mark.slow
def test_training_from_scratch_keeps_it_too(tmp_path):
    dims = ["--dims", str(tmp_path / "dims.json")]
    arch = Arch.of("deit_tiny_distilled_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4)
    (tmp_path / "dims.json").write_text(json.dumps(arch.dims.to_dict()))
    words = [w for w in TRAIN if w not in MODEL] + MODEL[:4]
    run(
        revit_scratch,
        *words,
        "--model-kwargs",
        "img_size=16",
        "patch_size=4",
        *dims,
        "--epochs",
        "1",
        "--output_dir",
        tmp_path,
    )
    content = checkpoint.load(only(tmp_path, "scratch_revit_*") / "ft_checkpoint.pth")
    assert content["data_config"] == Preparation.usual(16).record
