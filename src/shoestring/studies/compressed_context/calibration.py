"""What calibrated peers learn of a model, from text that no test uses.

The model reads some rows of tokens, each by itself; queries, keys and values of every layer are
kept as attention sees them, after rotary embedding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .watching import WatchingCache, watched

# L layers, H heads of keys, G heads of queries for each, t tokens of all rows, d width of a head


@dataclass(frozen=True, slots=True)
class Calibration:
    """keys, values: (L, H, t, d). query_squares: (L, H, d, d), mean of q q^T over tokens and over
    the heads of queries that share a head of keys. positions: (t,), of each in its row."""

    keys: Tensor
    values: Tensor
    query_squares: Tensor
    positions: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that it is of."""
        return len(self.positions)


class _Recording(WatchingCache):
    """Sums of q q^T by layer; keys and values stay in the layers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.squares: list[Tensor] = []

    def before(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        grouped = query[0].unflatten(0, (key.shape[1], -1)).flatten(1, 2).float()
        self.squares.append(grouped.mT @ grouped / grouped.shape[1])


@torch.no_grad()
def calibrate(model: Any, rows: Tensor) -> Calibration:
    """rows: (rows, tokens) of ids, read one after the other, from position 0 each."""
    keys, values, squares = [], [], []
    with watched(model):
        for row in rows:
            cache = _Recording(model.config)
            model(row[None], past_key_values=cache, logits_to_keep=1)
            keys.append(torch.stack([layer.keys[0] for layer in cache.layers]).float())
            values.append(torch.stack([layer.values[0] for layer in cache.layers]).float())
            squares.append(torch.stack(cache.squares))
    return Calibration(
        torch.cat(keys, 2), torch.cat(values, 2), torch.stack(squares).mean(0),
        torch.arange(rows.shape[1]).repeat(len(rows)),
    )  # fmt: skip
