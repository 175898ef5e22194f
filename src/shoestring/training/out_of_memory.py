"""What to do when memory runs out in a step in spite of everything: split it once, then stop.

The plan counts live tensors; another process, a fragmented allocator or a limit of the system can
still take what was counted on. The step's microbatches are then cut in half by rows, which keeps
the effective batch: weights were not touched yet, so nothing is lost.
"""

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import OutOfBudget, ShoestringError
from ..meter import Tracker
from ..objectives.next_token import Batch
from ..units import format_bytes

_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


class HalfUpdateError(Exception):
    """Memory ran out within the optimizer's step: some weights are new, some are not.

    Never seen outside: the run goes back to its last checkpoint. message: what the allocator said.
    """

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


class OutOfMemory(OutOfBudget):
    """The system, not the budget, had no more. What is written afterwards must need next to none:
    the libraries that write a model end the whole process where memory is refused to them."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator said no. Our own errors about budgets are not meant."""
    if isinstance(error, ShoestringError):
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _WORDS)


def said(error: BaseException) -> str:
    """What an allocator said, in one line; Python's own says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def release(device: torch.device) -> None:
    """Give back what a broken step left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def held_by_category(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that stay between steps: weights, gradients, the optimizer's states."""
    tracker = Tracker()
    tracker.seed(model, optimizer)
    return {name: count for name, count in tracker.ledger.by_category.items() if count}


def pieces(batch: Batch, count: int) -> list[dict[str, Any]]:
    """The batch cut into at most `count` parts by rows, none of them empty."""
    rows = len(batch["input_ids"])
    size = -(-rows // count)
    return [
        {name: value[start : start + size] for name, value in batch.items()}
        for start in range(0, rows, size)
    ]


def can_be_split(microbatches: Sequence[Batch], count: int) -> bool:
    """Whether `count` parts of each leave every part a row."""
    return all(len(batch["input_ids"]) >= count for batch in microbatches)


def gave_up(where: str, held: dict[str, int], message: str, *, was_split: bool) -> OutOfMemory:
    """The error that ends a run which ran out of memory again."""
    what = ", ".join(f"{name} {format_bytes(count)}" for name, count in held.items())
    again = ", though it was split already" if was_split else ""
    return OutOfMemory(
        f"{where}: the system had no more memory{again} ({message}); what stays between steps: "
        f"{what}",
        expected="as much free memory as the budget allows",
        hint="Close other programs, or set a smaller run.budget; then go on with resume.",
        instant=where,
    )
