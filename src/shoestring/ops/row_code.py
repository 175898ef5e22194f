"""The keys and values of a token as one row of bytes, with bits that differ from place to place.

A row holds all heads of one layer: first the keys, head by head, then the values. A head's vector
is cut into groups of eight coordinates, each with bits of its own, 0 to 8; a group of b bits is b
bytes (`bit_pack`). Then comes a scale for every head's key and value. Coordinates of 0 bits take
nothing and are zero.

Coordinates are expected about normal with the variance of their vector; what makes them so (a
rotation, or a basis made for a model) is not known here. A vector is divided by its root mean
square r, each coordinate u takes the nearest level c, and the scale is r |u| / |c|, lengths
weighted by how much a coordinate matters, so that what comes back is as long as what went in.

Levels are Lloyd's and Max's for the normal law (`codebook`), smoothed to an odd polynomial of
degree 5 in the code. It costs at most 0.2 % of error up to 4 bits and 1, 3, 6 and 10 % at 5 to 8,
and a kernel needs three constants for a level instead of a table.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .codebook import MOST_BITS, codebook

# B batch, H heads, t tokens, d width of a head, g = d / 8 groups; side 0 keys, side 1 values

GROUP = 8
SPARE = 16
"""Bytes that a kernel may read, but does not use, behind the last row of a buffer."""


@functools.cache
def coefficients() -> Tensor:
    """(9, 3) float64: level(code, b) = x (p0 + p1 x^2 + p2 x^4), x = (code - middle) / 2^(b-1)."""
    found = np.zeros((MOST_BITS + 1, 3))
    for bits in range(1, MOST_BITS + 1):
        level, x = np.array(codebook(bits).levels), _places(bits)
        powers = np.stack([x, x**3, x**5], axis=1)[:, : 2 ** (bits - 1)]
        for _ in range(300):  # Lloyd's rounds: to the means of the cells, as far as it bends
            mass, mean = _cells(level)
            weight = np.sqrt(mass)
            fit, *_ = np.linalg.lstsq(powers * weight[:, None], mean * weight, rcond=None)
            level = powers @ fit
        found[bits, : len(fit)] = fit
    return torch.from_numpy(found)


@functools.cache
def levels(bits: int) -> Tensor:
    """(2^bits,) float64, ascending; one zero for 0 bits."""
    p, x = coefficients()[bits], torch.from_numpy(_places(bits))
    square = x * x
    return x * (p[0] + square * (p[1] + square * p[2]))


@functools.cache
def edges(bits: int) -> Tensor:
    """Half-way between levels, (2^bits - 1,) float64."""
    each = levels(bits)
    return (each[1:] + each[:-1]) / 2


@functools.cache
def error(bits: int) -> float:
    """Mean squared error of a coordinate of variance 1, under the normal law; 1 at 0 bits."""
    if bits == 0:
        return 1.0
    level = levels(bits).numpy()
    mass, mean = _cells(level)
    return float(1 - (mass * (2 * level * mean - level**2)).sum())


def _cells(level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mass and mean of each level's cell under the normal law."""
    middle = (level[1:] + level[:-1]) / 2
    ends = torch.from_numpy(np.concatenate(([-12.0], middle, [12.0])))
    density = torch.exp(-ends.square() / 2) / (2 * torch.pi) ** 0.5
    mass = torch.special.ndtr(ends).diff().clamp_min(1e-300)
    return mass.numpy(), (-density.diff() / mass).numpy()


def _places(bits: int) -> np.ndarray:
    count = 2**bits
    return (np.arange(count) - (count - 1) / 2) / (count / 2)


@dataclass(frozen=True, eq=False)
class RowCode:
    """bits: (2, H, g) uint8, 0 to 8. weights: (2, H, g) float64, above 0, what a coordinate's
    squared error matters; alike where None. scale_bytes: 2 for half precision, 1 for steps of a
    sixteenth of an octave, between 2^-8 and 2^8.

    ConfigError for what cannot be.
    """

    bits: Tensor
    weights: Tensor | None = None
    scale_bytes: int = 2
    row_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        bits = self.bits
        if bits.dim() != 3 or bits.shape[0] != 2 or bits.dtype != torch.uint8:
            raise ConfigError(
                f"bits {tuple(bits.shape)} of {bits.dtype}", expected="uint8 (2, heads, groups)"
            )
        if int(bits.max()) > MOST_BITS:
            raise ConfigError(f"codes of {int(bits.max())} bits", expected="0 to 8")
        if self.scale_bytes not in (1, 2):
            raise ConfigError(f"scales of {self.scale_bytes} bytes", expected="1 or 2")
        if self.weights is not None and self.weights.shape != bits.shape:
            raise ConfigError(
                f"weights {tuple(self.weights.shape)}", expected=f"{tuple(bits.shape)}, as bits"
            )
        size = int(bits.sum()) + self.scale_bytes * bits.shape[0] * bits.shape[1]
        object.__setattr__(self, "row_bytes", size)

    @classmethod
    def uniform(cls, heads: int, width: int, key_bits: int, value_bits: int) -> "RowCode":
        """The same bits for all keys and for all values."""
        for bits in (key_bits, value_bits):
            if type(bits) is not int or bits not in range(1, MOST_BITS + 1):
                raise ConfigError(f"codes of {bits!r} bits", expected="1 to 8")
        each = torch.tensor([key_bits, value_bits], dtype=torch.uint8)
        return cls(each[:, None, None].expand(2, heads, padded(width) // GROUP).contiguous())

    @property
    def heads(self) -> int:
        """H."""
        return self.bits.shape[1]

    @property
    def width(self) -> int:
        """d."""
        return self.bits.shape[2] * GROUP

    @functools.cached_property
    def places(self) -> list[tuple[int, Tensor, Tensor]]:
        """For each number of bits b: groups of side, head and place in one count, (n_b,), and the
        bytes of a row that they lie in, (n_b, b)."""
        flat = self.bits.flatten().long()
        starts = flat.cumsum(0) - flat
        found = []
        for bits in range(1, MOST_BITS + 1):
            groups = (flat == bits).nonzero().flatten()
            if len(groups):
                found.append((bits, groups, starts[groups][:, None] + torch.arange(bits)))
        return found

    def encode(self, z: Tensor) -> Tensor:
        """(B, 2, H, t, d) -> uint8 (B, t, row_bytes), computed in float64.

        DataError for NaN, infinity, and vectors too long for a scale; then nothing is coded.
        """
        B, _, H, t, _ = z.shape
        z = z.double().permute(0, 3, 1, 2, 4).unflatten(-1, (-1, GROUP))  # (B, t, 2, H, g, 8)
        if not bool(torch.isfinite(z).all()):
            raise DataError("a vector to be coded holds NaN or infinity", expected="finite numbers")
        kept = (self.bits > 0).double().to(z.device)[..., None]
        count = (GROUP * kept.sum((-1, -2))).clamp_min(1)
        size = ((z.square() * kept).sum((-1, -2)) / count).sqrt()  # (B, t, 2, H)
        small = size < _SMALLEST
        u = torch.where(small[..., None, None], 0.0, z / size.clamp_min(_SMALLEST)[..., None, None])
        u, c = u.flatten(2, 4), torch.zeros_like(u).flatten(2, 4)
        rows = torch.empty(B, t, self.row_bytes, dtype=torch.uint8, device=z.device)
        for bits, groups, columns in self._placed(z.device):
            codes = torch.bucketize(u[:, :, groups].contiguous(), edges(bits).to(z.device))
            c[:, :, groups] = levels(bits).to(z.device)[codes]
            word = (codes << bits * torch.arange(GROUP, device=z.device)).sum(-1, keepdim=True)
            rows[:, :, columns] = word.view(torch.uint8)[..., :bits]
        weight = kept if self.weights is None else kept * self.weights.to(z.device)[..., None]
        shape = (2, H, -1, GROUP)
        was = (u.unflatten(2, shape[:3]).square() * weight).sum((-1, -2))
        comes = (c.unflatten(2, shape[:3]).square() * weight).sum((-1, -2))
        scale = torch.where(
            small | (comes == 0), 0.0, size * (was / comes.clamp_min(1e-300)).sqrt()
        )
        rows[:, :, self.row_bytes - 2 * H * self.scale_bytes :] = self._stored(scale).flatten(2)
        return rows

    def decode(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 (B, n, row_bytes) -> (B, 2, H, n, d)."""
        (B, n, _), H, device = rows.shape, self.heads, rows.device
        z = torch.zeros(B, n, self.bits.numel(), GROUP, dtype=dtype, device=device)
        for bits, groups, columns in self._placed(device):
            whole = torch.nn.functional.pad(rows[:, :, columns], (0, 8 - bits)).contiguous()
            shifts = bits * torch.arange(GROUP, device=device)
            codes = (whole.view(torch.int64) >> shifts) & (2**bits - 1)
            z[:, :, groups] = levels(bits).to(device, dtype)[codes]
        scale = self._scales(rows[:, :, self.row_bytes - 2 * H * self.scale_bytes :])
        z = z.view(B, n, 2, H, -1) * scale.to(dtype)[..., None]
        return z.permute(0, 2, 3, 1, 4)

    def _placed(self, device: torch.device) -> Sequence[tuple[int, Tensor, Tensor]]:
        if device.type == "cpu":
            return self.places
        return [(bits, groups.to(device), at.to(device)) for bits, groups, at in self.places]

    def _stored(self, scale: Tensor) -> Tensor:
        """(B, t, 2, H) float64 -> uint8 (B, t, 2, H, scale_bytes)."""
        if self.scale_bytes == 1:
            code = (16 * scale.clamp_min(1e-300).log2()).round().clamp(-127, 127) + 128
            return torch.where(scale == 0, 0, code).to(torch.uint8)[..., None]
        if float(scale.max() if scale.numel() else 0) > 65504:
            raise DataError(
                f"a vector of scale {float(scale.max()):.3g} to be coded", expected="up to 65504"
            )
        return scale.half()[..., None].contiguous().view(torch.uint8)

    def _scales(self, stored: Tensor) -> Tensor:
        """uint8 (B, n, 2 H scale_bytes) -> (B, n, 2, H) float64."""
        # A copy, since a view of halves has to begin at an even byte.
        each = stored.clone(memory_format=torch.contiguous_format)
        each = each.unflatten(-1, (2, self.heads, self.scale_bytes))
        if self.scale_bytes == 1:
            code = each[..., 0].double()
            return torch.where(code == 0, 0.0, torch.exp2((code - 128) / 16))
        return each.view(torch.float16)[..., 0].double()


_SMALLEST = 1e-30


def padded(width: int) -> int:
    """The width that codes have for vectors of that width: whole groups."""
    return -(-width // GROUP) * GROUP


# ---- twin --------------------------------------------------------------------------------------


def row_ref(code: RowCode, z: Tensor) -> tuple[list[int], Tensor]:
    """Twin of `encode` and `decode` for one token, z (2, H, d): the row's bytes, and what comes
    back, number by number."""
    found: list[int] = []
    scales: list[int] = []
    back = torch.zeros(z.shape, dtype=torch.float64)
    for side in range(2):
        for head in range(code.heads):
            bits = code.bits[side, head].repeat_interleave(GROUP).tolist()
            x = z[side, head].double()
            kept = [k for k, each in enumerate(bits) if each]
            r = float(x[kept].square().mean().sqrt()) if kept else 0.0
            c = torch.zeros_like(x)
            word = ""
            for k in kept:
                u = float(x[k]) / r if r >= _SMALLEST else 0.0
                number = sum(1 for edge in edges(bits[k]).tolist() if edge < u)
                c[k] = levels(bits[k])[number]
                word = f"{number:0{bits[k]}b}" + word  # the first code ends lowest
            found += [int(word[max(end - 8, 0) : end], 2) for end in range(len(word), 0, -8)]
            w = torch.ones_like(x)
            if code.weights is not None:
                w = code.weights[side, head].repeat_interleave(GROUP)
            scale = 0.0
            if kept and r >= _SMALLEST:
                wanted, there = (w * x.square())[kept].sum(), (w * c.square())[kept].sum()
                scale = float((wanted / there).sqrt())
            if code.scale_bytes == 2:
                stored = torch.tensor(scale, dtype=torch.float64).half()
                scales += stored[None].view(torch.uint8).tolist()
                scale = float(stored)
            elif scale:
                step = min(max(round(16 * float(np.log2(scale))), -127), 127)
                scales, scale = [*scales, step + 128], 2.0 ** (step / 16)
            else:
                scales.append(0)
            back[side, head] = scale * c
    return found + scales, back
