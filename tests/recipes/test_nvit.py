"""NViT's steps inside the training loop, one update after another."""

import copy

import pytest
import torch
import torch.nn.functional as F
from jobs import token_table

import main_full_global_latency
from engine import Progress, train_one_epoch
from models import Masks, TokenLogits, build_vit, compact
from pruning.config import PruningConfig
from pruning.global_latency import GlobalPruner
from pruning.saliency import Saliency
from pruning.shrink import Student
from recipes.calibration import Compensation
from recipes.nvit import PruningSteps, Setup
from runtime.precision import Precision
from training.parts import LossWeights, make_loss

CPU, TAU, KL = torch.device("cpu"), 3.0, 5e4
FLAGS = ["--interval_prune", "2", "--mixup", "0", "--cutmix", "0", "--smoothing", "0", "--original_loss_coeff", "1"]


class Run:
    """Pruning of a two-block model, an event every second update."""

    def __init__(self, model, masks, folder, *flags, precision=None):
        flags = [*FLAGS, "--kl_loss_coeff", str(KL), *flags]
        args = main_full_global_latency.get_args_parser().parse_args(flags)
        self.precision = precision or Precision(CPU, None)
        self.model, self.teacher, self.config = model, TokenLogits(copy.deepcopy(model)), PruningConfig()
        masks.install_(model)
        groups = self.config.group_sizes(model.dims)
        pruner = GlobalPruner(masks, token_table(), groups, regularization=0.0, target=None, per_event=6)
        setup = Setup(CPU, None, None, Student(model, masks), None, token_table(), self.config, pruner, folder, None)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        criterion = make_loss(args, LossWeights.of(args, TAU), None, self.teacher, per_token=False)
        never = Compensation(None, self.teacher.model, None, 8)
        self.steps = PruningSteps(args, setup, self.optimizer, criterion, self.precision, never)

    def backward(self):
        """A batch up to the hook after its backward pass: (images, labels, loss)."""
        images, labels = torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))
        self.optimizer.zero_grad()
        loss, _ = self.steps.loss(self.steps.student(images), images, labels)
        loss.backward()
        self.steps.after_backward()
        return images, labels, loss.detach()

    def update(self):
        *_, loss = self.backward()
        self.optimizer.step()
        self.steps.after_step(loss)


@pytest.fixture
def pruned(tiny, randomise, tmp_path):
    """Starts a run whose model lacks these axes already."""

    def start(*gone, flags=(), **more):
        torch.manual_seed(0)
        model = randomise(build_vit(**tiny))
        masks = Masks(model.dims, grid=model.patch_embed.grid_size if "--tokens" in flags else None)
        for axis in gone:
            masks.remove(axis, torch.arange(len(masks.keep[axis])))
        return Run(model, masks, tmp_path, *flags, **more)

    return start


def test_the_divergence_from_the_full_model_counts_once_something_is_gone(pruned):
    run = pruned()
    for update in range(4):
        before = copy.deepcopy(run.model)
        images, labels, loss = run.backward()
        logits, taught = (sum(both(images)) / 2 for both in (TokenLogits(before), run.teacher))
        expected = F.cross_entropy(logits, labels)
        if update >= 2:
            p, q = (F.softmax(x / TAU, 1) for x in (taught, logits))
            expected += KL / 1000 * (p * (p.log() - q.log())).sum(1).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        run.optimizer.step()
        run.steps.after_step(loss)
    assert run.steps.events == 2


def test_removed_weights_are_zero_after_every_step(pruned):
    """Whatever the optimizer has made of them."""
    run = pruned()
    for _ in range(2):
        run.update()
    *_, loss = run.backward()
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter += 1.0
    run.steps.after_step(loss)
    assert run.steps.events == 1 and run.steps.student.masks.dims != run.model.dims
    for name, parameter in run.model.named_parameters():
        run.steps.student.masks.zero_(name, expected := parameter.detach().clone())
        assert torch.equal(parameter, expected), name


def test_the_moving_average_starts_anew_after_the_first_event(pruned, monkeypatch):
    """The loss has another term from then on. Against the means of every window by itself."""
    run, scores, windows = pruned(), [], []
    event = run.steps.pruner.event
    monkeypatch.setattr(run.steps.pruner, "event", lambda found: scores.append(found) or event(found))
    alone = Saliency(run.model, run.model.dims, run.config.criterion, momentum=0.0)
    for update in range(6):
        *_, loss = run.backward()
        alone.step()
        if update % 2:
            windows.append(alone.close_window())
        run.optimizer.step()
        run.steps.after_step(loss)
    m = run.config.momentum
    for axis, first in windows[0].items():
        second, third = windows[1][axis], windows[2][axis]
        average = (m * (1 - m) * second + (1 - m) * third) / (1 - m**2)
        for found, expected in zip(scores, (first, second, average), strict=True):
            torch.testing.assert_close(found[axis], expected, rtol=1e-4, atol=0)


def test_gradients_are_those_of_the_compact_model(pruned):
    """Where branches are gone, too: what is no weight any more must not count when gradients are clipped."""
    run = pruned("blocks.0.mlp", "blocks.1.heads")
    images, labels, _ = run.backward()
    small = compact(run.model, run.steps.student.masks)
    F.cross_entropy(sum(TokenLogits(small)(images)) / 2, labels).backward()

    def norm(model):
        return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()

    torch.testing.assert_close(norm(run.model), norm(small), rtol=1e-4, atol=0)


def test_the_teacher_runs_once_for_the_loss_and_the_saliency(pruned):
    run = pruned(flags=["--saliency", "gate_samples", "--saliency_loss", "teacher"])
    calls = []
    run.teacher.register_forward_hook(lambda *_: calls.append(run.steps.events))
    for _ in range(6):
        run.update()
    assert calls == [0, 0, 1, 1, 2, 2]  # until the first event the loss has no use for it, the saliency has


SCORED_BY_HOOKS = (
    ["--saliency", "gates"],
    ["--saliency", "gate_samples", "--saliency_loss", "teacher"],
    ["--tokens", "place"],
)


@pytest.mark.parametrize("flags", SCORED_BY_HOOKS, ids=" ".join)
def test_an_overflow_in_float16_leaves_nothing_behind_in_the_saliency(pruned, flags):
    """Scaled by 2^40, gradients overflow until the scale has come down; scores are then those without scaling."""
    precision = Precision(CPU, torch.float16)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    runs = [pruned(flags=flags, precision=precision), pruned(flags=flags)]
    data = [(torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,)))] * 40
    found = []
    for run in runs:
        still = torch.optim.SGD(run.model.parameters(), lr=0.0)
        hooks = dict(after_backward=run.steps.after_backward, after_overflow=run.steps.after_overflow)
        train_one_epoch(run.steps.student, run.steps.loss, data, still, run.precision, Progress(40), **hooks)
        found.append([saliency.close_window() for saliency in run.steps._saliencies()])
    assert 5 < precision.overflows < 30
    for half, full in zip(*found, strict=True):
        for axis, scores in full.items():
            pair = torch.stack([half[axis], scores]).sqrt()
            assert torch.corrcoef(pair)[0, 1] > 0.99, axis
