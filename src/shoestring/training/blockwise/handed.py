"""What a finished network leaves on disk for blocks that build on it, and how they read it.

A directory with a manifest of checksums: handed.safetensors and facts.json, which says of which
weights it is. Tensors, each where there is a use for it:

train, held_out   (N, R, D)   rows that the network made of every image, for a block to read
chain             (K N, W)    z where the network's chain leaves it, K draws for every image

They are written a batch at a time and mapped when they are read: a job holds a batch of them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...checkpoint import atomic_directory, verify
from ...checkpoint.manifest import read_manifest
from ...checkpoint.tensors import InParts, write_tensors
from ...errors import CheckpointError
from ...meter import leave_out

# N images, R rows of one, D their width, K draws, W width of the table

HANDED, FACTS = "handed.safetensors", "facts.json"


class Batches(InParts):
    """A float32 tensor that a function makes batch by batch: of rows first..last - 1."""

    dtype = torch.float32
    layout = torch.strided

    def __init__(
        self, shape: tuple[int, ...], batch: int, make: Callable[[Tensor], Tensor]
    ) -> None:
        self.shape, self._batch, self._make = torch.Size(shape), batch, make

    def parts(self) -> Iterator[Tensor]:
        """In order."""
        for rows in torch.arange(self.shape[0]).split(self._batch):
            yield self._make(rows).float().cpu()


@dataclass(frozen=True, slots=True)
class Handed:
    """The tensors, mapped. of: which weights they are of, and all that these stand on."""

    of: str
    tensors: Mapping[str, Tensor]


def write_handed(place: Path, of: str, tensors: Mapping[str, Tensor | InParts]) -> None:
    """Write all of it, or nothing."""
    with atomic_directory(place, known := {}) as temporary:
        known.update(write_parts(temporary, of, tensors))


def write_parts(place: Path, of: str, tensors: Mapping[str, Tensor | InParts]) -> dict[str, str]:
    """The files alone; returns what their SHA-256 is, of those that are known."""
    text = json.dumps({"of": of}) + "\n"
    (place / FACTS).write_text(text, encoding="utf-8", newline="\n")
    return {HANDED: write_tensors(place / HANDED, tensors)}


def read_handed(place: Path) -> Handed | None:
    """What lies there, verified; None where nothing does. CheckpointError for damage."""
    if not place.is_dir() or not verify(place):
        return None
    try:
        of = str(json.loads((place / FACTS).read_text(encoding="utf-8"))["of"])
        return Handed(of, mapped(place / HANDED))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{place} cannot be read: {error}") from error


def mapped(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of a safetensors file, mapped, and left out of a meter's count; what is
    written to one stays here."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            raise ValueError(f"{name} of {path} is {entry['dtype']}")
        array = np.memmap(
            path, np.float32, "c", offset=8 + size + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
        )  # fmt: skip
        found[name] = torch.from_numpy(array)
    leave_out(found.values())
    return found


def stands_on(before: str | None, weights: str) -> str:
    """A name for weights and for all that they were trained on top of."""
    return hashlib.sha256(f"{before or ''}/{weights}".encode()).hexdigest()


def file_digest(directory: Path, name: str) -> str:
    """SHA-256 of a file as the manifest of its directory has it."""
    entry = (read_manifest(directory) or {}).get(name)
    if entry is None:
        raise CheckpointError(f"{directory} has no {name}", expected="it, in its manifest")
    return entry.sha256
