"""Masked diffusion of text with one block: the one text objective here with a likelihood.

Each token is masked with probability m(t) = 1 - alpha(t), the level's mass. Equation: the negative
evidence lower bound is the integral over m from 0 to 1 of E[sum over masked tokens of CE] / m, so
block b's part is the integral over the masses it owns, and the parts sum to the whole. With m even
in (0, 1) the work is even, too: edges lie evenly in alpha. A step's loss is that of one draw of m
for every text, per token: (1 / N T) sum_n (1 / m_n) sum over masked tokens of CE.

Logits that are more than a chunk (8 MiB) exist a chunk at a time and for masked places only
(`ops/chunked_loss.py`). The table they are made with is frozen, so no gradient of its size is ever
made. Draws are made on the CPU.

Source: MD4, arXiv 2406.04329; DiffusionBlocks, arXiv 2506.14202, App. D.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops.chunked_loss import CHUNK_BYTES, linear_cross_entropy
from ..ops.noise_levels import MaskTime, Partition

# N texts, T tokens, V vocabulary, W width of the table


@dataclass(frozen=True, slots=True)
class Draw:
    """level (N,), float64: the time of every text; masked (N, T), boolean."""

    level: Tensor
    masked: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedDiffusion:
    """How texts are masked. top_share: of block 1's draws in training, all masked, where a text
    begins; the bound knows nothing of it. ConfigError for noise levels that are no masking."""

    partition: Partition
    top_share: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.partition.law, MaskTime):
            raise ConfigError(
                f"masked diffusion with noise levels in {self.partition.law.kind}",
                expected="levels of kind mask",
            )

    def draw(self, block: int, tokens_NT: Tensor, generator: torch.Generator) -> Draw:
        """What one step of a block needs beside the tokens: levels evenly over the block's share,
        which lowers the variance of the mean and keeps what it is right for."""
        level = self.partition.sample(block, len(tokens_NT), generator, even=True)
        if self.top_share and block == 1:
            at_top = torch.rand(len(tokens_NT), generator=generator) < self.top_share
            level = torch.where(at_top, self.partition.law.high, level)
        return self.draw_at(level, tokens_NT, generator)

    def draw_at(self, level_N: Tensor, tokens_NT: Tensor, generator: torch.Generator) -> Draw:
        """A draw at given levels."""
        mass = self.partition.law.mass(level_N)
        u = torch.rand(tokens_NT.shape, generator=generator, dtype=torch.float64)
        return Draw(level_N, (u < mass[:, None]).to(tokens_NT.device))

    def losses(self, net: nn.Module, tokens_NT: Tensor, draw: Draw, table_VW: Tensor) -> Tensor:
        """Of every text, (N,): the sum of its masked tokens' nats over m, with its graph.

        net: (tokens, masked, noise (N,), table) -> (N, T, W), such as a block of a DiT.
        """
        noise = draw.level.to(tokens_NT.device, torch.float32)
        hidden = net(tokens_NT, draw.masked, noise, table_VW)
        mass = self.partition.law.mass(draw.level)
        if tokens_NT.numel() * len(table_VW) * 4 <= CHUNK_BYTES:
            return _at_once(hidden, tokens_NT, draw.masked, mass, table_VW)
        texts = zip(hidden, tokens_NT, draw.masked, mass.tolist(), strict=True)
        return torch.stack([_one_text(*text, table_VW) for text in texts])

    def loss(self, net: nn.Module, tokens_NT: Tensor, draw: Draw, table_VW: Tensor) -> Tensor:
        """The mean over texts, a token; a scalar."""
        return self.losses(net, tokens_NT, draw, table_VW).mean() / tokens_NT.shape[1]

    @torch.no_grad()
    def nelbo(
        self,
        net: nn.Module,
        block: int,
        tokens_NT: Tensor,
        table_VW: Tensor,
        generator: torch.Generator,
        *,
        draws: int = 1,
    ) -> Tensor:
        """Block b's part of each text's bound, (N,) nats, estimated with `draws` levels a text.

        The sum over all blocks is an unbiased estimate of the whole bound.
        """
        # A bound is of the ranges that blocks own: what overlaps would be counted twice.
        own = dataclasses.replace(
            self, partition=dataclasses.replace(self.partition, overlap=0.0), top_share=0.0
        )
        ends = torch.tensor(own.partition.range(block), dtype=torch.float64)
        share = float(self.partition.law.mass(ends).diff())
        total = torch.zeros(len(tokens_NT), dtype=torch.float64)
        for _ in range(draws):
            total += own.losses(
                net, tokens_NT, own.draw(block, tokens_NT, generator), table_VW
            ).cpu()
        return total * share / draws


def _at_once(hidden: Tensor, tokens: Tensor, masked: Tensor, mass: Tensor, table: Tensor) -> Tensor:
    """Losses of all texts where all their logits are not more than a chunk's."""
    logits = (hidden @ table.T).float()
    nats = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    sums = (nats.view(tokens.shape) * masked).sum(dim=1)
    # A level of mass 0 masks nothing: its text's sum is 0 whatever it is divided by.
    return sums / mass.clamp_min(1e-12).to(sums.device, sums.dtype)


def _one_text(
    hidden: Tensor, tokens: Tensor, masked: Tensor, mass: float, table: Tensor
) -> Tensor:  # fmt: skip
    """Loss of one text, of its masked places alone, in chunks."""
    if not bool(masked.any()):
        return hidden.float().sum() * 0
    return linear_cross_entropy(hidden[masked], table, tokens[masked], num_items=mass)


def bits_per_token(nats: Tensor, tokens: int) -> float:
    """Bits a token of a bound in nats, (N,), over N texts of `tokens` tokens; of bytes, bits per
    character."""
    return float(nats.double().mean()) / tokens / math.log(2)


def nelbo_ref(
    logits_NTV: Tensor, tokens_NT: Tensor, masked_NT: Tensor, mass_N: Tensor
) -> Tensor:  # fmt: skip
    """Twin of `losses` for logits at hand: term by term, float64, (N,)."""
    logs = logits_NTV.double().log_softmax(dim=-1)
    sums = []
    for n in range(len(tokens_NT)):
        terms = [-logs[n, t, tokens_NT[n, t]] for t in range(tokens_NT.shape[1]) if masked_NT[n, t]]
        sums.append(sum(terms, torch.zeros((), dtype=torch.float64)) / mass_N[n])
    return torch.stack(sums)
