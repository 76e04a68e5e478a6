"""A vision model of Hugging Face transformers as one of this project's: the same function under timm's names.

Nothing of transformers is imported: the model brings what is needed of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.arch import Arch
from models.exact import full_float32
from models.foreign import adapt, extract, mismatch
from models.parents import ModelError

NAMES = {  # model_type of a config: timm's model of that structure, and its activation as transformers calls it
    "vit": ("vit_small_patch16_224", "gelu"),
    "deit": ("deit_small_patch16_224", "gelu"),
    "dinov2": ("vit_small_patch14_dinov2", "gelu"),
    "dinov2_with_registers": ("vit_small_patch14_reg4_dinov2", "gelu"),
    "clip_vision_model": ("vit_base_patch16_clip_quickgelu_224", "quick_gelu"),
    "siglip_vision_model": ("vit_base_patch32_siglip_gap_256", "gelu_pytorch_tanh"),
}
TEACHER = ("deit_small_distilled_patch16_224", "gelu")  # both classifiers, averaged
OTHER_ACTIVATION = {
    ("clip_vision_model", "gelu"): "vit_base_patch16_clip_224",
    ("siglip_vision_model", "gelu"): "vit_base_patch16_siglip_gap_224",
}
GATED = dict(dinov2="vit_giant_patch14_dinov2", dinov2_with_registers="vit_giant_patch14_reg4_dinov2")
AGREE, ROUNDED = 3e-5, 0.05  # relative difference of outputs, in float32, and in half precision


def is_transformers(model: nn.Module) -> bool:
    """Whether a model is one of Hugging Face transformers'."""
    return any(kind.__module__.partition(".")[0] == "transformers" for kind in type(model).__mro__)


def _arch(model: nn.Module, config: Any, state: dict[str, Tensor]) -> Arch:
    """The architecture of a model, from its config. Raises ModelError."""
    kind = config.model_type
    known, activation = NAMES.get(kind, ("", "")) if "head_dist.weight" not in state else TEACHER
    if not known:
        raise ModelError(f"a {type(model).__name__} cannot be pruned; of transformers: {', '.join(NAMES)}")
    gated = getattr(config, "use_swiglu_ffn", False)
    if gated:
        known = GATED.get(kind, "")
    elif config.hidden_act != activation:
        known = OTHER_ACTIVATION.get((kind, config.hidden_act), "")
    if "attn_pool.latent" in state:
        known = known.replace("_gap_", "_")
    if not known:
        raise ModelError(f"a {type(model).__name__} with the activation {config.hidden_act} cannot be pruned")
    stem, width = state["patch_embed.proj.weight"], config.hidden_size
    kwargs = dict(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=stem.shape[1],
        num_classes=len(state["head.weight"]) if "head.weight" in state else 0,
        embed_dim=width,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=len(state["blocks.0.mlp.w12.weight" if gated else "blocks.0.mlp.fc1.weight"]) / width,
    )
    if "blocks.0.attn.qkv.bias" not in state:
        kwargs |= dict(qkv_bias=False)
    for registers in ("register_tokens", "reg_token"):
        if registers in state:
            kwargs |= dict(reg_tokens=state[registers].shape[1])
    return Arch.of(known, **kwargs)


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    """What a user reads: logits, or the normalised tokens (of CLIP: the class token, which alone it normalises; of
    SigLIP what its pool makes of them)."""
    given = model(pixel_values=images)
    if (logits := getattr(given, "logits", None)) is not None:
        return logits
    pooled = model.config.model_type.startswith(("clip", "siglip")) and given.pooler_output is not None
    return given.pooler_output if pooled else given.last_hidden_state


@full_float32()
def disagreement(
    ours: VisionTransformer, theirs: nn.Module, outputs: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[float, bool]:
    """(relative difference of outputs on two random images, whether the weights are at least float32).

    outputs: from images to (those of `ours`, those of `theirs`), both in eval mode. The mode of `theirs` is restored.
    """
    stem, mode, reference = ours.patch_embed, theirs.training, next(ours.parameters())
    images = torch.randn(2, stem.proj.in_channels, *stem.img_size, generator=torch.Generator().manual_seed(0))
    theirs.eval()
    found, expected = outputs(images.to(reference))
    theirs.train(mode)
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    return error, reference.dtype in (torch.float32, torch.float64)


@torch.no_grad()
def convert(model: nn.Module) -> VisionTransformer:
    """A copy of a vision model of transformers as one of this project's, in eval mode, on its device.

    ViT, DeiT, DINOv2 (with registers too), the vision towers of CLIP and SigLIP; with a classifier where it has one.
    CLIP's projection is left out: features are the tokens before it. SigLIP's pool by attention comes too, where the
    model has it. Raises ModelError.
    """
    name = type(model).__name__
    inner = getattr(model, "vision_model", model)  # of CLIPModel and SiglipModel
    config = getattr(inner.config, "vision_config", inner.config)
    state, _ = extract(dict(inner.state_dict()), name)
    if config.model_type == "deit" and "head_dist.weight" not in state:  # a token that no classifier reads
        state["reg_token"] = state.pop("dist_token")
    arch = _arch(model, config, state)
    state, _ = adapt(state, arch.skeleton, arch.name, name)
    ours, reference = arch.build(), next(inner.parameters())
    if reason := mismatch(ours.state_dict(), state):
        raise ModelError(f"a {name} of this config cannot be rebuilt: {reason}")
    ours.load_state_dict(state)
    ours = ours.to(reference.device, reference.dtype).eval()

    def outputs(images: Tensor) -> tuple[Tensor, Tensor]:
        expected = _outputs(inner, images)
        return (ours(images) if expected.dim() == 2 else ours.forward_features(images)), expected

    error, exact = disagreement(ours, inner, outputs)
    if not error <= (AGREE if exact else ROUNDED):
        raise ModelError(f"a {name} of this config cannot be rebuilt: it would differ by {error:.1e}")
    return ours
