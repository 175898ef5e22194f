"""Seconds on the device: each distinct block once, the rest of the model once.

A fake twin says what a block looks like and how it is called; one block at a time is made real
(sharing the weights of the model where there is one), run three times in every way on offer, in
turn, and freed. Head, loss and stem are timed in one pass with the blocks taken out, the
optimizer on one block's parameters and scaled by bytes. So planning needs no more memory than
the smallest plan: one block, or the loss, at a time. (Where blocks may keep their graphs elsewhere
the smallest plan may be smaller than one block kept, which is timed as well.)

The user's model is not touched: no gradient, buffer or random state of it changes.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..stack import BlockCall, Executor, Stack, hidden_of, with_hidden
from .cost import Captured, Step, Twin, forward_of, source
from .ends import sink
from .fake import _autocast
from .given import copied, tensors_of
from .ways import Way, apply_ways, optimizer_for, takes_turns

RUNS = 3
SLOW_S = 2.0
"""A run that takes longer than this is not repeated."""


def materialise(twin: Twin, real: Callable[[str], bool]) -> nn.Module:
    """The twin's model with the tensors that `real` names made real, all others without data.

    Weights of an existing model are shared, not copied; buffers are copies.
    """
    own = twin.step.model if isinstance(twin.step.model, nn.Module) else None
    weights = dict(own.named_parameters(remove_duplicate=False)) if own is not None else {}
    buffers = dict(own.named_buffers(remove_duplicate=False)) if own is not None else {}
    memo: dict[int, Any] = {}
    for name, fake in twin.model.named_parameters(remove_duplicate=False):
        if real(name) and isinstance(memo.get(id(fake)), Tensor) and not memo[id(fake)].is_meta:
            continue  # a tied weight that is real already
        data = weights[name].detach() if name in weights else None
        value = _like(fake, data, real(name))
        memo[id(fake)] = nn.Parameter(value, requires_grad=fake.requires_grad)
    for name, buffer in twin.model.named_buffers(remove_duplicate=False):
        data = buffers[name].detach().clone() if name in buffers and real(name) else None
        memo[id(buffer)] = _like(buffer, data, real(name))
    for value in tensors_of(twin.model):
        if id(value) not in memo:
            memo[id(value)] = _like(value, None, True)
    return copied(twin.model, memo).train()


def _like(fake: Tensor, data: Tensor | None, real: bool) -> Tensor:
    if not real:
        return torch.empty(fake.shape, dtype=fake.dtype, device="meta")
    if data is not None:
        return data
    value = torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)
    if value.is_floating_point():
        value.fill_(0.02)
    return value


class Stopwatch:
    """Seconds of work that may run asynchronously."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Timer:
    """Times the blocks, the turn and the optimizer of one step; remembers what it timed."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def block(
        self, base: Twin, twin: Twin, index: int, ways: Sequence[Way], patches: Sequence[Way]
    ) -> list[tuple[float, float]]:
        """(forward, backward) seconds of block `index` run in each of `ways`.

        base: the unpatched twin.  twin: the one with `patches`, which knows the calls.
        """
        prefix = f"{base.stack.path}." if base.stack.path else ""
        name = next(n for n, b in base.model.named_modules() if b is base.stack.blocks[index])
        assert name.startswith(prefix)
        model = materialise(base, lambda n: n.startswith(f"{name}."))
        apply_ways(model, patches, ())
        block = Stack.of(model).blocks[index]
        captured = twin.calls[index]
        runs: list[list[tuple[float, float]]] = [[] for _ in ways]
        with _random_state_kept(base.device):
            arguments = tree_map_only(
                Tensor, lambda t: _argument(t, base.device), (captured.args, captured.kwargs)
            )
            for _ in range(RUNS):
                for way, taken in zip(ways, runs, strict=True):
                    if taken and sum(taken[0]) > SLOW_S:
                        continue
                    executor = way.executor(Stack(model, base.stack.path, [block]), 0, 1)
                    taken.append(self._once(base, block, captured, arguments, executor))
        return [_medians(taken) for taken in runs]

    def _once(
        self, twin: Twin, block: nn.Module, captured: Captured, arguments: Any, executor: Executor
    ) -> tuple[float, float]:
        clock = Stopwatch(twin.device)
        args, kwargs = arguments
        forward = forward_of(block)

        noise = _noise(captured, twin)

        def call() -> BlockCall:
            hidden = source(noise, lambda: noise)
            return BlockCall(forward, args, kwargs, captured.place, hidden)

        started = clock()
        with _autocast(block, self.step.autocast), torch.enable_grad():
            output = executor.run(0, block, call())
        ran = clock()
        end = sink(hidden_of(output))
        del output
        back = clock()
        end.backward()
        ended = clock()
        for parameter in block.parameters():
            parameter.grad = None
        return ran - started, ended - back

    def turn(self, base: Twin, twin: Twin, patches: Sequence[Way]) -> float:
        """Seconds of stem, head and loss, forward and backward.

        base: the unpatched twin.  twin: the one whose blocks hand on what `patches` let them.
        """
        inside = {n for n, b in base.model.named_modules() if b in set(base.stack.blocks)}
        model = materialise(base, lambda n: not any(n.startswith(f"{i}.") for i in inside))
        apply_ways(model, patches, ())
        batch = tree_map_only(Tensor, lambda t: _own(t, base.device), dict(self.step.batch))
        stack = Stack.of(model)
        stack.apply([(0, len(stack), _Hollow(twin))])
        clock, taken = Stopwatch(base.device), []
        with _random_state_kept(base.device):
            for _ in range(RUNS):
                started = clock()
                self.step.forward(model, batch).backward()
                taken.append(clock() - started)
                for parameter in model.parameters():
                    parameter.grad = None
                if taken[-1] > SLOW_S:
                    break
        return statistics.median(taken)

    def optimizer(self, base: Twin, ways: Sequence[Way] = ()) -> float:
        """Seconds of the optimizer step as `ways` have it, from one block's parameters scaled by
        bytes."""
        trained = [p for p in base.model.parameters() if p.requires_grad]
        sample = [p for p in base.stack.blocks[0].parameters() if p.requires_grad] or trained[:1]
        if not sample:
            return 0.0
        real = [nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=p.device)) for p in sample]
        holder = nn.ParameterList(real)
        in_turns = takes_turns(ways)
        ways = [way for way in ways if not way.promises.takes_turns]  # of one block, as it is here
        apply_ways(holder, ways, ())
        chosen = optimizer_for(holder, ways, self.step.make)(real)
        for parameter in real:
            parameter.grad = torch.zeros_like(parameter)
        clock, taken = Stopwatch(base.device), []
        chosen.step()  # makes the states
        for _ in range(RUNS):
            started = clock()
            chosen.step()
            taken.append(clock() - started)
        if in_turns:
            return statistics.median(taken)
        whole = sum(p.nbytes for p in trained) / sum(p.nbytes for p in sample)
        return statistics.median(taken) * whole


class _Hollow(Executor):
    """Hands on a fresh hidden state in place of running the block."""

    def __init__(self, twin: Twin) -> None:
        self.twin = twin

    def run(self, position: int, block: nn.Module, call: BlockCall) -> Any:
        captured, device = self.twin.calls[position], self.twin.device
        call.hidden = None
        output = tree_map_only(Tensor, lambda t: _argument(t, device), captured.output)
        like = hidden_of(output)
        return with_hidden(output, source(like, lambda: like))


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    """A batch tensor as it is, or zeros where it is fake."""
    if type(tensor) is Tensor and not tensor.is_meta:
        return tensor.to(device)
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)


def _argument(fake: Tensor, device: torch.device) -> Tensor:
    """A real tensor of the same layout. Zeros add nothing as a mask; as a flag all are on."""
    value = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=device)
    # Through the storage, because expanded tensors must not be written through.
    flat = torch.empty(0, dtype=fake.dtype, device=device).set_(value.untyped_storage())
    flat.fill_(True) if fake.dtype == torch.bool else flat.zero_()
    return value


def _noise(captured: Captured, twin: Twin) -> Tensor:
    return torch.randn(captured.hidden.shape, device=twin.device).to(captured.hidden.dtype)


def _medians(taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    # The first run of all pays for warming up.
    later = taken[1:] or taken
    return statistics.median(f for f, _ in later), statistics.median(b for _, b in later)


def _random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """Random numbers drawn inside do not show outside."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
