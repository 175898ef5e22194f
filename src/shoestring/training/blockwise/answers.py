"""Images classified by denoising their labels' rows: data, loss and held-out numbers.

What a block reads is the image, or rows that stand for it and do not depend on z: those of a frozen
encoder (`context`), or of the finished block before it (`sequential`). They are made once and lie
on disk. In the same place a finished block leaves where its chain is (`chain_steps`): K draws of z
for every training image, at the level where the next block takes over. That block's last updates
are half as ever, and half at the calls that a chain of one call a block makes of it, with these z:
so no other block's weights are in memory, and what it learns to correct are real mistakes.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoint.tensors import InParts
from ...errors import ConfigError, DataError
from ...models.dit import Answering, DiT
from ...models.dit_config import DiTConfig
from ...models.wrapped import Wrapped
from ...objectives.label_denoising import Draw, LabelDenoising, denoised, nearest_ref
from ...ops.preconditioning import euler_step
from ..draws import generator_of
from .config import BlockwiseConfig
from .encoder import CONTEXT, Encoder, cached_rows
from .handed import Batches, Handed, read_handed, write_handed
from .job import folder_of
from .pictures import Pictures, read_pictures
from .task import HELD_OUT, Denoiser, Task, image_shape, parts_of, table_of

CHAINS = 8
"""K: draws of z for every training image that a chain is followed with."""
QUIET = 0.1
_FOLDER = "handed"


class Answers(Task):
    """Classifying images: their labels' rows are denoised, the images only read."""

    device = torch.device("cpu")
    table: Tensor
    shape: DiTConfig

    def __init__(self, config: BlockwiseConfig) -> None:
        super().__init__(config)
        data, settings = config.data, config.blockwise
        self.train, self.held_out = read_pictures(data.source, data.held_out)
        self.data_digest = self.train.digest
        classes = self.train.classes
        if classes < 2:
            raise DataError(
                f"{data.source} has {classes} classes", expected="`labels` of 2 classes or more"
            )
        self.table = table_of(config, classes)
        self.parts = parts_of(settings, self.train, self.table)
        self.objective = LabelDenoising(
            partition=self.parts, top_share=settings.top_share,
            top_all=settings.top_blocks == "all",
        )  # fmt: skip
        shape = image_shape(config, self.train)
        self.encoder = Encoder.read(settings.context, shape) if settings.context else None
        rows, width = self.encoder.rows_shape if self.encoder else (0, 0)
        self.shape = DiTConfig(
            answers=classes, table_width=self.table.shape[1], sequential=settings.sequential,
            context_rows=rows, context_width=width, **shape,
        )  # fmt: skip
        self._rows: dict[str, Tensor] = {}
        self._chain: Tensor | None = None

    def identity(self) -> dict[str, Any]:
        """With the encoder, where there is one."""
        more = {} if self.encoder is None else {"context": self.encoder.digest}
        return {**super().identity(), **more}

    def fresh(self, block: int, device: torch.device) -> DiT | Wrapped:
        """As of any task, with `quiet_start` but for what reads z."""
        model = super().fresh(block, device)
        if self.config.blockwise.quiet_start:
            net = model.block(block)
            assert isinstance(net, Answering)
            embed = net.embed
            row = torch.randn(embed.bias.shape, generator=generator_of(self.config.run.seed, block))
            with torch.no_grad():
                embed.weight.mul_(QUIET)
                embed.bias.copy_(row)
        return model

    def objective_facts(self) -> dict[str, Any]:
        """Kind only: what a row's deviation is follows from the table."""
        return {"kind": "labels"}

    # ---- what a block reads --------------------------------------------------------------------

    def stands_on(self, block: int, *, chained: bool) -> str | None:
        """See `Task`. Before the first update, and again where updates along the chain begin."""
        settings = self.config.blockwise
        self._rows, self._chain = {}, None
        if self.encoder is not None:
            self._rows = cached_rows(self.encoder, self.train, self.held_out, self.device)
        chained = chained and settings.chain_steps > 0
        if block == 1 or not (settings.sequential or chained):
            return None
        handed = self._handed(block - 1)
        if settings.sequential:
            self._rows = {name: handed.tensors[name] for name in ("train", "held_out")}
        self._chain = handed.tensors["chain"] if chained else None
        return handed.of

    def begin_files(self, directory: Path) -> None:
        """The encoder, for the model that the blocks become."""
        if self.encoder is not None:
            self.encoder.copy_to(directory / CONTEXT)

    def _handed(self, block: int) -> Handed:
        found = read_handed(folder_of(Path(self.config.run.directory), block) / _FOLDER)
        if found is None:
            after = " along the chain" if not self.config.blockwise.sequential else ""
            raise ConfigError(
                f"block {block + 1} cannot be trained{after}: block {block} is not finished, or "
                f"its folder is not in {self.config.run.directory}",
                expected=f"block {block} with what it hands over, {_FOLDER}/",
                hint=f"shoestring train RUN.toml --block {block}; then the same command again.",
            )
        return found

    def _seen(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the block reads of some samples of train or held_out, and their labels."""
        data: Pictures = getattr(self, name)
        if name not in self._rows:
            images, labels = data.batch(rows, self.device)
            assert labels is not None
            return images, labels
        assert data.labels is not None
        return self._rows[name][rows].to(self.device), data.labels[rows].to(self.device)

    # ---- losses --------------------------------------------------------------------------------

    def step_loss(self, net: Denoiser, block: int, step: int, part: int) -> Tensor:
        """As of any task; after `run.steps` updates half of the batch is along the chain."""
        if step <= self.config.run.steps:
            return super().step_loss(net, block, step, part)
        generator, whole = generator_of(self.config.run.seed, block, step, part), self._batch_size
        part_of = whole // 2
        losses = [self._losses(net, block, whole - part_of, generator)]
        if part_of:
            losses.append(self.chain_losses(net, block, part_of, generator))
        return torch.cat(losses).mean()

    def loss(self, net: Denoiser, block: int, generator: torch.Generator) -> Tensor:
        """See `LabelDenoising`."""
        return self._losses(net, block, self._batch_size, generator).mean()

    @property
    def _batch_size(self) -> int:
        return self.config.data.batch_size

    def _losses(self, net: Denoiser, block: int, count: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.train), (count,), generator=generator)
        seen, labels = self._seen("train", rows)
        draw = self.objective.draw(block, count, self.table.shape[1], generator)
        return self.objective.losses(net, seen, labels, draw, self.table)

    def chain_losses(
        self, net: Denoiser, block: int, count: int, generator: torch.Generator
    ) -> Tensor:
        """Cross-entropies at the calls that a chain of one call a block makes of this one, (N,): at
        the highest level it owns; of the last block half of them at the lowest, after a step of
        its own."""
        rows = torch.randint(len(self.train), (count,), generator=generator)
        draws = torch.randint(CHAINS, (count,), generator=generator)
        seen, labels = self._seen("train", rows)
        z = self._enters(block, draws * len(self.train) + rows, generator)
        low, high = self.parts.range(block)
        level = torch.full((count,), high, dtype=torch.float64, device=z.device)
        if block == self.parts.blocks:
            half = count // 2
            with torch.no_grad():
                further = self._step(net, block, z[:half], seen[:half])
            z = torch.cat((further, z[half:]))
            level[:half] = low
        return F.cross_entropy(self.objective.logits(net, z, level, seen), labels, reduction="none")

    def _enters(self, block: int, places: Tensor, generator: torch.Generator) -> Tensor:
        """z where a chain enters a block: for draw k of sample n what lies at place k N + n, and
        for block 1 noise."""
        if block > 1:
            assert self._chain is not None
            return self._chain[places].to(self.device)
        width = self.table.shape[1]
        noise = torch.randn(len(places), width, generator=generator)
        return (noise * (self.parts.law.high**2 + 1 / width) ** 0.5).to(self.device)

    def _step(self, net: Denoiser, block: int, z: Tensor, seen: Tensor) -> Tensor:
        """From the highest to the lowest level of a block."""
        low, high = self.parts.range(block)
        level = torch.full((len(z),), high, dtype=torch.float64, device=z.device)
        clean = denoised(self.objective.logits(net, z, level, seen), self.table)
        return euler_step(z, clean, level, torch.full_like(level, low))

    def hands_over(self, block: int) -> bool:
        """The last block has none after it."""
        settings = self.config.blockwise
        return block < self.parts.blocks and bool(settings.sequential or settings.chain_steps)

    @torch.no_grad()
    def hand_over(self, net: Denoiser, block: int, of: str) -> None:
        """Rows of every image and where the chain is, for the next block."""
        settings = self.config.blockwise
        place = folder_of(Path(self.config.run.directory), block) / _FOLDER
        there = read_handed(place)
        if there is not None and there.of == of:
            return
        assert isinstance(net, Answering)
        batch, N, width = self._batch_size, len(self.train), self.table.shape[1]
        tensors: dict[str, Tensor | InParts] = {}
        if settings.sequential:
            for name in ("train", "held_out"):
                size = (len(getattr(self, name)), self.shape.positions + 1, self.shape.width)
                tensors[name] = Batches(size, batch, self._rows_maker(net, name))
        if settings.chain_steps:

            def step(places: Tensor) -> Tensor:
                generator = generator_of(self.config.run.seed, 0, int(places[0]), 1)
                z = self._enters(block, places, generator)
                return self._step(net, block, z, self._seen("train", places % N)[0])

            tensors["chain"] = Batches((CHAINS * N, width), batch, step)
        write_handed(place, of, tensors)

    def _rows_maker(self, net: Answering, name: str) -> Callable[[Tensor], Tensor]:
        width = self.table.shape[1]
        return lambda rows: self.objective.rows(net, self._seen(name, rows)[0], width)

    # ---- held out ------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, net: Denoiser, block: int) -> dict[str, float]:
        """Accuracy over the block's own levels, with the images, with those of others, and of one
        who sees none; of block 1 also at the highest level, where z says nothing."""
        sums: dict[str, float] = {}
        rows = torch.arange(min(HELD_OUT, len(self.held_out)))
        images, labels = self._seen("held_out", rows)
        plain = dataclasses.replace(self.objective, top_share=0.0)
        draw = plain.draw(block, len(rows), self.table.shape[1], generator_of(0, 0, block, 0))
        z = plain.noised(labels, draw, self.table)

        def right(answered: Tensor) -> float:
            return float((answered.argmax(dim=1) == labels).double().mean())

        logits = plain.logits(net, z, draw.level, images)
        sums["loss"] = float(F.cross_entropy(logits, labels))
        sums["accuracy"] = right(logits)
        other = images.roll(1, dims=0)
        sums["accuracy with other images"] = right(plain.logits(net, z, draw.level, other))
        sums["accuracy without images"] = right(nearest_ref(z.cpu(), draw.level, self.table.cpu())
                                                .to(labels.device))  # fmt: skip
        if block == 1 or self.objective.top_all:
            top = torch.full_like(draw.level, self.parts.law.high)
            z = plain.noised(labels, Draw(top, draw.noise), self.table)
            logits = plain.logits(net, z, top, images)
            sums["loss at the top"] = float(F.cross_entropy(logits, labels))
            sums["accuracy at the top"] = right(logits)
        return sums
