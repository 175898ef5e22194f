"""Pairs of key and value that are let go: KVzip (arXiv 2505.23416), and at random as its control.

KVzip scores each pair of a context that is known whole: the model is asked to repeat the context
while it sees it, and a pair's score is the most attention that any query of the repetition, of any
head that shares it, gives to it. Pairs above one threshold for all layers and heads stay. The first
tokens and the newest ones always do. What stays is kept in 16 bits, or in 4 with a minimum and a
step (as the paper's combination with 4-bit caches).

Known whole means: scores come from reading the text once ahead of the test. Who generates does not
have that, so these rows are an upper end for eviction in a stream.
"""

from typing import Any

import torch
from torch import Tensor

from .simulated import SimulatedCache, min_max
from .watching import WatchingCache, causal_mask, watched

# B rows, L layers, H heads of keys, G heads of queries for each, t tokens, d width of a head

_QUERIES = 128  # scored at a time


class EvictingCache(SimulatedCache):
    """Pairs whose score is low are hidden once they leave the window.

    scores: (B, L, H, t), for every token of the context; tokens after it stay. keep: share of the
    pairs that stay. bits: 16, or 4 for the pairs that stay once they left the window.
    """

    def __init__(
        self, config: Any, scores: Tensor, *, keep: float, bits: int, window: int, sinks: int
    ) -> None:  # fmt: skip
        super().__init__(config, window=window, sinks=sinks)
        self.bits = bits
        self.stays = above_threshold(scores[..., sinks:], keep)
        self.hidden = sinks

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See SimulatedCache; what had left the window when this call began is hidden in it."""
        self.hidden = self.end if layer_idx == 0 else self.hidden
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def before(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """See WatchingCache."""
        count = min(self.hidden - self.sinks, self.stays.shape[-1])
        if count <= 0:
            return None
        seen = torch.ones(key.shape[:3], dtype=torch.bool)
        seen[:, :, self.sinks : self.sinks + count] = self.stays[:, layer, :, :count]
        return seen

    def decoded(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See SimulatedCache."""
        if self.bits == 16:
            return keys.half().float(), values.half().float()
        return min_max(keys, self.bits, -1), min_max(values, self.bits, -1)

    @property
    def coded_bytes(self) -> float:
        """Pairs of one row that stay, and a count for each head."""
        known = min(self.coded, self.stays.shape[-1])
        kept = int(self.stays[..., :known].sum()) / len(self.stays)
        kept += (self.coded - known) * self.vectors / 2
        constants = 0 if self.bits == 16 else 32
        pair = 2 * (self.numbers / self.vectors * self.bits + constants) / 8
        return float(kept * pair + 4 * self.vectors / 2)


def above_threshold(scores: Tensor, keep: float) -> Tensor:
    """(B, L, H, t) -> bool: the highest of each row over all layers and heads, `keep` of them."""
    flat = scores.flatten(1)
    count = max(1, round(keep * flat.shape[1]))
    places = flat.topk(count, dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, places, True).view_as(scores)


class _Scoring(WatchingCache):
    """Takes the most attention that each pair of the context gets."""

    def __init__(self, config: Any, context: int) -> None:
        super().__init__(config=config)
        self.context, self.scores = context, [torch.empty(0)] * len(self.layers)

    def before(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        if key.shape[2] > self.context:
            self.scores[layer] = most_attention(query, key, self.context)


def most_attention(query: Tensor, key: Tensor, context: int) -> Tensor:
    """query (B, G H, m, d), key (B, H, n, d) -> (B, H, context): the largest weight under the
    causal softmax, over queries and over the heads that share a head of keys."""
    queries, keys = query.shape[2], key.shape[2]
    mask = causal_mask(queries, keys)
    grouped = query.unflatten(1, (key.shape[1], -1))
    found = query.new_zeros(*key.shape[:2], context)
    for start in range(0, queries, _QUERIES):
        part = grouped[:, :, :, start : start + _QUERIES]
        scores = part @ key[:, :, None].mT * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask[start : start + _QUERIES], -torch.inf)
        found = torch.maximum(found, scores.softmax(-1)[..., :context].amax((2, 3)))
    return found


@torch.no_grad()
def kvzip_scores(model: Any, context: Tensor, prompt: Tensor) -> Tensor:
    """(B, t) ids, and those (1, p) that ask to repeat them -> (B, L, H, t).

    Contexts of more than 2,000 tokens are repeated in parts in the paper; here in one, which sees
    no less."""
    cache = _Scoring(model.config, context.shape[1])
    again = torch.cat([prompt.expand(len(context), -1), context], 1)
    with watched(model):
        model(context, past_key_values=cache, logits_to_keep=1)
        model(again, past_key_values=cache, logits_to_keep=1)
    return torch.stack(cache.scores, 1)


def random_scores(config: Any, context: Tensor, seed: int) -> Tensor:
    """(B, L, H, t), equally likely orders."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(context), config.num_hidden_layers, config.num_key_value_heads, context.shape[1])
    return torch.rand(shape, generator=generator)
