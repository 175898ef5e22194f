"""AdamW as the loop uses it, and gradient clipping that allocates nothing of a gradient's size.

AdamW is fused, where the device has a fused kernel: torch's foreach variant holds a copy of
every gradient at once, and its loop variant is slower. Vectors (norms, biases) are not decayed.
Clipping to a global norm follows arXiv 1211.5063; torch's own helper may take the foreach path.
"""

import inspect
import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from .config import OptimConfig
from .distributed import World
from .sharding import local

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def optimizer_factory(config: OptimConfig, device: torch.device) -> OptimizerFactory:
    """parameters -> AdamW; the planner calls it for a fake model, the loop for the real one."""

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        trained = [p for p in parameters if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            foreach=False,
            fused=has_fused_adamw(device),
        )

    return make


def has_fused_adamw(device: torch.device) -> bool:
    """Whether torch has a fused AdamW kernel for this kind of device."""
    return (
        device.type in ("cpu", "cuda")
        and "fused" in inspect.signature(torch.optim.AdamW).parameters
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


PIECE = 256
"""Elements whose squares are summed in float32 on CPU. torch sums those of a whole tensor so, which
loses digits of long ones, and depends on how the tensor is divided."""


def gradient_norm(parameters: Iterable[nn.Parameter], world: World | None = None) -> torch.Tensor:
    """L2 norm of all gradients together, a float32 scalar on their device; next to no temporaries.

    world: where it divides the gradients, those of all processes; all have to take part.
    """
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    squares = [_sum_of_squares(each, pieces=len(gradients)) for each in gradients]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
    if world is not None and world.shards:
        total = torch.tensor(world.sum([float(total)])[0], dtype=torch.float64)
    return total.sqrt().float()


def _sum_of_squares(gradient: torch.Tensor, *, pieces: int) -> torch.Tensor:
    """A float64 scalar. pieces: so many are looked at at once, 4 bytes each."""
    if gradient.device.type != "cpu" or not gradient.is_contiguous():
        return torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()
    flat = gradient.detach().view(-1)
    total = torch.zeros((), dtype=torch.float64)
    whole = flat.numel() // PIECE * PIECE
    for part in flat[:whole].split(PIECE * pieces):
        norms = torch.linalg.vector_norm(part.view(-1, PIECE), dim=1, dtype=torch.float32)
        total += torch.linalg.vector_norm(norms, dtype=torch.float64).square()
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)
    return total.add_(rest.double().square())


def clip_(parameters: Iterable[nn.Parameter], norm: float, largest: float) -> None:
    """Scale the gradients in place so that their norm, measured as `norm`, is at most `largest`."""
    if not largest or norm <= largest or not math.isfinite(norm):
        return
    scale = largest / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_ has it
    for parameter in parameters:
        if parameter.grad is not None:
            local(parameter.grad).mul_(scale)
