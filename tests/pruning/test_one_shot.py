"""Aiming at a measured ratio, with a device that is slower or quicker than its table."""

import pytest
import torch

from benchmarks.one_shot_cost import table_of_macs
from models import build_vit
from pruning.align import align_
from pruning.config import PruningConfig
from pruning.one_shot import NotReached, analyse
from pruning.targets import CLOSE, next_aim


@pytest.fixture(scope="module")
def analysis():
    torch.manual_seed(0)
    model = build_vit(
        "deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5
    )
    model = model.eval().requires_grad_(False)
    images = torch.randn(64, 3, 16, 16)
    align_(model, images.split(32))
    return analyse(model, images, PruningConfig().group_sizes(model.dims), 32)


AIMS = 4
DEVICES = dict(exact=lambda r: r, offset=lambda r: 0.2 + 0.8 * r, slow=lambda r: 1.3 * r, curved=lambda r: r**1.5)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_measured_target_is_met_from_below(analysis, device):
    table, lines = table_of_macs(analysis.dense.dims), []
    measure = lambda dims: device(table.ratio(dims, analysis.dense.dims))  # noqa: E731
    choice = analysis.choose_measured(table, 0.5, measure, lines.append)
    assert 0.5 - 2 * CLOSE <= measure(choice.dims) <= 0.5 and len(lines) <= AIMS + 1


def test_a_measured_target_that_is_missed_is_an_error(analysis):
    table = table_of_macs(analysis.dense.dims)
    with pytest.raises(NotReached, match="0.8000 is the lowest ratio"):
        analysis.choose_measured(table, 0.5, lambda dims: 0.8)


def test_the_next_aim_corrects_an_offset_and_a_factor():
    """The dense model, of which both ratios are 1, is the second point of the first line."""
    assert next_aim([(0.5, 0.6)], 0.5) == pytest.approx(0.375)
    assert next_aim([(0.5, 0.6), (0.375, 0.4)], 0.5) == pytest.approx(0.4375)
    assert next_aim([(0.5, 0.6), (0.3, 0.55)], 0.5) == pytest.approx(0.15)  # not 0.1
    assert next_aim([(0.5, 0.4)], 0.7) == pytest.approx(0.75)
    assert next_aim([(0.5, 0.6), (0.3, 0.65)], 0.5) == pytest.approx(0.3 * 0.5 / 0.65)  # noise
    assert next_aim([(1.0, 0.2)], 0.5) == 1.0


def test_any_size_follows_from_one_analysis(analysis):
    table = table_of_macs(analysis.dense.dims)
    before = {name: value.clone() for name, value in analysis.dense.state_dict().items()}
    sizes = [analysis.cut(analysis.choose(table, target).dims) for target in (0.8, 0.4)]
    ratios = [table.ratio(pruned.model.dims, analysis.dense.dims) for pruned in sizes]
    assert ratios[1] <= 0.4 < ratios[0] <= 0.8 and sizes[0].divergence < sizes[1].divergence
    assert all(torch.equal(before[name], value) for name, value in analysis.dense.state_dict().items())
    with pytest.raises(NotReached, match="by the table"):
        analysis.choose(table, 1e-6)
