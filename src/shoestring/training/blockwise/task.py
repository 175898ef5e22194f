"""What blocks are trained on: data, objective, the frozen table, and what they have in common.

Everything that a step draws (which samples, their noise, their labels) is a function of the seed,
the block and the step. So a block's training does not depend on what else its process does, nothing
random has to be saved to go on with it, and blocks trained in turn are those trained apart.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import ConfigError
from ...models.dit import Block, DiT, unit_table
from ...models.dit_config import DiTConfig
from ...models.wrapped import Wrapped, WrappedBlock
from ...models.wrapped_config import WrappedConfig
from ...objectives import denoise, masked_diffusion
from ...objectives.denoise import Denoise
from ...objectives.masked_diffusion import MaskedDiffusion
from ...ops.noise_levels import FlowTime, Law, LogNormal, MaskTime, Partition, partition
from ..draws import generator_of
from .config import BlocksConfig, BlockwiseConfig
from .letters import VOCABULARY, read_letters
from .pictures import Pictures, read_pictures

Denoiser = Block | WrappedBlock
FORMAT = 1
HELD_OUT = 512
"""Samples of an evaluation, at most."""


class Task(ABC):
    """Data and objective of one run.

    shape: of the whole network.  parts: who owns which noise.  table: (V, W) or None.
    """

    shape: DiTConfig | WrappedConfig
    parts: Partition
    table: Tensor | None = None
    data_digest: str

    def __init__(self, config: BlockwiseConfig) -> None:
        self.config = config

    @abstractmethod
    def objective_facts(self) -> dict[str, Any]:
        """The objective as plain data."""

    @abstractmethod
    def loss(self, net: Denoiser, block: int, generator: torch.Generator) -> Tensor:
        """The loss of a microbatch that the generator draws, a scalar with its graph."""

    def stands_on(self, block: int, *, chained: bool) -> str | None:
        """Open what other blocks left for this one, and name it; None where it needs nothing.

        chained: for updates after `run.steps`. ConfigError where it is not there yet.
        """
        return None

    def begin_files(self, directory: Path) -> None:  # noqa: B027
        """What merging needs of the task beside the table, into the block's folder."""

    def hands_over(self, block: int) -> bool:
        """Whether others need something of that block when it is finished."""
        return False

    def hand_over(self, net: Denoiser, block: int, of: str) -> None:  # noqa: B027
        """Leave in the finished block's folder what others need of it; `of`: its name."""

    @abstractmethod
    def evaluate(self, net: Denoiser, block: int) -> dict[str, float]:
        """Held-out numbers of one block."""

    def to(self, device: torch.device) -> "Task":
        """Where batches and the table go."""
        self.device = device
        if self.table is not None:
            self.table = self.table.to(device)
        return self

    def identity(self) -> dict[str, Any]:
        """What blocks that are to be one model must have in common, as plain data."""
        return {
            "format": FORMAT,
            "model": self.shape.to_json(),
            "partition": self.parts.to_json(),
            "objective": self.objective_facts(),
            "table": None if self.table is None else table_digest(self.table),
            "data": self.data_digest,
        }

    def fresh(self, block: int, device: torch.device) -> DiT | Wrapped:
        """A network in which that block has its first weights and no other has any."""
        seed = self.config.run.seed
        if isinstance(self.shape, WrappedConfig):
            return Wrapped.make(self.shape, seed=seed, only=block, table=self.table, device=device)
        return DiT.make(self.shape, seed=seed, only=block, table=self.table, device=device)

    def step_loss(self, net: Denoiser, block: int, step: int, part: int) -> Tensor:
        """The loss of microbatch `part` of update `step`."""
        return self.loss(net, block, generator_of(self.config.run.seed, block, step, part))


class Images(Task):
    """Denoising of images."""

    device = torch.device("cpu")

    def __init__(self, config: BlockwiseConfig) -> None:
        super().__init__(config)
        data, settings = config.data, config.blockwise
        self.train, self.held_out = read_pictures(
            data.source, data.held_out, latent=bool(config.model.diffusers)
        )
        self.data_digest = self.train.digest
        self.parts = parts_of(settings, self.train)
        self.shape = self._shape()
        self.objective = Denoise(
            kind="flow" if settings.objective == "flow" else "edm",
            partition=self.parts,
            data_std=settings.data_std,
            label_dropout=settings.label_dropout,
            classes=self.train.classes,
            top_share=settings.top_share,
        )

    def _shape(self) -> DiTConfig | WrappedConfig:
        return DiTConfig(classes=self.train.classes, **image_shape(self.config, self.train))

    def objective_facts(self) -> dict[str, Any]:
        """Kind and what it depends on."""
        return {"kind": self.objective.kind, "data_std": self.objective.data_std}

    def loss(self, net: Denoiser, block: int, generator: torch.Generator) -> Tensor:
        """See `Denoise`."""
        count = self.config.data.batch_size
        rows = torch.randint(len(self.train), (count,), generator=generator)
        images, labels = self.train.batch(rows, self.device)
        draw = self.objective.draw(block, images, labels, generator)
        return self.objective.loss(net, images, draw)

    @torch.no_grad()
    def evaluate(self, net: Denoiser, block: int) -> dict[str, float]:
        """Mean loss over the block's own levels, and at three fixed ones of them."""
        low, high = self.parts.range(block)
        ends = self.parts.law.mass(torch.tensor([low, high], dtype=torch.float64))
        inside = ends[0] + torch.tensor([0.05, 0.5, 0.95]) * (ends[1] - ends[0])
        fixed = self.parts.law.level(inside).tolist()
        sums: dict[str, float] = {}
        count = 0
        for rows, generator in self._held_out_rows():
            images, labels = self.held_out.batch(rows, self.device)
            draw = self.objective.draw(block, images, labels, generator)
            found = {"loss": self.objective.losses(net, images, draw)}
            for level in fixed:
                at = denoise.Draw(torch.full_like(draw.level, level), draw.noise, draw.labels)
                found[f"loss at {level:.4g}"] = self.objective.losses(net, images, at)
            for name, losses in found.items():
                sums[name] = sums.get(name, 0.0) + float(losses.double().sum())
            count += len(rows)
        return {name: total / count for name, total in sums.items()}

    def _held_out_rows(self) -> Iterator[tuple[Tensor, torch.Generator]]:
        rows = torch.arange(min(HELD_OUT, len(self.held_out)))
        for number, part in enumerate(rows.split(self.config.data.batch_size)):
            yield part, generator_of(0, 0, number, 0)


class OfBytes(Task):
    """Texts of bytes, and the frozen table of these."""

    device = torch.device("cpu")
    table: Tensor

    def __init__(self, config: BlockwiseConfig) -> None:
        super().__init__(config)
        data = config.data
        self.train, self.held_out = read_letters(data.source, data.held_out, data.sequence_length)
        self.data_digest = self.train.digest
        self.parts = parts_of(config.blockwise)
        self.table = table_of(config, VOCABULARY)

    def text_shape(self) -> dict[str, Any]:
        """What a network of texts has from the settings and from the table."""
        model = self.config.model
        return {
            "blocks": self.config.blockwise.blocks, "layers": model.num_hidden_layers,
            "width": model.hidden_size, "heads": model.num_attention_heads,
            "hidden": model.intermediate_size, "condition": model.condition_size,
            "vocabulary": VOCABULARY, "length": self.config.data.sequence_length,
            "table_width": self.table.shape[1],
        }  # fmt: skip

    def batch(self, generator: torch.Generator) -> Tensor:
        """Texts (N, T) to train on, drawn."""
        length = self.config.data.sequence_length
        starts = self.train.starts(self.config.data.batch_size, length, generator)
        return self.train.batch(starts, length, self.device)

    def held_out_batches(self) -> Iterator[Tensor]:
        """Held-out texts (N, T), some of all places, the same ones every time."""
        length = self.config.data.sequence_length
        rows = self.held_out.rows(length)
        rows = rows[torch.linspace(0, len(rows) - 1, min(HELD_OUT, len(rows))).long()]
        for starts in rows.split(self.config.data.batch_size):
            yield self.held_out.batch(starts, length, self.device)


class Texts(OfBytes):
    """Masked diffusion of bytes."""

    def __init__(self, config: BlockwiseConfig) -> None:
        super().__init__(config)
        self.objective = MaskedDiffusion(
            partition=self.parts, top_share=config.blockwise.top_share
        )  # fmt: skip
        self.shape = DiTConfig(**self.text_shape())

    def objective_facts(self) -> dict[str, Any]:
        """Kind only: the masking is in the partition."""
        return {"kind": "masked"}

    def loss(self, net: Denoiser, block: int, generator: torch.Generator) -> Tensor:
        """See `MaskedDiffusion`."""
        tokens = self.batch(generator)
        draw = self.objective.draw(block, tokens, generator)
        return self.objective.loss(net, tokens, draw, self.table)

    def evaluate(self, net: Denoiser, block: int) -> dict[str, float]:
        """The block's part of the bound, in bits a byte. The parts of all blocks sum to it."""
        nats = []
        for number, tokens in enumerate(self.held_out_batches()):
            generator = generator_of(0, 0, number, 0)
            nats.append(self.objective.nelbo(net, block, tokens, self.table, generator, draws=4))
        length = self.config.data.sequence_length
        return {"bits per byte": masked_diffusion.bits_per_token(torch.cat(nats), length)}


def task_of(config: BlockwiseConfig) -> Task:
    """The data read and checked. DataError, ConfigError."""
    if config.model.diffusers:
        from .wrapped import WrappedImages

        return WrappedImages(config)
    if config.blockwise.objective == "tokens":
        from .tokens import Tokens

        return Tokens(config)
    if config.blockwise.objective == "labels":
        from .answers import Answers

        return Answers(config)
    return (Texts if config.blockwise.objective == "masked" else Images)(config)


def image_shape(config: BlockwiseConfig, data: Pictures) -> dict[str, Any]:
    """What a network of images has from the settings and from the data."""
    model = config.model
    _, channels, height, size = data.images.shape
    return {
        "blocks": config.blockwise.blocks, "layers": model.num_hidden_layers,
        "width": model.hidden_size, "heads": model.num_attention_heads,
        "hidden": model.intermediate_size, "condition": model.condition_size, "size": size,
        "height": None if height == size else height, "channels": channels,
        "patch": model.patch_size,
    }  # fmt: skip


def parts_of(
    settings: BlocksConfig, data: Pictures | None = None, table: Tensor | None = None
) -> Partition:
    """Who owns which noise, from the settings, and from the data where these say so."""
    laws: dict[str, Law] = {}
    if settings.objective in ("edm", "labels", "tokens"):
        laws["edm"] = laws["labels"] = laws["tokens"] = LogNormal(
            mean=settings.sigma_mean, std=settings.sigma_std,
            low=settings.sigma_min, high=settings.sigma_max,
        )  # fmt: skip
    laws["flow"] = FlowTime(std=settings.time_std or None)
    laws["masked"] = MaskTime(alpha=settings.alpha)
    law = laws[settings.objective]
    if settings.spacing == "useful":
        from .useful import useful_parts

        assert data is not None
        return useful_parts(law, settings, data, table)
    return partition(law, settings.blocks, spacing=settings.spacing, overlap=settings.overlap)


def table_digest(table: Tensor) -> str:
    """SHA-256 of a table's shape and bytes."""
    values = table.detach().cpu().float().contiguous()
    digest = hashlib.sha256(repr(tuple(values.shape)).encode())
    digest.update(memoryview(values.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def table_of(config: BlockwiseConfig, rows: int) -> Tensor:
    """The frozen table of `rows` targets that a run's settings name, or one drawn from its seed."""
    if config.blockwise.table:
        return read_table(Path(config.blockwise.table), rows)
    return unit_table(rows, min(rows, config.model.hidden_size), seed=config.run.seed)


def read_table(path: Path, rows: int) -> Tensor:
    """A frozen table from a safetensors file. ConfigError unless it has unit rows."""
    try:
        with safe_open(path, framework="pt") as file:
            table = file.get_tensor("table")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"blockwise.table = {str(path)!r} cannot be read: {error}",
            expected="a safetensors file with a tensor `table`",
        ) from error
    if table.dim() != 2 or len(table) != rows or table.dtype != torch.float32:
        raise ConfigError(
            f"the table of {path} is {tuple(table.shape)} of {table.dtype}",
            expected=f"({rows}, W) of torch.float32",
        )
    worst = float((table.double().norm(dim=1) - 1).abs().max())
    if not worst < 1e-3 or math.isnan(worst):
        raise ConfigError(
            f"a row of {path} has a length that is {worst:.3g} away from 1",
            expected="rows of length 1",
            hint="Divide each row by its length: torch.nn.functional.normalize(table, dim=1).",
        )
    return table


def fresh(task: Task, block: int, device: torch.device) -> DiT | Wrapped:
    """A network in which that block has its first weights and no other has any."""
    return task.fresh(block, device)
