"""What a wrapped model is made from: its config, what it is given, and weights on disk."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..ops.noise_levels import LogNormal, Partition
from .wrapped_config import Call, WrappedConfig
from .wrapped_cut import call_of, skeleton


def config_of(
    network: nn.Module | Mapping[str, Any],
    partition: Partition,
    *,
    size: int | None = None,
    height: int | None = None,
    classes: int = 0,
    rows: Mapping[str, tuple[int, ...]] | None = None,
    call: Call | None = None,
) -> WrappedConfig:
    """How a transformer of diffusers is cut into the partition's blocks.

    network: a model, or its config with `_class_name`.  size, height: of the images; by default
    the model's own `sample_size`.  rows: shape of what is given for one class, by argument.  call:
    for architectures that are not known.  ConfigError for what cannot be cut or called so.
    """
    if isinstance(network, nn.Module):
        architecture, settings = type(network).__name__, dict(getattr(network, "config", {}))
    else:
        architecture, settings = str(network.get("_class_name", "")), dict(network)
    known = {k: v for k, v in settings.items() if not k.startswith("_")}
    settings = json.loads(json.dumps(known))  # as it comes back from a file: tuples are lists
    whole = skeleton(architecture, settings)
    call = call_of(whole, call)
    size = size or settings.get("sample_size")
    if not isinstance(size, int):
        raise ConfigError(f"{architecture} does not say how large images are", expected="a size")
    _check_settings(architecture, settings, call, classes)
    law, low, high = partition.law, 0.0, 1.0
    if isinstance(law, LogNormal):  # what `edm_scales` tells of the noise
        low, high = math.log(law.low) / 4, math.log(law.high) / 4
    patch = int(settings.get("patch_size") or 1) * (2 if call.packed else 1)
    if size % patch or (height or size) % patch:
        raise ConfigError(
            f"images of {height or size} x {size} for {architecture}",
            expected=f"a multiple of its patch, {patch}",
        )
    channels = int(settings.get("in_channels", 1)) // (4 if call.packed else 1)
    return WrappedConfig(
        architecture=architecture, settings=settings, call=call,
        layers=tuple(len(getattr(whole, name)) for name in call.lists), blocks=partition.blocks,
        low=low, high=high, size=size, height=height, channels=channels, classes=classes,
        rows={name: tuple((rows or {})[name]) for name in call.given if name in (rows or {})},
    )  # fmt: skip


def _check_settings(name: str, settings: Mapping[str, Any], call: Call, classes: int) -> None:
    if call.labels and not 0 <= classes <= int(settings[call.null]):
        raise ConfigError(
            f"{classes} classes, and {call.null} of {name} is {settings[call.null]}",
            expected=f"at most {settings[call.null]}",
        )
    if settings.get("guidance_embeds"):
        raise ConfigError(
            f"{name} with guidance_embeds, which a teacher's guidance is distilled into",
            expected="guidance_embeds = false: guidance is taken when images are drawn",
        )


def rows_table(given: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, tuple[int, ...]]]:
    """(table (V, R) float32, shape of a row by argument) of embeddings that have V rows each."""
    counts = {name: len(value) for name, value in given.items()}
    if len(set(counts.values())) != 1:
        raise ConfigError(f"embeddings with {counts} rows", expected="as many of each")
    table = torch.cat([value.float().flatten(1) for value in given.values()], dim=1)
    return table, {name: tuple(value.shape[1:]) for name, value in given.items()}


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a model. CheckpointError where there are none."""
    place = Path(path)
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no weights", expected="safetensors files")
    return files


def read_weights(file: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Those of these weights that a file has, one at a time. CheckpointError for damage."""
    try:
        with safe_open(file, framework="pt") as opened:
            for name in sorted(names & set(opened.keys())):
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
