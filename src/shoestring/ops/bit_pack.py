"""Codes of 1 to 8 bits in bytes, with no bit left over.

A code's bits are cut into planes whose widths are powers of two: 3 bits are a plane of 2 and one
of 1, 7 are 4, 2 and 1. A plane of w bits puts 8/w codes into a byte: byte j of a row of n codes
holds codes j, j + m, j + 2 m, ... from the low end up, where m = n w / 8. So unpacking shifts
whole rows and joins them end to end; nothing is interleaved.

n has to be a multiple of 8 / (smallest plane): `padded` says which n that is.
"""

import torch
from torch import Tensor

from ..errors import ConfigError

# n codes in a row, w width of a plane in bits


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes, the lowest bits first. ConfigError outside 1..8."""
    if bits not in range(1, 9):
        raise ConfigError(f"codes of {bits} bits", expected="1 to 8")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def padded(n: int, bits: int) -> int:
    """The least multiple of what every plane of these codes takes whole bytes for, from n on."""
    whole = 8 // min(planes(bits))
    return -(-n // whole) * whole


def row_bytes(n: int, bits: int) -> int:
    """Bytes of a row of n codes."""
    return padded(n, bits) * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 (..., n), below 2^bits -> uint8 (..., row_bytes(n, bits))."""
    n = codes.shape[-1]
    if missing := padded(n, bits) - n:
        codes = torch.nn.functional.pad(codes, (0, missing))
    parts, shift = [], 0
    for width in planes(bits):
        each = (codes >> shift) & (2**width - 1)
        rows = each.unflatten(-1, (8 // width, -1))
        packed = rows[..., 0, :].clone()
        for k in range(1, 8 // width):
            packed |= rows[..., k, :] << (k * width)
        parts.append(packed)
        shift += width
    return torch.cat(parts, dim=-1)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """uint8 (..., row_bytes(n, bits)) -> uint8 (..., n)."""
    whole, codes, shift, start = padded(n, bits), None, 0, 0
    for width in planes(bits):
        size = whole * width // 8
        plane = packed[..., start : start + size]
        mask = 2**width - 1
        rows = [(plane >> (k * width)) & mask for k in range(8 // width)]
        part = torch.cat(rows, dim=-1) << shift
        codes = part if codes is None else codes | part
        start, shift = start + size, shift + width
    assert codes is not None
    return codes[..., :n]


# ---- twin --------------------------------------------------------------------------------------


def pack_ref(codes: list[int], bits: int) -> list[int]:
    """Twin of `pack` for one row, bit by bit."""
    n = padded(len(codes), bits)
    codes = codes + [0] * (n - len(codes))
    found: list[int] = []
    shift = 0
    for width in planes(bits):
        m = n * width // 8
        row = [0] * m
        for index, code in enumerate(codes):
            row[index % m] += ((code >> shift) % 2**width) * 2 ** (width * (index // m))
        found += row
        shift += width
    return found
