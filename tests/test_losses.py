"""Losses against their formulas, written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losses import DistillationLoss, NViTLoss, base_criterion, full_model_kl


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(4)]


def kl(teacher, student, tau):
    p, q = F.softmax(teacher / tau, 1), F.softmax(student / tau, 1)
    return (p * (p.log() - q.log())).sum(1).mean()


def test_full_model_kl_per_token_and_on_the_mean(logits):
    a, b, c, d = logits
    both = full_model_kl((a, b), (c, d), 2.0, per_token=True)
    torch.testing.assert_close(both, (kl(c, a, 2.0) + kl(d, b, 2.0)) / 2)
    mean = full_model_kl((a, b), (c, d), 3.0, per_token=False)
    torch.testing.assert_close(mean, kl((c + d) / 2, (a + b) / 2, 3.0))


def test_the_published_coefficient_keeps_its_weight_for_any_class_count(logits):
    """100000 x a mean over batch x 1000 classes is 100 x the batch mean."""
    a, b, c, d = (x.float() for x in logits)
    teacher = nn.Identity()
    teacher.forward = lambda images: (c, d)
    loss = NViTLoss(DistillationLoss(nn.CrossEntropyLoss(), None, "none", 0.5, 1.0), 0.0, teacher, 1e5, 3.0, False)
    total, parts = loss((a, b), None, None)
    torch.testing.assert_close(total, 100 * kl((c + d) / 2, (a + b) / 2, 3.0))
    assert parts["orig_loss_value"] == 0


@pytest.mark.parametrize("kind", ["none", "hard", "soft"])
def test_cnn_distillation(logits, kind):
    a, b, taught, _ = logits
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    teacher = nn.Identity()
    teacher.forward = lambda images: taught
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, kind, 0.3, 2.0)((a, b), None, targets)
    task = F.cross_entropy((a + b) / 2, targets)
    distilled = dict(none=task, hard=F.cross_entropy(b, taught.argmax(1)), soft=kl(taught, b, 2.0) * 4 / 5)[kind]
    torch.testing.assert_close(loss, 0.7 * task + 0.3 * distilled)


def test_base_criterion_follows_the_targets(logits):
    a = logits[0]
    hard, soft = torch.tensor([0, 1, 2, 3, 4, 0]), F.softmax(logits[1], 1)
    torch.testing.assert_close(base_criterion(True, 0.1)(a, soft), -(soft * F.log_softmax(a, 1)).sum(1).mean())
    smoothed = F.cross_entropy(a, hard, label_smoothing=0.1)
    torch.testing.assert_close(base_criterion(False, 0.1)(a, hard), smoothed)
    torch.testing.assert_close(base_criterion(False, 0.0)(a, hard), F.cross_entropy(a, hard))


def test_teachers_are_not_parameters_that_train(logits):
    teacher = nn.Linear(2, 2).requires_grad_(False)
    loss = NViTLoss(DistillationLoss(nn.CrossEntropyLoss(), teacher, "hard", 0.5, 1.0), 1.0, teacher, 1.0, 1.0, True)
    assert not [p for p in loss.parameters() if p.requires_grad]
