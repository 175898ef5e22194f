"""An autoregressive language model in B blocks, each a whole denoiser of the token that follows.

A block reads a text of T tokens as two times T rows. Clean row i is token i - 1 (row 0 is a learned
start); noised row i is the noised table row of token i, which is what it is asked for. Clean row i
sees the clean rows up to its own; noised row i sees the same and itself, and no other noised row
(`ops/block_masks.py`, shifted). Both rows i have the rotary position i. Clean rows do not depend on
noise: they have a condition of their own, always the same, and are looked at through their keys and
values. So these are made once, by the same code in training (inside the graph: this is how context
is learned) and when a text is written, and serve noised rows of any level. With `beside`, noised
row i begins with the embedding of clean row i, which it sees anyway, added: as it is in the paper,
its first layer has to ask without knowing even the token before.

As clean row i is followed by token i, its own output is an ordinary next-token prediction, which
can be trained, too, and needs no noised row.

Recurrent (one block): the first layers, the prelude, read the clean rows only. Noised rows enter
after them, each joined to what the prelude made of the clean row beside it, so that running the
rest again, at a lower level of noise, is an iteration. `unrolled` runs the same weights as a
recurrent-depth network is trained end to end: the core K times over, the coda once.

Source: DiffusionBlocks, arXiv 2506.14202, 5.4, 5.5 and App. B; Block Diffusion, 2503.09573; Huginn,
2502.05171, section 3. The layers are those of `models/dit_layers.py`.
"""

import itertools
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import block_masks
from .causal_config import CausalConfig
from .dit import Block, DiT
from .dit_config import DiTConfig
from .dit_layers import KeysValues, Layer, Look, Turns, turns_of

# N texts, T tokens, D width, W width of the table

CLEAN = -2.0
"""What clean rows have in the place of ln(sigma) / 4: that of a sigma of 0.0003."""

causal: Look = partial(F.scaled_dot_product_attention, is_causal=True)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of the clean rows read so far, which is all that noised and later rows see.

    layers: keys and values of every layer.  entry (N, T, D): of the rows read last, where noised
    rows enter.
    """

    layers: tuple[KeysValues, ...]
    entry: Tensor

    @property
    def count(self) -> int:
        """Rows."""
        return self.layers[0][0].shape[2]


class CausalBlock(Block):
    """A denoiser of tokens that reads those before them."""

    def __init__(self, config: CausalConfig) -> None:
        super().__init__(config, config.row, config.row)
        D = config.width
        self.prelude, self.beside = config.prelude, config.beside
        self.core = config.layers // config.blocks - config.coda
        self.start = nn.Parameter(torch.empty(D))
        self.noised = nn.Linear(config.row, D)
        self.join = nn.Linear(2 * D, D) if self.prelude else None

    def forward(
        self, tokens_NT: Tensor, z_NTW: Tensor, noise_N: Tensor, table_VW: Tensor
    ) -> Tensor:
        """Tokens (row i sees those before i), the noised rows scaled to unit variance, noise (N,)
        -> what the noised rows answer (N, T, W), whose product with the table is the logits."""
        kept = self.read(self.rows(tokens_NT, table_VW))
        length = tokens_NT.shape[1]
        mask = block_masks.block_mask(length, shifted=True, device=z_NTW.device)[length:]
        return self._denoise(kept, z_NTW, noise_N, self._turns(0, length, z_NTW.device), mask)

    def next_tokens(self, tokens_NT: Tensor, table_VW: Tensor) -> Tensor:
        """What the clean rows answer, (N, T, W): row i stands for token i and sees those before."""
        x = self.rows(tokens_NT, table_VW)
        turns, condition = self._turns(0, x.shape[1], x.device), self._clean(x)
        for layer in self.layers:
            x = layer(x, condition, turns, causal)
        return self._answer(x, condition)

    # ---- a text being written ------------------------------------------------------------------

    def begin(self, tokens_NT: Tensor, table_VW: Tensor) -> tuple[Tensor, Kept]:
        """Read a prompt (N, T), which may be empty. (What the last clean row says of the token
        after it (N, W), what is kept of all T + 1 rows.)"""
        start = self.start.expand(len(tokens_NT), 1, -1)
        return self._extended(torch.cat((start, self._embedded(tokens_NT, table_VW)), dim=1), None)

    def extend(self, kept: Kept, tokens_N: Tensor, table_VW: Tensor) -> tuple[Tensor, Kept]:
        """The same, for the token that follows what was read, (N,)."""
        return self._extended(self._embedded(tokens_N[:, None], table_VW), kept)

    def answer(self, kept: Kept, z_NW: Tensor, noise_N: Tensor) -> Tensor:
        """What the noised row beside the last clean one answers, (N, W)."""
        turns = self._turns(kept.count - 1, kept.count, z_NW.device)
        return self._denoise(kept, z_NW[:, None], noise_N, turns, None)[:, 0]

    # ---- clean rows ----------------------------------------------------------------------------

    def rows(self, tokens_NT: Tensor, table_VW: Tensor) -> Tensor:
        """The start and all tokens but the last, (N, T, D)."""
        start = self.start.expand(len(tokens_NT), 1, -1)
        return torch.cat((start, self._embedded(tokens_NT[:, :-1], table_VW)), dim=1)

    def read(self, x: Tensor) -> Kept:
        """What is kept of clean rows (N, T, D), the first ones of a text."""
        turns, condition = self._turns(0, x.shape[1], x.device), self._clean(x)
        entry, kept = x, list[KeysValues]()
        for number, layer in enumerate(self.layers):
            entry = x if number == self.prelude else entry
            assert isinstance(layer, Layer)
            if number == len(self.layers) - 1:  # nobody sees what comes after these
                kept.append(layer.keys_values(x, condition, turns))
            else:
                x = layer(x, condition, turns, _keeping(None, kept))
        return Kept(tuple(kept), entry)

    def _extended(self, x: Tensor, before: Kept | None) -> tuple[Tensor, Kept]:
        first = before.count if before else 0
        turns, condition = self._turns(first, first + x.shape[1], x.device), self._clean(x)
        past = before.layers if before else itertools.repeat(None)
        entry, kept = x, list[KeysValues]()
        for number, (layer, seen) in enumerate(zip(self.layers, past, strict=False)):
            entry = x if number == self.prelude else entry
            x = layer(x, condition, turns, _keeping(seen, kept))
        return self._answer(x[:, -1:], condition)[:, 0], Kept(tuple(kept), entry)

    # ---- noised rows ---------------------------------------------------------------------------

    def _denoise(
        self, kept: Kept, z_NTW: Tensor, noise_N: Tensor, turns: Turns, mask: Tensor | None
    ) -> Tensor:
        condition = self.condition(noise_N, None)
        x = self.noised(z_NTW)
        entry = kept.entry[:, -x.shape[1] :]
        if self.join is not None:
            x = self.join(torch.cat((self.norm(x), entry), dim=2))
        elif self.beside:
            x = x + entry
        for layer, seen in list(zip(self.layers, kept.layers, strict=True))[self.prelude :]:
            x = layer(x, condition, turns, _seeing(seen, mask))
        return self._answer(x, condition)

    # ---- recurrent depth -----------------------------------------------------------------------

    def unrolled(self, tokens_NT: Tensor, table_VW: Tensor, iterations: int) -> Tensor:
        """As `next_tokens`, but the core is run `iterations` times from a state of zeros."""
        assert self.join is not None
        x = self.rows(tokens_NT, table_VW)
        turns, condition = self._turns(0, x.shape[1], x.device), self._clean(x)
        for layer in self.layers[: self.prelude]:
            x = layer(x, condition, turns, causal)
        state = torch.zeros_like(x)
        for _ in range(iterations):
            state = self.join(torch.cat((self.norm(state), x), dim=2))
            for layer in self.layers[self.prelude : self.core]:
                state = layer(state, condition, turns, causal)
        for layer in self.layers[self.core :]:
            state = layer(state, condition, turns, causal)
        return self._answer(state, condition)

    # ---- parts ---------------------------------------------------------------------------------

    def _embedded(self, tokens: Tensor, table_VW: Tensor) -> Tensor:
        rows: Tensor = self.embed(F.embedding(tokens, table_VW) * table_VW.shape[1] ** 0.5)
        return rows

    def _clean(self, x: Tensor) -> Tensor:
        condition: Tensor = self.condition(torch.full((1,), CLEAN, device=x.device), None)
        return condition

    def _answer(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.finish(x, condition) * self.config.row**0.5

    def _turns(self, first: int, last: int, device: torch.device) -> Turns:
        cosine, sine = turns_of(last, self.config.width // self.config.heads, device)
        return cosine[first:], sine[first:]

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        super().reset(generator)
        self.start.copy_(torch.randn(self.start.shape, generator=generator))


def _keeping(past: KeysValues | None, kept: list[KeysValues]) -> Look:
    """Rows that see those before them, and are kept with these."""

    def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if past is None:
            kept.append((k, v))
            return causal(q, k, v)
        k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        kept.append((k, v))
        new, all_of_them = q.shape[2], k.shape[2]
        mask = torch.ones(new, all_of_them, dtype=torch.bool, device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.tril(all_of_them - new))

    return look


def _seeing(kept: KeysValues, mask: Tensor | None) -> Look:
    """Rows that see what is kept, and of themselves what the mask (T, kept + T) lets them."""

    def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = torch.cat((kept[0], k), dim=2), torch.cat((kept[1], v), dim=2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return look


class Causal(DiT):
    """B blocks of an autoregressive model and the frozen table that they share."""

    @staticmethod
    def one(config: DiTConfig, block: int) -> Block:
        """A block of it."""
        assert isinstance(config, CausalConfig)
        return CausalBlock(config)

    def block(self, block: int) -> CausalBlock:
        """Block b of 1..B."""
        part = super().block(block)
        assert isinstance(part, CausalBlock)
        return part
