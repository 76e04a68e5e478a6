"""ReViT's widths: the published tables, and training them from scratch."""

import json

import pytest

import revit_scratch
from models import ViTDims, load_dense, macs, params
from models.redistribution import redistribute
from runtime.errors import BadArguments

DEIT_B = "deit_base_distilled_patch16_224"


@pytest.mark.parametrize(
    ("embed", "rule", "heads", "qk", "mlp", "mega_params", "giga_macs"),
    [
        (176, "published", [10, 2, 2] + [4] * 6 + [2, 2, 10], [16, 8, 8] + [16] * 6 + [8, 8, 16], 528, 5.34, 1.135),
        (192, "published", [10, 2, 2] + [4] * 6 + [2, 2, 10], [16, 8, 8] + [16] * 6 + [8, 8, 16], 576, 6.16, 1.290),
        (
            384,
            "published",
            [10, 4, 4] + [8] * 6 + [4, 4, 10],
            [32, 16, 16] + [32] * 6 + [16, 16, 32],
            1152,
            23.12,
            4.705,
        ),
        (176, "paper", [2] * 3 + [4] * 6 + [2] * 3, [8] * 3 + [16] * 6 + [8] * 3, 528, 4.88, 0.992),
        (384, "paper", [4] * 3 + [8] * 6 + [4] * 3, [16] * 3 + [40] * 6 + [16] * 3, 1152, 22.43, 4.534),
    ],
)
def test_both_rules_give_their_published_widths_and_counts(embed, rule, heads, qk, mlp, mega_params, giga_macs):
    dims = redistribute(embed, 198, rule)
    assert [b.heads for b in dims.blocks] == heads and [b.qk for b in dims.blocks] == qk
    assert [b.mlp for b in dims.blocks] == [mlp] * 3 + [2 * mlp] * 6 + [mlp] * 3
    assert {b.v for b in dims.blocks} == {64} and {b.tokens for b in dims.blocks} == {198}
    assert params(DEIT_B, dims) / 1e6 == pytest.approx(mega_params, abs=0.006)
    assert macs(DEIT_B, dims) / 1e9 == pytest.approx(giga_macs, abs=0.0006)


def test_what_no_rule_can_give_is_refused():
    with pytest.raises(ValueError, match="none of published, paper"):
        redistribute(176, 198, "mine")
    with pytest.raises(ValueError, match="too narrow"):
        redistribute(32, 198)


FLAGS = [
    "--data-set",
    "DIGITS",
    "--device",
    "cpu",
    "--num_workers",
    "0",
    "--epochs",
    "1",
    "--mixup",
    "0",
    "--cutmix",
    "0",
    "--model",
    "deit_tiny_distilled_patch16_224",
    "--kl_loss_coeff",
    "0",
    "--original_loss_coeff",
    "1",
    "--model-kwargs",
    "img_size=16",
    "patch_size=8",
    "embed_dim=32",
    "depth=2",
    "num_heads=4",
]


def run(*flags):
    revit_scratch.main(revit_scratch.get_args_parser().parse_args([*FLAGS, *map(str, flags)]))


def test_any_widths_train_from_scratch(tmp_path):
    widths = dict(embed=40, blocks=[dict(heads=h, qk=4, v=12, mlp=m, tokens=6) for h, m in ((2, 48), (0, 200), (5, 0))])
    (tmp_path / "dims.json").write_text(json.dumps(widths))
    run("--scratch", "--dims", tmp_path / "dims.json", "--output_dir", tmp_path)
    (folder,) = tmp_path.glob("scratch_revit_EMB_40_1_lr_0.0005_a_0.5_T_1.0_CNN_only")
    assert load_dense(folder / "ft_checkpoint.pth").dims == ViTDims.from_dict(widths)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finetuned"]["dims"] == widths and json.loads((folder / "dims.json").read_text()) == widths


def test_all_problems_at_once(tmp_path):
    with pytest.raises(BadArguments) as error:
        run("--output_dir", "", "--original_loss_coeff", "0")
    assert len(error.value.problems) == 3
    bad = dict(embed=4, blocks=[dict(heads=-1, qk=1, v=1, mlp=1, tokens=6)])
    (tmp_path / "dims.json").write_text(json.dumps(bad))
    for flags, message in (
        (["--dims", tmp_path / "dims.json"], "block 0: heads must be at least 0"),
        (["--dims", tmp_path / "none.json"], "none.json"),
        (["--EMB", "8"], "too narrow"),
    ):
        with pytest.raises(BadArguments, match=message):
            run("--scratch", "--output_dir", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
