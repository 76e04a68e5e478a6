"""A multiplicative gate at every unit of a plain ViT: 1 is keep, 0 is remove, and derivatives are taken in between.

At gates of zero and one the gated model computes what the masked model does (a block that loses a whole branch apart:
it also loses that branch's last bias). So there is one gate per unit and reader, where published SAViT multiplies the
residual stream 25 times by the same gate and leaves LayerNorm's statistics and bias ungated, and every axis of
`models.axes` can have gates. Legend: B batch, N tokens, E embed, H heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models.axes import Axis
from models.dims import ViTDims
from models.vit import LayerNorm
from pruning import streams

COMPONENTS = ("heads", "mlp", "embed", "qk", "v")  # SAViT's numbers 0, 1, 2, then two of ours


def axes_of_component(dims: ViTDims, component: str) -> list[str]:
    """The axes (`blocks.3.heads`, …) whose units make up a component; blocks without that branch have none."""
    if component == "embed":
        return ["embed"]
    branch = "mlp" if component == "mlp" else "heads"
    return [str(Axis(component, i)) for i, block in enumerate(dims.blocks) if getattr(block, branch)]


class Gates:
    """Gates of a model's units, applied by hooks while `attach`.

    values: by axis, (B, units) for one gate per image, or (1, units); an axis that is absent is not gated.
    behind: gates of MLP units stand behind the activation (removed units are the same, derivatives are not), as those
    of gated MLPs always do.
    """

    def __init__(self, model: nn.Module, behind: bool = False) -> None:
        self.model, self.behind = model, behind
        self.values: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def attach(self) -> Iterator[Gates]:
        """The model reads `values` in every forward pass inside this context."""
        handles = []
        for i, block in enumerate(self.model.blocks):
            if block.dims.heads:
                handles.append(block.attn.qkv.register_forward_hook(self._queries(i)))
                handles.append(block.attn.proj.register_forward_pre_hook(self._heads(i, block.dims.v)))
            if block.dims.mlp:
                handles.append(self._gate_hidden(block.mlp, i))
        for module in self.model.modules():
            if isinstance(module, LayerNorm):
                writes = module is getattr(self.model, "norm_pre", None)
                handles.append(module.register_forward_hook(self._norm(writes)))
        if not any(isinstance(getattr(self.model, name), LayerNorm) for name in ("norm", "fc_norm")):
            for module in streams.outlets(self.model):  # no norm before them: they read the residual stream itself
                handles.append(module.register_forward_pre_hook(self._outlet))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _queries(self, block: int):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if (gate := self.values.get(str(Axis("qk", block)))) is None:
                return None
            gate = gate.repeat(1, self.model.blocks[block].dims.heads)  # B (H qk): queries alone, so that it acts once
            return output * F.pad(gate, (0, output.shape[-1] - gate.shape[-1]), value=1.0)[:, None]

        return hook

    def _heads(self, block: int, width: int):
        def hook(module: nn.Module, args: tuple) -> tuple | None:
            heads, v = (self.values.get(str(Axis(kind, block))) for kind in ("heads", "v"))
            (x,) = args  # B N (H v)
            if heads is not None:
                x = x * heads.repeat_interleave(width, dim=1)[:, None]
            if v is not None:
                x = x * v.repeat(1, self.model.blocks[block].dims.heads)[:, None]
            return (x,)

        return hook

    def _gate_hidden(self, mlp: nn.Module, block: int) -> RemovableHandle:
        def gated(x: Tensor) -> Tensor:
            gate = self.values.get(str(Axis("mlp", block)))  # at 0 the activation gives 0
            return x if gate is None else x * gate[:, None]

        if self.behind or not isinstance(mlp, Mlp):  # a product of gate and value has one gate, behind it
            return mlp.fc2.register_forward_pre_hook(lambda module, args: (gated(args[0]),))
        return mlp.fc1.register_forward_hook(lambda module, args, output: gated(output))

    def _norm(self, writes: bool):
        """LayerNorm with statistics weighted by the gates: at zeros and ones, over the survivors.

        writes: its output goes into the residual stream, and its readers are gated; else it is a reader itself.
        """

        def hook(module: LayerNorm, args: tuple, output: Tensor) -> Tensor | None:
            if (gate := self.values.get("embed")) is None:
                return None
            (x,) = args  # B N E, or B E after pooling
            weight = gate if x.dim() == 2 else gate[:, None]
            total = weight.sum(-1, keepdim=True)
            centred = x - (weight * x).sum(-1, keepdim=True) / total
            variance = (weight * centred.square()).sum(-1, keepdim=True) / total
            y = centred * torch.rsqrt(variance + module.eps) * module.weight + module.bias
            return y if writes else weight * y

        return hook

    def _outlet(self, module: nn.Module, args: tuple) -> tuple | None:
        gate, (x,) = self.values.get("embed"), args  # x: B E, or B N E before a pool
        return None if gate is None else (x * (gate if x.dim() == 2 else gate[:, None]),)
