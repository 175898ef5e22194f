"""Images as one PNG: a grid, gray or in colour. No library of pictures is needed for that.

Source: PNG specification (W3C, third edition), sections 5 and 11; every row has filter 0.
"""

import math
import struct
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError


def grid_of(images: Tensor, columns: int | None = None, *, gap: int = 2) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] as one (C, rows, columns of pixels), bytes; gaps are gray.

    columns: images a row; the root of their number if not given. Values outside are cut off.
    """
    N, C, H, W = images.shape
    columns = min(N, columns or math.ceil(N**0.5))
    rows = math.ceil(N / columns)
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    empty = torch.full((rows * columns - N, C, H, W), 128, dtype=torch.uint8)
    padded = F.pad(torch.cat((pixels, empty)), (0, gap, 0, gap), value=128)
    grid = padded.view(rows, columns, C, H + gap, W + gap).permute(2, 0, 3, 1, 4)
    return grid.reshape(C, rows * (H + gap), columns * (W + gap))[:, :-gap, :-gap]


def png_of(picture: Tensor) -> bytes:
    """A picture (1 or 3, H, W) of bytes as a PNG file. ConfigError for other channels."""
    channels, height, width = picture.shape
    check_channels(channels)
    rows = picture.permute(1, 2, 0).reshape(height, width * channels)
    lines = torch.cat((torch.zeros(height, 1, dtype=torch.uint8), rows), dim=1)
    kind = {1: 0, 3: 2}[channels]
    header = struct.pack(">2I5B", width, height, 8, kind, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.numpy().tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def check_channels(channels: int) -> None:
    """ConfigError for images that are neither gray nor in colour."""
    if channels not in (1, 3):
        raise ConfigError(f"images of {channels} channels", expected="1 or 3 for a PNG")


def _chunk(name: bytes, data: bytes) -> bytes:
    check = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)
