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


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """L2 norm of all gradients together, a float32 scalar on their device; no temporaries. Of
    divided gradients: of this process's parts."""
    norms = [
        torch.linalg.vector_norm(local(p.grad), dtype=torch.float32)
        for p in parameters
        if p.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def clip_(parameters: Iterable[nn.Parameter], norm: float, largest: float) -> None:
    """Scale the gradients in place so that their norm, measured as `norm`, is at most `largest`."""
    if not largest or norm <= largest or not math.isfinite(norm):
        return
    scale = largest / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_ has it
    for parameter in parameters:
        if parameter.grad is not None:
            local(parameter.grad).mul_(scale)
