"""Samples say whether others took part of their time; they are replaced, measured with fewer threads, and said."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from benchmarks.busy import busy
from latency import measure, whole
from latency.disturbance import LOST, Sample, Watch, describe, fewer_threads, thread_count
from latency.measure import Timing, _clean_rounds
from latency.samples import OutOfTime, sample_all
from latency.whole import measure_ratios
from models import Arch

ARCH = Arch.of("deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5)
CPU = torch.device("cpu")


def spin():
    for _ in range(1_500_000):
        pass


def test_beside_busy_processes_the_time_that_a_thread_ran_counts():
    with thread_count(1), Watch(CPU) as watch:
        alone = min(watch.time(spin) for _ in range(5)).seconds
        with busy(4):
            begin = time.perf_counter()
            beside = [watch.time(spin) for _ in range(5)]
            wall = (time.perf_counter() - begin) / 5
    assert sum(sample.is_disturbed for sample in beside) >= 3
    assert np.median([sample.seconds for sample in beside]) < min(2 * alone, 0.8 * wall)  # two threads share a core


def test_with_several_threads_their_waits_are_counted():
    x = torch.randn(800, 800)
    with thread_count(2), torch.inference_mode():
        x @ x
        with Watch(CPU) as watch, busy(4):
            samples = [watch.time(lambda: x @ x, 20) for _ in range(3)]
    assert all(0 <= sample.lost <= 1 for sample in samples) and any(sample.is_disturbed for sample in samples)


def rounds(*lost):
    """What `_clean_rounds` is given: one model, its seconds the number of the round."""
    taken = iter([dict(a=Sample(i, share)) for i, share in enumerate(lost)])
    return lambda: next(taken)


def test_disturbed_rounds_are_replaced():
    kept = _clean_rounds(rounds(0.5, 0, LOST, 0.9, 0), 3, limit=60)
    assert [taken["a"].seconds for taken in kept] == [1, 2, 4]


def test_where_replacing_is_hopeless_the_least_disturbed_remain():
    kept = _clean_rounds(rounds(0.5, 0.9, 0.3, 0.8), 2, limit=60)
    assert [taken["a"].seconds for taken in kept] == [0, 2]
    assert len(_clean_rounds(rounds(0.5, 0.9), 2, limit=0)) == 1  # the time limit


@pytest.fixture
def crowded(monkeypatch):
    """A machine on which only one thread is left alone; the thread counts that were measured with."""
    counts = []

    def interleaved(models, images, rounds, **how):
        counts.append(torch.get_num_threads())
        return {name: Timing.of([1.0, 1.0], float(counts[-1] > 1)) for name in models}

    monkeypatch.setattr(whole, "interleaved", interleaved)
    return counts


def test_fewer_threads_are_tried_and_said(crowded):
    assert fewer_threads(6) == [6, 3, 1] and fewer_threads(1) == [1]
    measured = measure_ratios(ARCH, [ARCH.dims], 2, CPU, builds=3, threads=4)
    assert crowded == [4, 2, 1, 1, 1] and torch.get_num_threads() == 1
    assert (measured.threads, measured.wanted, measured.disturbed) == (1, 4, 0)
    assert measured.note == "measured with 1 of 4 threads, since others use the machine"


def test_nothing_is_said_of_an_idle_machine_and_all_of_a_crowded_one():
    assert describe(4, 4, 0.5) == ""
    assert describe(4, 4, 0.8) == "80% of the samples were disturbed by other processes; the figure may be far off"
    assert describe(1, 2, 0.8).count(";") == 2


def test_a_measurement_that_never_ends_is_stopped_and_kept(tmp_path):
    class Endless:
        keys, clock, at_once = [("mlp", "EMB_1", "MLP_1")], [], False
        saved = 0

        def tick(self):
            pass

        def samples(self, key, count=1):
            raise AssertionError

    class Kept:
        clock, samples, saved = [], {}, 0

        def save(self):
            self.saved += 1

    with pytest.raises(OutOfTime):
        sample_all(Endless(), kept := Kept(), 2, limit=0.0)
    assert kept.saved == 1


def test_it_imports_where_there_is_no_resource_module():
    code = (
        "import sys; sys.modules['resource'] = None\n"
        "import torch; from latency.disturbance import Watch, thread_count\n"
        "import latency.disturbance as d; d.TASKS = '/nowhere'\n"
        "with thread_count(2), Watch(torch.device('cpu')) as watch:\n"
        "    sample = watch.time(lambda: sum(range(1000)))\n"
        "assert sample.seconds > 0 and sample.lost == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rounds_in_which_any_model_was_disturbed_count():
    assert measure._is_disturbed(dict(a=Sample(1, 0), b=Sample(1, 0.5))) and not measure._is_disturbed(
        dict(a=Sample(1, LOST))
    )
