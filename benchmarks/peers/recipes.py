"""The recipes that people use by hand, as their documentation has them: no code of ours.

Each takes a model as it is and gives back a `Peer`: what computes the loss, and the optimizer.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Loss = Callable[[], Tensor]
SLICES = 8
_SAVED = {
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model whose blocks are in a list and whose loss can be taken apart."""

    model: Any
    blocks: nn.ModuleList
    batch: Any
    loss: Callable[[Any, Any], Tensor]
    hidden_and_head: Callable[[Any, Any], tuple[Tensor, Tensor, nn.Module]]
    """(rows, width) after the last norm, targets (rows,), the head."""


@dataclass(frozen=True)
class Peer:
    """What a loop calls."""

    loss: Loss
    optimizer: torch.optim.Optimizer


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """lr 0, so that every step has the same weights."""
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)


def eight_bit(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with states of 8 bits."""
    import bitsandbytes

    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=0.0, weight_decay=0.0)
    return made


def _checkpointed(blocks: Iterable[nn.Module], **settings: Any) -> None:
    for block in blocks:

        def run(*args: Any, inner: Any = block.forward, **kwargs: Any) -> Any:
            return checkpoint(inner, *args, use_reentrant=False, **settings, **kwargs)

        block.forward = run


def every_block(case: Case) -> Peer:
    _checkpointed(case.blocks)
    return _plain(case)


def every_other_block(case: Case) -> Peer:
    _checkpointed(list(case.blocks)[::2])
    return _plain(case)


def selective(case: Case) -> Peer:
    """torch's selective checkpointing: products and attention are saved, the rest run again."""

    def policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = function in _SAVED
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    _checkpointed(
        case.blocks, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )  # fmt: skip
    return _plain(case)


def memory_budget(share: float) -> Callable[[Case], Peer]:
    """torch's activation_memory_budget, which its partitioner keeps to; no code is generated."""

    def make(case: Case) -> Peer:
        import torch._functorch.config as config

        compiled = torch.compile(case.model, backend="aot_eager_decomp_partition")

        def loss() -> Tensor:
            with config.patch(activation_memory_budget=share):
                return case.loss(compiled, case.batch)

        return Peer(loss, adamw(case.model.parameters()))

    return make


def save_on_cpu(case: Case) -> Peer:
    """torch.autograd.graph.save_on_cpu: on a CPU it copies what is saved."""

    def loss() -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return case.loss(case.model, case.batch)

    return Peer(loss, adamw(case.model.parameters()))


def loss_in_slices(case: Case) -> Peer:
    """Every block run again, and the loss in checkpointed slices."""
    _checkpointed(case.blocks)
    return Peer(_slices(case), adamw(case.model.parameters()))


def by_hand(case: Case) -> Peer:
    """Every block run again, the loss in slices, and AdamW with states of 8 bits."""
    _checkpointed(case.blocks)
    return Peer(_slices(case), eight_bit(case.model.parameters()))


def _plain(case: Case) -> Peer:
    return Peer(lambda: case.loss(case.model, case.batch), adamw(case.model.parameters()))


def _slices(case: Case) -> Loss:
    def part(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")

    def loss() -> Tensor:
        hidden, targets, head = case.hidden_and_head(case.model, case.batch)
        parts = zip(hidden.chunk(SLICES), targets.chunk(SLICES), strict=True)
        sums = [checkpoint(part, h, t, head, use_reentrant=False) for h, t in parts]
        return torch.stack(sums).sum() / len(targets)

    return loss


RECIPES: dict[str, Callable[[Case], Peer]] = {
    "checkpoint every block": every_block,
    "checkpoint every other block": every_other_block,
    "selective: products and attention saved": selective,
    **{f"activation_memory_budget {share}": memory_budget(share) for share in (0.2, 0.5, 0.8)},
    "save_on_cpu": save_on_cpu,
    "every block, loss in slices": loss_in_slices,
    "every block, loss in slices, bitsandbytes' 8-bit AdamW": by_hand,
}
UNBIASED = {"every block, loss in slices, bitsandbytes' 8-bit AdamW"}


@contextlib.contextmanager
def quiet_compiler() -> Any:
    """Each recipe compiles from nothing."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
