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

from models.axes import Axis, Dim
from models.dims import ViTDims
from models.norms import MASKED
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
                if not isinstance(block.attn.norm, MASKED):
                    handles.append(block.attn.proj.register_forward_pre_hook(self._heads(i)))
            if block.dims.mlp and not isinstance(block.mlp.norm, MASKED):
                handles.append(self._gate_hidden(block.mlp, i))
        for name, module in self.model.named_modules():
            if isinstance(module, MASKED) and (dim := self.model.dims.axes_of(f"{name}.weight")[0]):
                handles.append(module.register_forward_hook(self._norm(dim, name in ("patch_embed.norm", "norm_pre"))))
        if not any(isinstance(getattr(self.model, name), MASKED) for name in ("norm", "fc_norm")):
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

    def _along(self, dim: Dim) -> Tensor | None:
        """Gates along a dimension of a parameter, (B, length), the products of its axes' gates; None for no gates."""
        sizes, segments = self.model.dims.sizes(), []
        if not any(axis in self.values for segment in dim for axis in segment):
            return None
        for segment in dim:
            gate = None
            for axis in segment:
                own = self.values.get(axis)
                own = next(iter(self.values.values())).new_ones(1, sizes[axis]) if own is None else own
                gate = own if gate is None else (gate[:, :, None] * own[:, None]).flatten(1)
            segments.append(gate)
        return torch.cat(segments, 1)

    def _heads(self, block: int):
        dim = self.model.dims.axes_of(f"blocks.{block}.attn.proj.weight")[1]

        def hook(module: nn.Module, args: tuple) -> tuple | None:
            gate, (x,) = self._along(dim), args  # B N (H v)
            return None if gate is None else (x * gate[:, None],)

        return hook

    def _gate_hidden(self, mlp: nn.Module, block: int) -> RemovableHandle:
        def gated(x: Tensor) -> Tensor:
            gate = self.values.get(str(Axis("mlp", block)))  # at 0 the activation gives 0
            return x if gate is None else x * gate[:, None]

        if self.behind or not isinstance(mlp, Mlp):  # a product of gate and value has one gate, behind it
            return mlp.fc2.register_forward_pre_hook(lambda module, args: (gated(args[0]),))
        return mlp.fc1.register_forward_hook(lambda module, args, output: gated(output))

    def _norm(self, dim: Dim, writes: bool):
        """A norm with statistics weighted by the gates: at zeros and ones, over the survivors.

        dim: the axes of its channels; writes: its output goes into the residual stream, and its readers are gated; else
        it is a reader itself.
        """

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if (gate := self._along(dim)) is None:
                return None
            (x,) = args  # B N channels, or B E after pooling
            weight = gate if x.dim() == 2 else gate[:, None]
            total = weight.sum(-1, keepdim=True)
            if isinstance(module, nn.LayerNorm):
                x = x - (weight * x).sum(-1, keepdim=True) / total
            variance = (weight * x.square()).sum(-1, keepdim=True) / total
            y = x * torch.rsqrt(variance + module.eps) * module.weight
            y = y if (bias := getattr(module, "bias", None)) is None else y + bias
            return y if writes else weight * y

        return hook

    def _outlet(self, module: nn.Module, args: tuple) -> tuple | None:
        gate, (x,) = self.values.get("embed"), args  # x: B E, or B N E before a pool
        return None if gate is None else (x * (gate if x.dim() == 2 else gate[:, None]),)
