"""Attention of one new token over rows of codes on a GPU, without decoding them to memory (Triton).

What `row_kernel.attend` computes, for one query a batch row. A program takes one head of keys and
a share of the tokens: it reads the bytes of a tile of rows, makes numbers of them in registers,
and keeps its own maximum, mass and sum; torch puts the shares together, and adds raw rows and the
token itself. Queries go to the codes' coordinates and sums come back, as on the CPU.

Imported only when asked for: it needs Triton. Under TRITON_INTERPRET=1 it runs on a CPU, slowly,
to be tested.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ConfigError

# B batch, H heads of keys and values, G query heads for each, n rows, d width, D a power of 2 >= d

_TILE = 32
_SHARE = 512
"""Tokens of a program, at least."""
_MOST_SHARES = 64


@dataclass(frozen=True, eq=False)
class TritonCode:
    """A row code on a device: where each coordinate's bits lie, and what they stand for.

    place: int32 (2, H, 3, D), first byte, shift, bits; level: float32 (2, H, 4, D), centre and
    three coefficients. Coordinates of 0 bits, and those beyond d, are 0.
    """

    place: Tensor
    level: Tensor
    width: int
    scale_bytes: int
    row_bytes: int

    @classmethod
    def of(
        cls, bits: Tensor, scale_bytes: int, coefficients: Tensor, device: torch.device | str
    ) -> "TritonCode":
        """bits (2, H, d / 8) uint8, coefficients (9, 3): see `row_kernel.KernelCode`."""
        if bits.dim() != 3 or bits.shape[0] != 2 or int(bits.max()) > 8:
            raise ConfigError(f"bits {tuple(bits.shape)}", expected="(2, heads, groups) of 0 to 8")
        if scale_bytes not in (1, 2):
            raise ConfigError(f"scales of {scale_bytes} bytes", expected="1 or 2")
        each, width = bits.long().cpu(), 8 * bits.shape[2]
        start = (each.flatten().cumsum(0) - each.flatten()).view(each.shape)
        wide, at = each.repeat_interleave(8, -1), torch.arange(width) % 8
        bit = wide * at
        place = torch.stack([start.repeat_interleave(8, -1) + bit // 8, bit % 8, wide], 2)
        # x = (code - centre) / 2^(bits - 1); the division goes into the coefficients.
        p = coefficients.double().cpu()[wide] * torch.exp2((1.0 - wide)[..., None] * _ODD)
        level = torch.cat([((2**wide - 1) / 2)[..., None], p], -1).mT
        more = triton.next_power_of_2(width) - width
        place, level = (torch.nn.functional.pad(x, (0, more)) for x in (place, level))
        size = int(each.sum()) + 2 * bits.shape[1] * scale_bytes
        return cls(
            place.int().contiguous().to(device), level.float().contiguous().to(device), width,
            scale_bytes, size,
        )  # fmt: skip


_ODD = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)


@triton.jit
def _numbers(
    rows: tl.tensor,
    there: tl.tensor,
    place: tl.tensor,
    level: tl.tensor,
    columns: tl.tensor,
    D: tl.constexpr,
) -> tl.tensor:
    """(tokens,) pointers of rows -> (tokens, D), without their scales."""
    byte, shift = tl.load(place + columns), tl.load(place + D + columns)
    bits = tl.load(place + 2 * D + columns)
    at = rows[:, None] + byte[None, :]
    seen = there[:, None] & (bits > 0)[None, :]
    low = tl.load(at, mask=seen, other=0).to(tl.int32)
    high = tl.load(at + 1, mask=seen & (shift + bits > 8)[None, :], other=0).to(tl.int32)
    code = ((low | (high << 8)) >> shift[None, :]) & ((1 << bits) - 1)[None, :]
    x = code.to(tl.float32) - tl.load(level + columns)[None, :]
    square = x * x
    y = tl.load(level + 2 * D + columns)[None, :] + square * tl.load(level + 3 * D + columns)
    return x * (tl.load(level + D + columns)[None, :] + square * y)


@triton.jit
def _scales(rows: tl.tensor, there: tl.tensor, first: tl.tensor, BYTES: tl.constexpr) -> tl.tensor:
    """(tokens,) scales of one side and head."""
    at = rows + first
    low = tl.load(at, mask=there, other=0)
    if BYTES == 1:
        found = tl.exp2((low.to(tl.float32) - 128.0) / 16.0)
        return tl.where(low == 0, 0.0, found)
    high = tl.load(at + 1, mask=there, other=0)
    half = low.to(tl.uint16) | (high.to(tl.uint16) << 8)
    return half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _attend_share(
    q: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    place: tl.tensor,
    level: tl.tensor,
    visible: tl.tensor,
    out: tl.tensor,
    high_out: tl.tensor,
    mass_out: tl.tensor,
    batch_stride: tl.tensor,
    row_stride: tl.tensor,
    scales: tl.tensor,
    share: tl.tensor,
    heads: tl.tensor,
    G: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    """One share of one head: q (B, H, G, D) and bias (B, H, G) in powers of 2."""
    shares = tl.num_programs(2)
    b, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns, group, tokens = tl.arange(0, D), tl.arange(0, G), tl.arange(0, TILE)
    first = tl.load(visible + 2 * b) + part * share
    end = tl.minimum(first + share, tl.load(visible + 2 * b + 1))
    head = (b * heads + h) * G
    queries = tl.load(q + (head + group)[:, None] * D + columns[None, :])
    added = tl.load(bias + head + group)
    high = tl.full((G,), float("-inf"), tl.float32)
    mass = tl.zeros((G,), tl.float32)
    total = tl.zeros((G, D), tl.float32)
    for start in range(first, end, TILE):
        at = start + tokens
        there = at < end
        row = rows + b.to(tl.int64) * batch_stride + at.to(tl.int64) * row_stride
        keys = _numbers(row, there, place + h * 3 * D, level + h * 4 * D, columns, D)
        score = tl.sum(queries[:, None, :] * keys[None, :, :], 2)
        score = score * _scales(row, there, scales + h * BYTES, BYTES)[None, :] + added[:, None]
        score = tl.where(there[None, :], score, float("-inf"))
        higher = tl.maximum(high, tl.max(score, 1))
        kept = tl.exp2(high - higher)
        weight = tl.exp2(score - higher[:, None])
        mass = mass * kept + tl.sum(weight, 1)
        side = heads + h
        values = _numbers(row, there, place + side * 3 * D, level + side * 4 * D, columns, D)
        weight = weight * _scales(row, there, scales + side * BYTES, BYTES)[None, :]
        total = total * kept[:, None] + tl.sum(weight[:, :, None] * values[None, :, :], 1)
        high = higher
    to = ((b * heads + h) * shares + part) * G + group
    tl.store(high_out + to, high)
    tl.store(mass_out + to, mass)
    tl.store(out + to[:, None] * D + columns[None, :], total)


@dataclass(frozen=True, eq=False)
class TritonSegment:
    """Rows of one kind: coded uint8 (B, n, row_bytes), or raw (B, n, 2 H d) where code is None.

    visible: int64 (B, 2), the first row that is seen and the one behind the last; None for all.
    """

    code: TritonCode | None
    rows: Tensor
    visible: Tensor | None = None

    def seen(self) -> Tensor:
        """(B, 2) int64, within the rows."""
        B, n = self.rows.shape[:2]
        if self.visible is None:
            return torch.tensor([0, n], device=self.rows.device).expand(B, 2).contiguous()
        return self.visible.clamp(0, n).contiguous()


_Part = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Maximum and mass (B, H, parts, G), sum (B, H, parts, G, d), and the sum's z where coded."""


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Sequence[TritonSegment],
    inverse: Tensor,
    mean: Tensor,
    scaling: float,
) -> Tensor:
    """q float32 (B, H G, 1, d), keys and values (B, H, 1, d) of the new token, which is seen;
    inverse (2, H, d, d), mean (2, B or 1, H, d) float32 -> float32 (B, 1, H G, d).

    ConfigError for more than one query, or rows of another width.
    """
    B, heads, m, d = q.shape
    H = keys.shape[1]
    if m != 1:
        raise ConfigError(f"{m} queries", expected="one; several are computed by torch")
    given = q.view(B, H, heads // H, d) * (scaling * 1.4426950408889634)
    turned = torch.einsum("bhgd,hde->bhge", given, inverse[0])
    bias = torch.einsum("bhgd,bhd->bhg", given, mean[0].expand(B, H, d))
    parts = [_raw(given, keys, values, None)]
    for segment in segments:
        if segment.code is None:
            raw = segment.rows.unflatten(-1, (2, H, d)).permute(2, 0, 3, 1, 4)
            parts.append(_raw(given, raw[0], raw[1], segment.seen()))
        else:
            parts.append(_coded(turned, bias, segment, segment.code))
    high = torch.cat([part[0] for part in parts], 2).amax(2)
    mass = out = torch.zeros((), device=q.device)
    for top, each, total, coded in parts:
        by = torch.exp2(top - high[:, :, None])
        mass = mass + (each * by).sum(2)
        summed = (total * by[..., None]).sum(2)
        if coded is not None:
            summed = torch.einsum("bhgd,hed->bhge", summed, inverse[1])
            summed = summed + mean[1].expand(B, H, d)[:, :, None] * (each * by).sum(2)[..., None]
        out = out + summed
    return (out / mass[..., None]).view(B, 1, heads, d)


def _raw(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> _Part:
    score = q @ keys.float().mT
    if seen is not None:
        at = torch.arange(keys.shape[2], device=q.device)
        there = (at >= seen[:, :1]) & (at < seen[:, 1:])
        score = score.masked_fill(~there[:, None, None], -torch.inf)
    if not keys.shape[2]:
        score = score.new_full((*score.shape[:3], 1), -torch.inf)
        values = values.new_zeros(*values.shape[:2], 1, values.shape[3])
    high = score.amax(-1)
    weight = torch.exp2(score - torch.where(high.isfinite(), high, 0.0)[..., None])
    return high[:, :, None], weight.sum(-1)[:, :, None], (weight @ values.float())[:, :, None], None


def _coded(turned: Tensor, bias: Tensor, segment: TritonSegment, code: TritonCode) -> _Part:
    (B, H, G, d), rows = turned.shape, segment.rows
    if rows.shape[2] != code.row_bytes or d != code.width or rows.stride(2) != 1:
        raise ConfigError(
            f"rows of {rows.shape[2]} bytes for heads of {d}",
            expected=f"{code.row_bytes} for {code.width}, the last stride 1",
        )
    D, padded = code.place.shape[-1], triton.next_power_of_2(G)
    share = max(_SHARE, -(-rows.shape[1] // _MOST_SHARES))
    share = -(-share // _TILE) * _TILE
    shares = max(1, -(-rows.shape[1] // share))
    pad = torch.nn.functional.pad
    q, added = pad(turned, (0, D - d, 0, padded - G)), pad(bias, (0, padded - G))
    out = turned.new_empty(B, H, shares, padded, D)
    high, mass = turned.new_empty(2, B, H, shares, padded).unbind(0)
    _attend_share[B, H, shares](
        q.contiguous(), added.contiguous(), rows, code.place, code.level, segment.seen(), out,
        high, mass, rows.stride(0), rows.stride(1), code.row_bytes - 2 * H * code.scale_bytes,
        share, H, G=padded, D=D, TILE=_TILE, BYTES=code.scale_bytes,
    )  # fmt: skip
    return high[..., :G], mass[..., :G], out[..., :G, :d], out


def tried(device: torch.device) -> None:
    """Attends once, to a token; raises whatever Triton raises where it cannot compile."""
    code = TritonCode.of(
        torch.ones(2, 1, 2, dtype=torch.uint8), 2, torch.ones(9, 3, dtype=torch.float64), device
    )
    rows = torch.zeros(1, 1, code.row_bytes, dtype=torch.uint8, device=device)
    x, eye = torch.ones(1, 1, 1, 16, device=device), torch.eye(16, device=device)
    attend(
        x, x, x, [TritonSegment(code, rows)], eye.expand(2, 1, 16, 16),
        torch.zeros(2, 1, 1, 16, device=device), 1.0,
    )  # fmt: skip
