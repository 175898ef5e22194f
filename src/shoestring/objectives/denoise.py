"""Denoising images with one block, in the noise that the block owns.

Equations: EDM, L_b = E |F(c_in z, c_noise) - f|^2 with z = y + sigma eps and the target f of
`ops/preconditioning.py`, which is E w(sigma) |D - y|^2. Flow, L_b = E |F(z, t) - (eps - y)|^2 with
z = (1 - t) y + t eps. Levels are drawn from the block's share of the law, one a sample; the mean
is over samples and components. With one block this is plain EDM, or plain flow matching.

A class label is left out of a share of the samples (drawn), so that a model can also be asked
without one, which guidance needs. Draws are made on the CPU, so they are the same on every device.

Memory: nothing beyond the block's own. Source: arXiv 2506.14202, Eq. 6; EDM, arXiv 2206.00364;
flow matching, arXiv 2210.02747; classifier-free guidance, arXiv 2207.12598.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops import preconditioning as ops
from ..ops.noise_levels import FlowTime, LogNormal, Partition

Kind = Literal["edm", "flow"]
_LAWS = {"edm": LogNormal, "flow": FlowTime}


@dataclass(frozen=True, slots=True)
class Draw:
    """What a step draws: levels (N,) float64, noise of the images' shape, labels (N,) or None."""

    level: Tensor
    noise: Tensor
    labels: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Denoise:
    """How images are noised and what a block is asked for.

    data_std: deviation of the images' values (EDM).  label_dropout: share of the labels left out.
    classes: 0 = the model takes no labels.  top_share: of block 1's draws, at the highest level,
    where a chain begins and training hardly ever is.
    """

    kind: Kind
    partition: Partition
    data_std: float = 0.5
    label_dropout: float = 0.1
    classes: int = 0
    top_share: float = 0.0

    def __post_init__(self) -> None:
        law = self.partition.law
        if self.kind not in _LAWS or not isinstance(law, _LAWS[self.kind]):
            raise ConfigError(
                f"objective {self.kind!r} with noise levels in {law.kind}",
                expected="edm with sigma, or flow with time",
            )

    def draw(
        self, block: int, images: Tensor, labels: Tensor | None, generator: torch.Generator
    ) -> Draw:
        """What one step of a block needs beside the images (N, C, H, W)."""
        level = self.partition.sample(block, len(images), generator)
        noise = torch.randn(images.shape, generator=generator)
        kept: Tensor | None = None
        if self.classes:
            assert labels is not None
            left_out = torch.rand(len(images), generator=generator) < self.label_dropout
            kept = torch.where(left_out.to(labels.device), self.classes, labels)
        if self.top_share and block == 1:
            at_top = torch.rand(len(images), generator=generator) < self.top_share
            level = torch.where(at_top, self.partition.law.high, level)
        return Draw(level, noise.to(images.device), kept)

    def losses(self, net: nn.Module, images: Tensor, draw: Draw) -> Tensor:
        """The loss of every sample, (N,) float32 with its graph.

        net: (z, noise (N,), labels or None) -> z's shape, such as a block of a DiT.
        """
        level = draw.level.to(images.device, torch.float32)
        if self.kind == "flow":
            got = net(ops.flow_noised(images, draw.noise, level), level, draw.labels)
            target = draw.noise - images
        else:
            scales = ops.edm_scales(level, self.data_std)
            z = ops.edm_noised(images, draw.noise, level)
            got = net(ops.spread(scales.inner, z) * z, scales.noise, draw.labels)
            target = ops.edm_target(images, draw.noise, level, self.data_std)
        return (got.float() - target.float()).square().flatten(1).mean(dim=1)

    def loss(self, net: nn.Module, images: Tensor, draw: Draw) -> Tensor:
        """The mean of `losses`, a scalar."""
        return self.losses(net, images, draw).mean()

    def denoised(
        self, net: nn.Module, z: Tensor, level_N: Tensor, labels_N: Tensor | None = None
    ) -> Tensor:
        """D, the clean images that a block expects behind z at these levels."""
        level = level_N.to(z.device, torch.float32)
        if self.kind == "flow":
            return ops.flow_denoised(net(z, level, labels_N).float(), z, level)
        scales = ops.edm_scales(level, self.data_std)
        got = net(ops.spread(scales.inner, z) * z, scales.noise, labels_N)
        return ops.edm_denoised(got.float(), z, level, self.data_std)

    def start(self, noise: Tensor) -> Tensor:
        """The noisiest z, out of standard normal noise."""
        top = self.partition.law.high
        return noise * top if self.kind == "edm" else noise
