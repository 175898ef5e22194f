"""Denoising the token that follows: a block says what it is from those before and its noised row.

The target of token v is row v of a frozen table (V, W) with rows of length 1, noised as in EDM,
z = y + sigma eps, with one sigma for a text and noise of its own for every token. A block is fed
c_in z, with the deviation of a row's components, 1 / sqrt(W), as sigma_data, and the clean tokens
as they are. It gives logits; the loss is their cross-entropy, without a weight (EDM's is of squared
errors). D, which the chain needs, is softmax(logits) @ table.

Below a sigma of about 1 / sqrt(2 ln V) the nearest row to z is the token, whatever came before, so
a mean over levels says little. What counts is the loss at the highest level, where z says nothing,
against what z says alone (`of_z_alone_ref`). And since noise is drawn for each token by itself,
z_i says nothing of other tokens: what is to be known is p(v | before, z) ~ p(v | before)
exp(z . row_v / sigma^2). So from any next-token prediction a denoiser of every level follows
(`posterior_ref`), and a trained one can at best equal that of a perfect prediction.

Mixed: every `mixed_every`-th update is of the ordinary next-token loss, read at the clean rows.

Source: DiffusionBlocks, arXiv 2506.14202, 5.4 and App. B.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..ops import preconditioning as ops
from ..ops.chunked_loss import linear_cross_entropy
from ..ops.noise_levels import LogNormal, Partition

OWN_BITS = "next-token bits per byte"
"""What a receipt calls the likelihood of a block's own next-token predictions."""

# N texts, T tokens, V vocabulary, W width of the table


@dataclass(frozen=True, slots=True)
class Draw:
    """level (N,), float64; noise (N, T, W)."""

    level: Tensor
    noise: Tensor


class Net(Protocol):
    """A block of a `Causal`."""

    def __call__(
        self, tokens_NT: Tensor, z_NTW: Tensor, noise_N: Tensor, table_VW: Tensor
    ) -> Tensor: ...

    def next_tokens(self, tokens_NT: Tensor, table_VW: Tensor) -> Tensor:
        """What the clean rows answer, (N, T, W)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDenoising:
    """How tokens are noised. top_share: of block 1's draws, at the highest level. mixed_every:
    which updates are of the ordinary loss; 0 = none. ConfigError for levels that are no sigma."""

    partition: Partition
    top_share: float = 0.0
    mixed_every: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.partition.law, LogNormal):
            raise ConfigError(
                f"tokens with noise levels in {self.partition.law.kind}",
                expected="levels of kind sigma",
            )

    def draw(self, block: int, tokens_NT: Tensor, width: int, generator: torch.Generator) -> Draw:
        """What one step of a block needs beside the tokens."""
        count, length = tokens_NT.shape
        level = self.partition.sample(block, count, generator, even=True)
        at_top = torch.rand(count, generator=generator) < self.top_share
        if block == 1:
            level = torch.where(at_top, self.partition.law.high, level)
        return Draw(level, torch.randn(count, length, width, generator=generator))

    def is_ordinary(self, step: int) -> bool:
        """Whether an update (1, 2, ...) is of the ordinary next-token loss."""
        return self.mixed_every > 0 and step % self.mixed_every == 0

    def noised(self, tokens_NT: Tensor, draw: Draw, table_VW: Tensor) -> Tensor:
        """z (N, T, W)."""
        rows = table_VW[tokens_NT]
        return ops.edm_noised(rows, draw.noise.to(rows.device), draw.level.to(rows.device))

    def answers(
        self, net: Net, tokens_NT: Tensor, z_NTW: Tensor, level_N: Tensor, table_VW: Tensor
    ) -> Tensor:
        """What a block answers to z among these tokens, (N, T, W)."""
        z, noise = scaled(z_NTW, level_N)
        return net(tokens_NT, z, noise, table_VW)

    def loss(self, net: Net, tokens_NT: Tensor, draw: Draw, table_VW: Tensor) -> Tensor:
        """Mean cross-entropy of the noised tokens, nats a token, with its graph."""
        z = self.noised(tokens_NT, draw, table_VW)
        hidden = self.answers(net, tokens_NT, z, draw.level, table_VW)
        return _mean_loss(hidden, tokens_NT, table_VW)

    def ordinary_loss(self, net: Net, tokens_NT: Tensor, table_VW: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens as the clean rows foresee them, nats a token: minus the
        mean log-likelihood of the texts under this block alone."""
        return _mean_loss(net.next_tokens(tokens_NT, table_VW), tokens_NT, table_VW)


def scaled(z: Tensor, level_N: Tensor) -> tuple[Tensor, Tensor]:
    """(c_in z, c_noise): what a block is fed for z (N, ..., W)."""
    scales = ops.edm_scales(level_N.to(z.device, torch.float32), z.shape[-1] ** -0.5)
    return ops.spread(scales.inner, z) * z, scales.noise


def denoised(logits: Tensor, table_VW: Tensor) -> Tensor:
    """D, (..., W): the mean row."""
    return logits.softmax(dim=-1) @ table_VW


def nats(hidden_NTW: Tensor, tokens_NT: Tensor, table_VW: Tensor) -> Tensor:
    """Cross-entropy of every token, (N, T) float32."""
    logits = (hidden_NTW @ table_VW.T).float()
    return F.cross_entropy(logits.transpose(1, 2), tokens_NT, reduction="none")


def _mean_loss(hidden_NTW: Tensor, tokens_NT: Tensor, table_VW: Tensor) -> Tensor:
    return linear_cross_entropy(hidden_NTW.flatten(0, 1), table_VW, tokens_NT.flatten())


# ---- twins and controls ------------------------------------------------------------------------


def loss_ref(logits_NTV: Tensor, tokens_NT: Tensor) -> Tensor:
    """Twin of the mean loss for logits at hand: term by term, float64."""
    logs = logits_NTV.double().log_softmax(dim=-1)
    terms = [
        -logs[n, t, token]
        for n, row in enumerate(tokens_NT.tolist())
        for t, token in enumerate(row)
    ]
    return torch.stack(terms).mean()


def noised_ref(tokens_NT: Tensor, draw: Draw, table_VW: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of `noised` and `scaled`: (c_in z, c_noise), token by token, float64."""
    table, width = table_VW.double(), table_VW.shape[1]
    z = torch.zeros(*tokens_NT.shape, width, dtype=torch.float64)
    for n, sigma in enumerate(draw.level.double()):
        for t, token in enumerate(tokens_NT[n].tolist()):
            one = table[token] + sigma * draw.noise[n, t].double()
            z[n, t] = one / (sigma**2 + 1 / width).sqrt()
    return z, draw.level.double().log() / 4


def of_z_alone_ref(z: Tensor, level_N: Tensor, table_VW: Tensor) -> Tensor:
    """Log-probabilities (..., V) of the tokens for one who sees z (N, ..., W) and nothing before:
    rows are alike in length, so ln p(v | z) = z . row_v / sigma^2 up to a constant; float64."""
    return _told_by(z, level_N, table_VW).log_softmax(dim=-1)


def posterior_ref(logits: Tensor, z: Tensor, level_N: Tensor, table_VW: Tensor) -> Tensor:
    """The same for one who foresees tokens with logits (N, ..., V) and is shown z; float64."""
    prior = logits.double().log_softmax(dim=-1)
    return (prior + _told_by(z, level_N, table_VW)).log_softmax(dim=-1)


def _told_by(z: Tensor, level_N: Tensor, table_VW: Tensor) -> Tensor:
    squares = level_N.double().square().to(z.device)
    return z.double() @ table_VW.double().T / ops.spread(squares, z.double())
