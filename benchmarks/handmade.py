"""Compact models against the same widths written by hand: throughput must not be lost to generality.

    python -m benchmarks.handmade [--model deit_small_patch16_224] [--model-kwargs K=V ...] [--batch-size 8]

The model by hand is a plain timm-style ViT of fixed widths without options. Its attention is the fastest of torch's
kernel as called, the same padded to equal widths, and plain matrix products, chosen per block by a measurement when it
is built. Prints the paired ratio of throughputs, ours over by hand, and of the compact model over the dense one.
"""

from __future__ import annotations

import argparse
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latency.measure import DTYPES, interleaved, ratio, stopwatch, warm_up
from latency.points import random_dims
from latency.whole import build_random, random_images
from models import Arch, ViTDims, skeleton
from options.parser import key_values
from runtime.console import table
from runtime.device import device_name

BUILDS = 3


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="deit_small_patch16_224",
        help="timm name of the dense model (default: %(default)s)",
    )
    parser.add_argument(
        "--model-kwargs", nargs="*", default=[], metavar="K=V", help="timm arguments of it (default: none)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images per call (default: %(default)s)")
    parser.add_argument("--random", type=int, default=10, help="architectures")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="fp32", choices=tuple(DTYPES), help="of weights and images (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    return parser


def as_called(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def pad(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    width = max(q.shape[-1], v.shape[-1])
    q, k, padded_v = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, padded_v, scale=scale)[..., : v.shape[-1]]


def products(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return (scale * q @ k.mT).softmax(-1) @ v


class HandBlock(nn.Module):
    """A pre-norm block of fixed widths."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        attn, mlp = theirs.attn, theirs.mlp
        self.norm1, self.qkv, self.proj = theirs.norm1, attn.qkv, attn.proj
        self.norm2, self.fc1, self.fc2 = theirs.norm2, mlp.fc1, mlp.fc2
        self.heads, self.qk, self.v, self.scale = attn.num_heads, attn.qk, attn.v, attn.scale
        self.kernel = as_called

    def attention(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).split([self.heads * self.qk, self.heads * self.qk, self.heads * self.v], -1)
        q, k, v = (t.view(B, N, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        return self.proj(self.kernel(q, k, v, self.scale).transpose(1, 2).reshape(B, N, -1))

    def choose(self, x: Tensor) -> None:
        """The fastest kernel for inputs like x."""
        seconds = {}
        for kernel in (as_called, pad, products):
            self.kernel = kernel
            warm_up(lambda: self.attention(x), x.device, 3)
            seconds[kernel] = min(stopwatch(lambda: self.attention(x), 1, x.device) for _ in range(5))
        self.kernel = min(seconds, key=seconds.get)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class HandViT(nn.Module):
    """The weights of a plain compact model (no LayerScale, no registers), in a forward without options."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.patches, self.norm, self.pos = model.patch_embed.proj, model.norm, model.pos_embed
        distilled = hasattr(model, "head_dist")
        self.prefix = nn.ParameterList([model.cls_token] + distilled * [getattr(model, "dist_token", None)])
        self.heads = nn.ModuleList([model.head] + distilled * [getattr(model, "head_dist", None)])
        self.blocks = nn.Sequential(*(HandBlock(block) for block in model.blocks))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([*(t.expand(len(x), -1, -1) for t in self.prefix), x], 1) + self.pos
        x = self.norm(self.blocks(x))
        return torch.stack([head(x[:, i]) for i, head in enumerate(self.heads)]).mean(0)


@torch.inference_mode()
def compare(args: argparse.Namespace, kwargs: dict, dims: ViTDims) -> tuple[float, float, float]:
    """Medians over builds: throughput of ours over by hand, of ours over the dense model; difference of the logits."""
    device, dtype, ratios, kept = torch.device(args.device), DTYPES[args.dtype], [], []
    arch = Arch.of(args.model, **kwargs)
    images = random_images(arch, args.batch_size, device)
    for _ in range(BUILDS):
        dense, ours, hand = (build_random(arch, d, device) for d in (None, dims, dims))
        hand.load_state_dict(ours.state_dict())
        models = dict(dense=dense, ours=ours, again=dense, hand=HandViT(hand).to(dtype))  # both after the same model
        for block, b in zip(models["hand"].blocks, dims.blocks, strict=True):
            block.choose(torch.randn(args.batch_size, b.tokens, dims.embed, device=device).to(dtype))
        kept.append(models)
        timings = interleaved(models, images, args.rounds, dtype=args.dtype)
        ratios.append([ratio(timings[other], timings["ours"]).median for other in ("hand", "dense")])
    expected, logits = (models[name].to(dtype)(images.to(dtype)).float() for name in ("hand", "ours"))
    return *np.median(ratios, axis=0), float((logits - expected).norm() / expected.norm())


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    kwargs, rng = key_values(args.model_kwargs, "--model-kwargs"), random.Random(args.seed)
    dense = ViTDims.of(skeleton(args.model, **kwargs))
    rows, ratios = [], []
    for i in range(args.random):
        hand, speed_up, difference = compare(args, kwargs, random_dims(dense, rng))
        ratios.append(hand)
        rows.append([f"random {i}", f"{hand:.3f}", f"{speed_up:.2f}x", f"{difference:.0e}"])
    print(f"{args.model} {kwargs}, batch {args.batch_size}, {args.dtype}, {device_name(args.device)}")
    print(table(["widths", "throughput over by hand", "over dense", "logits differ by"], rows))
    print(f"lowest {min(ratios):.3f}, median {np.median(ratios):.3f}")


if __name__ == "__main__":
    main(get_args_parser().parse_args())
