"""What TensorBoard finds in the folders of runs."""

import math

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.curves import Curves


def read(folder):
    found = EventAccumulator(str(folder), size_guidance=dict(histograms=0, scalars=0))
    found.Reload()
    return found


def test_a_pruning_run_shows_widths_latency_saliency_and_throughput(runs):
    found = read(runs["pruned"])
    tags = set(found.Tags()["scalars"])
    assert {
        "dimension/EMB",
        "dimension/Layer_1_MLP",
        "dimension/Estimated_Latency",
        "train/loss",
        "train/lr",
        "train/images_per_second",
        "test/acc1",
    } <= tags
    kinds = ("embed", "heads", "qk", "v", "mlp")
    assert {f"saliency_log10/{kind}" for kind in kinds} <= set(found.Tags()["histograms"])
    latency = [event.value for event in found.Scalars("dimension/Estimated_Latency")]
    assert len(latency) > 1 and latency == sorted(latency, reverse=True) and latency[-1] <= 0.6


def test_a_finetuning_run_shows_learning_rate_throughput_and_its_arguments(runs):
    found = read(runs["tuned"])
    assert {"train/lr", "train/images_per_second", "test/acc1"} <= set(found.Tags()["scalars"])
    assert all(event.value > 0 for event in found.Scalars("train/images_per_second"))
    assert "_hparams_/session_start_info" in found.summary_metadata or found.PluginTagToContent("hparams")


def test_histograms_leave_out_what_is_removed(tmp_path):
    curves = Curves(tmp_path)
    scores = {
        "embed": torch.tensor([1e-4, 1e-2, 0.0]),
        "blocks.0.mlp": torch.tensor([1e-3]),
        "blocks.1.mlp": torch.tensor([1e-5, 7.0]),
    }
    keep = {
        "embed": torch.tensor([True, False, True]),
        "blocks.0.mlp": torch.tensor([True]),
        "blocks.1.mlp": torch.tensor([True, False]),
    }
    curves.saliency(scores, keep, step=1)
    curves.writer.flush()
    (embed,), (mlp,) = (read(tmp_path).Histograms(f"saliency_log10/{kind}") for kind in ("embed", "mlp"))
    assert embed.histogram_value.num == 1 and math.isclose(embed.histogram_value.sum, -4, rel_tol=1e-5)
    assert mlp.histogram_value.num == 2 and math.isclose(mlp.histogram_value.sum, -8, rel_tol=1e-5)
