"""safetensors files, written tensor by tensor and hashed on the way.

The safetensors library makes one copy of everything in memory before it writes; here no more
than one piece exists beside the tensors, and the checksum costs no second reading. Files are
read by the library.

The format: eight bytes with the length of a JSON header (little-endian), the header (dtype, shape
and place of every tensor), then the tensors' bytes without gaps.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_PIECE_BYTES = 16 << 20
_ALIGNMENT = 8


class InParts(ABC):
    """A tensor that is nowhere as a whole: its rows come a part at a time, while it is written."""

    shape: torch.Size
    dtype: torch.dtype
    layout: torch.layout

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def numel(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)

    @abstractmethod
    def parts(self) -> Iterator[Tensor]:
        """The whole, cut along its first dimension, in order."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor | InParts]) -> str:
    """Write `tensors` and return the file's SHA-256 in hex. CheckpointError for an odd dtype.

    Tensors of any device and layout of strides; what they hold is written densely.
    """
    header, place = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            raise CheckpointError(
                f"{name} is a {tensor.layout} tensor of {tensor.dtype}, which no file can hold",
                expected="a dense tensor of an ordinary dtype",
            )
        nbytes = tensor.numel() * tensor.itemsize
        offsets = [place, place + nbytes]
        header[name] = {
            "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets
        }  # fmt: skip
        place += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            file.write(piece)
            digest.update(piece)
        for tensor in tensors.values():
            for part in tensor.parts() if isinstance(tensor, InParts) else (tensor,):
                for view in _pieces(part):
                    file.write(view)
                    digest.update(view)
    return digest.hexdigest()


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one after the other, on the CPU. CheckpointError for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", expected="a safetensors file"
        ) from error


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().reshape(-1)
    step = max(1, _PIECE_BYTES // tensor.itemsize)
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].cpu().contiguous()
        yield memoryview(part.view(torch.uint8).numpy())  # type: ignore[arg-type]
