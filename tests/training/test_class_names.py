"""Checkpoints hold the names of the classes; data of other classes, or of another order, does not go with them."""

import numpy as np
import pytest
from jobs import only, run, table_file
from PIL import Image

import finetune_dense
import main_full_global_latency
from files import checkpoint
from runtime.errors import BadArguments
from training.class_names import are_others, check_class_names

MODEL = "--model deit_tiny_patch16_224 --model-kwargs img_size=16 patch_size=4 embed_dim=16 depth=1 num_heads=2".split()
FLAGS = "--num_workers 0 --device cpu --mixup 0 --cutmix 0 --batch-size 4 --epochs 1 --original_loss_coeff 1".split()
ALONE = ["--kl_loss_coeff", "0", *FLAGS, "--aa", ""]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of images, checkpoint) of a model that was trained on ant, bee and cow."""
    root = tmp_path_factory.mktemp("names")
    for split in ("train", "val"):
        for name in ("ant", "bee", "cow"):
            (root / "data" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "data" / split / name / f"{i}.png")
    run(finetune_dense, *MODEL, *ALONE, "--scratch", "--data-path", root / "data", "--output_dir", root / "out")
    return root / "data", only(root / "out", "scratch_*") / "ft_checkpoint.pth"


@pytest.fixture
def renamed(trained, tmp_path):
    """The same images under other names of their classes."""

    def rename(**names):
        for split in ("train", "val"):
            (tmp_path / "data" / split).mkdir(parents=True)
            for folder in (trained[0] / split).iterdir():
                (tmp_path / "data" / split / names.get(folder.name, folder.name)).symlink_to(folder)
        return tmp_path / "data"

    return rename


def reorder(path, to, names):
    content = checkpoint.load(path)
    content["args"]["class_names"] = list(names)
    checkpoint.save(to, **{key: value for key, value in content.items() if key != "format"})
    return to


def test_the_first_difference_is_named():
    known = ["class_1", "class_10", "class_2"]
    check_class_names(known, tuple(known), "x.pth")
    check_class_names([], known, "x.pth")
    check_class_names(known, ["a", "b"], "x.pth")
    with pytest.raises(
        ValueError, match="same classes in another order .*: class 1 was 'class_10', now it is 'class_2'"
    ):
        check_class_names(known, ["class_1", "class_2", "class_10"], "x.pth")
    with pytest.raises(ValueError, match="x.pth was trained on other classes .*: class 2 was 'class_2', now it is 'd'"):
        check_class_names(known, ["class_1", "class_10", "d"], "x.pth")
    assert are_others(known, ["class_1", "class_10", "d"]) and not are_others(known, known[::-1])


def test_checkpoints_hold_them(trained):
    assert checkpoint.load(trained[1])["args"]["class_names"] == ["ant", "bee", "cow"]


def test_weights_of_another_order_are_refused(trained, tmp_path):
    data, path = trained
    other = reorder(path, tmp_path / "x.pth", ["bee", "ant", "cow"])
    words = (
        "x.pth was trained on the same classes in another order than the data has: class 0 was 'bee', now it is 'ant'"
    )
    for flags in (["--initial-checkpoint", other], ["--finetune", other], ["--finetune", other, "--eval"]):
        with pytest.raises(BadArguments, match=words):
            run(finetune_dense, *ALONE, *flags, "--data-path", data, "--output_dir", tmp_path)
    teaching = ["--kl_loss_coeff", "100", "--finetune", path, "--initial-checkpoint", other]
    with pytest.raises(BadArguments, match=words):
        run(finetune_dense, *FLAGS, *teaching, "--data-path", data, "--output_dir", tmp_path)


def test_other_classes_get_a_new_classifier_where_nothing_else_teaches_it(trained, renamed, tmp_path, capsys):
    data = renamed(bee="wasp")
    for flag in ("--initial-checkpoint", "--finetune"):
        run(finetune_dense, *ALONE, flag, trained[1], "--data-path", data, "--output_dir", tmp_path / flag)
        assert "new classifier: " in capsys.readouterr().out
    with pytest.raises(BadArguments, match="trained on other classes .*: class 1 was 'bee', now it is 'cow'"):
        run(finetune_dense, *ALONE, "--eval", "--finetune", trained[1], "--data-path", data)
    pruning = [*FLAGS, "--pruning", "--initial-checkpoint", trained[1], "--data-path", data, "--output_dir", tmp_path]
    with pytest.raises(BadArguments, match="trained on other classes"):
        run(main_full_global_latency, *pruning, "--latency_look_up_table", table_file(tmp_path / "table.json"))


def test_a_run_does_not_resume_on_other_classes(trained, renamed, tmp_path):
    resuming = ["--resume", trained[1], "--data-path", renamed(cow="yak"), "--output_dir", tmp_path]
    words = "--resume: .* was trained on other classes .*: class 2 was 'cow', now it is 'yak'"
    with pytest.raises(BadArguments, match=words):
        run(finetune_dense, *MODEL, *ALONE, "--scratch", *resuming)
