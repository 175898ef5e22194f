"""What the blocks of a diffusion transformer are made of: layers, the condition, positions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.preconditioning import waves_of_level
from .dit_config import DiTConfig

# N samples, T tokens or patches, D width, C width of the condition

FREQUENCIES = 128
"""Of the cosines, and of the sines, that a noise level becomes."""


def waves_of(places: Tensor, width: int) -> Tensor:
    """Sinusoids of positions, (T, width) (arXiv 1706.03762, 3.5)."""
    half = (width + 1) // 2
    angles = places[:, None].float() * 10_000.0 ** (-torch.arange(half).float() / half)
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width]


Turns = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, each (T, width of a head / 2)."""


def turns_of(positions: int, width: int, device: torch.device) -> Turns:
    """Rotary positions of the rows 0..positions - 1."""
    half = width // 2
    speeds = 10_000.0 ** (-torch.arange(half, device=device).float() / half)
    angles = torch.arange(positions, device=device).float()[:, None] * speeds
    return angles.cos(), angles.sin()


def turned(x: Tensor, turns: Turns) -> Tensor:
    """Rotary positions put into queries or keys (..., T, width), halves paired."""
    cosine, sine = (part.to(x.dtype) for part in turns)
    one, other = x.chunk(2, dim=-1)
    return torch.cat((one * cosine - other * sine, other * cosine + one * sine), dim=-1)


KeysValues = tuple[Tensor, Tensor]
"""Of rows of a layer, each (N, heads, T, width of a head)."""

Look = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention: queries, keys and values (N, heads, T, width of a head) -> the queries' shape."""


class Layer(nn.Module):
    """x + gate a(norm(x)), for attention and then for the MLP; both modulated by the condition."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D, hidden = config.width, config.hidden or 4 * config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp_norm = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.up, self.down = nn.Linear(D, hidden), nn.Linear(hidden, D)
        self.modulation = nn.Linear(config.condition, 6 * D)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        turns: Turns | None,
        look: Look = F.scaled_dot_product_attention,
    ) -> Tensor:
        """x (N, T, D), condition (N, C), rotary positions or None -> (N, T, D).

        look: who sees whom; every row every row if not given.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            self.modulation(condition)[:, None].chunk(6, dim=-1)
        )  # fmt: skip
        q, k, v = self.project(self.attention_norm(x) * (1 + scale) + shift, turns)
        x = x + gate * self.out(look(q, k, v).transpose(1, 2).reshape(x.shape))
        y = self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift
        return x + mlp_gate * self.down(F.gelu(self.up(y), approximate="tanh"))

    def keys_values(self, x: Tensor, condition: Tensor, turns: Turns | None) -> KeysValues:
        """What others see of these rows, and nothing more."""
        shift, scale = self.modulation(condition)[:, None].chunk(6, dim=-1)[:2]
        return self.project(self.attention_norm(x) * (1 + scale) + shift, turns)[1:]

    def project(self, x: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (N, heads, T, width of a head)."""
        N, T, _ = x.shape
        q, k, v = self.qkv(x).view(N, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if turns is not None:
            q, k = turned(q, turns), turned(k, turns)
        return q, k, v


class Condition(nn.Module):
    """Noise level and class as one vector (N, C)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        C = config.condition
        self.first, self.second = nn.Linear(2 * FREQUENCIES, C), nn.Linear(C, C)
        # the last row stands for no class
        self.label = nn.Embedding(config.classes + 1, C) if config.classes else None

    def forward(self, noise_N: Tensor, labels_N: Tensor | None) -> Tensor:
        waves = waves_of_level(noise_N, FREQUENCIES).to(self.first.weight.dtype)
        condition = self.second(F.silu(self.first(waves)))
        if self.label is not None:
            if labels_N is None:
                labels_N = torch.full_like(noise_N, self.label.num_embeddings - 1).long()
            condition = condition + self.label(labels_N)
        return F.silu(condition)
