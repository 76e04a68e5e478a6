"""torch.hub entry: torch.hub.load(repo, "vit_from_checkpoint", path)."""

from torch import nn

from models.pretrained import load_dense

dependencies = ["torch", "timm"]


def vit_from_checkpoint(path: str, device: str = "cpu") -> nn.Module:
    """A checkpoint of this project as a compact model in eval mode (see `models.load_dense`).

    path: a checkpoint, a folder that tools.export has written, or hf-hub:OWNER/NAME. Raises CheckpointError.
    """
    return load_dense(path, device)
