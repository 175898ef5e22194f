"""What a block of a pretrained decoder needs besides its layers while it learns to denoise.

A block is a run of neighbouring layers; its scaffold is a child of its first layer, so that it is
trained, streamed and kept in checkpoints with the block. It makes the rows that noised targets
enter the block as, and modulates them before and after every layer. At the start the rows are the
scaled targets at the spread of the input embeddings, and nothing is modulated (gates 1 + 0). Clean
rows never see it, so it is no part of what the model computes without noise, and none of what is
saved: `taken_out` leaves the plain decoder.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, StackError, nearest_divisors
from ..ops.preconditioning import waves_of_level
from ..stack import Stack

NAME = "denoising"
"""Of the scaffold, in the first layer of its block."""
FREQUENCIES = 64
"""Of the cosines, and of the sines, that a noise level becomes."""

Modulation = tuple[Tensor, Tensor, Tensor]
"""shift, scale and gate, each (N, 1, D)."""


class Scaffold(nn.Module):
    """Rows out of noised targets, and a modulation for each layer of the block.

    width: of the decoder, D.  layers: of the block.  condition: width of the vector that a noise
    level becomes.  spread: deviation of the input embeddings, a scalar.
    """

    def __init__(self, width: int, layers: int, condition: int, spread: Tensor) -> None:
        super().__init__()
        self.enter = nn.Linear(width, width, bias=False)
        self.first = nn.Linear(2 * FREQUENCIES, condition)
        self.second = nn.Linear(condition, condition)
        self.modulate = nn.Linear(condition, 3 * width * layers)
        with torch.no_grad():
            self.enter.weight.copy_(torch.eye(width, device=spread.device) * spread)
            nn.init.zeros_(self.modulate.weight)
            nn.init.zeros_(self.modulate.bias)
        self.layers = layers

    def forward(self, z_NSD: Tensor, noise_N: Tensor) -> tuple[Tensor, list[Modulation]]:
        """c_in z and c_noise -> rows (N, S, D), and one modulation a layer."""
        waves = waves_of_level(noise_N, FREQUENCIES)
        condition = F.silu(self.second(F.silu(self.first(waves))))
        parts = self.modulate(condition)[:, None].chunk(3 * self.layers, dim=-1)
        threes = [(parts[i], parts[i + 1], parts[i + 2]) for i in range(0, len(parts), 3)]
        return self.enter(z_NSD), threes


def put_scaffolding(model: Any, blocks: int, condition: int) -> None:
    """Give each of `blocks` runs of layers its scaffold, in place.

    ConfigError where that number does not divide the layers; StackError for a model without
    input embeddings as wide as its layers, or with a scaffold already.
    """
    stack = Stack.of(model)
    layers = layers_of_block(stack, blocks)
    table = embeddings_of(model)
    if any(hasattr(layer, NAME) for layer in stack.blocks):
        raise StackError(f"the layers of {stack!r} have {NAME!r} already", expected="plain layers")
    weight = table.weight.detach()
    for first in stack.blocks[::layers]:
        first.add_module(NAME, Scaffold(weight.shape[1], layers, condition, weight.std()))


def layers_of_block(stack: Stack, blocks: int) -> int:
    """Layers of each of so many blocks. ConfigError where they cannot be equal."""
    if not 1 <= blocks <= len(stack) or len(stack) % blocks:
        raise ConfigError(
            f"{blocks} blocks of the {len(stack)} layers of {stack!r}",
            expected="a divisor of the layers",
            hint=f"The nearest: {nearest_divisors(len(stack), blocks)}.",
        )
    return len(stack) // blocks


def embeddings_of(model: Any) -> nn.Embedding:
    """The table that tokens are looked up in. StackError where there is none."""
    finder = getattr(model, "get_input_embeddings", None)
    table = finder() if callable(finder) else None
    if not isinstance(table, nn.Embedding):
        raise StackError(
            f"{type(model).__name__} names no input embeddings",
            expected="a decoder whose get_input_embeddings() gives an nn.Embedding",
        )
    return table


@contextlib.contextmanager
def taken_out(model: nn.Module) -> Iterator[None]:
    """The model as it was made: without scaffolds in its state_dict, to be saved or counted."""
    homes = [(m, m._modules[NAME]) for m in model.modules() if _has_scaffold(m)]
    for home, _ in homes:
        del home._modules[NAME]
    try:
        yield
    finally:
        for home, scaffold in homes:
            home._modules[NAME] = scaffold


def _has_scaffold(module: nn.Module) -> bool:
    return isinstance(module._modules.get(NAME), Scaffold)
