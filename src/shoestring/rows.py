"""A batch cut by rows: views, nothing is copied."""

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .errors import ConfigError


def rows_of(batch: Mapping[str, Any]) -> int:
    """Rows of a batch: the first dimension of its first tensor that has one. ConfigError for a
    batch without."""
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise ConfigError(
        "this batch has no tensor with rows, so it cannot be cut",
        expected=f"tensors whose first dimension is the row; given {', '.join(batch)}",
    )


def cut(batch: Mapping[str, Any], parts: int) -> list[dict[str, Any]]:
    """The batch in that many parts, at most one for every row, the largest first: the first part
    of a step finds the least memory taken. What has another first dimension than the rows (a
    scalar, a table of positions) is in every part."""
    rows = rows_of(batch)
    parts = min(parts, rows)
    ends = [rows * k // parts for k in range(parts + 1)]

    def part(start: int, stop: int) -> dict[str, Any]:
        return {
            name: value[start:stop]
            if isinstance(value, Tensor) and value.dim() and len(value) == rows
            else value
            for name, value in batch.items()
        }

    return [part(a, b) for a, b in reversed(list(itertools.pairwise(ends)))]
