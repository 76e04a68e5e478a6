"""What pruning has to keep, as a value: how far outputs are from the dense ones, and which directions count.

Two objectives. `Predictions`: the classifier's distribution; the divergence is KL(dense || pruned). `Features`: tokens
behind the final norm, for models without a classifier; the divergence is the share of their variance that is lost.

To second order both are D = E (c . df)^2 / 2 over cotangents c with E[c c^T] the metric of D at the dense outputs f: of
KL the Fisher information of the logits (Martens, arXiv 1412.1193), which needs labels that the model itself draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pruning import streams
from pruning.moments import all_reduced

OBJECTIVES = ("predictions", "features")
TOKENS = ("class", "patches", "pooled", "all")
LEAST_VARIANCE = 1e-6  # of a feature, relative to the mean over features


class Objective(Protocol):
    """Outputs of a model from its residual stream after the last block, and their divergence from the dense ones."""

    unit: str

    def read(self, model: VisionTransformer) -> slice:
        """The tokens of the last block that the outputs depend on."""

    def outputs(self, model: VisionTransformer, stream: Tensor) -> Tensor:
        """(B, N, E) -> (B, …)."""

    def divergence(self, outputs: Tensor, dense: Tensor) -> Tensor:
        """Of every image: (B,), float64."""

    def cotangents(self, dense: Tensor, images: Sequence[int], probes: int) -> list[Tensor]:
        """`probes` samples of c, each (B, …). images: a number for each image that seeds its samples."""

    def last_layers(self, model: VisionTransformer, stream: Tensor) -> list[tuple[nn.Linear, Tensor]]:
        """The linear layers that give the outputs, each with its input."""


def divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """KL(dense || logits) of every row, in nats; in float64, as what nearly cancels has terms of 1."""
    target = dense.double().log_softmax(-1)
    return (target.exp() * (target - logits.double().log_softmax(-1))).sum(-1)


def _generator(image: int) -> torch.Generator:
    """Samples of an image that are the same in any batch and on any process."""
    return torch.Generator().manual_seed(image)


@dataclass(frozen=True)
class Predictions:
    """The classifier's distribution, by KL divergence in nats."""

    unit: str = "nats"

    def read(self, model: VisionTransformer) -> slice:
        return streams.read(model)

    def outputs(self, model: VisionTransformer, stream: Tensor) -> Tensor:
        return streams.head(model, stream)

    def divergence(self, outputs: Tensor, dense: Tensor) -> Tensor:
        return divergence(outputs, dense)

    def cotangents(self, dense: Tensor, images: Sequence[int], probes: int) -> list[Tensor]:
        """onehot(y) - p with labels y drawn from p, those of one image as evenly spaced quantiles."""
        p = dense.double().softmax(-1)
        first = torch.stack([torch.rand((), generator=_generator(image), dtype=torch.float64) for image in images])
        quantiles = (first[:, None] + torch.arange(probes)).to(p) / probes  # B probes
        labels = torch.searchsorted(p.cumsum(-1), quantiles).clamp_max(p.shape[-1] - 1)
        onehot = nn.functional.one_hot(labels, p.shape[-1]) - p[:, None]
        return list(onehot.to(dense.dtype).unbind(1))

    def last_layers(self, model: VisionTransformer, stream: Tensor) -> list[tuple[nn.Linear, Tensor]]:
        return [*streams.pool(model, stream), *streams.classifiers(model, stream)]


@dataclass(frozen=True)
class Features:
    """Tokens behind the final norm; the divergence is the lost share of their variance, averaged over features.

    tokens: `class` (all prefix tokens), `patches`, `all`, or `pooled`, as the model pools them. A linear head, which a
    model may have to restore its width, is applied, unless it reads a pool by attention and the tokens are others.
    scale: 1 / standard deviation of every feature over calibration images, (features,).
    """

    tokens: str
    scale: Tensor
    unit: str = "of the variance"

    @classmethod
    @torch.no_grad()
    def of(cls, model: VisionTransformer, images: Tensor, batch: int, tokens: str) -> Features:
        """The objective of a dense model in eval mode, its scale from calibration images (n, 3, H, W).

        Raises ValueError for tokens that the model lacks.
        """
        if tokens == "class" and not model.num_prefix_tokens:
            raise ValueError("the model has no class token: take the pooled features or those of its patches")
        device = next(model.parameters()).device
        raw = cls(tokens, torch.ones((), device=device))
        total = torch.zeros(3, 1, dtype=torch.float64, device=device)
        for part in images.split(batch):
            rows = raw.outputs(model, model.blocks(streams.stem(model, part.to(device)))).flatten(0, -2).double()
            total = total + torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0)])
        count, first, second = all_reduced(total)
        variance = second / count - (first / count).square()
        variance = variance.clamp_min(LEAST_VARIANCE * float(variance.mean()))
        return cls(tokens, variance.rsqrt().float())

    def read(self, model: VisionTransformer) -> slice:
        """The prefix tokens, the patches or all of them, as `tokens` says."""
        if self.tokens == "pooled":
            return streams.read(model)
        prefix = model.num_prefix_tokens
        return (
            dict(all=slice(None), patches=slice(prefix, None))[self.tokens] if self.tokens != "class" else slice(prefix)
        )

    def _features(self, model: VisionTransformer, stream: Tensor) -> Tensor:
        return model.fc_norm(model.norm(stream)[:, self.read(model)])

    def outputs(self, model: VisionTransformer, stream: Tensor) -> Tensor:
        """Features in units of their standard deviation: (B, features), or (B, tokens, features)."""
        if self.tokens == "pooled":
            return streams.head(model, stream) * self.scale
        head = model.head if model.attn_pool is None else nn.Identity()
        return head(self._features(model, stream)) * self.scale

    def divergence(self, outputs: Tensor, dense: Tensor) -> Tensor:
        return (outputs.double() - dense.double()).square().flatten(1).mean(1)

    def cotangents(self, dense: Tensor, images: Sequence[int], probes: int) -> list[Tensor]:
        """Standard normal, scaled so that E (c . df)^2 / 2 is the mean square."""
        size = (2 / dense[0].numel()) ** 0.5
        noise = [size * torch.randn(probes, *dense.shape[1:], generator=_generator(image)) for image in images]
        return list(torch.stack(noise, 1).to(dense).unbind(0))

    def last_layers(self, model: VisionTransformer, stream: Tensor) -> list[tuple[nn.Linear, Tensor]]:
        """The layers that restore the width, two in a distilled model, and those of a pool by attention; none where the
        features are the stream."""
        pool = streams.pool(model, stream)
        if not isinstance(model.head, nn.Linear):
            return pool
        if self.tokens == "pooled" or pool:
            return [*pool, *streams.classifiers(model, stream)]
        return [(model.head, self._features(model, stream))]


PREDICTIONS = Predictions()


def mean_divergence(pairs: Iterable[tuple[Tensor, Tensor]], objective: Objective = PREDICTIONS) -> float:
    """Mean divergence of (outputs, dense outputs) of all batches and processes, never below 0."""
    total = torch.zeros(2, dtype=torch.float64)
    for outputs, dense in pairs:
        values = objective.divergence(outputs, dense)
        total = total.to(values.device) + torch.stack([values.sum(), values.new_tensor(len(values))])
    return max(0.0, float(torch.divide(*all_reduced(total))))


@torch.no_grad()
def judge(
    model: VisionTransformer,
    dense: VisionTransformer,
    images: Tensor,
    batch: int,
    objective: Objective = PREDICTIONS,
) -> float:
    """Mean divergence of a model's outputs from the dense model's on images (n, 3, H, W)."""
    device = next(dense.parameters()).device

    def outputs(which: VisionTransformer, part: Tensor) -> Tensor:
        return objective.outputs(which, which.blocks(streams.stem(which, part)))

    parts = (part.to(device) for part in images.split(batch))
    return mean_divergence(((outputs(model, part), outputs(dense, part)) for part in parts), objective)
