"""A frozen encoder whose rows every block reads instead of the image, and where they lie.

The encoder is a merged model of labels with one block: `blocks = 1` and as many layers as are
worth their memory, trained like any other block (with `top_share = 1`, as a plain classifier). Its
rows are made once a machine, of every image, into the cache, and mapped; so a block's job holds
neither the encoder nor the rows. The encoder's own files go with each block, and into the model.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import atomic_directory
from ...checkpoint.manifest import write_manifest
from ...data.cache import default_cache, entry_name, new_entry
from ...errors import CheckpointError, ConfigError
from ...models.dit import Answering
from ...models.dit_config import DiTConfig
from ...objectives.label_denoising import LabelDenoising
from .handed import Batches, file_digest, read_handed, stands_on, write_parts
from .pictures import Pictures

CONTEXT = "context"
"""In a block's folder and in a merged model: the encoder, a merged model itself."""
_BATCH = 256


@dataclass(frozen=True, slots=True)
class Encoder:
    """Where an encoder is, what it is of, and the digest of its weights."""

    place: Path
    config: DiTConfig
    digest: str

    @classmethod
    def read(cls, path: str | Path, shape: dict[str, Any]) -> "Encoder":
        """The encoder at a path, for images of a shape. ConfigError unless it can be one."""
        from .merging import FACTS as MODEL_FACTS
        from .merging import WEIGHTS, load_merged

        path = Path(path)
        merged = load_merged(path)  # verifies; frees what it loaded when this ends
        place = path if (path / MODEL_FACTS).is_file() else path / "model"
        config = merged.model.config
        is_plain = isinstance(merged.objective, LabelDenoising) and merged.encoder is None
        if not is_plain or config.blocks != 1:
            raise ConfigError(
                f"blockwise.context = {str(path)!r} is a model of "
                f"{merged.facts['objective']['kind']} with {config.blocks} blocks",
                expected="a model of labels with one block and no context of its own",
                hint="Train it with blockwise.blocks = 1, and merge it.",
            )
        assert isinstance(config, DiTConfig)
        for name in ("size", "height", "channels"):
            if getattr(config, name) != shape[name]:
                raise ConfigError(
                    f"blockwise.context = {str(path)!r} reads images of {name} "
                    f"{getattr(config, name)}",
                    expected=f"{shape[name]}, as the data are",
                )
        return cls(place, config, file_digest(place, WEIGHTS))

    @property
    def rows_shape(self) -> tuple[int, int]:
        """(rows, width) of an image."""
        return self.config.positions + 1, self.config.width

    def copy_to(self, place: Path) -> None:
        """A merged model with the same files there."""
        from .merging import FACTS as MODEL_FACTS
        from .merging import WEIGHTS

        with atomic_directory(place) as temporary:
            for name in (MODEL_FACTS, WEIGHTS):
                (temporary / name).write_bytes((self.place / name).read_bytes())


def rows_of(merged: Any, images: Tensor) -> Tensor:
    """The rows (N, T + 1, D) that an encoder, a merged model of one block, makes of images."""
    net = merged.model.block(1)
    assert isinstance(net, Answering)
    rows: Tensor = merged.objective.rows(net, images, merged.model.config.row)
    return rows


def cached_rows(
    encoder: Encoder, train: Pictures, held_out: Pictures, device: torch.device
) -> dict[str, Tensor]:
    """train and held_out as the encoder's rows, mapped; made where the cache has them not, or has
    them damaged."""
    from .merging import load_merged

    of = stands_on(train.digest, encoder.digest)
    place = default_cache() / "blockwise" / entry_name(of, str(len(held_out)))
    try:
        found = read_handed(place)
    except CheckpointError:
        found = None
    if found is not None and found.of == of:
        return dict(found.tensors)
    shutil.rmtree(place, ignore_errors=True)
    merged = load_merged(encoder.place, device=device)
    with new_entry(place) as temporary, torch.no_grad():

        def made(data: Pictures) -> Batches:
            return Batches(
                (len(data), *encoder.rows_shape), _BATCH,
                lambda rows: rows_of(merged, data.batch(rows, device)[0]),
            )  # fmt: skip

        parts = {"train": made(train), "held_out": made(held_out)}
        write_manifest(temporary, write_parts(temporary, of, parts))
    found = read_handed(place)
    assert found is not None
    return dict(found.tensors)
