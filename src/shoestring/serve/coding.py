"""Vectors into rows of codes, from one tier's rows to the next's, and back."""

import torch
from torch import Tensor

from ..ops.row_code import RowCode
from .form import Turn

# B batch, H heads, t tokens, d width of a head


def encode(
    keys: Tensor, values: Tensor, turn: Turn, mean: Tensor | None, code: RowCode
) -> Tensor:  # fmt: skip
    """(B, H, t, d) each, mean (2, B or 1, H, d) float64 -> rows (B, t, row bytes)."""
    forward, _ = turn.to(keys.device)
    x = torch.stack([keys, values], dim=1).double()
    if mean is not None:
        x = x - mean.transpose(0, 1).unsqueeze(3)
    return code.encode(x @ forward.mT)


def recode(rows: Tensor, before: RowCode, after: RowCode) -> Tensor:
    """Rows of one tier (B, t, row bytes) -> of the next. Nothing is turned, only cut."""
    return after.encode(before.decode(rows, torch.float64))


def decode(rows: Tensor, code: RowCode) -> Tensor:
    """(B, n, row bytes) -> (B, 2, H, n, D) float32, turned and without the mean."""
    return code.decode(rows)
