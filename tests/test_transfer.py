"""A pruned model finetuned on other data: a new classifier, the same widths, nothing that would not compare."""

import json

import pytest
import torch
from jobs import run

import finetune_dense
from models import ViTDims, load_dense
from runtime.errors import BadArguments

CLASSES = ("ant", "bee", "cow")
FLAGS = [
    "--num_workers",
    "0",
    "--device",
    "cpu",
    "--mixup",
    "0",
    "--cutmix",
    "0",
    "--aa",
    "",
    "--batch-size",
    "4",
    "--epochs",
    "1",
    "--lr",
    "1e-2",
]
TASK = ["--kl_loss_coeff", "0", "--original_loss_coeff", "1"]


@pytest.fixture
def folder(image_folder, tmp_path):
    return image_folder(tmp_path / "animals", CLASSES, side=16)


@pytest.mark.parametrize("source", ["pruned", "tuned"])
def test_a_pruned_model_gets_a_new_classifier(runs, source, folder, tmp_path, capsys):
    run(finetune_dense, *FLAGS, *TASK, "--finetune", runs[source], "--data-path", folder, "--output_dir", tmp_path)
    assert "knows 10 classes, the data has 3" in capsys.readouterr().out
    (out,) = tmp_path.glob("ft_dense_*")
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == ["finetuned"] and 0 < summary["finetuned"]["latency_measured"]
    model, before = load_dense(out / "ft_checkpoint.pth"), load_dense(runs["pruned"] / "pruned_checkpoint.pth")
    assert model.dims == before.dims == ViTDims.from_dict(summary["finetuned"]["dims"])
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    assert not list(runs[source].glob("ft_dense_1_*")), "the run on the old data is left alone"
    run(finetune_dense, *FLAGS, "--eval", "--finetune", out, "--data-path", folder)
    assert f"top-1 {summary['finetuned']['top1']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--eval"], "has 10 classes, the data has 3$"),
        (["--kl_loss_coeff", "1000", "--original_loss_coeff", "1"], "for a new classifier use --kl_loss_coeff 0"),
    ],
)
def test_where_a_new_classifier_makes_no_sense(runs, folder, flags, message):
    with pytest.raises(BadArguments, match=message):
        run(finetune_dense, *FLAGS, *flags, "--finetune", runs["pruned"], "--data-path", folder)
