"""Images and their classes from a safetensors file, split, and drawn from by number."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import DataError


@dataclass(frozen=True, slots=True)
class Pictures:
    """images (N, C, H, W), bytes or float32 in [-1, 1], latents any float32; labels (N,) int64 or
    None; digest: of both, before anything was held out; classes: 0 without labels."""

    images: Tensor
    labels: Tensor | None
    classes: int
    digest: str

    def __len__(self) -> int:
        return len(self.images)

    def batch(
        self, rows: Tensor, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor | None]:
        """Some of them: images as float32 in [-1, 1], and their labels."""
        images = self.images[rows].to(device)
        if images.dtype == torch.uint8:
            images = images.float() / 127.5 - 1
        return images, None if self.labels is None else self.labels[rows].to(device)


def read_pictures(
    path: str | Path, held_out: float, *, latent: bool = False
) -> tuple[Pictures, Pictures]:
    """(train, held out): a share drawn once, the same on every machine. DataError for a file that
    does not hold images. latent: floats may be any finite numbers."""
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"there is no file {path}", expected="a safetensors file with images (N, C, H, W)"
        )
    images, labels = _tensors(path, math.inf if latent else 1.0)
    digest = hashlib.sha256(_bytes(images))
    classes = 0
    if labels is not None:
        labels = labels.long()
        digest.update(_bytes(labels))
        classes = int(labels.max()) + 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    cut = min(len(images) - 1, max(1, round(held_out * len(images))))
    # What is held out stays mixed: files often hold one class after the other, and an evaluation
    # looks at the first of them, or gives one image another's place.
    parts = order[cut:].sort().values, order[:cut]
    train, rest = (
        Pictures(
            images[rows], None if labels is None else labels[rows], classes, digest.hexdigest()
        )
        for rows in parts
    )
    return train, rest


def _tensors(path: Path, largest: float) -> tuple[Tensor, Tensor | None]:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if "images" not in names:
                raise DataError(f"{path} holds {sorted(names)}", expected="a tensor `images`")
            images = file.get_tensor("images")
            labels = file.get_tensor("labels") if "labels" in names else None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}", expected="a safetensors file") from error
    is_fine = images.dim() == 4 and images.numel() and len(images) >= 2
    if not is_fine or images.dtype not in (torch.uint8, torch.float32):
        raise DataError(
            f"the images of {path} are {tuple(images.shape)} of {images.dtype}",
            expected="2 or more images (N, C, H, W), as bytes or float32 in [-1, 1]",
        )
    if images.dtype == torch.float32:
        top = float(images.abs().max())
        if not (math.isfinite(top) and top <= largest):
            raise DataError(
                f"{path} has values beyond [-1, 1]" if math.isfinite(top) else
                f"{path} has values that are not finite",
                expected="float images in [-1, 1]" if largest == 1 else "finite numbers",
            )  # fmt: skip
    if labels is not None and (
        labels.shape != (len(images),) or labels.is_floating_point() or int(labels.min()) < 0
    ):
        raise DataError(
            f"the labels of {path} are {tuple(labels.shape)} of {labels.dtype}",
            expected=f"({len(images)},) whole numbers from 0 on",
        )
    return images, labels


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
