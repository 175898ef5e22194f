"""One update: microbatches in, one step of the optimizer out.

Each microbatch's mean loss is weighted by its share of the step's target tokens, over all
processes, so that the summed gradients are those of one big batch: the order of sums is the
only difference. Nothing is updated until every number has been found finite.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import TrainingDiverged
from ..objectives.next_token import Batch, num_targets, shares
from .distributed import World
from .guard import FiniteGuard
from .optimizer import clip_, gradient_norm
from .out_of_memory import HalfUpdateError, is_out_of_memory, pieces, said

LossFunction = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True, slots=True)
class Updated:
    """loss: nats a target token, over all processes; norm: of the gradients, before clipping;
    tokens: target tokens, over all processes."""

    loss: float
    norm: float
    tokens: int


def update(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    microbatches: Sequence[Batch],
    *,
    loss: LossFunction,
    guard: FiniteGuard,
    world: World,
    clip: float,
    split: int = 1,
) -> Updated:
    """Accumulate, check, clip, update. TrainingDiverged before anything is changed.

    microbatches: dicts of (B, T) tensors on any device; model: as `World.wrap` gave it.
    split: parts, by rows, that each microbatch is cut into; the update is the same one.
    """
    if split > 1:
        microbatches = [part for batch in microbatches for part in pieces(batch, split)]
    counts = [num_targets(batch) for batch in microbatches]
    total = int(world.sum([sum(counts)])[0])
    # DDP averages what the processes give; the shares are of all of them.
    weights = shares(counts, total=total, world=world.size)
    losses = []
    for index, (batch, weight) in enumerate(zip(microbatches, weights, strict=True)):
        averages = index == len(weights) - 1
        with contextlib.nullcontext() if averages else _accumulating(model):
            mean = loss(model, on_device(batch if weight else _with_a_target(batch), world.device))
            (mean * weight).backward()
        losses.append(mean.detach())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    of_all = gradient_norm(parameters, world).to(losses[0].device)
    *means, norm = torch.stack([*losses, of_all]).tolist()
    _all_finite(step, means, norm, world)
    guard.check(step, means, norm)
    clip_(parameters, norm, clip)
    half_made = None
    try:
        optimizer.step()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        half_made = HalfUpdateError(said(error))
    if half_made is not None:
        raise half_made  # out here, so that it does not hold what the other one's frames hold
    optimizer.zero_grad(set_to_none=True)
    nats = sum(mean * count for mean, count in zip(means, counts, strict=True))
    return Updated(world.sum([nats])[0] / total, norm, total)


def _all_finite(step: int, losses: Sequence[float], norm: float, world: World) -> None:
    """TrainingDiverged where only another process of the group saw a loss that is not finite:
    all have to leave the update out."""
    mine = all(map(math.isfinite, (*losses, norm)))
    if world.sum([float(not mine)])[0] and mine:
        raise TrainingDiverged(
            f"step {step}: a loss of another process is not finite", expected="finite numbers"
        )


def on_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch on the device; a copy to CUDA does not hold up the host."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return {name: t.pin_memory().to(device, non_blocking=True) for name, t in batch.items()}


def _accumulating(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """DDP averages gradients in the last backward of a step only."""
    no_sync = getattr(model, "no_sync", None)
    return no_sync() if no_sync is not None else contextlib.nullcontext()


def _with_a_target(batch: Batch) -> dict[str, Tensor]:
    # The mean over no tokens is NaN; over one token, weighted by 0, it is a gradient of zeros,
    # and every process of a group still takes part in the backward.
    labels = batch["labels"].clone()
    labels[0, -1] = batch["input_ids"][0, -1]
    return {**batch, "labels": labels}
