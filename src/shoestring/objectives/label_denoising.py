"""Classifying by denoising: a block says the class from an image and the class's noised row.

The target of class c is row c of a frozen table (V, W) with rows of length 1, noised as in EDM:
z = y + sigma eps, fed as c_in z with the deviation of a row's components, 1 / sqrt(W), as
sigma_data. The block gives logits; the loss is their cross-entropy, without a weight: EDM's is of
squared errors, and up to 250,000 on a loss that is not. D, which the chain needs, is
softmax(logits) @ table, the mean of the row given what the block knows.

Below a sigma of about 1 / sqrt(2 ln V) the nearest row to z is the class whatever the image shows,
so a mean loss over levels says little: what counts is the loss at the highest, where z carries
nothing. There an answer begins, and training hardly ever is; `top_share` of block 1's draws are, or
of every block's where each reads what the one before it made of the image.

Source: DiffusionBlocks, arXiv 2506.14202, 5.1 and App. B; NoProp, arXiv 2503.24322.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops import preconditioning as ops
from ..ops.noise_levels import LogNormal, Partition

# N samples, V classes, W width of the table


@dataclass(frozen=True, slots=True)
class Draw:
    """level (N,), float64; noise (N, W)."""

    level: Tensor
    noise: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelDenoising:
    """How rows are noised. ConfigError for levels that are no sigma.

    top_share: of block 1's draws (top_all: of every block's), at the highest level.
    """

    partition: Partition
    top_share: float = 0.0
    top_all: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.partition.law, LogNormal):
            raise ConfigError(
                f"labels with noise levels in {self.partition.law.kind}",
                expected="levels of kind sigma",
            )

    def draw(self, block: int, count: int, width: int, generator: torch.Generator) -> Draw:
        """What one step of a block needs beside images and labels."""
        level = self.partition.sample(block, count, generator)
        at_top = torch.rand(count, generator=generator) < self.top_share
        if block == 1 or self.top_all:
            level = torch.where(at_top, self.partition.law.high, level)
        return Draw(level, torch.randn(count, width, generator=generator))

    def noised(self, labels_N: Tensor, draw: Draw, table_VW: Tensor) -> Tensor:
        """z (N, W)."""
        rows = table_VW[labels_N]
        return ops.edm_noised(rows, draw.noise.to(rows.device), draw.level.to(rows.device))

    def logits(self, net: nn.Module, z_NW: Tensor, level_N: Tensor, images: Tensor) -> Tensor:
        """What a block answers, (N, V) float32.

        net: (c_in z, noise (N,), images) -> (N, V), such as a block of a classifying DiT. images:
        or the rows that the block reads instead.
        """
        level = level_N.to(z_NW.device, torch.float32)
        scales = ops.edm_scales(level, z_NW.shape[1] ** -0.5)
        answered: Tensor = net(ops.spread(scales.inner, z_NW) * z_NW, scales.noise, images)
        return answered.float()

    def rows(self, net: Any, seen: Tensor, width: int) -> Tensor:
        """The rows (N, T + 1, D) that a block makes of what it reads, for the next one to read:
        with z = 0, the middle of what there is at the highest level. So they depend on the image
        alone, and one reading serves every z.

        net: with a method `rows`, (z (N, W), noise (N,), seen) -> (N, T + 1, D).  width: W.
        """
        level = torch.full((len(seen),), self.partition.law.high, device=seen.device)
        z = torch.zeros(len(seen), width, device=seen.device)
        made: Tensor = net.rows(z, ops.edm_scales(level, 1.0).noise, seen)
        return made

    def losses(
        self, net: nn.Module, images: Tensor, labels_N: Tensor, draw: Draw, table_VW: Tensor
    ) -> Tensor:
        """Cross-entropy of every sample in nats, (N,), with its graph."""
        z = self.noised(labels_N, draw, table_VW)
        return F.cross_entropy(self.logits(net, z, draw.level, images), labels_N, reduction="none")


def denoised(logits_NV: Tensor, table_VW: Tensor) -> Tensor:
    """D, (N, W): the mean row."""
    return logits_NV.softmax(dim=1) @ table_VW


def nearest_ref(z_NW: Tensor, level_N: Tensor, table_VW: Tensor) -> Tensor:
    """Log-probabilities (N, V) of the classes for one who sees z and no image: the rows are alike
    in length, so ln p(c | z) = z . row_c / sigma^2 up to what is the same for all; float64."""
    scores = z_NW.double() @ table_VW.double().T / level_N.double().square()[:, None]
    return scores.log_softmax(dim=1)
