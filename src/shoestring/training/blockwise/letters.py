"""The bytes of a text, split, and texts of a fixed length drawn from them."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...data import Source, open_source
from ...data.yardsticks import joined_bytes
from ...errors import DataError

VOCABULARY = 256


@dataclass(frozen=True, slots=True)
class Letters:
    """content: bytes of all documents, joined, as a uint8 tensor; digest: of them."""

    content: Tensor
    digest: str

    def batch(self, starts: Tensor, length: int, device: torch.device | str = "cpu") -> Tensor:
        """Texts (N, length), int64, that begin at these bytes."""
        places = starts[:, None] + torch.arange(length)
        return self.content[places].to(device).long()

    def starts(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Where `count` texts begin, drawn."""
        return torch.randint(len(self.content) - length + 1, (count,), generator=generator)

    def rows(self, length: int) -> Tensor:
        """Where texts begin that lie one after the other."""
        return torch.arange(0, len(self.content) - length + 1, length)


def read_letters(source: str, held_out: float, length: int) -> tuple[Letters, Letters]:
    """(train, held out). DataError for a source with fewer bytes than a text on either side."""
    train, rest = open_source(source).split(held_out)
    return _read(train, length), _read(rest, length)


def _read(source: Source, length: int) -> Letters:
    content = b"".join(joined_bytes(source))
    if len(content) < length:
        raise DataError(
            f"{source.name} has {len(content)} bytes",
            expected=f"at least data.sequence_length = {length}",
        )
    tensor = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
    return Letters(tensor, hashlib.sha256(content).hexdigest())
