"""Losses of pruning and finetuning: the task loss with a CNN teacher, and distillation from the full model.

Every loss takes logits of the class token and of the distillation token, each (B, classes).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

Logits = tuple[Tensor, Tensor]  # class token, distillation token


def base_criterion(mixup: bool, smoothing: float) -> nn.Module:
    """Cross-entropy with class indices (and label smoothing), or with the soft targets that mixup makes."""
    if mixup:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


class DistillationLoss(nn.Module):
    """(1 - alpha) x task loss + alpha x CNN distillation, as DeiT (arXiv 2012.12877, section 4).

    The task loss uses the mean of both tokens' logits (as published for NViT; DeiT uses the class token alone), the
    distillation loss the distillation token: `hard` is the cross-entropy with the teacher's label, `soft` the KL at
    temperature tau, times tau^2, averaged over batch and classes; `none` is the task loss alone.
    """

    def __init__(self, base: nn.Module, teacher: nn.Module | None, kind: str, alpha: float, tau: float) -> None:
        super().__init__()
        self.base, self.teacher, self.kind, self.alpha, self.tau = base, teacher, kind, alpha, tau

    def forward(self, logits: Logits, images: Tensor, targets: Tensor) -> Tensor:
        cls, dist = logits
        task = self.base((cls + dist) / 2, targets)
        if self.kind == "none":
            return task
        with torch.no_grad():
            taught = self.teacher(images)
        if self.kind == "hard":
            distilled = F.cross_entropy(dist, taught.argmax(1))
        else:
            student = F.log_softmax(dist / self.tau, 1)
            distilled = F.kl_div(student, F.log_softmax(taught / self.tau, 1), log_target=True, reduction="sum")
            distilled = distilled * self.tau**2 / dist.numel()
        return task * (1 - self.alpha) + distilled * self.alpha


def full_model_kl(student: Logits, teacher: Logits, tau: float, per_token: bool) -> Tensor:
    """KL(teacher || student) at temperature tau, averaged over the batch, without the factor tau^2 (NViT, Eq. 9).

    per_token: average one KL per token, as in the published finetuning; otherwise one KL of the tokens' mean logits, as
    in the published pruning.
    """
    if not per_token:
        student, teacher = (((a + b) / 2,) for a, b in (student, teacher))
    terms = [
        F.kl_div(F.log_softmax(s / tau, 1), F.log_softmax(t / tau, 1), log_target=True, reduction="batchmean")
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean()


class NViTLoss(nn.Module):
    """original x DistillationLoss + kl / 1000 x full-model KL.

    The published KL is a mean over batch x 1000 classes. Dividing its coefficient by 1000 and averaging over the batch
    gives a coefficient the same weight for any number of classes. Returns the loss and, for the log, its two parts.
    """

    def __init__(
        self,
        original: DistillationLoss,
        original_coeff: float,
        teacher: nn.Module | None,
        kl_coeff: float,
        tau: float,
        per_token: bool,
    ) -> None:
        super().__init__()
        self.original, self.original_coeff = original, original_coeff
        self.teacher, self.kl_coeff, self.tau, self.per_token = teacher, kl_coeff, tau, per_token

    @torch.no_grad()
    def teach(self, images: Tensor) -> Logits:
        """The full model's logits, float32."""
        return tuple(t.float() for t in self.teacher(images))

    def forward(
        self, logits: Logits, images: Tensor, targets: Tensor, taught: Logits | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """taught: what `teach` has given for these images, where the caller has asked already."""
        logits = tuple(t.float() for t in logits)
        original = kl = logits[0].new_zeros(())
        if self.original_coeff:
            original = self.original(logits, images, targets)
        if self.kl_coeff:
            kl = full_model_kl(logits, taught or self.teach(images), self.tau, self.per_token)
        loss = self.original_coeff * original + self.kl_coeff / 1000 * kl
        return loss, dict(orig_loss_value=original.detach(), main_loss_value=kl.detach())
