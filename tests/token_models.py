"""Models that compress tokens, and what every one of them must be able to do."""

from __future__ import annotations

import io

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models import ViTDims


def with_tokens(dims, *counts):
    return ViTDims.from_dict(
        dims.to_dict()
        | dict(blocks=[b | dict(tokens=n) for b, n in zip(dims.to_dict()["blocks"], counts, strict=True)])
    )


def trains_a_segmentation_head(backbone, images, bf16=False):
    """Three steps on all tokens lower the loss."""
    model, labels = Segmenter(backbone.train(), 5), torch.randint(0, 5, (3, 16, 16))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


def compiles_and_runs_in_onnxruntime(model, images):
    """Both compute what the model does."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(torch.compile(model)(images), expected, rtol=1e-4, atol=1e-5)
        program = torch.onnx.export(model, (images,), dynamo=True)
    buffer = io.BytesIO()
    program.save(buffer)
    session = runtime.InferenceSession(buffer.getvalue())
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


class Segmenter(nn.Module):
    """A linear decoder on all patches in place (Segmenter, Strudel et al. 2021)."""

    def __init__(self, backbone: VisionTransformer, classes: int) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, nn.Linear(backbone.embed_dim, classes)

    def forward(self, images):
        tokens = self.backbone.forward_features(images)[:, self.backbone.num_prefix_tokens :]
        rows, columns = self.backbone.patch_embed.grid_size
        maps = self.decoder(tokens).transpose(1, 2).unflatten(2, (rows, columns))  # B classes h w
        return nn.functional.interpolate(maps, size=images.shape[-2:], mode="bilinear")
