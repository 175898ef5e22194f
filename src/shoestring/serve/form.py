"""The form of a compressed cache: for every layer, how vectors are turned and what each age costs.

A token passes through *tiers* as it grows older. A tier holds the newest so many of the tokens that
reach it, either exact, in the model's dtype, or coded (`ops.row_code`); the last holds all others.
Going from one coded tier to the next, a token keeps the form its codes gave it and loses bits.

Before it is coded a vector x of a head becomes z = A (x - mean). A `Turn` says which A: one random
rotation for all, which makes the coordinates of any vector alike (arXiv 2504.19874), or one made
for each head from a model (`calibration`).
"""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from ..ops.rotation import Rotation
from ..ops.row_code import RowCode, padded
from .store import buffer_bytes, room_for

# H heads, d width of a head, D its codes' width; side 0 keys, side 1 values


@dataclass(frozen=True, eq=False)
class Turn:
    """forward: (2, H, D, d), float64. inverse: (2, H, d, D), float32. mean: (2, H, d) float64,
    or None where each context finds a mean of its keys by itself, or has none."""

    forward: Tensor
    inverse: Tensor
    mean: Tensor | None = None
    _moved: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _zeros: Tensor | None = field(default=None, init=False, repr=False)

    @classmethod
    def random(cls, heads: int, width: int, seed: int) -> "Turn":
        """One rotation for all."""
        size = padded(width)
        matrix = Rotation(size, seed=seed).matrix(dtype=torch.float64)[:, :width]
        forward = matrix.expand(2, heads, size, width).contiguous()
        return cls(forward, forward.mT.float().contiguous())

    def no_mean(self) -> Tensor:
        """(2, 1, H, d) float64 zeros."""
        if self._zeros is None:
            _, heads, _, width = self.forward.shape
            object.__setattr__(self, "_zeros", self.forward.new_zeros(2, 1, heads, width))
        assert self._zeros is not None
        return self._zeros

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """forward in float64 and inverse in float32, on that device."""
        if device not in self._moved:
            self._moved[device] = self.forward.to(device), self.inverse.to(device)
        return self._moved[device]


@dataclass(frozen=True, eq=False)
class Tier:
    """room: tokens that it holds, None for all that come. code: None where they stay exact."""

    room: int | None
    code: RowCode | None

    def row_bytes(self, heads: int, width: int, dtype: torch.dtype) -> int:
        """Of one token of one layer."""
        if self.code is None:
            return 2 * heads * width * dtype.itemsize
        return self.code.row_bytes


@dataclass(frozen=True, eq=False)
class LayerForm:
    """heads, width: of keys and of values. tiers: from the newest tokens on; an exact one can only
    be the first. centre: find a mean of the keys when the first token leaves the exact tier."""

    heads: int
    width: int
    turn: Turn
    tiers: tuple[Tier, ...]
    sinks: int
    centre: bool = False

    def __post_init__(self) -> None:
        assert self.tiers[-1].room is None
        assert all(tier.code is not None for tier in self.tiers[1:])

    def __deepcopy__(self, memo: object) -> Self:
        return self  # nothing in it changes, and its tables are large

    @property
    def window(self) -> int:
        """Newest tokens that stay exact."""
        first = self.tiers[0]
        return first.room or 0 if first.code is None else 0


def layer_bytes(form: LayerForm, tokens: int, batch: int, dtype: torch.dtype) -> int:
    """Of a layer that holds that many tokens in each row, for exact ones of that dtype."""
    if not tokens:
        return 0
    total = batch * form.sinks * 2 * form.heads * form.width * dtype.itemsize
    total += 4 * batch * form.heads * form.width * form.centre
    for tier in form.tiers:
        itemsize = dtype.itemsize if tier.code is None else 1
        length = tier.row_bytes(form.heads, form.width, dtype) // itemsize
        room = room_for(tokens) if tier.room is None else tier.room
        total += buffer_bytes(room, length, batch, itemsize)
        tokens -= min(tokens, room)
    return total
