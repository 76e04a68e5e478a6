"""The parts of a Swin Transformer at a grid of widths, measured through the modules that the compact model uses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, SwinTransformerStage
from torch import Tensor, nn

from latency.bench import OTHER, Bench, _Pool
from latency.measure import WARM_UP, caller, warm_up
from latency.points import branches
from latency.table import STAGE
from models.arch import Arch
from models.dims import BlockDims
from models.norms import LayerNorm
from models.swin import Block, stem_of, tail_of
from models.swin_dims import SwinDims


def _kinds(stage: SwinTransformerStage) -> list[SwinTransformerBlock]:
    """One block of every shift that a stage has: its windows lie still, and shifted."""
    return list({block.shift_size: block for block in stage.blocks}.values())


class SwinBench(Bench):
    """As `Bench`, with keys behind the stage ("STAGE_0", "mlp", "EMB_96", "MLP_384"); see `latency.table`.

    Attention is measured in a block of every kind, windows shifted and not, and the mean of them counts. grids: points
    of embed, heads, qk, v and mlp by stage ("STAGE_0").
    """

    def __init__(
        self,
        arch: Arch,
        grids: dict[str, dict[str, list[int]]],
        batch: int,
        device: str,
        dtype: str,
        compiled: bool,
    ) -> None:
        self.parent = parent = arch.skeleton
        self._begin(parent, batch, device, dtype, compiled)
        self.dims, self.norm = SwinDims.of(parent), partial(LayerNorm, eps=parent.norm.eps)
        self.pool = _Pool(2 * sum(p.numel() + 64 for p in parent.layers.parameters()), self.device, self.dtype)
        self._streams: dict[tuple[int, int], Tensor] = {}  # inputs by stage and embedding
        self._others: dict[tuple[int, int, str], list[nn.Module]] = {}  # by stage, embedding and kind of branch
        streams = [self._add_branches(i, grids[f"{STAGE}{i}"]) for i in range(len(parent.layers))]
        for i, (before, own) in enumerate(zip(streams, streams[1:], strict=False), 1):
            for e, x in before.items():
                for out in own:
                    module = self._fill(partial(PatchMerging, e, out, self.norm))
                    self._add(i, ("merging", f"EMB_{e}", f"OUT_{out}"), module, x, (i - 1, e))
        for e in streams[0]:
            self._add_outside(0, e, [stem_of(parent, e)], self.images)
        for e, x in streams[-1].items():
            first = [stem_of(parent, e)] if len(streams) == 1 else []
            self._add_outside(len(streams) - 1, e, [*first, *tail_of(parent, e)], self.images if first else x)
        deepest = max(range(len(parent.layers)), key=lambda i: len(parent.layers[i].blocks))
        stage = self.dims.stages[deepest]
        reference = self._blocks(deepest, stage.embed, stage.blocks[0])
        self._reference = caller(reference, streams[deepest][stage.embed], compiled=False)
        with torch.inference_mode():
            warm_up(self._reference, self.device, WARM_UP[device])

    def _fill(self, make: Any) -> nn.Module:
        """What `make` builds, with weights from the pool."""
        with torch.device("meta"):
            module = make()
        self.pool.fill(module.eval())
        for part in module.modules():
            if hasattr(part, "init_non_persistent_buffers"):
                part.init_non_persistent_buffers()
        return module

    def _blocks(self, stage: int, embed: int, dims: BlockDims) -> nn.Module:
        parents = _kinds(self.parent.layers[stage])[: None if dims.heads else 1]
        return self._fill(lambda: nn.Sequential(*(Block(embed, dims, of) for of in parents)))

    def _add(self, stage: int, key: tuple[str, ...], module: nn.Module, x: Tensor, place: tuple[int, int]) -> None:
        """place: stage and embedding of the branches that run in between; their kind is the other than `key`'s."""
        streams = self._streams[place]
        others = self._others.setdefault((*place, OTHER.get(key[0], "mlp")), [])
        self._points[(f"{STAGE}{stage}", *key)] = module, x, others, streams

    def _add_branches(self, stage: int, grid: dict[str, list[int]]) -> dict[int, Tensor]:
        """Every branch of a stage's blocks; returns its inputs (B, height, width, E) by embedding."""
        height, width = self.parent.layers[stage].blocks[0].input_resolution
        streams = {e: self._random(len(self.images), height, width, e) for e in grid["embed"]}
        self._streams |= {(stage, e): x for e, x in streams.items()}
        for key, embed, dims in branches(grid, height * width):
            module = self._blocks(stage, embed, dims)
            self._others.setdefault((stage, embed, key[0]), []).append(module)
            self._add(stage, key, module, streams[embed], (stage, embed))
        return streams

    def _add_outside(self, stage: int, embed: int, parts: list[nn.Module], x: Tensor) -> None:
        module = nn.Sequential(*parts).to(self.device, self.dtype).eval()
        self._add(stage, ("overhead", f"EMB_{embed}"), module, x, (stage, embed))

    def samples(self, key: tuple[str, ...], count: int = 1) -> list[tuple[float, int]]:
        """As of `Bench`: seconds of one branch, the mean of its kinds of blocks."""
        kinds = len(self._points[key][0]) if key[1] == "attention" else 1
        return [(seconds / kinds, index) for seconds, index in super().samples(key, count)]


def make_bench(arch: Arch, grid: dict[str, Any], batch: int, device: str, dtype: str, compiled: bool) -> Bench:
    """The bench of an architecture. grid: of a plain ViT the points of every axis, else those by stage."""
    kind = SwinBench if isinstance(arch.dims, SwinDims) else Bench
    return kind(arch, grid, batch, device, dtype, compiled)
