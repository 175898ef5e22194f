"""TurboQuant: vectors in a few bits a coordinate, without calibration (arXiv 2504.19874).

A vector is divided by its norm and rotated at random (`rotation`); every coordinate then has the
same known law, and its best scalar code (`codebook`) is within 2.72 of what any code can reach
(Theorems 1 and 3). What is kept is the codes, packed (`bit_pack`), and one scale.

The scale makes up for what rounding takes from a vector; c are the levels of its codes:
  "norm"      |x| / |c|: the decoded vector is as long as the vector. The least error in attention.
  "unbiased"  |x| / <u, c>: inner products with any query are right in the mean (DRIVE,
              arXiv 2105.08339), with a third to a seventh of the error of the sketch below.
  "plain"     |x|, as the paper has it: inner products come out short, by 1 - error.

`sketch=True` is the paper's inner-product code (Algorithm 2): one bit less, and for that bit the
signs of a normal sketch of what was lost (QJL, arXiv 2406.03482), which make inner products
unbiased with a variance of about 1.57 error / d. It is for searching; under a softmax its variance
costs far more than the bias did.

`Split` codes some channels with a bit more (section 4.3), which gives fractional bits.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .bit_pack import pack, row_bytes, unpack
from .codebook import codebook
from .rotation import Kind, Rotation

# ... any number of vectors, d width

Scale = Literal["norm", "unbiased", "plain"]
_SCALES = ("norm", "unbiased", "plain")
_SKETCH_SEED = 0x5EED  # so that the sketch is drawn apart from the rotation


@dataclass(frozen=True, slots=True)
class Codes:
    """Vectors as they are kept. packed: uint8 (..., bytes of a row); scale: (...).

    signs: uint8 (..., bytes) and lost: (...), of the sketch, where there is one.
    """

    packed: Tensor
    scale: Tensor
    signs: Tensor | None = None
    lost: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of everything that is kept."""
        parts = (self.packed, self.scale, self.signs, self.lost)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True, slots=True)
class VectorCode:
    """How vectors of one width are coded.

    bits: 1 to 8, of a coordinate (the sketch's among them); rotation, seed: see `Rotation`;
    scale, sketch: see above; scale_dtype: of scales. ConfigError for what cannot be.
    """

    width: int
    bits: int
    scale: Scale = "norm"
    sketch: bool = False
    rotation: Kind = "hadamard"
    seed: int = 0
    scale_dtype: torch.dtype = torch.float16
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _sketches: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise ConfigError(f"codes of {self.bits} bits", expected="1 to 8 (Split has fractions)")
        if self.width < 3:
            raise ConfigError(f"vectors of {self.width} coordinates", expected="3 or more")
        if self.scale not in _SCALES:
            raise ConfigError(f"scale = {self.scale!r}", expected=f"one of {list(_SCALES)}")

    @property
    def rotate(self) -> Rotation:
        """Its rotation; equal ones are drawn once each."""
        return _rotation(self.width, self.rotation, self.seed)

    @property
    def code_bits(self) -> int:
        """Bits of a coordinate's level."""
        return self.bits - self.sketch

    @property
    def vector_bytes(self) -> int:
        """Bytes that a vector takes, scales included."""
        levels = row_bytes(self.width, self.code_bits) if self.code_bits else 0
        signs = row_bytes(self.width, 1) if self.sketch else 0
        return levels + signs + self.scale_dtype.itemsize * (1 + self.sketch)

    def levels(self, device: torch.device | str = "cpu") -> Tensor:
        """(2^code_bits,) float32: what codes stand for, of a unit vector that was rotated."""
        return self._table(torch.device(device))[0]

    def encode(self, x: Tensor) -> Codes:
        """(..., d), any float dtype -> codes. DataError for NaN and infinity, ConfigError for
        another width and for a norm that scale_dtype cannot hold.

        float64 is computed in float64: then the same vector has the same codes in any company,
        where products of one row and of many may round apart in float32."""
        if x.shape[-1] != self.width:
            raise ConfigError(f"vectors of width {x.shape[-1]}", expected=str(self.width))
        x = x if x.dtype == torch.float64 else x.float()
        norm = x.norm(dim=-1)
        if not bool(torch.isfinite(norm).all()):
            raise DataError(
                "a vector that holds NaN or infinity, or whose norm is no float32, cannot be coded",
                expected="finite numbers",
            )
        unit = x / torch.where(norm > 0, norm, 1.0)[..., None]
        levels, edges = (table.to(x.dtype) for table in self._table(x.device))
        turned = self.rotate(unit)
        codes = torch.bucketize(turned, edges, out_int32=True)
        kept = levels[codes]
        packed = pack(codes.to(torch.uint8), self.code_bits) if self.code_bits else codes[..., :0]
        if self.sketch:
            lost = unit - self.rotate.inverse(kept)
            signs = (lost @ self._sketch(x.device).to(x.dtype).T >= 0).to(torch.uint8)
            size = self._scales(norm * lost.norm(dim=-1))
            return Codes(packed.to(torch.uint8), self._scales(norm), pack(signs, 1), size)
        if self.scale == "norm":
            norm = norm / kept.norm(dim=-1)
        elif self.scale == "unbiased":
            norm = norm / (turned * kept).sum(-1)
        return Codes(packed, self._scales(norm))

    def decode(self, codes: Codes) -> Tensor:
        """Codes -> (..., d) float32."""
        x = self.rotate.inverse(self.rotated(codes))
        return x if codes.signs is None else x + self._signs(codes) @ self._sketch(x.device)

    def scores(self, queries: Tensor, codes: Codes) -> Tensor:
        """(..., m, d) and codes of (..., n) vectors -> (..., m, n): inner products, of vectors that
        are never rotated back."""
        queries = queries.float()
        found = self.rotate(queries) @ self.rotated(codes).mT
        if codes.signs is not None:
            found = found + queries @ self._sketch(queries.device).T @ self._signs(codes).mT
        return found

    def rotated(self, codes: Codes) -> Tensor:
        """Codes -> (..., d) float32: the vectors as they lie after the rotation, without what a
        sketch adds. Inner products with queries that were rotated, too, need no more."""
        index = unpack(codes.packed, self.code_bits, self.width) if self.code_bits else None
        levels, scale = self.levels(codes.scale.device), codes.scale.float()[..., None]
        if index is None:
            return (levels * scale).expand(*scale.shape[:-1], self.width)
        return levels[index.int()] * scale

    def _signs(self, codes: Codes) -> Tensor:
        """The sketch's signs, scaled so that the transposed sketch gives back what was lost."""
        assert codes.signs is not None
        assert codes.lost is not None
        signs = unpack(codes.signs, 1, self.width).float() * 2 - 1
        return signs * (codes.lost.float()[..., None] * (math.sqrt(math.pi / 2) / self.width))

    def _scales(self, values: Tensor) -> Tensor:
        kept = values.to(self.scale_dtype)
        if not bool(torch.isfinite(kept).all()):
            raise ConfigError(
                f"a vector of norm {float(values.max()):.3g} has no scale in {self.scale_dtype}",
                expected=f"norms up to {torch.finfo(self.scale_dtype).max:.5g}",
                hint="Take scale_dtype=torch.bfloat16.",
            )
        return kept

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Levels and edges of a unit vector's coordinates, float32."""
        if device not in self._tables:
            if self.code_bits:
                book = codebook(self.code_bits, self.width)
                made = [torch.tensor(x, dtype=torch.float64) for x in (book.levels, book.edges)]
            else:  # a code of no bits stands for the mean
                made = [torch.zeros(1), torch.zeros(0)]
            levels, edges = ((x / math.sqrt(self.width)).float().to(device) for x in made)
            self._tables[device] = levels, edges
        return self._tables[device]

    def _sketch(self, device: torch.device) -> Tensor:
        """(d, d), entries from the normal law of variance 1."""
        if device not in self._sketches:
            generator = torch.Generator().manual_seed(self.seed ^ _SKETCH_SEED)
            drawn = torch.randn(self.width, self.width, generator=generator)
            self._sketches[device] = drawn.to(device)
        return self._sketches[device]


@functools.cache
def _rotation(width: int, kind: Kind, seed: int) -> Rotation:
    return Rotation(width, kind, seed)


@dataclass(frozen=True, slots=True)
class Split:
    """Vectors whose channels `outliers` take a bit more than the others: two codes, each with a
    rotation and a scale of its own.

    `bits` is the bits of the others; `mean_bits` what comes of both. ConfigError for channels
    that are not there, or for parts of fewer than 3.
    """

    width: int
    bits: int
    outliers: tuple[int, ...]
    scale: Scale = "norm"
    rotation: Kind = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        there = set(self.outliers)
        if len(there) != len(self.outliers) or not there <= set(range(self.width)):
            raise ConfigError(
                f"outliers = {self.outliers}", expected=f"distinct channels below {self.width}"
            )
        _ = self.high, self.low

    @classmethod
    def by_energy(cls, x: Tensor, bits: int, count: int, **settings: object) -> "Split":
        """The `count` channels with the largest mean square over the vectors x (..., d)."""
        energy = x.float().square().flatten(0, -2).mean(0)
        chosen = energy.topk(count).indices.sort().values
        return cls(x.shape[-1], bits, tuple(chosen.tolist()), **settings)  # type: ignore[arg-type]

    @property
    def mean_bits(self) -> float:
        """Bits of a coordinate in the mean, without the scales."""
        return self.bits + len(self.outliers) / self.width

    @property
    def vector_bytes(self) -> int:
        """Bytes that a vector takes, scales included."""
        return self.high.vector_bytes + self.low.vector_bytes

    @property
    def high(self) -> VectorCode:
        """Of the outliers."""
        return self._part(len(self.outliers), self.bits + 1)

    @property
    def low(self) -> VectorCode:
        """Of the others."""
        return self._part(self.width - len(self.outliers), self.bits)

    def encode(self, x: Tensor) -> tuple[Codes, Codes]:
        """(..., d) -> codes of the outliers, codes of the others."""
        if x.shape[-1] != self.width:
            raise ConfigError(f"vectors of width {x.shape[-1]}", expected=str(self.width))
        first, rest = self._places(x.device)
        return self.high.encode(x[..., first]), self.low.encode(x[..., rest])

    def decode(self, codes: tuple[Codes, Codes]) -> Tensor:
        """Codes -> (..., d) float32."""
        first, rest = self._places(codes[0].packed.device)
        x = torch.empty((*codes[0].scale.shape, self.width), device=first.device)
        x[..., first] = self.high.decode(codes[0])
        x[..., rest] = self.low.decode(codes[1])
        return x

    def _part(self, width: int, bits: int) -> VectorCode:
        return _vector_code(width, bits, self.scale, self.rotation, self.seed)

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        there = set(self.outliers)
        rest = [k for k in range(self.width) if k not in there]
        made = (torch.tensor(places, device=device) for places in (self.outliers, rest))
        first, others = made
        return first, others


@functools.cache
def _vector_code(width: int, bits: int, scale: Scale, kind: Kind, seed: int) -> VectorCode:
    return VectorCode(width, bits, scale=scale, rotation=kind, seed=seed)


# ---- twin --------------------------------------------------------------------------------------


def decoded_ref(code: VectorCode, x: Tensor) -> Tensor:
    """Twin of encoding and decoding: Algorithms 1 and 2 of the paper, by distances to all levels,
    in float64, with nothing packed and scales as they are."""
    d = code.width
    matrix = code.rotate.matrix(dtype=torch.float64)
    norm = x.double().norm(dim=-1, keepdim=True)
    unit = x.double() / norm.clamp_min(1e-300)
    levels = torch.zeros(1, dtype=torch.float64)
    if code.code_bits:
        book = codebook(code.code_bits, d)
        levels = torch.tensor(book.levels, dtype=torch.float64) / math.sqrt(d)
    turned = unit @ matrix.T
    kept = levels[(turned[..., None] - levels).abs().argmin(-1)]
    back = kept @ matrix
    if code.sketch:
        sketch = code._sketch(torch.device("cpu")).double()
        lost = unit - back
        signs = torch.where(lost @ sketch.T >= 0, 1.0, -1.0).double()
        size = lost.norm(dim=-1, keepdim=True)
        return norm * (back + math.sqrt(math.pi / 2) / d * size * (signs @ sketch))
    if code.scale == "norm":
        back = back / back.norm(dim=-1, keepdim=True)
    elif code.scale == "unbiased":
        back = back / (unit * back).sum(-1, keepdim=True)
    return norm * back
