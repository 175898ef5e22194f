"""Who may look at whom when a clean and a noised copy of a text are read at once.

A block-wise autoregressive denoiser reads 2 S rows: the clean tokens, then the noised ones. The
text is cut into pieces of `size` tokens; within a piece tokens are denoised together. Row i of the
clean half sees the clean pieces up to its own (within it, all of it), and nothing noised. Row i of
the noised half sees the clean pieces *before* its own, and its own piece of the noised half. With
size 1 that is: clean i sees clean j <= i; noised i sees clean j < i and itself.

The noised row at position i stands for token i itself. Where it stands for the token that follows
(`shifted`), the clean row i is already known to it: clean j <= i. Mixing the two shows a row its
own answer; so does a plain causal mask over the 2 S rows.

Source: Block Diffusion, arXiv 2503.09573 (`block_diff_mask`); DiffusionBlocks, 2506.14202, 5.4.
"""

import torch
from torch import Tensor

from ..errors import ConfigError


def block_mask(
    length: int,
    *,
    size: int = 1,
    shifted: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Boolean (2 S, 2 S), True = may look; rows and columns: S clean, then S noised.

    size: tokens of a piece.  shifted: noised row i stands for token i + 1 (size 1 only).
    ConfigError for lengths that pieces do not fill.
    """
    if length < 1 or size < 1 or length % size or (shifted and size != 1):
        raise ConfigError(
            f"{length} tokens in pieces of {size}{', shifted' if shifted else ''}",
            expected="a size that divides the length, and size 1 where noised rows are shifted",
        )
    piece = torch.arange(length, device=device) // size
    before = piece[None, :] < piece[:, None]
    same = piece[None, :] == piece[:, None]
    clean = torch.cat((before | same, torch.zeros_like(same)), dim=1)
    known = before | same if shifted else before
    return torch.cat((clean, torch.cat((known, same), dim=1)), dim=0)


def may_look_ref(row: int, column: int, length: int, size: int, shifted: bool) -> bool:
    """Twin of `block_mask`, one pair of rows at a time."""
    (noised_row, i), (noised_column, j) = divmod(row, length), divmod(column, length)
    own, other = i // size, j // size
    if not noised_row:
        return not noised_column and other <= own
    if noised_column:
        return own == other
    return other <= own if shifted else other < own
