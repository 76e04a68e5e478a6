"""Measurements of wall time: bands are loose, because test machines are shared."""

import math

import pytest
import torch
from jobs import token_table

from latency.bench import Bench
from latency.disturbance import thread_count
from latency.measure import Timing, interleaved, ratio
from models import Arch, ViTDims, build_vit, skeleton
from models.content import OnGroups
from runtime.device import device_name

ARCH = "deit_tiny_distilled_patch16_224"
KWARGS = dict(img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=10)


def test_timing_and_paired_ratio():
    a, b = Timing.of([4.0, 1.0, 2.0, 3.0, 10.0]), Timing.of([2.0, 1.0, 1.0, 1.0, 5.0])
    assert (a.median, a.q1, a.q3, a.min, a.n, a.samples) == (3.0, 2.0, 4.0, 1.0, 5, (4.0, 1.0, 2.0, 3.0, 10.0))
    assert ratio(a, b) == (2.0, 2.0, 2.0)  # of the pairs 2, 1, 2, 3, 2; the medians alone would say 3
    with pytest.raises(ValueError, match="5 and 1 rounds"):
        ratio(a, Timing.of([1.0]))


def test_a_deeper_model_takes_longer_and_a_model_as_long_as_itself():
    shallow, deep = (build_vit(ARCH, **KWARGS | dict(depth=depth)) for depth in (2, 8))
    timings = interleaved(dict(a=shallow, deep=deep, again=shallow), torch.randn(8, 3, 16, 16), rounds=9)
    assert list(timings) == ["a", "deep", "again"] and all(t.n == 9 and 0 < t.min <= t.median for t in timings.values())
    assert ratio(timings["deep"], timings["a"]).median > 1.5
    assert 0.7 < ratio(timings["again"], timings["a"]).median < 1.4


class Recorder(torch.nn.Module):
    """Notes each pass: name, training mode, inference mode, dtype of weights and images."""

    def __init__(self, name, log):
        super().__init__()
        self.name, self.log, self.layer = name, log, torch.nn.Linear(4, 4)

    def forward(self, x):
        self.log.append((self.name, self.training, torch.is_inference_mode_enabled(), self.layer.weight.dtype, x.dtype))
        return self.layer(x)

    def __deepcopy__(self, memo):
        return Recorder(self.name, self.log)


@pytest.mark.parametrize("dtype, expected", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_models_take_turns_in_eval_and_inference_mode(dtype, expected):
    log = []
    models = {name: Recorder(name, log).train() for name in "AB"}
    interleaved(models, torch.randn(2, 4), rounds=3, min_seconds=1e-9, dtype=dtype)
    assert [entry[0] for entry in log] == list("AAABBB" + "ABABAB")  # warm-up, then rounds
    assert {entry[1:] for entry in log} == {(False, True, expected, expected)}
    assert all(m.training and m.layer.weight.dtype == torch.float32 for m in models.values())


def test_what_has_the_type_already_is_not_copied():
    """2:4 sparse layers cannot be."""

    class Single(Recorder):
        def __deepcopy__(self, memo):
            raise NotImplementedError

    log = []
    interleaved(dict(A=Single("A", log).bfloat16()), torch.randn(2, 4), rounds=1, min_seconds=1e-9, dtype="bf16")
    assert {entry[3] for entry in log} == {torch.bfloat16}


def test_repeats_fill_the_shortest_sample():
    log = []
    interleaved(dict(A=Recorder("A", log)), torch.randn(2, 4), rounds=1, min_seconds=0.02)
    assert len(log) > 20


def test_wrong_requests_are_refused():
    model, images = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with pytest.raises(ValueError, match="fp32, bf16, fp16"):
        interleaved(dict(a=model), images, dtype="fp8")
    with pytest.raises(ValueError, match="rounds"):
        interleaved(dict(a=model), images, rounds=0)
    with pytest.raises(ValueError, match="model a is not on the images' device"):
        interleaved(dict(a=model.to("meta")), images)


def test_device_name_tells_the_threads():
    assert device_name("cpu").endswith(", 1 thread") and len(device_name("cpu").split(",")[0]) > 2
    with thread_count(2):
        assert device_name("cpu").endswith(", 2 threads")
    for device in (device_name("cpu"), device_name("cpu") + "s"):  # as older tables say it
        assert token_table(device=device).device == device_name("cpu")


def test_bench_measures_every_branch_of_the_grid():
    grid = dict(embed=[16, 48], heads=[1, 3], qk=[8, 16], v=[16], mlp=[16, 192])
    bench = Bench(Arch.of(ARCH, **KWARGS), grid, batch=4, device="cpu", dtype="fp32", compiled=False)
    assert len(bench.keys) == len(set(bench.keys)) == 2 * (2 * 2 * 1 + 2 + 1)
    small, large, outside = (
        min(s for s, _ in bench.samples(key, 5))
        for key in [("mlp", "EMB_16", "MLP_16"), ("mlp", "EMB_48", "MLP_192"), ("overhead", "EMB_48")]
    )
    assert 0 < small < large < 1 and outside > 0
    assert bench.clock and all(0 < index + 1 <= len(bench.clock) for _, index in bench.samples(bench.keys[0], 2))


def test_bench_branches_are_those_of_the_compact_model():
    grid = dict(embed=[48], heads=[2], qk=[4], v=[12], mlp=[40])
    bench = Bench(Arch.of(ARCH, **KWARGS), grid, batch=1, device="cpu", dtype="fp32", compiled=False)
    attention = bench._points["attention", "EMB_48", "QK_2_4", "V_12"][0]
    parent = skeleton(ARCH, **KWARGS)
    assert attention.attn.scale == parent.blocks[0].attn.head_dim ** -0.5
    assert attention.norm1.eps == parent.blocks[0].norm1.eps and attention.attn.qkv.bias is not None
    assert (attention.dims.heads, attention.dims.qk, attention.dims.v, attention.dims.mlp) == (2, 4, 12, 0)
    assert not attention.training and attention.dims.tokens == ViTDims.of(parent).blocks[0].tokens
    outside = bench._points["overhead", "EMB_48"][0]
    assert len(outside.blocks) == 0 and outside(bench.images).shape == (1, 10)


def test_attention_on_groups_by_content_is_timed_with_their_bias():
    """As the model runs it: some kernels take no bias. What sees all tokens, and MLPs, have none."""
    grid = dict(embed=[48], heads=[3], qk=[16], v=[16], mlp=[192], tokens=[6, 9, 18])
    arch = Arch.of(ARCH, **KWARGS, content_merge=True)
    assert arch.dims.blocks[0].tokens == 18
    bench = Bench(arch, grid, batch=2, device="cpu", dtype="fp32", compiled=False)
    biased = {key for key, (module, *_) in bench._points.items() if isinstance(module, OnGroups)}
    assert biased == {("attention", f"N_{n}", "EMB_48", "QK_3_16", "V_16") for n in (6, 9)}
    module, z, *_ = bench._points["attention", "N_6", "EMB_48", "QK_3_16", "V_16"]
    seen, mix = [], module.block.attn.mix
    module.block.attn.mix = lambda qkv, bias=None: seen.append(bias) or mix(qkv, bias)
    assert module(z).shape == (2, 6, 48) and bench.samples(next(iter(biased)))[0][0] > 0
    torch.testing.assert_close(seen[0], torch.full((2, 1, 1, 6), math.log(18 / 6)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_timings_follow_the_work():
    shallow, deep = (build_vit(ARCH, **KWARGS | dict(depth=depth)).cuda() for depth in (2, 8))
    timings = interleaved(dict(a=shallow, b=deep), torch.randn(8, 3, 16, 16, device="cuda"), dtype="bf16")
    assert ratio(timings["b"], timings["a"]).median > 1.5
