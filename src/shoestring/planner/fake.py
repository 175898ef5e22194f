"""Bytes of a training step before anything is allocated.

A fake twin of the model runs whole training steps under FakeTensorMode, counted by the same
Tracker that counts real ones, so that prediction and measurement speak of the same storages.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ..errors import ConfigError
from ..meter import Tracker
from ..meter.history import History
from ..meter.ledger import Ledger
from ..methods import MakeOptimizer
from ..optim import InTurns
from ..stack import Stack
from .fidelity import known_positions, without_trivial_masks
from .given import Batch, Loss, copied, explained, loss_of, tensors_of
from .quick import QuickFakeMode, optimizers_may_read, weights_may_read


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a training step will hold, in the words of `Meter`.

    peak_bytes: most bytes of live tensors at once.  by_category: that peak, by
    meter.CATEGORIES.  instant: the phase it falls in ("forward", "loss", "loss backward",
    "backward", "after backward", "optimizer step").  operator: what allocated last before it.
    retained_bytes: held for the backward at the end of the forward.  baseline_bytes: what
    exists before the first step (weights, batch).  timeline: (phase, bytes) after each
    operator that allocates, over all steps.  random_draws: operators that drew random numbers.
    history: a later step by category, as `Meter.history` tells a measured one; None where later
    steps were not counted.
    """

    peak_bytes: int
    by_category: dict[str, int]
    instant: str
    operator: str
    retained_bytes: int
    baseline_bytes: int
    timeline: list[tuple[str, int]]
    random_draws: int
    history: dict[str, Any] | None = None


def simulate(
    model_or_config: Any,
    batch: Batch,
    *,
    apply: Callable[[nn.Module], object] | None = None,
    optimizer: MakeOptimizer | None = None,
    loss: Loss | None = None,
    steps: int = 2,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    grad_clip: float | None = None,
    mask: Literal["worst", "given"] = "worst",
    later: bool = False,
    beside: int = 0,
) -> Profile:
    """Run whole training steps on a fake twin and tell what they would hold.

    model_or_config: a model (left untouched), a Hugging Face config object, the path of a
    config.json or of a directory with one, or a callable that builds a model.
    batch: tensors by name for `model(**batch)`, whose output has `.loss`; or give `loss`.
    apply: called with the fake model before the steps, to put methods in place.
    optimizer: trainable parameters -> Optimizer; fused AdamW when left out.
    steps: optimizer steps; the optimizer's state appears in the first, so two show the peak.
    accumulate: forward and backward passes in each step.  autocast: dtype of the forward.
    mask: an attention mask of all ones is dropped by a real run, one with padding is not and
    needs more; "worst" counts as if it had padding, "given" believes the batch.
    An optimizer that trains in turns is taken through all of them, whatever `steps` is: the peak
    is that of the turn that needs most.
    later: count the steps that come after these as well, without running them: they find the
    optimizer's states from their beginning. With steps=1 one pass tells what two would.
    beside: bytes that lie in memory all the time.

    ConfigError for what is no model, and for a model whose shapes depend on values.
    """
    mode = QuickFakeMode()
    twin = fake_model(model_or_config, mode)
    fake = fake_batch(batch if mask == "worst" else without_trivial_masks(batch), mode)
    with mode, known_positions(batch):
        if apply is not None:
            apply(twin)
        twin.train()
        parameters = [each for each in twin.parameters() if each.requires_grad]
        chosen = (optimizer or fused_adamw)(parameters)
        tracker = Tracker(history=later)
        tracker.seed(twin, chosen)
        tracker.assign("other", _tensors(fake))
        waiting = hold(tracker, beside, twin)
        first_only = (0, 0)

        def turn() -> None:
            for _ in range(accumulate):
                with _autocast(twin, autocast):
                    value = loss_of(twin, fake, loss)
                (value / accumulate if accumulate > 1 else value).backward()
                del value
            if grad_clip is not None:
                nn.utils.clip_grad_norm_(parameters, grad_clip)

        with tracker, optimizers_may_read(mode), explained(type(twin).__name__):
            if isinstance(chosen, InTurns):
                first_only = _walk_turns(tracker, twin, chosen, turn)
            for number in range(0 if isinstance(chosen, InTurns) else steps):
                states = len(chosen.state)
                turn()
                if later and number == steps - 1:
                    if len(chosen.state) > states and states == 0:
                        first_only = _step_again(tracker, chosen, turn)
                    else:
                        first_only = _step_and_later(tracker, chosen)
                else:
                    chosen.step()
                chosen.zero_grad(set_to_none=True)
        del waiting
    return _profile(tracker, first_only)


def hold(tracker: Tracker, nbytes: int, twin: nn.Module) -> Tensor:
    """So many bytes more, as long as what is returned lives. Under the twin's mode."""
    device = next(twin.parameters()).device
    held = torch.empty(nbytes, dtype=torch.uint8, device=device)
    tracker.assign("other", [held])
    return held


def _step_and_later(tracker: Tracker, optimizer: Optimizer) -> tuple[int, int]:
    """The optimizer's step, and the peak of the next training step: up to the optimizer it is
    this one's with the states on top, which come to be only now. Returns the stretch of the
    history that is the first step's alone."""
    ledger = tracker.ledger
    assert ledger.history is not None
    tracker.mark("optimizer step")
    found = replace(ledger, peak_by_category=dict(ledger.peak_by_category))
    states, existing = ledger.by_category["optimizer"], ledger.existing
    began = ledger.history.now
    optimizer.step()
    made_states = ledger.history.now
    optimizer.step()  # its own peak, with the states there from the start
    states = ledger.by_category["optimizer"] - states
    tables = ledger.existing - existing  # of the optimizer's own, noticed only in its step
    if found.peak + states + tables > ledger.peak:
        ledger.peak = found.peak + states + tables
        ledger.peak_by_category = found.peak_by_category
        ledger.peak_by_category["optimizer"] += states
        ledger.peak_by_category["other"] += tables
        ledger.peak_phase, ledger.peak_operator = found.peak_phase, found.peak_operator
    return began, made_states


def _step_again(
    tracker: Tracker, optimizer: Optimizer, turn: Callable[[], None]
) -> tuple[int, int]:
    """A whole step more, for an optimizer whose states came to be within the backward. Returns
    the stretch of the history that is before it."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    history = tracker.ledger.history
    assert history is not None
    before = history.now
    turn()
    optimizer.step()
    return -1, before


def each_turn(optimizer: InTurns) -> Iterator[int]:
    """Every turn once: which part it trains. The next begins when the caller is done."""
    for _ in optimizer.parts:
        turn = optimizer.turn
        yield optimizer.active
        if optimizer.turn == turn:  # it ended by itself where it is short
            optimizer.end_turn()


def _walk_turns(
    tracker: Tracker, model: nn.Module, optimizer: InTurns, turn: Callable[[], None]
) -> tuple[int, int]:
    """A step with its states there, if they ever are, of every turn that may need most, and in the
    end once more of the one that does. Returns the stretch of the history that is before that."""
    ledger, peaks, looked_at = tracker.ledger, {}, _may_need_most(model, optimizer)
    for part in each_turn(optimizer):
        if part in looked_at:
            _forget_peak(ledger)
            _step_in_turn(optimizer, turn)
            peaks[part] = ledger.peak
    worst = max(peaks, key=lambda part: peaks[part])
    while optimizer.active != worst:
        optimizer.end_turn()
    _forget_peak(ledger)
    began = _step_in_turn(optimizer, turn, ledger.history)
    return -1, began


def _may_need_most(model: nn.Module, optimizer: InTurns) -> set[int]:
    """The first and the last part of every run of neighbours that have weights of the same shapes
    and are run by the same executor. In the turn of one further up backward does the same, but
    ends earlier."""
    stack = Stack.of(model)
    runs = {
        id(parameter): executor
        for block, executor in zip(stack.blocks, stack.executors, strict=True)
        for parameter in block.parameters()
    }
    kinds = [
        [(p.shape, p.stride(), p.dtype, id(runs.get(id(p)))) for p in part]
        for part in optimizer.parts
    ]
    pairs = zip([None, *kinds], [*kinds, None], strict=True)
    borders = [i for i, (below, above) in enumerate(pairs) if below != above]
    return {*borders[:-1], *(i - 1 for i in borders[1:])}


def _step_in_turn(
    optimizer: InTurns, turn: Callable[[], None], history: History | None = None
) -> int:
    """The first step of a turn that finds the states; returns when it began."""
    if optimizer.steps > 1:
        for parameter in optimizer.parts[optimizer.active]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    began = history.now if history is not None else 0
    turn()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return began


def _forget_peak(ledger: Ledger) -> None:
    ledger.peak, ledger.peak_serial = ledger.live, ledger.serial
    ledger.peak_by_category = dict(ledger.by_category)


def fake_model(model_or_config: Any, mode: FakeTensorMode) -> nn.Module:
    """A twin whose tensors are fake: of a model, or built from a config or a callable."""
    if isinstance(model_or_config, nn.Module):
        return _fake_copy(model_or_config, mode)
    model_or_config = config_of(model_or_config)
    with mode, weights_may_read(mode):
        if hasattr(model_or_config, "model_type"):
            return built(model_or_config)
        if callable(model_or_config):
            made = model_or_config()
            if isinstance(made, nn.Module):
                return made
    raise ConfigError(
        f"cannot make a model of {type(model_or_config).__name__}",
        expected="a torch.nn.Module, a Hugging Face config, a path to one, or a callable",
    )


def fake_batch(batch: Batch, mode: FakeTensorMode) -> dict[str, Any]:
    """The batch with every tensor replaced by a fake one of the same shape and dtype."""
    return dict(tree_map_only(Tensor, mode.from_tensor, dict(batch)))


def _fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    # deepcopy of a real model fails under the mode, so the memo holds the fakes beforehand;
    # ties survive because the memo is keyed by the tensor.
    memo: dict[int, Any] = {}
    for tensor in tensors_of(model):
        memo[id(tensor)] = mode.from_tensor(tensor)
    with mode:
        twin = copied(model, memo)
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def config_of(given: Any) -> Any:
    """The Hugging Face config where its path was given; all else as it is."""
    if not isinstance(given, str | Path):
        return given
    from transformers import AutoConfig

    path = Path(given)
    if not path.exists():
        raise ConfigError(f"no config at {path}", expected="a config.json or its directory")
    return AutoConfig.from_pretrained(path)


def class_of(config: Any) -> type[nn.Module]:
    """The model class a config names, or the causal language model of its type."""
    import transformers

    named = (getattr(config, "architectures", None) or [None])[0]
    kind = getattr(transformers, named, None) if named else None
    kind = kind or transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise ConfigError(
            f"{type(config).__name__} names no model class that is known ({named})",
            expected="architectures with a class of transformers, or the config of a causal "
            "language model",
        )
    return kind


def built(config: Any) -> nn.Module:
    """A model of a config, in its dtype; fake under a fake mode."""
    kind = class_of(config)
    dtype = getattr(config, "dtype", None) or torch.float32
    before = torch.get_default_dtype()
    # A fake model cannot be cast after it was made, so it is made in its dtype.
    torch.set_default_dtype(dtype)
    try:
        with explained(kind.__name__):
            return kind(config)
    finally:
        torch.set_default_dtype(before)


def fused_adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


def _autocast(model: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype)


def _tensors(batch: Mapping[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, dict(batch))
    return found


def _profile(tracker: Tracker, first_only: tuple[int, int]) -> Profile:
    ledger = tracker.ledger
    history = None
    if ledger.history is not None:
        history = ledger.history.timeline(skip=first_only, present="optimizer")
    return Profile(
        peak_bytes=ledger.peak,
        by_category=dict(ledger.peak_by_category),
        instant=ledger.peak_phase,
        operator=ledger.peak_operator,
        retained_bytes=ledger.retained,
        baseline_bytes=ledger.existing,
        timeline=ledger.timeline,
        random_draws=tracker.random_draws,
        history=history,
    )
