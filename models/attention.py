"""Attention of any query/key and value widths, by the fastest exact route for device and dtype.

Kernels want q, k and v of one width. The routes, all the same function to rounding:

fused     torch's scaled_dot_product_attention as called;
padded    the same with zeros appended to the narrower of q/k and v, and up to a multiple of 8 on a GPU, where what
          does not start at a multiple of 16 bytes is copied to where it does;
explicit  two matrix products and a softmax, a few images at a time so that their scores stay in the cache.

The rule of `choose_route` comes from `python -m benchmarks.attention_routes`; the figures are in benchmarks/RESULTS.md.
Legend: B batch, N tokens, H heads, d channels per head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROUTES = ("fused", "padded", "explicit")
SCORES_BYTES = 2 << 20  # of one chunk of images on the explicit route
AMX = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()  # matrix instructions of recent Intel CPUs
TENSOR_CORES = 8  # widths and strides that a GPU's kernels take are multiples of this


def choose_route(qk: int, v: int, device: torch.device, dtype: torch.dtype) -> str:
    """The fastest exact route where no gradient is needed; with one, explicit gives way to padded.

    A CPU's fused kernel is the quickest at equal widths in fp32; unequal ones it takes slowly, and padded it computes
    the zeros too. In bf16 it is slow without Intel's AMX; in fp16 matrix products by themselves are slower still. A
    GPU's kernels take unequal widths as they are, if both are multiples of 8; others are slow, or refused where a row
    of the fused product is no multiple of 16 bytes.
    """
    if device.type == "cpu":
        if dtype == torch.float16:
            return "fused"
        if dtype == torch.bfloat16:
            return ("fused" if qk == v else "padded") if AMX else "explicit"
        return "fused" if qk == v else "explicit"
    return "fused" if qk % TENSOR_CORES == 0 and v % TENSOR_CORES == 0 else "padded"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dropout: float = 0.0,
    route: str | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias) v: q (B, H, N, qk), k (B, H, M, qk), v (B, H, M, v) -> (B, N, H v).

    route: a route, None for the rule's; bias: of the keys, (B, 1, 1, M), None for none.
    """
    route = route or choose_route(q.shape[-1], v.shape[-1], q.device, q.dtype)
    if route == "explicit":
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not dropout:
            return _explicit(q, k, v, scale, bias)
        route = "padded"
    B, H, N, _ = q.shape
    out = by_kernel(q, k, v, scale, dropout, bias, padded=route == "padded")
    return out.transpose(1, 2).reshape(B, N, H * v.shape[-1])


def by_kernel(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float = 0.0, bias: Tensor | None = None, padded: bool = True
) -> Tensor:
    """softmax(scale q k^T + bias) v by torch's kernel, as it is or padded: shapes of `attend` -> (B, H, N, v).

    bias: of the scores, (B, H, N, M) or 1 where they share it.
    """
    width = v.shape[-1]
    if padded:
        on_cpu = q.device.type == "cpu"
        multiple = 1 if on_cpu else TENSOR_CORES
        common = -(-max(q.shape[-1], width) // multiple) * multiple
        q, k, v = (F.pad(t, (0, common - t.shape[-1])) if t.shape[-1] < common else t for t in (q, k, v))
        q, k, v = (t if on_cpu or is_aligned(t) else t.contiguous() for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)[..., :width]


def is_aligned(t: Tensor) -> bool:
    """Whether every row of t starts where a GPU's kernels can read it, as rows of a fused q, k, v need not."""
    return t.stride(-1) == 1 and all(n % TENSOR_CORES == 0 for n in (t.storage_offset(), *t.stride()[:-1]))


def _explicit(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    (B, H, N, _), width = q.shape, v.shape[-1]
    chunk = max(1, SCORES_BYTES // (H * N * k.shape[2] * q.element_size()))
    out = v.new_empty(B, N, H, width)
    for i, rows in enumerate(zip(*(t.split(chunk) for t in (q, k, v, out)), strict=True)):
        q_, k_, v_ = (t.flatten(0, 1) for t in rows[:3])  # b*H N d
        scores = torch.baddbmm(q_.new_empty(1), q_, k_.transpose(1, 2), beta=0, alpha=scale)  # b*H N N
        if bias is not None:
            scores.unflatten(0, (-1, H)).add_(bias[i * chunk : (i + 1) * chunk])
        rows[3].copy_(torch.bmm(scores.softmax(-1), v_).view(-1, H, N, width).transpose(1, 2))
    return out.view(B, N, H * width)
