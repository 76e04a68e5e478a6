"""Which attention kernel a model really runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


@torch.no_grad()
def attention_kernels(model: nn.Module, images: Tensor) -> str:
    """The kernels of one pass, as in "explicit, flash_attention_for_cpu": torch's names, or the products alone."""
    with _Recorder() as recorder:
        model(images)
    fused = {name.removeprefix("_scaled_dot_product_") for name in recorder.seen if "scaled_dot_product" in name}
    by_hand = {"explicit"} if recorder.seen["baddbmm"] else set()
    unfused = {"math"} if not fused | by_hand and any("softmax" in name for name in recorder.seen) else set()
    return ", ".join(sorted(fused | by_hand | unfused)) or "none"
