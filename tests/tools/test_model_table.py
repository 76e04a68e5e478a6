"""docs/models.md says what is true of timm's ViTs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

from tools import model_table

PAGE = (Path(__file__).parent.parent.parent / "docs" / "models.md").read_text()


def test_the_page_is_of_this_code():
    """Whoever takes another family runs python -m tools.model_table."""
    if f"timm {timm.__version__} " not in PAGE:
        pytest.skip("the page is of another timm")
    assert model_table.page() == PAGE


def test_every_name_has_one_row_and_every_refusal_a_reason():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) == len({row[0] for row in rows}) == int(re.search(r"of (\d+) names", PAGE)[1])
    assert all(row[1] in ("yes", "no") and (row[1] == "yes") == bool(row[2]) for row in rows)
    assert all(row[-1] for row in rows if row[1] == "no")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vit_tiny_patch16_224", []),
        ("vit_giant_patch14_dinov2", []),
        ("vit_base_patch16_siglip_224", []),
        ("beit3_base_patch16_224", []),
        ("aimv2_large_patch14_224", []),
        ("naflexvit_base_patch16_gap", ["stem is NaFlexEmbeds"]),
        ("vit_small_patch16_dinov3", ["blocks are EvaBlock", "attention is EvaAttention", "rotary position embedding"]),
    ],
)
def test_what_is_in_the_way_is_read_off_the_model(name, expected):
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    assert model_table.obstacles(model) == expected
