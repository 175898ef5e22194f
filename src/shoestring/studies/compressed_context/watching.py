"""A cache that is told of every attention, and may hide tokens from it.

Transformers does not hand the cache to the attention function, so the keys that go there carry it
as an attribute, as `serve.attention` does. A cache that is watched sees queries, keys and values of
each layer (to score or to calibrate) and gives back which tokens each head may see. What comes
without such a cache goes to torch's own attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# B rows, H heads of keys, G heads of queries for each, m queries, n keys, d width of a head

NAME = "shoestring_study"
_CARRIED = "_shoestring_watching"


class WatchingCache(DynamicCache):
    """Keys and values as they come; a subclass overrides `before`."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As of transformers; the keys carry this cache to `attention`."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys = keys.view_as(keys)
        setattr(keys, _CARRIED, (self, layer_idx))
        return keys, values

    def before(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """Called ahead of each attention: query (B, G H, m, d), key and value (B, H, n, d).
        Returns which keys the heads may see, bool (B, H, n), or None for all."""
        return None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, G H, m, d) -> (B, m, G H, d), None: torch's attention under the cache's mask."""
    cache, layer = getattr(key, _CARRIED, (None, 0))
    seen = cache.before(layer, query, key, value) if cache is not None else None
    if seen is not None:
        groups = query.shape[1] // key.shape[1]
        causal = causal_mask(query.shape[2], key.shape[2]) if attention_mask is None else (
            attention_mask[..., : key.shape[2]]
        )  # fmt: skip
        attention_mask = causal & seen.repeat_interleave(groups, 1)[:, :, None]
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return result


def causal_mask(queries: int, keys: int) -> Tensor:
    """(m, n) bool: the newest queries see themselves and all before."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


@contextmanager
def watched(model: Any) -> Iterator[None]:
    """The model's attention asks the cache, until the end of a `with`."""
    before = model.config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
