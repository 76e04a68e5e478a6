"""Routes through attention: the same function on every one, and the rule that chooses."""

import pytest
import torch

from models import attention
from models.attention import ROUTES, attend, choose_route

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def qkv(batch, heads, tokens, qk, v, dtype):
    product = torch.randn(batch, tokens, heads * (2 * qk + v), generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = product.split([heads * qk, heads * qk, heads * v], dim=-1)
    return [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in parts]


def reference(q, k, v, scale):
    """Head by head and image by image, in float64: (B, H, N, d) -> (B, N, H v)."""
    images = []
    for one in zip(q.double(), k.double(), v.double(), strict=True):
        images.append(torch.cat([torch.softmax(scale * a @ b.T, -1) @ c for a, b, c in zip(*one, strict=True)], -1))
    return torch.stack(images)


@pytest.mark.parametrize("route", [None, *ROUTES])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("qk, v", [(8, 8), (5, 12), (12, 5), (1, 9)])
def test_every_route_computes_attention(route, dtype, tolerance, qk, v, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_BYTES", 2 * 3 * 11 * 11 * dtype.itemsize)  # 2 of the 5 images at a time
    tensors = qkv(5, 3, 11, qk, v, dtype)
    expected = reference(*tensors, 0.3)
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            found = attend(*tensors, 0.3, route=route)
        assert found.dtype == dtype and found.shape == (5, 11, 3 * v)
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_are_the_same_on_every_route(route):
    tensors = [t.detach().requires_grad_() for t in qkv(2, 3, 7, 4, 10, torch.float64)]
    expected = torch.autograd.grad(reference(*tensors, 0.5).square().sum(), tensors)
    found = torch.autograd.grad(attend(*tensors, 0.5, route=route).square().sum(), tensors)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, expected, strict=True))


def test_the_rule(monkeypatch):
    for amx, brain in ((False, ("explicit", "explicit")), (True, ("fused", "padded"))):
        monkeypatch.setattr(attention, "AMX", amx)
        assert (choose_route(64, 64, CPU, torch.bfloat16), choose_route(32, 64, CPU, torch.bfloat16)) == brain
        assert choose_route(64, 64, CPU, torch.float32) == "fused"
        assert choose_route(32, 64, CPU, torch.float32) == "explicit"
        assert choose_route(32, 64, CPU, torch.float16) == "fused"
    widths = (64, 64), (32, 64), (20, 20), (32, 20)
    assert [choose_route(*pair, CUDA, torch.bfloat16) for pair in widths] == ["fused", "fused", "padded", "padded"]


@pytest.mark.parametrize("heads, qk, v", [(3, 8, 5), (3, 5, 8), (1, 4, 4), (3, 8, 8), (2, 24, 16)])
def test_what_a_gpu_kernel_gets_is_aligned(heads, qk, v, monkeypatch):
    """Rows at multiples of 8 numbers: q and k need no padding at (8, 5), but their rows lie 63 numbers apart."""
    tensors, got = [t.to("meta") for t in qkv(2, heads, 7, qk, v, torch.bfloat16)], []
    assert all(map(attention.is_aligned, tensors)) == (qk % 8 == v % 8 == 0)
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda *a, **k: got.extend(a) or kernel(*a, **k))
    out = attend(*tensors, 0.3)
    assert out.shape == (2, 7, heads * v)
    for t in got:
        assert t.data_ptr() % 16 == 0 and t.storage_offset() % 8 == 0 and not any(n % 8 for n in t.stride()[:-1])
