"""Next-token prediction: the mean cross-entropy of the targets, in nats.

Equation: loss = - (1 / n) sum over targets t of log p(x_t | x_<t), n the number of targets (labels
other than -100; the model shifts). Microbatches differ in n, so an update's loss is their mean
weighted by n, not the mean of their means: `shares` gives the weights. The model computes the
loss itself, so a method that replaces the loss (chunked, fused) is used without being named here.

Memory: nothing beyond the model's own. Source of the weighting: the sum over an accumulated
update equals the one large batch; plain averaging is off wherever rows are padded or masked.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import DataError

IGNORED = -100
Batch = Mapping[str, torch.Tensor]


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean nats per target of one microbatch, a scalar with its graph.

    batch: input_ids and labels, both (B, T), and whatever else the model's forward takes.
    """
    output: torch.Tensor = model(**batch).loss
    return output


def num_targets(batch: Batch) -> int:
    """How many labels are predicted. Count before the batch goes to the device: no waiting there.

    labels (B, T); the first of a row is predicted by nothing and does not count.
    """
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def shares(counts: Sequence[int], *, total: float | None = None, world: int = 1) -> list[float]:
    """The weight of each microbatch's mean loss in the update's loss.

    counts: targets of this process's microbatches.  total: targets of all processes together
    (by default this process's).  world: processes whose gradients are *averaged* afterwards; the
    weights are that much larger, so that the average is the sum that is meant.
    """
    whole = sum(counts) if total is None else total
    if whole <= 0:
        raise DataError(
            "an update has no target to learn from",
            expected="at least one label that is not -100",
            hint="Use longer rows, so that answers are not cut off.",
        )
    return [count * world / whole for count in counts]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Sums over held-out targets; the sums of several processes may be added."""

    nats: float
    """Total cross-entropy."""
    targets: int
    """Number of targets."""

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.nats / self.targets if self.targets else math.nan

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits per byte of the text that the targets spell, which has `num_bytes` bytes."""
        if num_bytes < 1:
            raise DataError(f"bits per byte of {num_bytes} bytes", expected="1 byte or more")
        return self.nats / math.log(2) / num_bytes


def evaluate(
    model: nn.Module, batches: Iterable[Batch], *, device: torch.device | str | None = None
) -> Evaluation:
    """Held-out nats and targets, without gradients, dropout or cache; the mode is put back.

    device: where batches are sent; by default they stay.  Sums are kept in float64.
    """
    nats, targets = torch.zeros((), dtype=torch.float64), 0
    with _evaluating(model), torch.no_grad():
        for batch in batches:
            count = num_targets(batch)
            if not count:
                continue  # a mean over nothing is NaN, and it adds nothing
            if device is not None:
                batch = {name: value.to(device) for name, value in batch.items()}
            mean = loss(model, batch).double()
            nats = nats.to(mean.device) + mean * count
            targets += count
    return Evaluation(float(nats), targets)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {name: module.training for name, module in model.named_modules()}
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if use_cache:  # a key-value cache that nobody reads is memory
        config.use_cache = False
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)
        if use_cache:
            config.use_cache = use_cache
