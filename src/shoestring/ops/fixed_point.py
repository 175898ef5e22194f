"""Fixed-point residual streams: exact addition and exact inverse at any depth.

A stream value x is the integer X = round(x * 2^k). Adding and subtracting integers loses
nothing, so an update can be undone to the last bit whatever dtype computed it. Backward treats
rounding as the identity (straight-through).

int32 costs 4 bytes an element, like float32; its step 2^-k is at least as fine as float32's own
spacing once k is calibrated to the largest value (k = 30 - ceil(log2(amax * margin))).
Overflow would wrap silently (an out-of-range float casts to INT_MIN, whose abs is negative), so
ranges are checked on the floats: before the cast, and on what is read back.
Source: Maclaurin, Duvenaud, Adams (ICML 2015) for the idea; range rules derived here.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

DTYPES = {
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
    "float64": torch.float64,
}
DEFAULT_SCALE_BITS = {"int32": 20, "int64": 40}


@dataclass(frozen=True, slots=True)
class Grid:
    """How a stream is held: `streams` is a name of DTYPES, `scale_bits` the k of 2^k."""

    streams: str = "int32"
    scale_bits: int = 20

    def __post_init__(self) -> None:
        if self.streams not in DTYPES:
            raise ConfigError(
                f"streams = {self.streams!r}",
                expected=f"one of {sorted(DTYPES)}",
                hint="16-bit float streams lose the gradient (cosine 0.15 to the true one was "
                "measured); run the blocks in bf16 under autocast and keep int32 streams.",
            )
        if not 0 <= self.scale_bits <= 50:
            raise ConfigError(f"scale_bits = {self.scale_bits}", expected="0 to 50, or 'auto'")

    @property
    def exact(self) -> bool:
        return self.streams.startswith("int")

    def encode(self, x: Tensor) -> Tensor:
        """x -> round(x * 2^k) as integers (or a copy in the float dtype). Never x's memory."""
        dtype = DTYPES[self.streams]
        if not self.exact:
            return x.to(dtype, copy=True)
        wide = torch.float64 if self.streams == "int64" else torch.float32
        return (x.to(wide) * 2.0**self.scale_bits).round_().to(dtype)

    def decode(self, stream: Tensor, dtype: torch.dtype) -> Tensor:
        """The stream's values, in `dtype`. Never the stream's memory, which is walked in place."""
        if not self.exact:
            return stream.to(dtype, copy=True)
        wide = torch.float64 if self.streams == "int64" else torch.float32
        return stream.to(wide).mul_(2.0**-self.scale_bits).to(dtype)

    def limit(self, terms: int) -> float:
        """Largest |value| for which a sum of `terms` such values cannot wrap."""
        if not self.exact:
            return math.inf
        bits = 31 if self.streams == "int32" else 52
        return 2.0 ** (bits - math.ceil(math.log2(terms)) - self.scale_bits)

    @staticmethod
    def calibrated(streams: str, amax: float, margin: float = 8.0) -> int:
        """k for a largest seen |value| of amax: margin times that still fits in 30 bits."""
        bits = 30 if streams == "int32" else 50
        # Finer than 2^-28 (or 2^-45) adds nothing to a 24-bit (53-bit) branch output.
        finest = 28 if streams == "int32" else 45
        return max(0, min(finest, bits - math.ceil(math.log2(max(amax, 2**-20) * margin))))


def encode_ref(x: Tensor, scale_bits: int) -> list[int]:
    """Twin of `Grid.encode`, in Python integers: round half to even of x * 2^k."""
    from fractions import Fraction

    return [round(Fraction(v) * 2**scale_bits) for v in x.double().flatten().tolist()]


def largest(x: Tensor) -> Tensor:
    """max |x| as a float32 scalar, 0 of nothing; NaN if any element is. Allocates nothing of x's
    size."""
    x = x.detach()
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float32)
    # Ten times faster on a CPU than vector_norm(inf), which is not vectorised.
    return torch.maximum(x.amax(), -x.amin()).float()


def checksum(stream: Tensor) -> tuple[int, int]:
    """A 64-bit sum of an integer stream, and one weighted by row, so that swapped rows show."""
    rows = stream.reshape(-1, stream.shape[-1]).sum(dim=-1, dtype=torch.int64)
    weights = torch.arange(1, rows.numel() + 1, device=rows.device, dtype=torch.int64) * 2 + 1
    return int(rows.sum()), int((rows * weights).sum())


def pack_bits(bits: Tensor) -> Tensor:
    """0/1 integers of any shape -> uint8, eight to a byte: ceil(n / 8) bytes."""
    flat = bits.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    packed = flat[:, 0].clone()
    for place in range(1, 8):
        packed |= flat[:, place] << place
    return packed


def unpack_bits(packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Undo `pack_bits`."""
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    flat = (packed.unsqueeze(-1) >> places).bitwise_and_(1).reshape(-1)
    return flat[: shape.numel()].view(shape).to(dtype)
