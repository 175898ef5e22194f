"""A reversible network of your own: memory flat in depth, gradients bit-equal to storing all.

python examples/reversible_network.py
"""

import copy

import torch
from torch import nn

from shoestring import Meter
from shoestring.methods.reversible import ReversibleStack
from shoestring.units import format_bytes

WIDTH = 128


def sub_block() -> nn.Module:
    """Any map of the stream's shape to itself, with its own norm and no skip inside."""
    return nn.Sequential(
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 4 * WIDTH),
        nn.GELU(),
        nn.Linear(4 * WIDTH, WIDTH),
        nn.Dropout(0.1),
    )


def step(stack: ReversibleStack, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    stack.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        p, q = stack(x, x)
    (p.square().mean() + q.square().mean()).backward()
    return [parameter.grad for parameter in stack.parameters()]


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 128, WIDTH)
    for depth in (8, 32):
        blocks = [sub_block() for _ in range(depth)]
        rebuilt = ReversibleStack(copy.deepcopy(blocks))
        stored = ReversibleStack(copy.deepcopy(blocks), keep_top=depth)
        peaks, grads = [], []
        for stack in (rebuilt, stored):
            step(stack, x)  # calibrates the fixed-point grid
            with Meter(stack) as meter:
                grads.append(step(stack, x))
            counted = meter.by_category
            peaks.append(meter.peak_bytes - counted["weights"] - counted["gradients"])
        equal = all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        print(
            f"{depth} sub-blocks: rebuilt {format_bytes(peaks[0])}, stored "
            f"{format_bytes(peaks[1])}, gradients bit-equal: {equal}"
        )
        assert equal


if __name__ == "__main__":
    main()
