"""squeeze: what a block saves for backward is kept at 8 or 4 bits.

Idea: the forward is computed as always; only the copies that wait for backward are coarser (ActNN,
arXiv 2104.14129). Groups of 256 neighbouring values have their own range; rounding is dithered and
the dither taken off again, so every value comes back right in expectation, with half the variance
of plain stochastic rounding (`ops/group_quant.py`).
Equations: x' = lo + step * (floor((x - lo) / step + u) + 1/2 - u), u uniform in (0, 1).
Memory: 8.25 or 4.25 bits a value instead of 32 or 16, in storages that saved views share. Kept as
they are: parameters (their 16-bit copies under autocast, too), tensors under 4096 bytes, and what
carries no gradient: integers, masks, rotary tables, norm statistics, attention's log-sum-exp.
Time: each saved value is rounded once and brought back once; no block is run again.
Exactness: unbiased, to first order. A gradient that is linear in what was saved (that of a matrix
product) is right in expectation; through norms, activation functions and attention, errors enter
squared as well, which leaves a small bias (measured on the page).
Limits: the draw is a hash of the seed, the block's input and the value's place, so nothing has to
be stored to go on bit for bit; the same input under the same seed draws the same numbers.
Source: ActNN, arXiv 2104.14129; GACT, arXiv 2206.11357; subtractive dither, Schuchman 1964.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops import group_quant
from ..ops.group_quant import Packed
from ..saved import Content, SavedTensors
from ..stack import BlockCall, Executor, Stack
from .base import Method, Promises


@dataclass(frozen=True, kw_only=True, slots=True)
class SqueezeConfig:
    """How what is saved is kept."""

    bits: int | str = 8
    """8, 4 (biased once attention's scores are large), or "mixed": 4 for what is wider than the
    hidden state (the inside of MLPs), 8 else."""
    group: int = 256
    """Values that share a range; even. Fewer: smaller errors, 8 bytes a group."""
    seed: int = 0
    """Other seeds draw other roundings."""

    def __post_init__(self) -> None:
        if self.bits not in (8, 4, "mixed") or isinstance(self.bits, bool):
            raise ConfigError(f"squeeze: bits = {self.bits!r}", expected="8, 4 or 'mixed'")
        try:
            group_quant.check(8, self.group)
        except ConfigError as error:
            raise ConfigError(f"squeeze: {error.what}", expected=error.expected) from None
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"squeeze: seed = {self.seed!r}", expected="a number from 0 on")


class _Squeezed:
    """A storage's elements in groups."""

    __slots__ = ("packed",)

    def __init__(self, packed: Packed) -> None:
        self.packed = packed

    def back(self) -> Tensor:
        return group_quant.dequantize(self.packed)


class SqueezeExecutor(Executor):
    """Runs blocks; what they save is kept in few bits."""

    compiles = False

    def __init__(self, config: SqueezeConfig) -> None:
        self.config = config
        self._saved = SavedTensors()

    def __deepcopy__(self, memo: dict[int, Any]) -> "SqueezeExecutor":
        return type(self)(self.config)

    def __reduce__(self) -> Any:
        return type(self), (self.config,)

    def run(self, position: int, block: nn.Module, call: BlockCall) -> Any:
        hidden = call.hidden
        assert hidden is not None
        call.hidden = None
        config, numbers = self.config, itertools.count()
        # torch's seed is part of its random state: set, saved and restored with it.
        seed = config.seed + torch.initial_seed()
        content = group_quant.digest(hidden)

        width = hidden.shape[-1]

        def keep(flat: Tensor, tensor: Tensor) -> Content:
            key = group_quant.key_of(content, seed, next(numbers))
            bits = config.bits
            if isinstance(bits, str):
                # More dimensions are those of heads: attention is what errors hurt most.
                bits = 4 if tensor.dim() <= 3 and tensor.shape[-1] > width else 8
            return _Squeezed(group_quant.quantize(flat, bits, config.group, key))

        with self._saved.of(block, call, keep, wanted=is_activation):
            return call(hidden)


def is_activation(tensor: Tensor) -> bool:
    """Whether what autograd saves may be rounded.

    What carries no gradient is no activation: masks (which may hold infinities), rotary tables,
    norm means, attention's log-sum-exp. Nor is one number a row, nor a weight in another shape or
    dtype, such as the copies that autocast makes.
    """
    if not (tensor.is_floating_point() and tensor.requires_grad) or tensor.shape[-1:] == (1,):
        return False
    node = tensor.grad_fn
    while node is not None and node.name().startswith(_SAME_VALUES):
        node = node.next_functions[0][0]
    return node is not None and node.name() != "torch::autograd::AccumulateGrad"


_SAME_VALUES = tuple(
    f"{name}Backward"
    for name in "T Transpose Permute View UnsafeView ReshapeAlias Expand Alias ToCopy Clone".split()
)


class Squeeze(Method):
    """What blocks save, in few bits."""

    name = "squeeze"
    promises = Promises(fidelity="unbiased", gradient_error=0.01, applies_to="span")
    Config = SqueezeConfig
    # 4 bits everywhere is for whoever asks for it: through attention its bias is no longer small.
    variants = ({"bits": 8}, {"bits": "mixed"})

    def gradient_error(self, config: SqueezeConfig) -> float:
        assert self.promises.gradient_error is not None
        # A step of 4 bits is 17 times one of 8; inside the MLP alone it shows half as much.
        return self.promises.gradient_error * {8: 1, "mixed": 8, 4: 17}[config.bits]

    def executor(self, stack: Stack, start: int, stop: int, config: Any) -> Executor:
        return SqueezeExecutor(config)
