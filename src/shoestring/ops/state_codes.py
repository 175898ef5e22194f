"""Block-wise codes of 8 or 4 bits for the moments that an optimizer keeps.

Every block of B values is divided by its largest magnitude N_b; what is kept is N_b (float32) and
for each value the index of an entry of a fixed map (arXiv 2110.02861, section 2). The maps are
dynamic: the entries of each power of ten are as many as there are bits left for them.

Two things differ from the maps of bitsandbytes, so that rounding can be unbiased and safe:
the lowest entry of a signed map is -1 (theirs reaches 1 on one side only), and maps for second
moments have no 0, which would blow up 1 / sqrt(v) where a value is small beside its block's
largest (arXiv 2309.01507, section 3). With 4 bits the second moment's map is linear, as there.

Stochastic rounding takes one of the two entries around a value, each with the probability that
makes the mean the value itself. Values below the lowest entry of a map without 0 become that.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

# n values of a tensor, B block, K entries of a map


@dataclass(frozen=True, slots=True)
class Format:
    """How a moment is kept. bits: 8 or 4.  signed: the first moment; else the second."""

    bits: int
    signed: bool

    @property
    def block(self) -> int:
        return 256 if self.bits == 8 else 128

    def blocks(self, n: int) -> int:
        """Blocks that n values take."""
        return -(-n // self.block)

    def code_bytes(self, n: int) -> int:
        """Bytes of the codes of n values: whole blocks."""
        return self.blocks(n) * self.block * self.bits // 8

    def entries(self) -> list[float]:
        """The map, ascending."""
        return list(_entries(self.bits, self.signed))


@cache
def _entries(bits: int, signed: bool) -> tuple[float, ...]:
    if bits == 4 and not signed:
        return tuple((k + 1) / 16 for k in range(16))
    exponents = 7 if bits == 8 else 3
    found = [1.0]
    for i in range(exponents):
        parts = 2**i if signed else 2 ** (i + 1)
        edges = [0.1 + 0.9 * k / parts for k in range(parts + 1)]
        middles = [(a + b) / 2 * 10.0 ** (i + 1 - exponents) for a, b in pairwise(edges)]
        found += middles
        if signed:
            found += [-middle for middle in middles]
    if signed:
        found.append(0.0)
    found.sort()
    if signed:
        found[0] = -1.0
    return tuple(found)


class Coder:
    """Encodes and decodes one format on one device; holds 70 kB of tables.

    stochastic: whether `encode` rounds by chance; else to the nearest entry, the lower of two.
    """

    def __init__(self, form: Format, device: torch.device, *, stochastic: bool) -> None:
        self.form, self.stochastic = form, stochastic
        self.book = torch.tensor(form.entries(), dtype=torch.float32, device=device)
        # A value's code is the number of edges below it; by chance, of entries not above it.
        edges = self.book[1:-1] if stochastic else (self.book[1:] + self.book[:-1]) / 2
        # A search takes several times as long. The upper half of a float's bits says it but for
        # one edge, as no two edges agree in them.
        bits = torch.arange(1 << 16, dtype=torch.int32, device=device) << 16
        lowest = torch.where(bits < 0, bits | 0xFFFF, bits).view(torch.float32)
        self._table = torch.bucketize(lowest, edges, right=stochastic).to(torch.uint8)
        self._edges = torch.cat((edges, edges.new_full((1,), math.inf)))
        self._gaps = self.book.diff() if stochastic else None

    def encode(self, values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """float32 (n,) -> (codes, uint8 (code_bytes(n),); largest magnitudes, (blocks(n),)).

        noise: uniform in [0, 1), (n,), where the coder is stochastic.
        """
        assert (noise is not None) == self.stochastic
        rows = _whole_blocks(values, self.form).view(-1, self.form.block)
        scale = torch.maximum(rows.amax(1), -rows.amin(1))
        # A block of zeros: any divisor will do, as its codes are multiplied by 0 again.
        unit = (rows / torch.where(scale > 0, scale, 1.0)[:, None]).view(-1)
        codes = self._below(unit)
        if noise is not None:
            assert self._gaps is not None
            part = unit.sub_(self.book.index_select(0, codes))
            part.div_(self._gaps.index_select(0, codes))
            codes.add_(_whole_blocks(noise, self.form) < part)
        packed = codes.to(torch.uint8)
        if self.form.bits == 4:
            packed = packed[0::2] | (packed[1::2] << 4)
        return packed, scale

    def _below(self, unit: Tensor) -> Tensor:
        """Number of edges below each value (or not above it), int32."""
        upper = (unit.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
        count = self._table.index_select(0, upper).to(torch.int32)
        del upper
        edge = self._edges.index_select(0, count)
        return count.add_(unit >= edge if self.stochastic else unit > edge)

    def decode(self, codes: Tensor, scale: Tensor, n: int) -> Tensor:
        """What `encode` kept, float32 (n,)."""
        if self.form.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=1).view(-1)
        values = self.book.index_select(0, codes.to(torch.int32))
        values.view(-1, self.form.block).mul_(scale[:, None])
        return values[:n]


def _whole_blocks(values: Tensor, form: Format) -> Tensor:
    missing = -values.numel() % form.block
    return torch.nn.functional.pad(values, (0, missing)) if missing else values


# ---- twins -------------------------------------------------------------------------------------


def encode_ref(
    values: list[float], form: Format, noise: list[float] | None = None
) -> tuple[list[int], list[float]]:
    """Twin of `Coder.encode`, in float64: (codes, one a value; largest magnitudes)."""
    entries = form.entries()
    codes, scales = [], []
    for start in range(0, len(values), form.block):
        block = values[start : start + form.block]
        largest = max(map(abs, block))
        scales.append(largest)
        for place, value in enumerate(block):
            unit = value / largest if largest else 0.0
            distance = [abs(unit - e) for e in entries]
            if noise is None:
                codes.append(distance.index(min(distance)))
                continue
            below = max((k for k, e in enumerate(entries) if e <= unit), default=0)
            below = min(below, len(entries) - 2)
            part = (unit - entries[below]) / (entries[below + 1] - entries[below])
            codes.append(below + (noise[start + place] < part))
    return codes, scales


def decode_ref(codes: list[int], scales: list[float], form: Format) -> list[float]:
    """Twin of `Coder.decode`."""
    entries = form.entries()
    return [entries[code] * scales[k // form.block] for k, code in enumerate(codes)]
