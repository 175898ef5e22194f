"""Where a layer keeps its tokens: rows, oldest first, in order of when they came.

A `Ring` holds the newest so many and hands over what it has no more room for; a `Pile` holds all
that come. Neither knows what a row means: the layer does.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.row_code import SPARE

# B batch, t tokens, r numbers or bytes of a token's row


class Ring:
    """The newest `room` tokens that came. Their places are used again, so nothing is moved."""

    def __init__(self, like: Tensor, room: int, length: int) -> None:
        self.room = room
        self.rows = _buffer(like, room, length)
        self.oldest = self.count = 0

    def __len__(self) -> int:
        return self.count

    def push(self, rows: Tensor) -> Tensor:
        """(B, t, r), copied -> (B, p, r), a copy of what had to leave, the oldest first."""
        new, room = rows.shape[1], self.room
        if new == 1 and self.count == room > 0:  # as it is token after token
            place = slice(self.oldest, self.oldest + 1)
            gone = self.rows[:, place].clone()
            self.rows[:, place] = rows
            self.oldest = (self.oldest + 1) % room
            return gone
        leave = max(self.count + new - room, 0)
        from_here = min(leave, self.count)
        gone = torch.cat([self._first(from_here), rows[:, : leave - from_here]], dim=1)
        self.oldest = (self.oldest + from_here) % room if room else 0
        self.count -= from_here
        rows = rows[:, leave - from_here :]
        at = (self.oldest + self.count) % room if room else 0
        fits = min(rows.shape[1], room - at)
        self.rows[:, at : at + fits] = rows[:, :fits]
        self.rows[:, : rows.shape[1] - fits] = rows[:, fits:]
        self.count += rows.shape[1]
        return gone

    def segments(self) -> list[Tensor]:
        """(B, n, r) each, views: what is here, in one or two pieces."""
        end = min(self.oldest + self.count, self.room)
        found = [self.rows[:, self.oldest : end]] if end > self.oldest else []
        if rest := self.count - (end - self.oldest):
            found.append(self.rows[:, :rest])
        return found

    def drop_newest(self, count: int) -> None:
        """As if they had not come."""
        self.count -= count

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """change: of the batch dimension."""
        self.rows = _copied(change(self.rows))

    def _first(self, count: int) -> Tensor:
        pieces, left = [self.rows[:, :0]], count
        for rows in self.segments():
            pieces.append(rows[:, :left])
            left -= pieces[-1].shape[1]
        return torch.cat(pieces, dim=1)


class Pile:
    """All tokens that came, in one buffer with a little room to grow."""

    def __init__(self, like: Tensor, length: int) -> None:
        self.rows = _buffer(like, 0, length)
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def push(self, rows: Tensor) -> None:
        """(B, t, r), copied."""
        there = self.count
        self.count += rows.shape[1]
        if self.count > self.rows.shape[1]:
            grown = _buffer(self.rows, room_for(self.count), self.rows.shape[2])
            grown[:, :there] = self.rows[:, :there]
            self.rows = grown
        self.rows[:, there : self.count] = rows

    def segments(self) -> list[Tensor]:
        """(B, n, r), a view: what is here, in one piece or none."""
        return [self.rows[:, : self.count]] if self.count else []

    def drop_newest(self, count: int) -> None:
        """As if they had not come; room that is no longer needed is let go."""
        self.count -= count
        if room_for(self.count) < self.rows.shape[1]:
            fewer = _buffer(self.rows, room_for(self.count), self.rows.shape[2])
            fewer[:, : self.count] = self.rows[:, : self.count]
            self.rows = fewer

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """change: of the batch dimension."""
        self.rows = _copied(change(self.rows))


def room_for(count: int) -> int:
    """Tokens that a pile of that many has room for: at most a 32nd more, or 15."""
    step = max(2 ** (max(count, 1).bit_length() - 6), 16)
    return -(-count // step) * step


def buffer_bytes(count: int, length: int, batch: int, itemsize: int) -> int:
    """Of a buffer with room for that many tokens."""
    return batch * count * length * itemsize + SPARE


def _buffer(like: Tensor, room: int, length: int) -> Tensor:
    """(B, room, length) of zeros, with bytes behind it that a kernel may read."""
    batch, spare = like.shape[0], SPARE // like.element_size()
    with torch.inference_mode(False):  # so that it can be written to outside of it, too
        flat = like.new_zeros(batch * room * length + spare)
    return flat[: batch * room * length].view(batch, room, length)


def _copied(rows: Tensor) -> Tensor:
    new = _buffer(rows, rows.shape[1], rows.shape[2])
    new.copy_(rows)
    return new
