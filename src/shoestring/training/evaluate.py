"""Held-out loss and a sampled continuation, in no more memory than a training step.

Losses are summed as numbers, batch by batch: logits of one batch are all that ever exists.
Neither disturbs training: the random state, the training flags of all modules and the gradients
are as they were.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..errors import DataError
from .distributed import World
from .step import Batch, LossFunction, num_targets, on_device


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Loss on text the model was not trained on."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int

    def to_json(self) -> dict[str, float]:
        """As a dict of numbers."""
        return asdict(self)


def held_out_loss(
    model: nn.Module,
    batches: Iterable[tuple[Batch, int]],
    *,
    loss: LossFunction,
    world: World,
) -> HeldOut:
    """Mean over all target tokens of all batches.

    batches: (batch of (B, T) tensors, UTF-8 bytes that its target tokens stand for).
    """
    nats, tokens, num_bytes = 0.0, 0, 0
    with evaluating(model), torch.no_grad():
        for batch, size in batches:
            count = num_targets(batch)
            if count:
                nats += float(loss(model, on_device(batch, world.device))) * count
            tokens, num_bytes = tokens + count, num_bytes + size
    if not tokens or not num_bytes:
        raise DataError(
            "the held-out data has no token to score",
            expected="at least one full row",
            hint="Hold out a larger share, or shorten data.sequence_length.",
        )
    return HeldOut(nats / tokens, nats / math.log(2) / num_bytes, tokens, num_bytes)


def continuation(
    model: Any, prompt: torch.Tensor, *, num_tokens: int, seed: int, end: int | None = None
) -> torch.Tensor:
    """`num_tokens` sampled after a prompt of shape (1, T), by the model's own generate; (1, N)."""
    with evaluating(model), torch.no_grad(), _own_random_numbers(seed, prompt.device):
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            do_sample=True,
            temperature=0.8,
            top_k=50,
            eos_token_id=end,
            pad_token_id=end,
        )
    new: torch.Tensor = out[:, prompt.shape[1] :]
    return new


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
