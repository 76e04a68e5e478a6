"""Gates of zero and one give the masked model; a gate's derivative is that of the function in between."""

import pytest
import torch

from models import Masks, build_vit
from pruning.gates import COMPONENTS, Gates, axes_of_component


@pytest.mark.parametrize("component", COMPONENTS)
def test_binary_gates_are_masks(family, component, images, randomise, prune):
    model = randomise(build_vit(**family)).double().eval()
    masks = prune(Masks(model.dims), (component,))
    with torch.no_grad(), Gates(model).attach() as gates:
        dense = model(images.double())
        gates.values = {axis: masks.keep[axis][None].double() for axis in axes_of_component(model.dims, component)}
        gated = model(images.double())
    masks.install_(model)
    torch.testing.assert_close(gated, model(images.double()), rtol=1e-10, atol=1e-10)
    assert (gated - dense).norm() > 1e-3 * dense.norm()


def test_all_components_at_once_and_one_gate_per_image(tiny, images, randomise, prune):
    """Image 0 with gates of one is the dense model's, image 1 with masks the masked model's."""
    model = randomise(build_vit(**tiny)).double().eval()
    images = images[:2].double()
    dense = model(images)
    masks = prune(Masks(model.dims), COMPONENTS)
    with torch.no_grad(), Gates(model).attach() as gates:
        for component in COMPONENTS:
            for axis in axes_of_component(model.dims, component):
                keep = masks.keep[axis].double()
                gates.values[axis] = torch.stack([torch.ones_like(keep), keep])
        gated = model(images)
    torch.testing.assert_close(gated[0], dense[0], rtol=1e-10, atol=1e-10)
    masks.install_(model)
    torch.testing.assert_close(gated[1], model(images)[1], rtol=1e-10, atol=1e-10)


def test_hooks_are_gone_afterwards(tiny, images):
    model = build_vit(**tiny).eval()
    with Gates(model).attach() as gates:
        gates.values = {"embed": torch.zeros(1, 32).index_fill(1, torch.tensor([3]), 1.0)}
        inside = model(images)
    assert not torch.equal(inside, model(images))
    gates.values = {}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_blocks_without_a_branch_have_no_units(tiny, prune):
    model = build_vit(**tiny)
    dims = prune(Masks(model.dims), ("blocks.0.heads=0", "blocks.1.mlp=0")).dims
    assert axes_of_component(dims, "qk") == ["blocks.1.qk"] and axes_of_component(dims, "mlp") == ["blocks.0.mlp"]
    assert axes_of_component(dims, "embed") == ["embed"]
