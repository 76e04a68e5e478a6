"""Interactions between components against autograd's full Hessian over every gate, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_vit
from pruning.gates import COMPONENTS, Gates, axes_of_component
from pruning.interaction import SampledMean, component_hessian, without_second_derivative


@pytest.fixture
def problem(tiny, randomise):
    """A model of 88 units in float64, images, labels."""
    model = randomise(build_vit(**tiny | dict(embed_dim=16, mlp_ratio=1.0))).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    return model, torch.randn(6, 3, 16, 16, generator=generator).double(), torch.arange(6)


def full_hessian(model, images, targets, components):
    """(units, units) over all gates at once, and each unit's component."""
    sizes = model.dims.sizes()
    owner = {axis: c for c in components for axis in axes_of_component(model.dims, c)}
    lengths = [sizes[axis] for axis in owner]

    with Gates(model).attach() as gates, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):

        def loss(values):
            gates.values = {a: v[None] for a, v in zip(owner, values.split(lengths), strict=True)}
            return F.cross_entropy(model(images), targets)

        hessian = torch.autograd.functional.hessian(loss, torch.ones(sum(lengths), dtype=torch.float64))
    return hessian, [c for axis, c in owner.items() for _ in range(sizes[axis])]


@pytest.mark.parametrize("components", [COMPONENTS, ("embed", "heads"), ("mlp",)])
def test_rows_are_sums_over_the_full_hessian(problem, components):
    model, images, targets = problem
    hessian, owner = full_hessian(model, images, targets, components)
    expected = torch.stack(
        [
            torch.stack(
                [hessian[[o == k for o in owner]][:, [o == other for o in owner]].sum() for other in components]
            )
            for k in components
        ]
    )
    with Gates(model).attach() as gates:
        exact, finite = (
            component_hessian(gates, components, lambda: F.cross_entropy(model(images), targets), form)
            for form in ("exact", "finite")
        )
    scale = expected.abs().max()
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-9 * float(scale))
    torch.testing.assert_close(finite, expected, rtol=0, atol=1e-2 * float(scale))


def test_a_sample_of_batches_is_within_its_stated_error(problem):
    """The error of 10 of 40 batches' mean, in its own standard errors, over 30 samples: about one on average."""
    model, _, _ = problem
    generator = torch.Generator().manual_seed(2)
    data = [
        (torch.randn(4, 3, 16, 16, generator=generator).double(), torch.randint(0, 10, (4,), generator=generator))
        for _ in range(40)
    ]
    with Gates(model).attach() as gates:
        each = torch.stack(
            [component_hessian(gates, COMPONENTS[:3], lambda x=x, y=y: F.cross_entropy(model(x), y)) for x, y in data]
        )
    truth, deviations = each.mean(0), []
    for _ in range(30):
        sampled = SampledMean(3)
        for hessian in each[torch.randperm(40, generator=generator)[:10]]:
            sampled.merge(SampledMean.pack(hessian))
        assert sampled.count == 10
        deviations.append((sampled.mean - truth) / sampled.standard_error)
    spread = torch.stack(deviations).square().mean(0).sqrt()
    assert ((0.4 < spread) & (spread < 1.6)).all()  # without replacement: sqrt(30 / 40) of what is stated, and noise


def test_the_error_is_the_textbook_one():
    sampled, values = SampledMean(2), torch.randn(7, 2, 2, dtype=torch.float64)
    assert sampled.largest_error == torch.inf
    for parts in (values[:3], values[3:]):  # as two processes would
        sampled.merge(sum(SampledMean.pack(v) for v in parts))
    torch.testing.assert_close(sampled.mean, values.mean(0))
    torch.testing.assert_close(sampled.standard_error, values.std(0) / 7**0.5)
    diagonal = values.mean(0).diagonal().abs()
    scale = torch.maximum(values.mean(0).abs(), (diagonal[:, None] * diagonal).sqrt())
    torch.testing.assert_close(sampled.relative_error, sampled.standard_error / scale)
    assert sampled.largest_error == sampled.relative_error.max()


class Once(torch.autograd.Function):
    """An activation whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0] > 0)


class OnceLayer(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_a_layer_without_second_derivative_is_named(tiny, images):
    model = build_vit(**tiny).eval()
    assert without_second_derivative(model, images) is None
    model.blocks[1].mlp.act = OnceLayer()
    assert without_second_derivative(model, images) == "blocks.1.mlp.act (OnceLayer)"
    assert not any(m._forward_pre_hooks for m in model.modules())
