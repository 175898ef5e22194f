"""Where a layer keeps its tokens: the newest ones as they are, the older ones as codes.

Both write in place. Neither knows which tokens are which: the layer does.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..ops.vector_code import Codes, VectorCode

# B rows of the batch, H heads of keys and values, t tokens, d width of a head

BLOCK = 256
"""Tokens that codes are allocated for at a time, and that attention decodes at a time."""
SLACK = 32
"""Tokens that are written past the window before the window is moved to the front."""


class Recent:
    """The newest tokens, exact: two buffers (B, H, window + SLACK, d), filled from front to end.

    A longer chunk lies in longer buffers until all but the window has left.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int) -> None:
        self.room = window + SLACK
        self.buffers = [
            x.new_zeros((*x.shape[:2], self.room, x.shape[-1])) for x in (keys, values)
        ]  # fmt: skip
        self.begin = self.end = 0

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def keys(self) -> Tensor:
        """(B, H, t, d), a view."""
        return self.buffers[0][:, :, self.begin : self.end]

    @property
    def values(self) -> Tensor:
        """(B, H, t, d), a view."""
        return self.buffers[1][:, :, self.begin : self.end]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """(B, H, t, d), copied."""
        count = keys.shape[2]
        if self.end + count > self.buffers[0].shape[2]:
            whole = -(-(len(self) + count) // SLACK) * SLACK
            self._to_front(max(self.room, whole))
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, self.end : self.end + count] = new
        self.end += count

    def drop_oldest(self, count: int) -> None:
        """Their place is used again; buffers that are longer than they need be are let go."""
        self.begin += count
        if self.buffers[0].shape[2] > self.room >= len(self):
            self._to_front(self.room)

    def drop_newest(self, count: int) -> None:
        """As if they had not come."""
        self.end -= count

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """change: of the batch dimension."""
        self.buffers = [change(buffer) for buffer in self.buffers]

    def _to_front(self, room: int) -> None:
        length = len(self)
        for index, buffer in enumerate(self.buffers):
            kept = buffer[:, :, self.begin : self.end]
            if room == buffer.shape[2]:
                buffer[:, :, :length] = kept.clone()  # the two places may overlap
            else:
                new = buffer.new_zeros((*buffer.shape[:2], room, buffer.shape[-1]))
                new[:, :, :length] = kept
                self.buffers[index] = new
        self.begin, self.end = 0, length


class Coded:
    """The older tokens, as codes, in blocks of BLOCK tokens that stay where they are."""

    def __init__(self, key_code: VectorCode, value_code: VectorCode) -> None:
        self.codes = (key_code, value_code)
        self.blocks: list[tuple[Codes, Codes]] = []
        self.length = 0

    def __len__(self) -> int:
        return self.length

    def append(self, keys: Tensor, values: Tensor, mean: Tensor | None) -> None:
        """(B, H, t, d); mean (B, H, 1, d) is taken from the keys. All are coded before one is
        written, so an error of `VectorCode.encode` changes nothing."""
        pieces, start = [], 0
        while start < keys.shape[2]:
            place = (self.length + start) % BLOCK
            stop = min(start + BLOCK - place, keys.shape[2])
            # In float64, so that codes do not depend on how many came at a time.
            key, value = (x[:, :, start:stop].double() for x in (keys, values))
            key = key if mean is None else key - mean.double()
            pieces.append((place, self.codes[0].encode(key), self.codes[1].encode(value)))
            start = stop
        for place, key_codes, value_codes in pieces:
            if place == 0:
                self.blocks.append((_empty(key_codes), _empty(value_codes)))
            for block, new in zip(self.blocks[-1], (key_codes, value_codes), strict=True):
                end = place + new.scale.shape[2]
                block.packed[:, :, place:end] = new.packed
                block.scale[:, :, place:end] = new.scale
            self.length += key_codes.scale.shape[2]

    def tiles(self) -> Iterator[tuple[int, Codes, Codes]]:
        """First token, codes of keys, codes of values, block by block; views."""
        for index, (keys, values) in enumerate(self.blocks):
            start = index * BLOCK
            count = min(BLOCK, self.length - start)
            yield start, _first(keys, count), _first(values, count)

    def crop(self, length: int) -> None:
        """To that many tokens; blocks that hold none are let go."""
        self.length = length
        del self.blocks[-(-length // BLOCK) :]

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """change: of the batch dimension."""
        self.blocks = [
            (
                Codes(change(keys.packed), change(keys.scale)),
                Codes(change(values.packed), change(values.scale)),
            )
            for keys, values in self.blocks
        ]

    def tensors(self) -> list[Tensor]:
        """All that codes are in."""
        parts = [part for block in self.blocks for part in block]
        return [x for part in parts for x in (part.packed, part.scale)]


def _empty(like: Codes) -> Codes:
    shape = (*like.scale.shape[:2], BLOCK)
    packed = like.packed.new_zeros((*shape, like.packed.shape[-1]))
    return Codes(packed, torch.zeros(shape, dtype=like.scale.dtype, device=like.scale.device))


def _first(codes: Codes, count: int) -> Codes:
    return Codes(codes.packed[:, :, :count], codes.scale[:, :, :count])
