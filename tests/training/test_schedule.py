"""Learning rates: the published linear rule, and timm's schedules stepped every update."""

from argparse import Namespace

import pytest
import torch

import finetune_dense
from training.parts import make_scheduler, scale_lr

UPDATES = 10  # an epoch


def rates(*flags):
    """The learning rate of every update."""
    args = finetune_dense.get_args_parser().parse_args(["--lr", "1", "--epochs", "8", "--batch-size", "512", *flags])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=scale_lr(args))
    scheduler, epochs = make_scheduler(args, optimizer, UPDATES)
    found = []
    for update in range(epochs * UPDATES):
        scheduler.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_the_linear_rule_counts_the_global_batch():
    args = Namespace(lr=5e-4, batch_size=64, grad_accum_steps=2)
    assert scale_lr(args) == pytest.approx(5e-4 * 128 / 512)


def test_cosine_warms_up_and_ends_at_the_lowest_rate():
    found = rates("--warmup-epochs", "2", "--warmup-lr", "0.1", "--min-lr", "0.01")
    assert len(found) == 80 and found[0] == pytest.approx(0.1) and found[:20] == sorted(found[:20])
    assert found[-1] < 0.012 and found[20:] == sorted(found[20:], reverse=True)


def test_cooldown_adds_epochs_at_the_lowest_rate():
    found = rates("--cooldown-epochs", "3", "--min-lr", "0.01")
    assert len(found) == 110 and found[-30:] == [pytest.approx(0.01)] * 30 and found[79] > 0.01


@pytest.mark.parametrize(
    "flags, steps",
    [
        (["--sched", "step", "--decay-epochs", "3"], {30: 0.1, 60: 0.01}),
        (["--sched", "multistep", "--decay-milestones", "2", "7"], {19: 0.1, 69: 0.01}),  # timm's steps one early
    ],
)
def test_steps(flags, steps):
    found = rates(*flags)
    for update, rate in steps.items():
        assert found[update] == pytest.approx(rate) and found[update - 1] == pytest.approx(10 * rate)


@pytest.mark.parametrize("name", ["tanh", "poly"])
def test_smooth_ones_fall(name):
    found = rates("--sched", name)
    assert found[0] == pytest.approx(1, rel=0.05) and found[-1] < 0.7 and found == sorted(found, reverse=True)


def test_noise_begins_where_it_is_told_and_follows_the_seed():
    noise = ["--lr-noise", "0.5"]
    plain, noisy, again, other = (rates(*flags) for flags in ([], noise, noise, [*noise, "--seed", "3"]))
    assert noisy[:40] == plain[:40] and noisy[45:] != plain[45:] and noisy == again != other


@pytest.mark.parametrize("name", ["cosine", "tanh", "poly"])
def test_a_rate_below_the_lowest_does_not_rise(name, capsys):
    """Published: 2e-4 for 512 images; of 16 images that is 6.25e-6, and --min-lr is 1e-5."""
    small = ["--lr", "2e-4", "--batch-size", "16", "--sched", name]
    found = rates(*small, "--warmup-epochs", "2", "--warmup-lr", "1e-4")
    assert found == [pytest.approx(6.25e-6)] * 80
    begin = "warning: --lr 0.0002 is 6.25e-06 for a global batch of 16, below"
    ends = ("--min-lr 1e-05", "--warmup-lr 0.0001")
    assert capsys.readouterr().err.splitlines() == [f"{begin} {end}, which is 6.25e-06 in this run" for end in ends]
    assert rates(*small, "--min-lr", "1e-6")[-1] < 6.25e-6 and not capsys.readouterr().err


def test_what_has_no_lowest_rate_says_nothing(capsys):
    rates("--lr", "2e-4", "--batch-size", "16", "--sched", "step")
    assert not capsys.readouterr().err
