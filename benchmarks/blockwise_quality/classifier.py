"""The judge of drawn digits: a small convolutional network, and the Frechet distance of its sight.

Frechet distance of two clouds with means m and covariances S:
|m - m'|^2 + tr(S + S' - 2 (S S')^1/2) (arXiv 1706.08500). The features are of this classifier, so
distances compare with each other only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.training.blockwise.task import Images


class Classifier(nn.Module):
    """Digits (N, 1, 28, 28) to logits (N, 10), by 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 5, 2, 2), nn.Conv2d(16, 32, 5, 2, 2)
        self.features, self.out = nn.Linear(32 * 7 * 7, 64), nn.Linear(64, 10)

    def hidden(self, images: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(images))))
        return F.relu(self.features(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.hidden(images))

    @torch.no_grad()
    def features_of(self, images: Tensor) -> Tensor:
        return torch.cat([self.hidden(part) for part in images.split(100)]).double()


def train_classifier(task: Images, *, epochs: int) -> tuple[Classifier, dict[str, float]]:
    """The judge, its held-out accuracy, and how far held-out digits are from digits."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(task.train)).split(50):
            images, labels = task.train.batch(rows)
            assert labels is not None
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval().requires_grad_(False)
    images, labels = task.held_out.batch(torch.arange(len(task.held_out)))
    others, _ = task.train.batch(torch.randperm(len(task.train))[: len(images)])
    return model, {
        "accuracy": float((model(images).argmax(1) == labels).double().mean()),
        "frechet_of_digits": frechet(model.features_of(others), model.features_of(images)),
    }


def frechet(one: Tensor, other: Tensor) -> float:
    """Distance of two clouds of features (N, F), float64."""
    gap = (one.mean(0) - other.mean(0)).square().sum()
    S, R = one.T.cov(), other.T.cov()
    values, vectors = torch.linalg.eigh(S)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ R @ root).clamp_min(0).sqrt().sum()
    return float(gap + S.trace() + R.trace() - 2 * cross)
