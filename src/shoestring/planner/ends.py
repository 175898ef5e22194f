"""The end of a graph that is cut: what stands for all that would come after it."""

from typing import Any

import torch
from torch import Tensor


class _Sink(torch.autograd.Function):
    """Takes a tensor away, keeping nothing of it; sends back a gradient of its shape."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.like = (value.shape, value.dtype, value.device)
        return value.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device)


def sink(value: Tensor) -> Tensor:
    """A scalar whose backward sends a gradient of `value`'s shape."""
    out: Tensor = _Sink.apply(value)
    return out
