"""The recipes of others, as their documentation has them: no code of ours."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SLICES = 8


def checkpointing(model: Any) -> None:
    """transformers: every layer is run again in backward."""
    model.gradient_checkpointing_enable({"use_reentrant": False})


def loss_in_slices(model: Any, batch: Any) -> Tensor:
    """Cross entropy of the next token, with a slice's logits alive at a time."""
    hidden = model.model(batch["input_ids"]).last_hidden_state[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()

    def part(h: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(h).float(), t, reduction="sum")

    parts = zip(hidden.chunk(SLICES), targets.chunk(SLICES), strict=True)
    sums = [checkpoint(part, h, t, use_reentrant=False) for h, t in parts]
    return torch.stack(sums).sum() / len(targets)


class Each:
    """An optimizer of its own for each parameter, stepped as soon as the gradient is there, as in
    torch's tutorial "How to save memory by fusing the optimizer step into the backward pass"."""

    def __init__(self, parameters: Sequence[nn.Parameter], make: Callable[..., Any]) -> None:
        optimizers = {p: make([p]) for p in parameters}
        self.each = list(optimizers.values())

        def arrived(parameter: nn.Parameter) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(arrived)

    @property
    def state(self) -> dict[Any, Any]:
        """Of all of them."""
        return {p: s for one in self.each for p, s in one.state.items()}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all of them."""
        return [group for one in self.each for group in one.param_groups]

    def step(self) -> None:
        """Backward has done it."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Backward has done it."""


def in_backward(make: Callable[..., Any]) -> Callable[..., Any]:
    """Each parameter stepped within backward, by an optimizer that `make` makes."""
    return lambda parameters: Each(parameters, make)


def eight_bit(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with states of 8 bits."""
    import bitsandbytes

    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-5)
    return made
