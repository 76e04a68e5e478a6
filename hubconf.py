"""torch.hub entry: torch.hub.load(repo, "vit_from_checkpoint", path)."""
from models.pretrained import load_dense

dependencies = ["torch", "timm"]


def vit_from_checkpoint(path: str, device: str = "cpu"):
    """A checkpoint of this project as a compact model in eval mode (see `models.load_dense`)."""
    return load_dense(path, device)
