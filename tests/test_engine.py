"""The training loop and the evaluation."""
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from engine import FiniteGuard, Precision, Progress, evaluate, train_one_epoch
from utils import RunFailed

CPU = torch.device("cpu")


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        y = self.linear(x)
        return y, y


def criterion(logits, images, targets):
    loss = nn.functional.cross_entropy(logits[0].float(), targets)
    return loss, dict(part=loss.detach() * 2)


@pytest.fixture
def parts():
    model = Both()
    loader = DataLoader(TensorDataset(torch.randn(20, 4), torch.randint(0, 3, (20,))), batch_size=5)
    return model, loader, torch.optim.SGD(model.parameters(), lr=0.1)


def test_an_epoch_is_the_plain_loop(parts):
    model, loader, optimizer = parts
    reference = Both()
    reference.load_state_dict(model.state_dict())
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    losses = []
    for x, y in loader:
        loss, _ = criterion(reference(x), x, y)
        plain.zero_grad()
        loss.backward()
        plain.step()
        losses.append(loss.item())
    stats = train_one_epoch(model, criterion, loader, optimizer, Precision(CPU, None), Progress(4))
    assert torch.equal(model.linear.weight, reference.linear.weight)
    assert stats["loss"] == pytest.approx(sum(losses) / 4) and stats["part"] == pytest.approx(sum(losses) / 2)


def test_hooks_see_gradients_before_and_weights_after_the_step(parts):
    model, loader, optimizer = parts
    seen = []

    def after_backward():
        seen.append((model.linear.weight.clone(), model.linear.weight.grad.clone()))

    def after_step(loss):
        before, grad = seen[-1]
        torch.testing.assert_close(model.linear.weight, before - 0.1 * grad)
        return len(seen) == 2

    train_one_epoch(
        model,
        criterion,
        loader,
        optimizer,
        Precision(CPU, None),
        Progress(4),
        after_backward=after_backward,
        after_step=after_step,
    )
    assert len(seen) == 2  # ended early


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(parts):
    model, _, optimizer = parts
    images = torch.randn(20, 4)
    images[12, 0] = math.nan  # in step 2
    weights = []
    loader = DataLoader(TensorDataset(images, torch.randint(0, 3, (20,))), batch_size=5)
    with pytest.raises(RunFailed, match="step 2"):
        train_one_epoch(model, criterion, loader, optimizer, Precision(CPU, None), Progress(4),
                        after_step=lambda loss: weights.append(model.linear.weight.clone()))  # fmt: skip
    assert len(weights) == 2 and torch.equal(model.linear.weight, weights[-1])


def test_the_deferred_guard_names_the_first_bad_step():
    guard = FiniteGuard(CPU)
    guard.immediate = False  # as on a GPU
    for step, loss in enumerate([1.0, math.inf, math.nan, 1.0]):
        guard.see(torch.tensor(loss), step)
    with pytest.raises(RunFailed, match="step 1"):
        guard.check()


def test_evaluation_is_exact(parts):
    model, loader, _ = parts
    model.train()
    result = evaluate(model, loader, Precision(CPU, None))
    x, y = loader.dataset.tensors
    logits = model.linear(x)
    assert result["acc1"] == pytest.approx(100 * (logits.argmax(1) == y).double().mean().item())
    assert result["acc5"] == 100 and result["samples"] == 20
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)


def test_bfloat16_autocast_trains(parts):
    model, loader, optimizer = parts
    precision = Precision(CPU, torch.bfloat16)
    assert not precision.scaler.is_enabled()
    first = train_one_epoch(model, criterion, loader, optimizer, precision, Progress(4))["loss"]
    for epoch in range(1, 10):
        last = train_one_epoch(model, criterion, loader, optimizer, precision, Progress(4, epoch))["loss"]
    assert last < first and model.linear.weight.dtype == torch.float32
