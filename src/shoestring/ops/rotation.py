"""Random orthogonal maps of vectors: after one, every vector looks the same to a scalar code.

A *dense* rotation is drawn from the Haar measure (QR of a normal matrix, signs from R: Mezzadri,
arXiv math-ph/0609050). A *Hadamard* rotation flips signs at random and then takes the orthogonal
Walsh-Hadamard transform, d log d work instead of d^2. Without the signs a constant vector would end
in one coordinate. Where d is not a power of two it is the largest one in it times an odd rest, and
the rest is mixed by a dense rotation of its own.

Both are drawn on the CPU in float64 from a seed, so that a seed means the same map on every device
and in every dtype.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError

# d width of a vector, R odd rest, P power of two: d = R P

Kind = Literal["hadamard", "dense"]
MATRIX_UP_TO = 256
"""Widths up to this are multiplied by a matrix: one call, and faster than log d small ones."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """One map of width d. kind: "hadamard" or "dense"; seed: what it is drawn from.

    ConfigError for a width below 1 or another kind.
    """

    width: int
    kind: Kind = "hadamard"
    seed: int = 0
    _made: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"a rotation of width {self.width}", expected="1 or more")
        if self.kind not in ("hadamard", "dense"):
            raise ConfigError(f"rotation = {self.kind!r}", expected="'hadamard' or 'dense'")

    def __call__(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d), rotated; float32 or float64, computed in the dtype of x."""
        self._check(x)
        if self.kind == "dense" or self.width <= MATRIX_UP_TO:
            return x @ self.matrix(x.device, x.dtype).T
        signs, rest = self._parts(x.device, x.dtype)
        y = _walsh_hadamard((x * signs).unflatten(-1, (len(rest), -1)))
        return (rest @ y).flatten(-2)

    def inverse(self, y: Tensor) -> Tensor:
        """(..., d) -> (..., d), rotated back."""
        self._check(y)
        if self.kind == "dense" or self.width <= MATRIX_UP_TO:
            return y @ self.matrix(y.device, y.dtype)
        signs, rest = self._parts(y.device, y.dtype)
        x = _walsh_hadamard(rest.T @ y.unflatten(-1, (len(rest), -1)))
        return x.flatten(-2) * signs

    def matrix(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(d, d): rows are the directions that coordinates of the result are along."""
        key = (torch.device(device), dtype)
        if key not in self._made:
            if self.kind == "dense":
                made = _haar(self.width, _generator(self.seed))
            else:
                signs, rest = self._drawn()
                made = torch.kron(rest, _hadamard(self.width // len(rest))) * signs
            self._made[key] = (made.to(device, dtype),)
        return self._made[key][0]

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.width:
            raise ConfigError(
                f"vectors of width {x.shape[-1]}", expected=f"the rotation's width, {self.width}"
            )

    def _parts(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = (device, dtype)
        if key not in self._made:
            self._made[key] = tuple(part.to(device, dtype) for part in self._drawn())
        signs, rest = self._made[key]
        return signs, rest

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Signs (d,) and the rotation of the odd rest (R, R), float64."""
        generator = _generator(self.seed)
        bits = torch.randint(2, (self.width,), generator=generator)
        odd = self.width // (self.width & -self.width)
        return 1.0 - 2.0 * bits.double(), _haar(odd, generator)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _haar(width: int, generator: torch.Generator) -> Tensor:
    normal = torch.randn(width, width, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    return torch.as_tensor(q * r.diagonal().sign()).contiguous()


def _hadamard(width: int) -> Tensor:
    """Orthogonal, float64; a power of two."""
    made = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(made) < width:
        made = torch.kron(two, made)
    return made / math.sqrt(width)


def _walsh_hadamard(x: Tensor) -> Tensor:
    """The orthogonal transform of the last dimension, a power of two."""
    width = x.shape[-1]
    half = 1
    while half < width:
        pair = x.unflatten(-1, (-1, 2, half))
        low, high = pair.unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    return x / math.sqrt(width)


# ---- twin --------------------------------------------------------------------------------------


def rotated_ref(rotation: Rotation, x: Tensor) -> Tensor:
    """Twin of calling a rotation: its matrix, entry by entry from the definition, in float64."""
    d = rotation.width
    if rotation.kind == "dense":
        return x.double() @ rotation.matrix(dtype=torch.float64).T
    signs, rest = rotation._drawn()
    P = d // len(rest)
    rows = [
        [
            float(rest[i // P, j // P])
            * (-1) ** ((i % P) & (j % P)).bit_count()
            / math.sqrt(P)
            * float(signs[j])
            for j in range(d)
        ]
        for i in range(d)
    ]
    return x.double() @ torch.tensor(rows, dtype=torch.float64).T
