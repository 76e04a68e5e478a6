"""Bookkeeping of masks, and what a masked model must never do: let a removed unit come back."""

import pytest
import torch

from models import BlockDims, Masks, ViTDims, build_vit
from models.axes import axes_of, branch_of

DIMS = ViTDims(6, (BlockDims(2, 3, 2, 4, 5), BlockDims(2, 3, 2, 4, 5)))


def removed_part(masks, name, shape):
    """True where a parameter belongs to a removed unit, element by element, from the meaning of the axes."""
    removed = torch.zeros(shape, dtype=torch.bool)
    for position, dim in enumerate(axes_of(name)):
        flags = [True]
        if dim:
            flags = []
            for segment in dim:
                outer, *inner = (masks.keep[axis].tolist() for axis in segment)
                flags += [a and b for a in outer for b in (inner[0] if inner else [True])]
        keep = torch.tensor(flags).view([-1 if i == position else 1 for i in range(len(shape))])
        removed |= ~keep
    return removed


def test_survivors_are_counted_per_axis():
    masks = Masks(DIMS)
    assert masks.dims == DIMS
    masks.remove("embed", torch.tensor([1, 5]))
    masks.remove("embed", torch.tensor([5, 0]))
    masks.remove("blocks.1.heads", torch.tensor([0]))
    masks.remove("blocks.0.mlp", torch.arange(4))
    assert masks.alive("embed") == 3 and masks.keep["embed"].tolist() == [False, False, True, True, True, False]
    assert masks.dims == ViTDims(3, (BlockDims(2, 3, 2, 0, 5), BlockDims(1, 3, 2, 4, 5)))


def test_fused_rows_are_cut_head_by_head():
    """qkv rows: q of both heads, k of both, v of both; head 0 goes, and qk channel 1 and v channel 0 of every head."""
    masks = Masks(DIMS)
    masks.remove("blocks.0.heads", torch.tensor([0]))
    masks.remove("blocks.0.qk", torch.tensor([1]))
    masks.remove("blocks.0.v", torch.tensor([0]))
    rows = torch.arange(2 * 3 + 2 * 3 + 2 * 2)
    assert masks.cut("blocks.0.attn.qkv.bias", rows).tolist() == [3, 5, 9, 11, 15]
    assert masks.cut("blocks.1.attn.qkv.bias", rows).tolist() == rows.tolist()
    assert masks.cut("blocks.0.attn.proj.weight", torch.arange(4).repeat(6, 1)).tolist() == [[3]] * 6


def test_zeroing_hits_exactly_the_removed_units(family, case, randomise, prune):
    model = randomise(build_vit(**family))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = prune(Masks(model.dims), case)
    masks.install_(model)
    for name, parameter in model.named_parameters():
        gone = removed_part(masks, name, parameter.shape)
        if (branch := branch_of(name)) and not masks.alive(branch):
            gone = torch.ones_like(gone)
        assert not parameter[gone].any(), name
        assert torch.equal(parameter[~gone], before[name][~gone]), name
        assert masks.cut(name, parameter).numel() == (~gone).sum() or gone.all(), name


def test_gradients_of_removed_units_are_exactly_zero(family, case, images, randomise, prune):
    """A removed unit sends and receives nothing; the last bias of a removed branch is no unit, but held at zero."""
    model = randomise(build_vit(**family))
    masks = prune(Masks(model.dims), case)
    masks.install_(model)
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        gone = removed_part(masks, name, parameter.shape)
        assert parameter.grad is not None and not parameter.grad[gone].any(), name
        assert gone.all() or parameter.grad[~gone].any() or "blocks" in name, name


def test_removed_units_stay_removed_through_training(tiny, images, randomise, prune):
    model = randomise(build_vit(**tiny))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    masks = Masks(model.dims)

    def step():
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()
        masks.zero_weights_(model)

    step()
    prune(masks, ("embed", "heads", "qk", "v", "mlp", "blocks.0.heads=0", "blocks.1.mlp=0"))
    masks.install_(model, optimizer)
    first = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        step()
    for (name, parameter), before in zip(model.named_parameters(), first, strict=True):
        gone = removed_part(masks, name, parameter.shape)
        assert not parameter[gone].any(), name
        assert not torch.equal(parameter, before) or not before.any(), name


def test_install_zeroes_the_removed_moments(tiny, images, randomise, prune):
    model = randomise(build_vit(**tiny))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(images).square().sum().backward()
    optimizer.step()
    moments = {
        (name, key): optimizer.state[p][key].clone()
        for name, p in model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
    }
    assert all(m.any() for m in moments.values())
    masks = prune(Masks(model.dims), ("embed", "heads", "qk", "v", "mlp"))
    masks.install_(model, optimizer)
    for name, parameter in model.named_parameters():
        gone = removed_part(masks, name, parameter.shape)
        for key in ("exp_avg", "exp_avg_sq"):
            now = optimizer.state[parameter][key]
            assert not now[gone].any(), name
            assert torch.equal(now[~gone], moments[name, key][~gone]), name
        assert optimizer.state[parameter]["step"] == 1


def test_state_dict_round_trip(prune):
    masks = prune(Masks(DIMS), ("embed", "heads", "qk", "v", "mlp"))
    restored = Masks(DIMS)
    restored.load_state_dict({axis: keep.clone() for axis, keep in masks.state_dict().items()})
    assert restored.dims == masks.dims != DIMS
    assert all(torch.equal(restored.keep[axis], keep) for axis, keep in masks.keep.items())


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"embed": torch.ones(7, dtype=torch.bool)}, "axis embed has 7 units, not 6"),
        ({"embed": torch.ones(6)}, "axis embed"),
        ({"blocks.1.mlp": torch.ones(2, 2, dtype=torch.bool)}, "axis blocks.1.mlp"),
        ({"blocks.2.mlp": torch.ones(4, dtype=torch.bool)}, "axis blocks.2.mlp has 4 units, not None"),
        ({"blocks.2.mlp": torch.ones(4)}, "axis blocks.2.mlp"),
    ],
)
def test_masks_of_another_model_are_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        Masks(DIMS).load_state_dict(Masks(DIMS).state_dict() | change)


def test_a_missing_axis_is_refused():
    state = Masks(DIMS).state_dict()
    del state["blocks.0.v"]
    with pytest.raises(ValueError, match=r"axis blocks\.0\.v has None units, not 2"):
        Masks(DIMS).load_state_dict(state)


def test_what_is_removed_later_is_zeroed_too(tiny):
    """What to multiply weights by is kept between steps, until masks change."""
    model = build_vit(**tiny)
    masks = Masks(model.dims)
    earlier = {axis: keep.clone() for axis, keep in masks.state_dict().items()}

    def zeroed():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
        masks.zero_weights_(model)
        return all(
            torch.equal(p == 0, removed_part(masks, name, p.shape) | (p == 0) & masks._branch_is_gone(name))
            for name, p in model.named_parameters()
        )

    assert zeroed() and all((p == 1).all() for p in model.parameters())
    for axis, units in (("embed", [0, 3]), ("blocks.0.mlp", [5]), ("embed", [7]), ("blocks.1.heads", [0, 1, 2, 3])):
        masks.remove(axis, torch.tensor(units))
        assert zeroed() and (model.pos_embed[0, 0, units] == 0).all() == (axis == "embed")
    masks.load_state_dict(earlier)
    assert zeroed() and all((p == 1).all() for p in model.parameters())
