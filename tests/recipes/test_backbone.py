"""One-shot pruning of a backbone by the command: features stay, any folder of images will do, mistakes are said."""

import json

import pytest
import torch
from jobs import PLAIN, run, table_file
from PIL import Image

import main_full_global_latency
from loading.folders import Pictures
from loading.images import DataError
from models import Arch, load_dense
from recipes import api, backbone, tables
from runtime.errors import BadArguments
from training import probes
from training.full_model import FullModel


@pytest.fixture(scope="module")
def flags(learnt, tmp_path_factory):
    table = table_file(tmp_path_factory.mktemp("table") / "table.json")
    weights = ["--initial-checkpoint", learnt, "--latency_look_up_table", table]
    return [*PLAIN, "--one_shot", "--objective", "features", "--calib_images", 256, *weights]


def run_folder(root):
    (folder,) = root.glob("one_shot_*")
    return folder


def test_every_size_of_a_backbone(flags, tmp_path, capsys):
    run(main_full_global_latency, *flags, "--latency_target", 0.8, 0.5, "--linear_probe", "--output_dir", tmp_path)
    folder, printed = run_folder(tmp_path), capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"args.json", "run.json", "sizes.json", "target_0.5", "target_0.8"}
    sizes = json.loads((folder / "sizes.json").read_text())
    assert [row["target"] for row in sizes["sizes"]] == [0.8, 0.5] and sizes["dense"]["knn"] > 40
    for row in sizes["sizes"]:
        assert row["latency_predicted"] <= row["target"] and row["divergence"] < 1 and row["linear"] > 50
        assert f"{row['knn']:.2f}" in printed
        model = load_dense(folder / row["folder"])
        assert (
            model.dims.embed == 32 and model.num_classes == 0 and list(model.data_config["input_size"]) == [3, 16, 16]
        )
        assert model(torch.randn(2, 3, 16, 16)).shape == (2, 32)
        assert json.loads((folder / row["folder"] / "summary.json").read_text())["pruned"]["macs"] == row["macs"]
    assert sizes["sizes"][0]["divergence"] <= sizes["sizes"][1]["divergence"]
    assert sizes["sizes"][0]["knn"] >= sizes["dense"]["knn"] - 10


@pytest.mark.parametrize("more, measured", [([], True), (["--latency_predicted"], False)])
def test_a_target_is_a_measured_one_where_the_table_is_of_this_device(flags, tmp_path, monkeypatch, more, measured):
    seen, prune = [], api.Study.prune
    monkeypatch.setattr(tables, "can_be_measured", lambda table, device: True)
    monkeypatch.setattr(api.Study, "prune", lambda self, target, *how: seen.append(how[0]) or prune(self, target))
    run(main_full_global_latency, *flags, "--latency_target", 0.8, "--output_dir", tmp_path, *more)
    assert seen == [measured]


def pictures(root, number):
    generator = torch.Generator().manual_seed(0)
    for i in range(number):
        path = root / ("deep/er" if i % 2 else ".") / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(0, 256, (20, 18, 3), generator=generator, dtype=torch.uint8).numpy()).save(path)
    return root


def test_any_folder_of_images_and_an_output_of_the_old_width(flags, tmp_path):
    flags = [*flags, "--data-set", "IMNET", "--data-path", pictures(tmp_path / "images", 70), "--calib_images", 64]
    run(main_full_global_latency, *flags, "--latency_target", 0.2, "--keep_output", "--output_dir", tmp_path / "out")
    folder = run_folder(tmp_path / "out")
    assert folder.name.endswith("_features_keep_output")
    stages = json.loads((folder / "summary.json").read_text())
    assert set(stages) == {"dense", "pruned"} and "knn" not in stages["pruned"]
    model = load_dense(folder)
    assert model.dims.embed < 32 and model(torch.randn(2, 3, 16, 16)).shape == (2, 32)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--linear_probe"], "--linear_probe needs classes: --data-path with train/ and val/"),
        (["--latency_target", "0.5", "--data-path", "nowhere"], "there is no folder nowhere"),
        (["--calib_images", "80"], "--calib_images 80 is more than the 70 training images"),
        (["--tokens", "place"], "--tokens goes with --objective predictions"),
        (["--objective", "predictions", "--keep_output"], "--keep_output goes with --objective features"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(flags, tmp_path, more, message):
    words = ["--data-set", "IMNET", "--data-path", pictures(tmp_path / "images", 70), "--calib_images", 64]
    words += ["--latency_target", 0.5, "--output_dir", tmp_path / "out", *more]
    with pytest.raises(BadArguments, match=message):
        run(main_full_global_latency, *flags, *words)
    assert not (tmp_path / "out").exists()


def test_a_drop_is_measured_by_nearest_neighbours(flags, tmp_path):
    words = ["--max_drop", 20, "--output_dir", tmp_path]
    run(main_full_global_latency, *flags, *words)
    stages = json.loads((run_folder(tmp_path) / "summary.json").read_text())
    assert stages["dense"]["knn"] - stages["pruned"]["knn"] <= 20 and stages["pruned"]["latency_predicted"] < 0.95


def test_without_a_flag_weights_decide(flags):
    class Args:
        one_shot, objective = True, None

    def of(name, **more):
        return backbone.is_for(Args, FullModel(Arch.of(name), **more))

    assert of("vit_small_patch14_dinov2", pretrained=True) and not of("deit_tiny_patch16_224", pretrained=True)
    assert not of("vit_small_patch14_dinov2", state={"head.weight": torch.zeros(3, 384)})
    Args.objective = "predictions"
    assert not of("vit_small_patch14_dinov2", pretrained=True)
    Args.objective, Args.one_shot = "features", False
    assert not of("vit_small_patch14_dinov2", pretrained=True)


def test_nearest_neighbours_vote_by_similarity():
    """Two images of class 1 point almost where the query does; many of class 0 are orthogonal to it."""
    bank = torch.tensor([[1.0, 0.0]] * 30 + [[0.0, 1.0], [0.1, 1.0]]), torch.tensor([0] * 30 + [1, 1])
    queries = torch.tensor([[0.0, 3.0], [2.0, 0.1], [0.05, 0.5]]), torch.tensor([1, 0, 0])
    assert probes.neighbours(bank, queries) == pytest.approx(200 / 3)
    assert probes.linear(bank, queries) == pytest.approx(200 / 3)


def test_features_of_readable_images_alone(randomise):
    class Some(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, i):
            return None if i == 3 else (torch.full((3, 2), float(i)), i)

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4))
    features, labels = probes.embed(model, Some(), batch=2)
    assert labels.tolist() == [0, 1, 2, 4] and features.shape == (4, 4)
    assert torch.allclose(features[3], model(torch.full((1, 6), 4.0))[0])


def test_pictures_are_all_that_is_shown(tmp_path):
    root = pictures(tmp_path / "images", 6)
    for name in (".hidden.png", "@eaDir/a.png", "notes.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    found = Pictures(root)
    assert [p.removeprefix(f"{root}/") for p, _ in found.samples] == [
        "000.png",
        "002.png",
        "004.png",
        "deep/er/001.png",
        "deep/er/003.png",
        "deep/er/005.png",
    ]
    assert found[0][0].size == (18, 20) and found[0][1] == -1
    with pytest.raises(DataError, match="there is no folder"):
        Pictures(root.parent / "none")
