"""How far drawn images are from real ones, in the features of a classifier trained here.

Features are what the last hidden layer of a small convolutional network gives, which is trained on
the training digits with one fixed seed, so that all arms are seen by the same eyes. The distance is
Frechet's between two normal laws with the features' means and covariances:
|m - n|^2 + tr(C + D - 2 (C^1/2 D C^1/2)^1/2), in float64. It has the form of FID and none of its
scale: numbers are comparable within one study only. It falls with the number of images, so all
arms draw as many.

Source: FID, arXiv 1706.08500.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, CHANNELS, BATCH = 32, 24, 128

# N images, W features


class Eyes(nn.Module):
    """Images (N, 1, H, H) -> features (N, W) -> logits (N, 10)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.second = nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, padding=1)
        self.last = nn.Linear(2 * CHANNELS * (size // 4) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """(N, W)."""
        x = F.max_pool2d(F.relu(self.first(images)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return F.relu(self.last(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@dataclass(frozen=True, slots=True)
class Seen:
    """What images look like to the eyes: features (N, W) float64, classes (N,)."""

    features: Tensor
    classes: Tensor


@torch.no_grad()
def seen(eyes: Eyes, images: Tensor) -> Seen:
    """Of images (N, 1, H, H); what lies beyond [-1, 1] is cut off, as in a picture."""
    features = torch.cat([eyes.features(part.clamp(-1, 1)) for part in images.split(500)])
    return Seen(features.double(), eyes.head(features).argmax(dim=1))


def trained_eyes(images: Tensor, labels: Tensor, *, epochs: int) -> Eyes:
    """The classifier, trained on (N, 1, H, H) with AdamW at a falling rate; seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        eyes = Eyes(images.shape[-1])
    generator = torch.Generator().manual_seed(0)
    steps = max(1, epochs * len(images) // BATCH)
    optimizer = torch.optim.AdamW(eyes.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        F.cross_entropy(eyes(images[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return eyes.eval().requires_grad_(False)


def frechet(one: Tensor, other: Tensor) -> float:
    """Distance between two sets of features, (N, W) and (M, W) in float64."""
    C, D = one.T.cov(), other.T.cov()
    root = _root(C)
    cross = torch.linalg.eigvalsh(root @ D @ root).clamp_min(0).sqrt().sum()
    gap = (one.mean(dim=0) - other.mean(dim=0)).square().sum()
    return max(0.0, float(gap + C.trace() + D.trace() - 2 * cross))


def _root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_ref(one: Tensor, other: Tensor) -> float:
    """Twin of `frechet`: sums in loops, and the roots of the eigenvalues of the product C D."""
    means, covariances = [], []
    for each in (one.double(), other.double()):
        mean = sum(each.unbind(0), torch.zeros(each.shape[1], dtype=torch.float64)) / len(each)
        away = [row - mean for row in each.unbind(0)]
        total = sum((torch.outer(a, a) for a in away), torch.zeros(len(mean), len(mean)).double())
        means.append(mean)
        covariances.append(total / (len(each) - 1))
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp_min(0).sqrt()
    gap = (means[0] - means[1]).square().sum()
    return float(gap + covariances[0].trace() + covariances[1].trace() - 2 * roots.sum())
