"""Saliency from the derivative of a loss to a gate behind every unit, in the training step's own backward pass.

Published NViT sums weight times gradient: of an MLP unit that is the gate before the activation, of a head that of its
queries, keys and values at once. Here gates stand where removal acts: behind the activation, and at the heads' outputs.
Units of all axes are on one scale, without the published constants.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.masks import Masks
from pruning.gates import Gates
from pruning.saliency import EventMean

KINDS = ("gates", "gate_samples")


class GateSaliency(EventMean):
    """kind: `gates` squares the derivative of the batch's mean loss, `gate_samples` averages its images' squares, from
    the same backward pass: every image has gates of its own.

    taught: differentiate the cross-entropy to labels drawn from a teacher's predictions, which `see` gets, instead of
    the training loss: the Fisher information of the distillation loss, whose own gradient is 0 while student and
    teacher agree. With several processes, scores are averaged over them at every step.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        kind: str,
        momentum: float,
        scaler: torch.amp.GradScaler,
        taught: bool = False,
    ) -> None:
        super().__init__(model.dims.sizes(), momentum, next(model.parameters()).device)
        self.kind, self.masks, self.scaler, self.taught = kind, masks, scaler, taught
        self._leaves: list[dict[str, Tensor]] = []
        self._found: list[list[Tensor]] = []  # of the teacher's loss, one list per forward pass
        self._gates = Gates(model, behind=True)
        self._attached = self._gates.attach()  # for as long as this object lives
        self._attached.__enter__()
        model.patch_embed.register_forward_pre_hook(lambda module, args: self._arm(len(args[0])))

    def _arm(self, images: int) -> None:
        """Gates of the forward pass that begins: 1 for survivors, 0 for removed units; none without gradients."""
        self._gates.values = {}
        if torch.is_grad_enabled():
            self._gates.values = {
                axis: self.masks.keep[axis].to(self.average.dtype).expand(images, -1).clone().requires_grad_()
                for axis in self.sizes
            }
            self._leaves.append(self._gates.values)

    def see(self, logits: tuple[Tensor, Tensor], taught: tuple[Tensor, Tensor]) -> None:
        """Differentiate the loss on labels drawn from the teacher, where `taught`; all logits are (B, classes)."""
        if not self.taught:
            return
        drawn = torch.multinomial((sum(t.float() for t in taught) / 2).softmax(1), 1).flatten()
        loss = self.scaler.scale(F.cross_entropy(sum(t.float() for t in logits) / 2, drawn))
        leaves = list(self._leaves[-1].values())
        self._found.append(list(torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)))

    def discard(self) -> None:
        """Forget the forward passes since the last step."""
        self._gates.values = {}
        self._leaves, self._found = [], []

    @torch.no_grad()
    def step(self) -> None:
        """Add this step's scores: after backward, with gradients unscaled."""
        passes = len(self._leaves)
        scale = self.scaler.scale(torch.ones_like(self.steps)) * (passes if self.taught else 1)
        total = torch.zeros_like(self.average)
        for k, leaves in enumerate(self._leaves):
            gradients = self._found[k] if self.taught else [leaf.grad for leaf in leaves.values()]
            pairs = zip(gradients, leaves.values(), strict=True)
            each = torch.cat([torch.zeros_like(leaf) if g is None else g for g, leaf in pairs], 1) / scale  # B units
            total += each.sum(0) if self.kind == "gates" else (each * len(each) * passes).square().mean(0) / passes
        self.discard()
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        self._add(total.square() if self.kind == "gates" else total)
