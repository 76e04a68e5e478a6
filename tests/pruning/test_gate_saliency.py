"""Gates behind every unit: against derivatives of weights, image by image, in parts, and on masked models."""

import copy

import pytest
import torch
import torch.nn.functional as F

from models import Masks, TokenLogits, build_vit
from pruning.gate_saliency import KINDS, GateSaliency

OFF = torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture
def problem(tiny, randomise):
    """In float64: a squared derivative near 0 is, in float32, the square of rounding."""
    model = randomise(build_vit(**tiny)).double().eval()
    return model, torch.randn(6, 3, 16, 16).double(), torch.randint(0, 10, (6,))


def scores_of(model, masks, kind, images, targets, parts=1, teacher=None, scaler=OFF):
    saliency = GateSaliency(model, masks, kind, 0.0, scaler, taught=teacher is not None)
    both = TokenLogits(model)
    for x, y in zip(images.chunk(parts), targets.chunk(parts), strict=True):
        logits = both(x)
        with torch.no_grad():
            taught = teacher and teacher(x)
        saliency.see(logits, taught)
        scaler.scale(F.cross_entropy(sum(logits) / 2, y) / parts).backward()
    saliency.step()
    return saliency.close_window()


def by_weights(model, images, targets):
    """Squared derivatives of gates on what each unit writes, from the gradients of the weights that read it."""
    model.zero_grad()
    F.cross_entropy(sum(TokenLogits(model)(images)) / 2, targets).backward()
    block, found = model.blocks[1], {}
    found["blocks.1.mlp"] = (block.mlp.fc2.weight * block.mlp.fc2.weight.grad).sum(0)
    read = (block.attn.proj.weight * block.attn.proj.weight.grad).sum(0).view(4, 8)
    found["blocks.1.heads"], found["blocks.1.v"] = read.sum(1), read.sum(0)
    q = block.attn.qkv
    found["blocks.1.qk"] = ((q.weight * q.weight.grad).sum(1) + q.bias * q.bias.grad)[:32].view(4, 8).sum(0)
    return {axis: value.detach().double().square() for axis, value in found.items()}


def test_gates_are_derivatives_behind_the_units(problem):
    expected = by_weights(copy.deepcopy(problem[0]), *problem[1:])
    found = scores_of(problem[0], Masks(problem[0].dims), "gates", *problem[1:])
    for axis, value in expected.items():
        torch.testing.assert_close(found[axis], value, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lean_last_block_scores_the_same(problem, kind):
    model, *data = problem
    expected = scores_of(copy.deepcopy(model), Masks(model.dims), kind, *data)
    model.blocks[-1].num_queries = 2
    for axis, value in scores_of(model, Masks(model.dims), kind, *data).items():
        torch.testing.assert_close(value, expected[axis], rtol=1e-4, atol=1e-12)


def test_the_embedding_against_finite_differences(problem):
    model, images, targets = problem
    masks, step = Masks(model.dims), 1e-5
    found = scores_of(copy.deepcopy(model), masks, "gates", images, targets)["embed"]
    saliency = GateSaliency(model, masks, "gates", 0.0, OFF)
    for unit in (0, 17):
        losses = []
        for change in (step, -step):
            saliency._gates.values = {
                "embed": torch.ones(1, 32)
                .double()
                .index_add(1, torch.tensor([unit]), torch.tensor([[change]]).double())
            }
            stem = model.patch_embed._forward_pre_hooks
            hooks, model.patch_embed._forward_pre_hooks = stem, {}
            losses.append(F.cross_entropy(sum(TokenLogits(model)(images)) / 2, targets).item())
            model.patch_embed._forward_pre_hooks = hooks
        assert ((losses[0] - losses[1]) / (2 * step)) ** 2 == pytest.approx(float(found[unit]), rel=1e-3)


def test_samples_are_squared_image_by_image(problem):
    model, images, targets = problem
    masks = Masks(model.dims)
    each = [scores_of(copy.deepcopy(model), masks, "gates", images[[i]], targets[[i]]) for i in range(6)]
    found = scores_of(model, masks, "gate_samples", images, targets)
    for axis, value in found.items():
        torch.testing.assert_close(value, sum(e[axis] for e in each) / 6, rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_count_as_one(problem, kind):
    model, images, targets = problem
    whole = scores_of(copy.deepcopy(model), Masks(model.dims), kind, images, targets)
    found = scores_of(model, Masks(model.dims), kind, images, targets, parts=3)
    for axis, value in found.items():
        torch.testing.assert_close(value, whole[axis], rtol=1e-3, atol=1e-10)


def test_the_scale_of_the_loss_is_taken_out(problem):
    model, *data = problem
    plain = scores_of(copy.deepcopy(model), Masks(model.dims), "gates", *data)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = scores_of(model, Masks(model.dims), "gates", *data, scaler=scaler)
    torch.testing.assert_close(found["embed"], plain["embed"], rtol=1e-4, atol=0)


def test_a_masked_model_stays_masked(problem, prune):
    model, images, _ = problem
    masks = prune(Masks(model.dims), ("embed", "heads", "qk", "v", "mlp"))
    masks.install_(model)
    expected = model(images).detach()
    saliency = GateSaliency(model, masks, "gates", 0.0, OFF)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)
    assert saliency._leaves and not torch.equal(model(images), 0 * expected)
    with torch.no_grad():
        assert torch.equal(model(images), expected)  # without gradients there are no gates


def test_a_teacher_scores_where_its_own_loss_has_no_gradient(problem):
    model, *data = problem
    teacher = TokenLogits(copy.deepcopy(model))
    torch.manual_seed(3)
    found = scores_of(copy.deepcopy(model), Masks(model.dims), "gate_samples", *data, teacher=teacher)
    torch.manual_seed(3)
    drawn = torch.multinomial((sum(teacher(data[0])) / 2).softmax(1), 1).flatten()
    expected = scores_of(model, Masks(model.dims), "gate_samples", data[0], drawn)
    for axis, value in found.items():
        torch.testing.assert_close(value, expected[axis], rtol=1e-4, atol=1e-12)
        assert value.max() > 0
