"""Edges at equal useful work, from the data of a run: a function of these alone, so that jobs on
different machines divide alike. What they found is in every checkpoint, and merging compares it."""

import torch
from torch import Tensor

from ...objectives.input_gap import SAMPLES, class_gap, image_gap
from ...ops.noise_levels import Law, LogNormal, Partition
from ...ops.useful_levels import useful_partition, without_free
from .config import BlocksConfig
from .pictures import Pictures


def useful_parts(
    law: Law, settings: BlocksConfig, data: Pictures, table_VW: Tensor | None
) -> Partition:
    """Who owns which noise. table_VW: of labels; levels at which it gives them away are dropped."""
    rows = torch.linspace(0, len(data) - 1, min(SAMPLES, len(data))).long()
    images, labels = data.batch(rows)
    if table_VW is None:
        gap = image_gap(images, law, settings.data_std)
    else:
        assert isinstance(law, LogNormal)
        assert labels is not None
        law, gap = without_free(law, len(table_VW)), class_gap(images, labels, table_VW)
    return useful_partition(law, settings.blocks, gap, overlap=settings.overlap)
