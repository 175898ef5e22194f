"""keep: run the block as it is and let autograd keep what it wants.

Idea: the yardstick of every other method.
Memory: everything a block saves (about 16 x batch x tokens x width elements for a pre-norm
transformer block with fused attention). Time: 1. Exactness: bitwise, by definition.
Limits: none. The key/value cache is dropped while gradients are on, as for every method.
"""

from typing import Any

from torch import nn

from ..stack import BlockCall, Executor, Stack
from .base import Method, Promises


class KeepExecutor(Executor):
    """Calls the block."""

    def run(self, position: int, block: nn.Module, call: BlockCall) -> Any:
        assert call.hidden is not None
        return call(call.hidden)


class Keep(Method):
    """Keep what autograd saves."""

    name = "keep"
    promises = Promises(fidelity="exact", grade="bitwise", applies_to="span", always_allowed=True)

    def executor(self, stack: Stack, start: int, stop: int, config: Any) -> Executor:
        return KeepExecutor()
