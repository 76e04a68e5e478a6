"""The training loop and the evaluation."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from engine import Progress, evaluate, train_one_epoch
from runtime.errors import RunFailed
from runtime.precision import Precision

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
        train_one_epoch(
            model,
            criterion,
            loader,
            optimizer,
            Precision(CPU, None),
            Progress(4),
            after_step=lambda loss: weights.append(model.linear.weight.clone()),
        )
    assert len(weights) == 2 and torch.equal(model.linear.weight, weights[-1])


class Spoils(torch.autograd.Function):
    """The identity, with a gradient of infinity for what it is given `spoilt`."""

    @staticmethod
    def forward(ctx, x, spoilt):
        ctx.spoilt = spoilt
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad * math.inf if ctx.spoilt else grad), None


def spoilt_in(*updates):
    """A criterion whose loss is finite, and whose gradient is not in those updates."""
    calls = []

    def criterion(logits, images, targets):
        calls.append(1)
        return nn.functional.cross_entropy(Spoils.apply(logits[0].float(), len(calls) - 1 in updates), targets), {}

    return criterion


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move(parts):
    model, loader, optimizer = parts
    seen = []
    line = r"the gradient of linear.weight \(batch 2 to 3\) is not finite in epoch 0, step 1"
    with pytest.raises(RunFailed, match=line):
        train_one_epoch(
            model,
            spoilt_in(3),
            loader,
            optimizer,
            Precision(CPU, None),
            Progress(2),
            accumulate=2,
            after_backward=lambda: seen.append(1),
            after_step=lambda loss: seen.append(model.linear.weight.clone()),
        )
    assert len(seen) == 2 and torch.equal(model.linear.weight, seen[-1])


class TestCheckedTogether:
    """A GPU's losses and gradients are read every few updates: later, but before anything is written."""

    @pytest.fixture
    def precision(self):
        precision = Precision(CPU, None)
        precision.guard.every = 3
        return precision

    def run(self, parts, precision, odd, updates=4):
        model, loader, optimizer = parts
        moved = []
        hooks = dict(after_step=lambda loss: moved.append(1))
        try:
            train_one_epoch(model, spoilt_in(*odd), loader, optimizer, precision, Progress(updates), **hooks)
        finally:
            self.moved = len(moved)

    def test_the_first_that_is_not_finite_is_named(self, parts, precision):
        with pytest.raises(
            RunFailed, match=r"the gradient of linear.weight \(batch 1\) is not finite in epoch 0, step 1"
        ):
            self.run(parts, precision, odd=(1,))
        assert self.moved == 2  # the third update was not made

    def test_the_last_update_of_an_epoch_waits_for_none(self, parts, precision):
        with pytest.raises(RunFailed, match="step 3"):
            self.run(parts, precision, odd=(3,))
        assert self.moved == 3

    def test_nothing_is_written_before_it_is_checked(self, parts, precision):
        self.run(parts, precision, odd=(), updates=3)
        model = parts[0]
        precision.guard.see(torch.tensor(math.nan), 7)
        assert precision.guard.check(model, epoch=2, step=7)
        with pytest.raises(RunFailed, match="the loss of batch 7 is not finite in epoch 2, step 7"):
            precision.guard.settle()
        precision.guard.settle()


def scaled():
    precision = Precision(CPU, None)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return precision


def test_an_overflow_under_loss_scaling_is_left_out_and_counted(parts):
    model, loader, optimizer = parts
    precision, weights, scored, skipped = scaled(), [], [], []
    stats = train_one_epoch(
        model,
        spoilt_in(1),
        loader,
        optimizer,
        precision,
        Progress(4),
        after_backward=lambda: scored.append(1),
        after_overflow=lambda: skipped.append(len(scored)),
        after_step=lambda loss: weights.append(model.linear.weight.clone()),
    )
    assert skipped == [1]
    assert stats["overflows"] == precision.overflows == 1 and len(scored) == 3
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert precision.scaler.get_scale() == 2.0**9


def test_hooks_read_the_gradients_of_the_loss_itself(parts):
    """Not scaled, and not clipped, which the step is."""
    model, loader, optimizer = parts
    batches, limit, steps = iter(loader), 1e-3, []

    def after_backward():
        images, targets = next(batches)
        expected = torch.autograd.grad(criterion(model(images), images, targets)[0], model.parameters())
        found = [p.grad.clone() for p in model.parameters()]
        torch.testing.assert_close(found, list(expected))
        norm = torch.cat([g.flatten() for g in expected]).norm()
        assert norm > 10 * limit
        steps.append([p.detach() - 0.1 * g * limit / norm for p, g in zip(model.parameters(), expected, strict=True)])

    def after_step(loss):
        torch.testing.assert_close([p.detach() for p in model.parameters()], steps[-1])

    hooks = dict(after_backward=after_backward, after_step=after_step)
    train_one_epoch(model, criterion, loader, optimizer, scaled(), Progress(4), clip_grad=limit, **hooks)
    assert len(steps) == 4


def test_overflows_without_end_are_a_fault(parts):
    model, _, optimizer = parts
    loader = DataLoader(TensorDataset(torch.randn(40, 4), torch.randint(0, 3, (40,))), batch_size=1)
    with pytest.raises(RunFailed, match="the gradient of linear.weight .* step 30"):
        train_one_epoch(model, spoilt_in(*range(40)), loader, optimizer, scaled(), Progress(40))


def test_a_reader_that_died_is_named(parts):
    model, *_ = parts

    class Dying:
        def __len__(self):
            return 1

        def __iter__(self):
            raise ConnectionResetError("Connection reset by peer")
            yield

    with pytest.raises(RunFailed, match="a data loader worker died: Connection reset by peer"):
        evaluate(model, Dying(), Precision(CPU, None))


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
