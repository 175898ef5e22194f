"""Images denoised by the blocks of a transformer of diffusers, as jobs like any others.

The data file holds the images and their labels as ever. For a model that is given embeddings (of
texts), it also holds these, under the names of the model's own arguments, with a row for every
label and one more, which is the embedding of no text: (classes + 1, ...).
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import ConfigError, DataError
from ...models.dit import DiT
from ...models.wrapped import Wrapped
from ...models.wrapped_config import ARCHITECTURES, WrappedConfig
from ...models.wrapped_sources import config_of, rows_table, weight_files
from .config import BlockwiseConfig
from .task import Denoiser, Images


class WrappedImages(Images):
    """Denoising of images by a wrapped model."""

    def __init__(self, config: BlockwiseConfig) -> None:
        super().__init__(config)
        shape = self.shape
        assert isinstance(shape, WrappedConfig)
        if shape.channels != self.train.images.shape[1]:
            raise ConfigError(
                f"images of {self.train.images.shape[1]} channels for {shape.architecture}",
                expected=f"{shape.channels}, which its config decides",
            )

    def _shape(self) -> WrappedConfig:
        network = read_config(self.config.model.diffusers)
        call = ARCHITECTURES.get(str(network["_class_name"]))
        rows: dict[str, tuple[int, ...]] = {}
        if call is not None and call.given:
            given = read_given(Path(self.config.data.source), call.given, self.train.classes)
            self.table, rows = rows_table(given)
        if self.config.model.weights:
            weight_files(self.config.model.weights)
        high, wide = self.train.images.shape[2:]
        return config_of(
            network, self.parts, size=wide, height=None if high == wide else high,
            classes=self.train.classes, rows=rows,
        )  # fmt: skip

    def fresh(self, block: int, device: torch.device) -> DiT | Wrapped:
        """As it is made, or as the weights to start from have it."""
        model = super().fresh(block, device)
        if self.config.model.weights:
            assert isinstance(model, Wrapped)
            model.start_from(block, self.config.model.weights)
        return model

    def loss(self, net: Denoiser, block: int, generator: torch.Generator) -> Tensor:
        """See `Denoise`. What the model itself drops is drawn from the generator too."""
        if not any(isinstance(m, nn.Dropout) and m.p > 0 for m in net.modules()):
            return super().loss(net, block, generator)
        seed = int(torch.randint(2**62, (1,), generator=generator))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            return super().loss(net, block, generator)

    @torch.no_grad()
    def evaluate(self, net: Denoiser, block: int) -> dict[str, float]:
        """As of any images, without dropping anything."""
        net.eval()
        try:
            return super().evaluate(net, block)
        finally:
            net.train()


def read_config(path: str | Path) -> dict[str, Any]:
    """A model's config, from its config.json or the folder that holds it."""
    place = Path(path)
    place = place / "config.json" if place.is_dir() else place
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.diffusers = {str(path)!r} cannot be read: {error}",
            expected="the config.json of a transformer of diffusers, or its folder",
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("_class_name"), str):
        raise ConfigError(
            f"{place} names no class",
            expected="`_class_name`, such as " + next(iter(ARCHITECTURES)),
        )
    return found


def read_given(path: Path, names: tuple[str, ...], classes: int) -> dict[str, Tensor]:
    """The embeddings that the data file holds, (classes + 1, ...) each. DataError."""
    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            given = {name: file.get_tensor(name) for name in names if name in there}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}", expected="a safetensors file") from error
    for name in names:
        value = given.get(name)
        if value is None or not value.is_floating_point() or len(value) != classes + 1:
            raise DataError(
                f"{name} of {path} is "
                + ("missing" if value is None else f"{tuple(value.shape)} of {value.dtype}"),
                expected=f"numbers ({classes + 1}, ...): a row for each label, and one for none",
            )
    return given
