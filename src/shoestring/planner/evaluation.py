"""Bytes of what runs without gradients beside training: evaluation, generation, saving.

An evaluation finds the weights and the optimizer's states where training left them, and often
makes what training never does: logits of a whole batch, or of more rows. So a fake twin, in
evaluation mode, runs it on its own. What a checkpoint that is written in the background is copied
to waits beside all steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import (
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves

from ..meter import Tracker
from ..methods import MakeOptimizer
from ..optim import InTurns
from .ends import sink
from .fake import Profile, _autocast, _profile, fake_batch, fake_model, fused_adamw, hold
from .given import Batch, Loss, copied, explained, output_of
from .quick import QuickFakeMode, optimizers_may_read

Evaluate = Batch | Callable[[nn.Module], object]
"""A batch that is scored, or a function that runs the model on tensors that it makes."""
INSTANT = "evaluation"
_MOST = 10_000  # objects to look through for tensors; a cache has some hundred


def evaluation_profile(
    model_or_config: Any,
    evaluate: Evaluate,
    *,
    apply: Callable[[nn.Module], object] | None = None,
    optimizer: MakeOptimizer | None = None,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    beside: int = 0,
) -> Profile:
    """What an evaluation between two steps will hold; nothing is allocated.

    model_or_config, apply, optimizer, autocast: as for `simulate`.  loss: of the batch, the
    model's output where left out.  beside: bytes that lie in memory meanwhile.
    """
    mode = QuickFakeMode()
    twin = fake_model(model_or_config, mode)
    batch = fake_batch(evaluate, mode) if isinstance(evaluate, Mapping) else {}
    with mode:
        if apply is not None:
            apply(twin)
        made = with_states(twin, optimizer or fused_adamw, mode)
        tracker = Tracker()
        tracker.seed(twin, made)
        tracker.assign("other", _tensors(batch))
        waiting = hold(tracker, beside, twin)
        twin.eval()
        with tracker, torch.no_grad(), explained(type(twin).__name__):
            with _autocast(twin, autocast):
                _ = _scored(twin, evaluate, batch, loss)
        del waiting
    return replace(_profile(tracker, (0, 0)), instant=INSTANT)


def _scored(twin: nn.Module, evaluate: Evaluate, batch: Batch, loss: Loss | None) -> object:
    """What the evaluation gives is held while it ends, as who called it does."""
    if not isinstance(evaluate, Mapping):
        return evaluate(twin)
    return loss(twin, batch) if loss is not None else output_of(twin, batch)


def with_states(twin: nn.Module, make: MakeOptimizer, mode: QuickFakeMode) -> Optimizer:
    """The optimizer of a fake twin with the states that it has after a step; of turns in that of
    the largest part. Under the mode."""
    made = make([p for p in twin.parameters() if p.requires_grad])
    if isinstance(made, InTurns):
        sizes = [sum(p.nbytes for p in part) for part in made.parts]
        while sizes[made.active] < max(sizes):
            made.end_turn()
    trained = [p for p in twin.parameters() if p.requires_grad]
    with optimizers_may_read(mode), torch.enable_grad():
        if any(map(is_traceable_wrapper_subclass, trained)):
            for parameter in trained:  # divided over a group: no method steps within backward there
                parameter.grad = torch.zeros_like(parameter)
        else:
            # One backward in which gradients come one by one: some step as soon as one is there.
            torch.autograd.backward([sink(parameter) for parameter in trained])
        made.step()
        made.zero_grad(set_to_none=True)
    return made


# ---- saving ------------------------------------------------------------------------------------


def copy_bytes(model_or_config: Any, optimizer: MakeOptimizer | None = None) -> int:
    """Bytes of the copy that a checkpoint in the background is written from: weights, the
    optimizer's states without any method of a plan, and the generators' states. On CUDA it waits
    on the host, where no budget counts it."""
    mode = QuickFakeMode()
    twin = fake_model(model_or_config, mode)
    with mode:
        made = with_states(twin, optimizer or fused_adamw, mode)
    if next(twin.parameters()).device.type != "cpu":
        return 0
    weights = {id(tensor): tensor for tensor in twin.state_dict(keep_vars=True).values()}
    held = [*weights.values(), *_tensors(dict(enumerate(made.state.values())))]
    return sum(tensor.nbytes for tensor in held) + len(torch.get_rng_state())


def batch_bytes(batch: Batch) -> int:
    """Of its tensors."""
    return sum(tensor.nbytes for tensor in _tensors(batch))


# ---- what a model is called with, without gradients --------------------------------------------


def call_bytes(
    module: nn.Module, args: Any, kwargs: Any, put: Callable[[nn.Module], object] | None = None
) -> int:
    """Peak of calling `module` without gradients: its weights, what it is given (a key/value
    cache with what is in it, too), and what it makes. Nothing is allocated.

    put: called with the copy, to put in place what a copy does not have.
    """
    mode = QuickFakeMode()
    # A meter that is on counts what is real, not this.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        twin = fake_model(module, mode)
        given = tensors_in((args, kwargs))
        with mode:
            if put is not None:
                put(twin)
            memo: dict[int, Any] = _faked(given)
            holder = nn.Module()
            holder.__dict__["given"] = (args, kwargs)
            args, kwargs = vars(copied(holder, memo))["given"]
            tracker = Tracker()
            tracker.seed(twin)
            tracker.assign("other", [memo[id(tensor)] for tensor in given])
            del memo, holder  # a cache lets go of what it has outgrown
            with tracker:
                twin(*args, **kwargs)
    return tracker.ledger.peak


def _faked(tensors: list[Tensor]) -> dict[int, Tensor]:
    """Fakes by the id of what they stand for; what shares a storage still does."""
    storages: dict[int, Tensor] = {}
    found = {}
    for tensor in tensors:
        storage, size = tensor.untyped_storage(), tensor.itemsize
        elements = storage.nbytes() // size
        key = storage._cdata
        if key not in storages:
            storages[key] = torch.empty(elements * size, dtype=torch.uint8, device=tensor.device)
        found[id(tensor)] = (
            storages[key].view(tensor.dtype)
            .as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        )  # fmt: skip
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in containers and in attributes of plain objects, such as caches; each once."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting and len(seen) < _MOST:
        each = waiting.pop()
        if isinstance(each, Tensor):
            found.setdefault(id(each), each)
            continue
        if id(each) in seen or isinstance(each, nn.Module | type):
            continue
        seen.add(id(each))
        if isinstance(each, Mapping):
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each
        elif hasattr(each, "__dict__"):
            waiting += vars(each).values()
    return list(found.values())


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(dict(value)) if isinstance(leaf, Tensor)]
