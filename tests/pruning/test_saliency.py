"""Saliency against finite differences of a gate on every unit, and its averaging over events."""

import pytest
import torch
import torch.nn.functional as F

from models import build_vit
from models.axes import axes_of
from pruning.saliency import CONSTANTS, SCORED, Saliency

PUBLISHED_QK, PUBLISHED_V = 0, 2  # the segment of the fused qkv rows that is summed


def gate_slices(model, axis, unit, sizes):
    """(parameter, index) of every weight that the published criterion sums for one unit, found independently."""
    kind = axis.rsplit(".", 1)[-1]
    for name, parameter in model.named_parameters():
        local = name.split(".", 2)[2] if name.startswith("blocks.") else name
        if kind not in SCORED.get(local, ()) or (axis != "embed" and not name.startswith(axis.rsplit(".", 1)[0] + ".")):
            continue
        rows = torch.zeros(parameter.shape, dtype=torch.bool)
        if local.startswith("attn.qkv") and kind != "embed":
            heads, qk, v = (sizes[f"{axis.rsplit('.', 1)[0]}.{a}"] for a in ("heads", "qk", "v"))
            start = [0, heads * qk, 2 * heads * qk]
            for head in range(heads):
                if kind == "qk":
                    rows[start[0] + head * qk + unit] = True
                elif kind == "v":
                    rows[start[2] + head * v + unit] = True
                elif head == unit:
                    for first, width in zip(start, (qk, qk, v), strict=True):
                        rows[first + head * width : first + (head + 1) * width] = True
        else:
            position = next(i for i, dim in enumerate(axes_of(name)) if dim == ((axis,),))
            rows.transpose(0, position)[unit] = True
        yield parameter, rows


def loss_of(model, images, targets):
    return F.cross_entropy(model(images), targets)


@pytest.fixture
def problem(tiny, randomise):
    model = randomise(build_vit(**tiny)).double().eval()
    generator = torch.Generator().manual_seed(1)
    size = model.patch_embed.img_size
    return (
        model,
        torch.randn(8, 3, *size, generator=generator).double(),
        torch.randint(0, 10, (8,), generator=generator),
    )


@pytest.mark.parametrize("axis", ["embed", "blocks.0.heads", "blocks.1.qk", "blocks.0.v", "blocks.1.mlp"])
def test_taylor_is_the_squared_derivative_of_a_gate(problem, axis):
    model, images, targets = problem
    saliency = Saliency(model, model.dims, "taylor_sq")
    loss_of(model, images, targets).backward()
    saliency.step()
    scores = saliency.close_window()[axis]
    kind = axis.rsplit(".", 1)[-1]
    constant = 1 / len(model.dims.blocks) if kind == "embed" else CONSTANTS[kind]
    step = 1e-5
    for unit in (0, len(scores) - 1):
        slices = list(gate_slices(model, axis, unit, model.dims.sizes()))
        assert slices

        def gated(gate, slices=slices):
            originals = [(p, p.detach().clone()) for p, _ in slices]
            with torch.no_grad():
                for parameter, rows in slices:
                    parameter[rows] *= gate
                value = loss_of(model, images, targets).item()
                for parameter, original in originals:
                    parameter.copy_(original)
            return value

        derivative = (gated(1 + step) - gated(1 - step)) / (2 * step)
        assert scores[unit].item() == pytest.approx((constant * derivative) ** 2, rel=1e-3, abs=1e-14)


def test_elementwise_and_magnitude_against_plain_sums(problem):
    model, images, targets = problem
    loss_of(model, images, targets).backward()
    for criterion, weigh in (("taylor_elementwise", lambda p: (p * p.grad) ** 2), ("magnitude", lambda p: p**2)):
        saliency = Saliency(model, model.dims, criterion)
        saliency.step()
        scores = saliency.close_window()
        for axis in ("embed", "blocks.1.heads", "blocks.0.qk", "blocks.1.v", "blocks.0.mlp"):
            for unit in (0, 1):
                slices = gate_slices(model, axis, unit, model.dims.sizes())
                expected = sum(weigh(p)[rows].sum().item() for p, rows in slices)
                assert scores[axis][unit].item() == pytest.approx(expected, rel=1e-4), (criterion, axis)


def test_a_window_is_a_mean_of_squares_and_momentum_is_bias_corrected(problem):
    model, images, targets = problem
    single = []
    for part in (slice(0, 4), slice(4, 8)):
        model.zero_grad()
        loss_of(model, images[part], targets[part]).backward()
        alone = Saliency(model, model.dims, "taylor_sq")
        alone.step()
        single.append(alone.close_window()["embed"])
        if part.start == 0:
            window = Saliency(model, model.dims, "taylor_sq", momentum=0.9)
        window.step()
    first = window.close_window()["embed"]
    torch.testing.assert_close(first, (single[0] + single[1]) / 2, rtol=1e-5, atol=0)  # no factor 1 - 0.9 at event 1
    window.step()  # gradients of the second part again
    second = window.close_window()["embed"]
    expected = (0.9 * 0.1 * first + 0.1 * single[1]) / (1 - 0.9**2)
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=0)
    window.forget()
    window.step()
    torch.testing.assert_close(window.close_window()["embed"], single[1], rtol=1e-5, atol=0)


def test_a_step_that_overflowed_is_left_out_and_none_at_all_is_an_error(problem):
    model, images, targets = problem
    saliency = Saliency(model, model.dims, "taylor_sq")
    loss_of(model, images, targets).backward()
    saliency.step()
    model.blocks[0].mlp.fc1.weight.grad[0, 0] = float("inf")
    saliency.step()
    assert saliency.steps.item() == 1
    assert all(torch.isfinite(s).all() for s in saliency.close_window().values())
    saliency.step()
    with pytest.raises(ValueError, match="finite"):
        saliency.close_window()


def test_state_round_trip(problem):
    model, images, targets = problem
    loss_of(model, images, targets).backward()
    one, two = (Saliency(model, model.dims, "taylor_sq", momentum=0.5) for _ in range(2))
    one.step()
    one.close_window()
    one.step()
    two.load_state_dict(one.state_dict())
    a, b = one.close_window(), two.close_window()
    assert all(torch.equal(a[axis], b[axis]) for axis in a)
