"""What an input tells beyond the noised target, by noise level, for edges at equal useful work.

Classes: a cheap reader (ridge regression on random features of the image, half of the samples, its
scores sharpened on the other half) gives p(c | x). One who also sees z = row_c + sigma eps knows

    p(c | x, z)  ~  p(c | x) exp(z . row_c / sigma^2)         (rows of length 1)

exactly, whatever p(c | x) is, and one who sees z alone the same with the classes' frequencies. The
gap is the difference of their mean cross-entropies. Images: see `ops/useful_levels.linear_gap`.

Everything is a function of the data alone, on the CPU in float64, so that every job finds the same.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.noise_levels import Law
from ..ops.useful_levels import linear_gap

# N samples, V classes, W width of the table, K levels, E values of an image

SAMPLES, FEATURES, RIDGE = 4096, 512, 1.0
SHARPNESS = tuple(2.0**k for k in range(-2, 7))


def class_gap(images: Tensor, labels_N: Tensor, table_VW: Tensor) -> Callable[[Tensor], Tensor]:
    """The gap in nats of images (N, ...) with their classes, levels (K,) -> (K,)."""
    rows = torch.linspace(0, len(images) - 1, min(SAMPLES, len(images))).long()
    x, labels = images[rows].flatten(1).double(), labels_N[rows]
    table, V = table_VW.double().cpu(), len(table_VW)
    seen, known = _read(x, labels, V)
    labels = labels[seen]
    prior = torch.bincount(labels, minlength=V).double().clamp_min(0.5).log().log_softmax(0)
    noise = torch.randn(
        len(labels), table.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )

    def gap(level_K: Tensor) -> Tensor:
        found = []
        for level in level_K.double():
            score = (table[labels] + level * noise) @ table.T / level.square()
            blind, sighted = (F.cross_entropy(score + p, labels) for p in (prior, known))
            found.append(blind - sighted)
        return torch.stack(found)

    return gap


def _read(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(numbers of the samples that were not fitted, their log p(c | x))."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    fitted, rest = order[: len(x) // 2], order[len(x) // 2 :]
    x = (x - x[fitted].mean(dim=0)) / (x[fitted].std() + 1e-12)
    into = torch.randn(x.shape[1], FEATURES, generator=generator, dtype=torch.float64)
    shift = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    features = F.pad((x @ into / x.shape[1] ** 0.5 + shift).relu(), (0, 1), value=1.0)
    A, target = features[fitted], F.one_hot(labels[fitted], classes).double()
    ridge = RIDGE * torch.eye(A.shape[1], dtype=torch.float64)
    scores = features[rest] @ torch.linalg.solve(A.T @ A + ridge, A.T @ target)
    losses = [float(F.cross_entropy(sharp * scores, labels[rest])) for sharp in SHARPNESS]
    sharp = SHARPNESS[losses.index(min(losses))]
    return rest, (sharp * scores).log_softmax(dim=1)


def image_gap(images: Tensor, law: Law, data_std: float) -> Callable[[Tensor], Tensor]:
    """The gap of images (N, ...) as floats, in units of the training's loss."""
    rows = torch.linspace(0, len(images) - 1, min(SAMPLES // 2, len(images))).long()
    x = images[rows].flatten(1).double()
    x = x - x.mean(dim=0)
    N, E = x.shape
    # The smaller of the two products has all eigenvalues that are not 0.
    product = x.T @ x if E <= N else x @ x.T
    spectrum = F.pad(torch.linalg.eigvalsh(product / N), (0, max(0, E - N)))
    return linear_gap(law, x.square().mean(dim=0), spectrum, data_std)
