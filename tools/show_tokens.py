"""What token compression does to an image: python -m tools.show_tokens CHECKPOINT IMAGE [--output tokens.png]

One row per compressed block: its tokens (patches of a group have one colour, their mean, and share an outline; skipped
patches are white), and the image as the block puts it back (R M of the pixels, skipped patches as they are).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image, UnidentifiedImageError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import options
from files.checkpoint import CheckpointError
from models import load_dense
from models.content import Groups
from models.tokens import SKIPPED, DenseTokenMerge, TokenMerge, layers
from runtime.console import say
from runtime.errors import BadArguments
from runtime.script import run_script
from tools.formats import preparation_of

OUTLINE = "#202020"
Merged = TokenMerge | DenseTokenMerge | Groups


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "example: python -m tools.show_tokens runs/pm/pruned_checkpoint.pth image.jpg --output tokens.png",
        "tools.show_tokens",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of a token-compressed model")
    parser.add_argument("image", metavar="IMAGE", help="resized to the model's input")
    parser.add_argument("--output", metavar="FILE", default="tokens.png", help="the picture (default: %(default)s)")
    return parser


def patches_of(pixels: Tensor, grid: Sequence[int]) -> Tensor:
    """(H, W, 3) -> (N, h, w, 3), row by row."""
    (rows, columns), (height, width, _) = grid, pixels.shape
    split = pixels.reshape(rows, height // rows, columns, width // columns, 3)
    return split.transpose(1, 2).flatten(0, 1)


def image_of(patches: Tensor, grid: Sequence[int]) -> Tensor:
    """The inverse of `patches_of`."""
    n, h, w, _ = patches.shape
    return patches.view(*grid, h, w, 3).transpose(1, 2).reshape(grid[0] * h, grid[1] * w, 3)


@torch.inference_mode()
def groups_of(model: VisionTransformer, pixels: Tensor) -> list[Merged]:
    """What merges this image in every compressed block."""
    prepared = preparation_of(model)
    mean, std = torch.tensor(prepared.mean), torch.tensor(prepared.std)
    groups, images = [], ((pixels - mean) / std).permute(2, 0, 1)[None]
    hooks = [
        model.blocks[i].register_forward_pre_hook(lambda block, x: groups.append(block.tokens.groups_for(x[0])))
        for i, _ in layers(model)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return groups


def pictures(tokens: Merged, pixels: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(groups, reconstruction, owner): two images (H, W, 3), and the group of every patch (N,), SKIPPED for none."""
    M, R, s = (t.detach().float() for t in tokens.matrices())
    P = tokens.prefix
    patches = patches_of(pixels, grid)
    M, R, s = M[P:, P:], R[P:, P:], s[P:]
    if isinstance(tokens, DenseTokenMerge):
        owner = torch.where(tokens.skip[P:], SKIPPED, P + M.argmax(0))
    else:
        owner = tokens.owner if isinstance(tokens, TokenMerge) else tokens.owner[0, P:]
    member = (owner[:, None] == P + torch.arange(len(M))).float()  # N K
    means = torch.einsum("nk,nhwc->kc", member, patches) / patches[0, ..., 0].numel()
    means = means / member.sum(0).clamp_min(1)[:, None]
    shown = torch.ones_like(patches)
    held = owner != SKIPPED
    shown[held] = means[owner[held] - P][:, None, None, :].expand(-1, *patches.shape[1:])
    z = torch.einsum("kn,nhwc->khwc", M, patches)
    own = s[:, None, None, None] * (patches - held.view(-1, 1, 1, 1) * torch.einsum("nk,khwc->nhwc", R, z))
    back = torch.einsum("nk,khwc->nhwc", R, z) + own
    return image_of(shown, grid), image_of(back.clamp(0, 1), grid), owner


def outline(axes: Axes, owner: Tensor, grid: Sequence[int], size: Sequence[float]) -> None:
    """Lines between patches of different groups, and around every skipped one."""
    rows, columns = grid
    group = owner.view(rows, columns)
    h, w = size
    for r in range(rows):
        for c in range(columns):
            for down, right in ((1, 0), (0, 1)):
                if r + down < rows and c + right < columns:
                    other = group[r + down, c + right]
                    if group[r, c] != other or other == SKIPPED:
                        x, y = (c + right) * w - 0.5, (r + down) * h - 0.5
                        axes.plot([x, x + down * w], [y, y + right * h], color=OUTLINE, linewidth=0.6)


def draw(model: VisionTransformer, pixels: Tensor, path: str) -> None:
    """Write the picture. pixels: (H, W, 3) in [0, 1], of the model's input size."""
    grid, compressed, merged = model.patch_embed.grid_size, list(layers(model)), groups_of(model, pixels)
    size = pixels.shape[0] / grid[0], pixels.shape[1] / grid[1]
    across = min(2, len(compressed))
    down = -(-len(compressed) // across)
    figure, axes = plt.subplots(down, 2 * across, figsize=(4.4 * across, 2.5 * down), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for k, (i, tokens) in enumerate(compressed):
        groups, back, owner = pictures(merged[k], pixels, grid)
        left, right = axes[k % down, 2 * (k // down) : 2 * (k // down) + 2]
        left.imshow(np.asarray(groups), interpolation="nearest")
        outline(left, owner, grid, size)
        right.imshow(np.asarray(back), interpolation="nearest")
        skipped, kept = int((owner == SKIPPED).sum()), tokens.tokens - tokens.prefix
        left.set_title(f"block {i}: {kept} of {len(owner)} tokens, {skipped} skipped", fontsize=8)
        right.set_title("put back", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=160)
    plt.close(figure)


def read_image(path: str, size: Sequence[int]) -> Tensor:
    """(H, W, 3) in [0, 1], resized. Raises ValueError for a file that is no image."""
    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} is no image that can be read: {error}") from None
    return torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)


def main(args: argparse.Namespace) -> None:
    try:
        model = load_dense(args.checkpoint)
        if not list(layers(model)):
            raise ValueError(f"{args.checkpoint} has no token structure; main_pm_vit.py --prune makes one")
        pixels = read_image(args.image, model.patch_embed.img_size)
        if not Path(args.output).resolve().parent.is_dir():
            raise ValueError(f"--output: there is no folder {Path(args.output).resolve().parent}")
    except (CheckpointError, ValueError) as error:
        raise BadArguments([str(error)]) from None
    draw(model, pixels, args.output)
    say(f"{args.output}: {sum(1 for _ in layers(model))} compressed blocks")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
