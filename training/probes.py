"""What features are good for, the backbone untouched: nearest neighbours, and a linear classifier on top."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO's evaluation (Caron et al., arXiv 2104.14294)
MOST_IMAGES = 10_000  # of a bank
ROUNDS = 500  # of the linear classifier's solver


@torch.inference_mode()
def embed(model: nn.Module, dataset: Dataset, batch: int, workers: int = 0) -> tuple[Tensor, Tensor]:
    """Features (n, d) of a headless model and labels (n,) of MOST_IMAGES images at most, evenly spread; on the CPU.

    Images that cannot be read (None) are left out.
    """
    device = next(model.parameters()).device
    places = range(0, len(dataset), -(-len(dataset) // MOST_IMAGES))
    loader = DataLoader(Subset(dataset, places), batch_size=batch, num_workers=workers, collate_fn=list)
    features, labels = [], []
    for samples in loader:
        readable = [sample for sample in samples if sample is not None]
        if readable:
            images, targets = zip(*readable, strict=True)
            features.append(model(torch.stack(images).to(device)).flatten(1).float().cpu())
            labels += targets
    return torch.cat(features), torch.tensor(labels)


def neighbours(bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]) -> float:
    """Top-1 in percent of a vote among the NEIGHBOURS images of the bank with the highest cosine similarity s, each
    weighted by exp(s / TEMPERATURE). Both are (features (n, d), labels (n,))."""
    known, labels = F.normalize(bank[0], dim=1), bank[1]
    similar, places = (F.normalize(queries[0], dim=1) @ known.T).topk(min(NEIGHBOURS, len(known)), dim=1)
    votes = torch.zeros(len(similar), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[places], (similar / TEMPERATURE).exp())
    return 100 * (votes.argmax(1) == queries[1]).float().mean().item()


def linear(bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]) -> float:
    """Top-1 in percent of a logistic regression on standardised features of the bank."""
    from sklearn.linear_model import LogisticRegression  # slow to import, and only this needs it
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=ROUNDS))
    classifier.fit(bank[0].numpy(), bank[1].numpy())
    return 100 * float(classifier.score(queries[0].numpy(), queries[1].numpy()))
