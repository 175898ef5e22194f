"""Floats kept at 8 or 4 bits in groups, unbiased: what comes back is right in expectation.

A group of consecutive values is held as its smallest value, the step between two codes, and one
code a value. Rounding is dithered and the dither taken off again: with y = (x - lo) / step in
[0, L] and a number u in (0, 1) that both sides can draw,

    code = floor(y + u)            in 0 .. L, L = 2^bits - 1
    x'   = lo + step * (code + 1/2 - u)

The error x' - x is uniform in +-step/2 whatever x is: mean 0, variance step^2 / 12, half of what
plain stochastic rounding (u not taken off) has on average. The u of an element is a hash of a key
and its index: nothing but the key is kept, any order and device gives the same numbers, and no
generator moves.

Memory: bits / 8 bytes a value and 8 bytes a group; while it runs a handful of arrays of one piece
(`PIECE` values), never of the whole tensor, but for the result.
Sources: subtractive dither, Roberts 1962 and Schuchman 1964; groups of 256 with their own range as
in ActNN, arXiv 2104.14129; the hash is "lowbias32" of Wellons' hash-prospector.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..effort import unseen_bytes
from ..errors import ConfigError

BITS = (4, 8)
PIECE = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Values worked on at a time: on a CPU what stays in its cache, on a GPU what fills it."""
_WRITTEN = {"quantize": 32, "dequantize": 28}
"""About how many bytes a value the operators of either way write."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A one-dimensional tensor in groups: codes (uint8; at 4 bits two to a byte, the halves of a
    group side by side), the smallest value and the step of each group (float32)."""

    codes: Tensor
    lowest: Tensor
    step: Tensor
    key: Tensor
    bits: int
    group: int
    numel: int
    dtype: torch.dtype


def check(bits: object, group: object) -> None:
    """ConfigError for what cannot be a number of bits or a group."""
    if bits not in BITS or isinstance(bits, bool):
        raise ConfigError(f"bits = {bits!r}", expected=f"one of {list(BITS)}")
    if isinstance(group, bool) or not isinstance(group, int) or group < 2 or group % 2:
        raise ConfigError(f"group = {group!r}", expected="an even number of values")


def quantize(x: Tensor, bits: int, group: int, key: Tensor) -> Packed:
    """x (n,), of any floating dtype -> Packed. `key`: int32 scalar on x's device.

    A group with an infinity or NaN comes back as NaN.
    """
    n, bytes_ = x.numel(), packed_bytes(x.numel(), bits, group)
    codes = x.new_empty(bytes_, dtype=torch.uint8)
    groups = -(-n // group)
    lowest = x.new_empty(groups, dtype=torch.float32)
    step = x.new_empty(groups, dtype=torch.float32)
    for first, last, rows in _pieces(x, group, "quantize"):
        at = slice(first // group, first // group + rows)
        lo, size, c = _codes(x[first:last].view(rows, -1), bits, key, first)
        lowest[at], step[at] = lo, size
        # All groups before this piece are whole.
        start = first * bits // 8
        codes[start : start + c.numel()] = c.view(-1)
        del lo, size, c
    return Packed(codes, lowest, step, key, bits, group, n, x.dtype)


def dequantize(packed: Packed) -> Tensor:
    """Packed -> (n,), a fresh tensor."""
    out = packed.codes.new_empty(packed.numel, dtype=packed.dtype)
    group, bits = packed.group, packed.bits
    for first, last, rows in _pieces(out, group, "dequantize"):
        at, width = slice(first // group, first // group + rows), (last - first) // rows
        start, each = first * bits // 8, -(-width * bits // 8)
        c = packed.codes[start : start + rows * each].view(rows, each)
        if bits == 4:
            c = torch.cat([c & 15, c >> 4], dim=1)[:, :width]
        y = c.float().view(-1)
        del c
        y.sub_(_dither(packed.key, first, last - first)).add_(0.5)
        y = y.view(rows, width).mul_(packed.step[at, None]).add_(packed.lowest[at, None])
        out[first:last] = y.view(-1)
        del y
    return out


def packed_bytes(numel: int, bits: int, group: int) -> int:
    """Bytes of the codes: the last group may be short, and of an odd number."""
    whole, rest = divmod(numel, group)
    return whole * group * bits // 8 + -(-rest * bits // 8)


def key_of(digest: Tensor, seed: int, number: int) -> Tensor:
    """The key of the `number`-th tensor that is kept under a digest: int32 scalar."""
    return digest.mul(_signed(0x9E3779B1)).add_(_signed(_mixed(seed, number)))


def digest(x: Tensor) -> Tensor:
    """An int32 scalar that another content would change: the sum of the bits, wrapping. Makes no
    copy of x, and its value is not waited for."""
    x = x.detach()
    wide = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    # In its own dtype: a sum in another one would copy the whole of it first.
    total = x.view(wide).sum(dtype=wide)
    return (total + (total >> 32) if wide is torch.int64 else total).to(torch.int32)


def _pieces(x: Tensor, group: int, way: str) -> list[tuple[int, int, int]]:
    """(first value, last, groups) of each piece. The short last group is one of its own.

    Under fake tensors only the first of equal pieces is gone through: its peak is that of all.
    """
    n = x.numel()
    whole = n // group
    rows = max(1, PIECE.get(x.device.type, PIECE["cuda"]) // group)
    cuts = [(a, min(a + rows, whole)) for a in range(0, whole, rows)]
    pieces = [(a * group, b * group, b - a) for a, b in cuts]
    if whole * group < n:
        pieces.append((whole * group, n, 1))
    if isinstance(x, FakeTensor) and len(pieces) > 1:
        unseen_bytes(_WRITTEN[way] * (n - pieces[0][1]))
        return pieces[:1]
    return pieces


def _codes(x: Tensor, bits: int, key: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """(smallest value, step, codes) of groups x (rows, width) that begin at element `first`."""
    rows, width = x.shape
    top = 2**bits - 1
    x = x.float()
    # On a CPU aminmax takes ten times as long as both, and float to uint8 four times as long as
    # by way of int32.
    lo = x.amin(dim=1)
    size = x.amax(dim=1).sub_(lo).div_(top)
    y = x - lo[:, None]
    del x
    # Equal values: any step gives code 0, and 0 brings them back exactly.
    y.div_(size.masked_fill(size == 0, 1.0)[:, None])
    y.view(-1).add_(_dither(key, first, rows * width))
    # Rounding of y + u may reach past the ends by a hair.
    c = y.floor_().clamp_(0, top).to(torch.int32)
    del y
    c = c.to(torch.uint8)
    if bits == 8:
        return lo, size, c
    half = -(-width // 2)
    packed = c[:, :half].clone()
    packed[:, : width - half] |= c[:, half:] << 4
    return lo, size, packed


def _dither(key: Tensor, first: int, count: int) -> Tensor:
    """Numbers in (0, 1) for the elements first..first+count-1; 16 bits each, two of a hash.

    `first` is even: only a last group can be of an odd length.
    """
    h = torch.arange(
        first // 2, (first + count + 1) // 2, dtype=torch.int32, device=key.device
    ).mul_(_signed(0x9E3779B1))
    h.add_(key)
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None)):
        # int32 shifts in copies of the sign; the mask makes that zeros.
        h ^= (h >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        if multiplier is not None:
            h.mul_(_signed(multiplier))
    u = h.view(torch.int16)[:count].float()
    return u.mul_(2.0**-16).add_(0.5 + 2.0**-17)


def _mixed(seed: int, number: int) -> int:
    """SplitMix64 of both: neighbouring seeds and numbers give unrelated values of 32 bits."""
    z = (seed * 0xD1342543DE82EF95 + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return (z ^ (z >> 31)) % 2**32


def _signed(value: int) -> int:
    """32 bits as the int32 that has them."""
    return value - 2**32 if value >= 2**31 else value


# ---- twins -------------------------------------------------------------------------------------


def dither_ref(key: int, index: int) -> float:
    """Twin of `_dither` for one element, in Python integers."""
    h = ((index // 2) * 0x9E3779B1 + key) % 2**32
    h = ((h ^ (h >> 16)) * 0x7FEB352D) % 2**32
    h = ((h ^ (h >> 15)) * 0x846CA68B) % 2**32
    h ^= h >> 16
    half = (h >> 16 if index % 2 else h) % 2**16
    return ((half if half < 2**15 else half - 2**16) + 2**15 + 0.5) / 2**16


def round_trip_ref(
    x: list[float], bits: int, group: int, key: int
) -> tuple[list[int], list[float]]:
    """Twin of quantize and dequantize, from the equations in float64: (codes, values)."""
    codes, values = [], []
    for start in range(0, len(x), group):
        part = x[start : start + group]
        lo, top = min(part), 2**bits - 1
        step = (max(part) - lo) / top
        for place, value in enumerate(part, start):
            u = dither_ref(key, place)
            code = int((value - lo) / step + u) if step else 0
            codes.append(code)
            values.append(lo + step * (code + 0.5 - u))
    return codes, values
