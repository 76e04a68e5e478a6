"""SAViT's scores against finite differences of gates; ranking that keeps unit identity; the objective by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import Masks, ViTDims, build_vit
from pruning.gates import COMPONENTS, Gates, axes_of_component
from pruning.savit import Importance, Scores, choose, floor_dims, floor_of, objective, published_sizes, rank

THREE = COMPONENTS[:3]


@pytest.fixture
def problem(tiny, randomise):
    model = randomise(build_vit(**tiny)).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 3, 16, 16, generator=generator).double()
    return model, images, torch.tensor([0, 3, 1, 7, 2])


@pytest.mark.parametrize("component", COMPONENTS)
def test_scores_are_squared_derivatives_of_gates(problem, component):
    model, images, targets = problem
    (axis, *_) = axes_of_component(model.dims, component)
    step, unit = 1e-5, 2

    def loss_at(gate):
        value = torch.ones(1, model.dims.sizes()[axis], dtype=torch.float64)
        value[0, unit] = gate
        gates.values = {axis: value}
        return F.cross_entropy(model(images), targets, reduction="none")

    with Gates(model).attach() as gates, torch.no_grad():
        each = (loss_at(1 + step) - loss_at(1 - step)) / (2 * step)  # one derivative per image
    for method, expected in ((2, each.mean().square()), (3, each.square().mean())):
        scores = Scores(model.dims, (component,), method)
        with Gates(model).attach() as gates:
            scores.add(scores.measure(gates, 5, lambda: F.cross_entropy(model(images), targets)))
        importance = scores.importance()
        assert float(importance.scores[axis][unit]) == pytest.approx(float(expected), rel=1e-5)
        assert float(importance.gradients[axis][unit]) == pytest.approx(float(each.mean()), rel=1e-5)
        assert float(importance.fisher[axis][unit]) == pytest.approx(float(each.square().mean()), rel=1e-5)
    assert scores.loss == pytest.approx(float(F.cross_entropy(model(images), targets)))


def test_scores_are_means_over_batches_and_must_be_finite(problem):
    model, images, targets = problem
    scores = Scores(model.dims, THREE, 2)
    with Gates(model).attach() as gates:
        parts = [
            scores.measure(gates, 2, lambda i=i: F.cross_entropy(model(images[i : i + 2]), targets[i : i + 2]))
            for i in (0, 2)
        ]
    scores.add(parts[0])
    alone = scores.importance().scores
    scores.add(parts[1])
    both = scores.importance().scores
    other = torch.cat(scores.per_component(parts[1]))
    assert torch.allclose(torch.cat(list(both.values())), (torch.cat(list(alone.values())) + other) / 2)
    assert [len(part) for part in scores.per_component(parts[1])] == [8, 256, 32]
    parts[1][5] = math.nan
    scores.add(parts[1])
    with pytest.raises(ValueError, match=r"importance of blocks\.0\.heads is not finite"):
        scores.importance()


def importance_of(dims, components=THREE, hessian=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = dims.sizes()
    axes = [a for c in components for a in axes_of_component(dims, c)]
    units = [{a: torch.rand(sizes[a], generator=generator).double() for a in axes} for _ in range(3)]
    return Importance(components, 2, *units, hessian)


def test_protection_keeps_the_best_and_every_unit_its_identity():
    """What goes is exactly the lowest of those that may go; the published code cut about half of them by chance."""
    dims = ViTDims.of(build_vit("deit_tiny_patch16_224"))
    importance = importance_of(dims)
    for component in THREE:
        ranking = rank(importance, component, dims, 0.05, None)
        seen = {}
        for score, axis, unit in zip(ranking.scores, ranking.axis, ranking.unit, strict=True):
            assert importance.scores[ranking.axes[axis]][unit].tolist() == [score]
            seen.setdefault(ranking.axes[axis], []).append(int(unit[0]))
        for axis, scores in importance.scores.items():
            if axis in ranking.axes:
                floor = max(1, int(0.05 * len(scores)))
                assert seen[axis] == scores.argsort()[: len(scores) - floor].tolist()
        assert (np.diff(ranking.scores) >= 0).all()
    assert [floor_of("mlp", 768, s) for s in (0.05, 0.0, None)] == [38, 1, 0]
    assert [floor_of(c, 3, None) for c in COMPONENTS] == [0, 0, 1, 1, 1]


def test_the_removed_units_are_the_lowest_ranked():
    from tests.pruning.test_macs_search import DIGITS, make

    problem, dims = make(DIGITS, THREE, 0.5)
    masks = choose(problem, dims)
    for ranking in problem.rankings:
        gone = [not masks.keep[ranking.axes[a]][u] for a, u in zip(ranking.axis, ranking.unit, strict=True)]
        count = sum(gone)
        assert all(gone[:count])  # blocks cost the same here: nothing was put back out of order
        assert sum(int((~masks.keep[axis]).sum()) for axis in ranking.axes) == count


def test_normalising_by_layer():
    dims = ViTDims.of(build_vit("deit_tiny_patch16_224"))
    importance = importance_of(dims)
    importance.scores["blocks.3.mlp"].mul_(1000)
    for norm in (1, 2):
        ranking = rank(importance, "mlp", dims, None, norm)
        for position in range(len(ranking.axes)):
            there = ranking.scores[ranking.axis == position]
            assert np.linalg.norm(there, norm) == pytest.approx(1)
    assert (rank(importance, "mlp", dims, None, None).axis[:5000] != 3).all()


@pytest.mark.parametrize("formula", ["paper", "joint", "published"])
def test_the_objective_by_hand(formula):
    dims = ViTDims.of(build_vit("deit_tiny_patch16_224"))
    hessian = torch.tensor([[3.0, -1.0, 0.5], [-1.0, 2.0, 0.25], [0.5, 0.25, 4.0]], dtype=torch.float64)
    importance = importance_of(dims, hessian=hessian)
    rankings = [rank(importance, c, dims, 0.05, None) for c in THREE]
    counts = np.array([5, 3000, 60])
    gone = [
        [(r.axes[a], u) for a, u in zip(r.axis[:m], r.unit[:m], strict=True)]
        for r, m in zip(rankings, counts, strict=True)
    ]
    expected, quadratic = 0.0, hessian.clone()
    if formula == "joint":
        sums = [sum(float(importance.scores[a].sqrt().sum()) for a in r.axes) for r in rankings]
        roots = [sum(float(importance.scores[a][u]) ** 0.5 for a, u in units) for units in gone]
        shares = [part / whole for part, whole in zip(roots, sums, strict=True)]
        expected = 0.5 * sum(float(importance.fisher[a][u]) for units in gone for a, u in units)
        for k, r in enumerate(rankings):
            quadratic[k, k] -= sum(float(importance.fisher[a].sum()) for a in r.axes)
    else:
        shares = counts / np.array([36, 12 * 768, 192])
    c = [192 * 12, 768 * 12, 192 * 12 * 6.0]
    for k in range(3):
        for other in range(3):
            weight = 1 / (c[k] * c[other]) if formula == "published" else 0.5
            expected += weight * float(quadratic[k, other]) * shares[k] * shares[other]
    assert objective(importance, rankings, dims, formula=formula, linear=False)(counts) == pytest.approx(expected)
    if formula != "published":
        expected -= sum(float(importance.gradients[a][u]) for units in gone for a, u in units)
    assert objective(importance, rankings, dims, formula=formula, linear=True)(counts) == pytest.approx(expected)


def test_without_interactions_the_scores_decide():
    dims = ViTDims.of(build_vit("deit_tiny_patch16_224"))
    rankings = [rank(importance_of(dims), c, dims, 0.05, None) for c in THREE]
    found = objective(importance_of(dims), rankings, dims)(np.array([5, 100, 7]))
    assert found == pytest.approx(sum(r.scores[:m].sum() for r, m in zip(rankings, (5, 100, 7), strict=True)))


def test_the_published_formula_knows_three_components():
    dims = ViTDims.of(build_vit("deit_base_patch16_224"))
    assert published_sizes(dims, 6.0) == dict(heads=768 * 12, mlp=3072 * 12, embed=55296)
    importance = importance_of(dims, ("heads", "qk"), torch.eye(2).double())
    rankings = [rank(importance, c, dims, None, None) for c in ("heads", "qk")]
    with pytest.raises(ValueError, match="no weight for qk"):
        objective(importance, rankings, dims, formula="published")


def test_a_part_of_the_components():
    dims = ViTDims.of(build_vit("deit_tiny_patch16_224"))
    importance = importance_of(dims, hessian=torch.arange(9.0).view(3, 3))
    assert importance.only(("heads", "embed")).hessian.tolist() == [[0, 2], [6, 8]]
    with pytest.raises(ValueError, match="no importance of v: scored were heads, mlp, embed"):
        importance.only(("heads", "v"))


def test_floors_of_an_architecture(tiny, prune):
    dims = prune(Masks(build_vit(**tiny).dims), ("blocks.0.heads=0", "blocks.1.mlp=0")).dims
    low = floor_dims(dims, COMPONENTS, None)
    assert (low.embed, low.blocks[0].heads, low.blocks[0].mlp, low.blocks[1].qk) == (1, 0, 0, 1)
    assert floor_dims(dims, ("mlp",), 0.25).blocks[0].mlp == 32 and floor_dims(dims, ("mlp",), 0.25).embed == 32
