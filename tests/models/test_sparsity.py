"""2:4 sparsity of the finished model."""

import json

import pytest
import torch
from jobs import PLAIN, run

import finetune_dense
from models import build_vit, load_dense, sparsity


def test_the_two_largest_of_every_four_stay():
    weight = torch.tensor([[1.0, -4, 3, 2, 0, 0, 5, 0], [-1, -2, -3, -4, 7, 6, 5, 8]])
    expected = [[0, 1, 1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 1, 0, 0, 1]]
    found = sparsity.two_of_four(weight)
    assert found[1].int().tolist() == expected[1] and found[0, :4].int().tolist() == expected[0][:4]
    assert found[0, 6] and found[0, 4:].sum() == 2  # which of equal zeros stays does not matter


def test_every_linear_layer_of_the_blocks_is_sparse(tiny):
    model = build_vit(**tiny)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert sparsity.sparsify_(model) == []
    for name, value in model.state_dict().items():
        if name.startswith("blocks.") and value.dim() == 2:
            assert ((value.reshape(-1, 4) != 0).sum(1) == 2).all(), name
            kept = value != 0
            assert torch.equal(value[kept], before[name][kept])
        else:
            assert torch.equal(value, before[name]), name


def test_widths_that_are_no_multiple_of_four_are_left_out(tiny):
    model = build_vit(**tiny | dict(embed_dim=36, num_heads=2, mlp_ratio=0.5))
    assert sparsity.sparsify_(model) == ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]


@pytest.mark.gpu
def test_semi_structured_tensors_compute_the_same():
    device = torch.device("cuda")
    if not sparsity.has_kernels(device):
        pytest.skip("needs compute capability 8.0")
    model = build_vit("vit_tiny_patch16_224", depth=2).to(device).eval()
    sparsity.sparsify_(model)
    images = torch.randn(4, 3, 224, 224, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = model.to(torch.bfloat16)(images)
        torch.testing.assert_close(sparsity.accelerate(model, torch.bfloat16)(images), expected, rtol=5e-2, atol=5e-2)


def test_the_flag_writes_a_sparse_checkpoint(runs, tmp_path, capsys):
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "ft_checkpoint.pth").write_bytes((runs["dense"] / "ft_checkpoint.pth").read_bytes())
    run(finetune_dense, *PLAIN, "--eval", "--asp", "--finetune", folder)
    assert "no 2:4 kernels on this device" in capsys.readouterr().out
    model = load_dense(folder / "ASP_checkpoint.pth")
    assert model.blocks[0].mlp.fc1.weight.eq(0).float().mean() == 0.5


def test_a_run_with_the_flag_names_it_and_reports_both(runs, tmp_path):
    (tmp_path / "pruned_checkpoint.pth").write_bytes((runs["pruned"] / "pruned_checkpoint.pth").read_bytes())
    flags = [*PLAIN, "--epochs", "1", "--kl_loss_coeff", "0", "--original_loss_coeff", "1", "--asp"]
    run(finetune_dense, *flags, "--finetune", tmp_path)
    (folder,) = tmp_path.glob("ft_dense_1_*_asp_CNN_only")
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == ["finetuned", "sparse"] and summary["sparse"]["dims"] == summary["finetuned"]["dims"]
    assert load_dense(folder / "ASP_checkpoint.pth").dims == load_dense(folder / "ft_checkpoint.pth").dims


def test_the_moving_average_can_be_loaded(runs, capsys):
    path = runs["tuned"] / "ft_checkpoint.pth"
    average, weights = load_dense(path, ema=True), load_dense(path)
    content = torch.load(path, weights_only=True)
    assert torch.equal(average.head.weight, content["model_ema"]["head.weight"])
    assert not torch.equal(average.head.weight, weights.head.weight)
    run(finetune_dense, *PLAIN, "--eval", "--use-ema", "--finetune", path)
    log = [json.loads(line) for line in (runs["tuned"] / "log.txt").read_text().splitlines()]
    assert f"top-1 {log[-1]['test_ema_acc1']:.2f}" in capsys.readouterr().out
