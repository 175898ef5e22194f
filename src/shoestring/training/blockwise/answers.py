"""Images classified by denoising their labels' rows: data, loss and held-out numbers."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import DataError
from ...models.dit import unit_table
from ...models.dit_config import DiTConfig
from ...objectives.label_denoising import LabelDenoising, nearest_ref
from .config import BlockwiseConfig
from .pictures import read_pictures
from .task import HELD_OUT, Denoiser, Task, generator_of, image_shape, parts_of, read_table


class Answers(Task):
    """Classifying images: their labels' rows are denoised, the images only read."""

    device = torch.device("cpu")

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
        self.parts = parts_of(settings)
        self.objective = LabelDenoising(partition=self.parts, top_share=settings.top_share)
        self.table = (
            read_table(Path(settings.table), classes)
            if settings.table
            else unit_table(classes, min(classes, config.model.hidden_size), seed=config.run.seed)
        )
        self.shape = DiTConfig(
            answers=classes, table_width=self.table.shape[1], **image_shape(config, self.train)
        )

    def objective_facts(self) -> dict[str, Any]:
        """Kind only: what a row's deviation is follows from the table."""
        return {"kind": "labels"}

    def loss(self, net: Denoiser, block: int, generator: torch.Generator) -> Tensor:
        """See `LabelDenoising`."""
        assert self.table is not None
        count = self.config.data.batch_size
        rows = torch.randint(len(self.train), (count,), generator=generator)
        images, labels = self.train.batch(rows, self.device)
        assert labels is not None
        draw = self.objective.draw(block, count, self.table.shape[1], generator)
        return self.objective.losses(net, images, labels, draw, self.table).mean()

    @torch.no_grad()
    def evaluate(self, net: Denoiser, block: int) -> dict[str, float]:
        """Accuracy over the block's own levels, with the images, with those of others, and of one
        who sees none; of block 1 also at the highest level, where z says nothing."""
        assert self.table is not None
        sums: dict[str, float] = {}
        rows = torch.arange(min(HELD_OUT, len(self.held_out)))
        images, labels = self.held_out.batch(rows, self.device)
        assert labels is not None
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
        if block == 1:
            top = torch.full_like(draw.level, self.parts.law.high)
            at = dataclasses.replace(draw, level=top)
            z = plain.noised(labels, at, self.table)
            logits = plain.logits(net, z, top, images)
            sums["loss at the top"] = float(F.cross_entropy(logits, labels))
            sums["accuracy at the top"] = right(logits)
        return sums
