"""Codes of 1 to 8 bits in bytes, with no bit left over.

Eight codes of b bits are b bytes: one number, code i from bit i b up, its lowest byte first. A
row of n codes is those of its eights, one after another; n is filled up with zeros to a multiple
of eight.
"""

import torch
from torch import Tensor

from ..errors import ConfigError

# n codes in a row


def row_bytes(n: int, bits: int) -> int:
    """Bytes of a row of n codes. ConfigError for bits outside 1..8."""
    if bits not in range(1, 9):
        raise ConfigError(f"codes of {bits} bits", expected="1 to 8")
    return -(-n // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 (..., n), below 2^bits -> uint8 (..., row_bytes(n, bits))."""
    row_bytes(0, bits)
    if missing := -codes.shape[-1] % 8:
        codes = torch.nn.functional.pad(codes, (0, missing))
    shifts = bits * torch.arange(8, device=codes.device)
    words = (codes.unflatten(-1, (codes.shape[-1] // 8, 8)).long() << shifts).sum(-1, keepdim=True)
    return words.view(torch.uint8)[..., :bits].flatten(-2)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """uint8 (..., row_bytes(n, bits)) -> uint8 (..., n)."""
    row_bytes(0, bits)
    whole = torch.nn.functional.pad(
        packed.unflatten(-1, (packed.shape[-1] // bits, bits)), (0, 8 - bits)
    )
    shifts = bits * torch.arange(8, device=packed.device)
    codes = (whole.contiguous().view(torch.int64) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :n]


# ---- twin --------------------------------------------------------------------------------------


def pack_ref(codes: list[int], bits: int) -> list[int]:
    """Twin of `pack` for one row, bit by bit."""
    found = []
    for start in range(0, len(codes), 8):
        word = 0
        for place, code in enumerate(codes[start : start + 8]):
            word |= code << (place * bits)
        found += [word >> (8 * k) & 255 for k in range(bits)]
    return found
