"""Running a piece of a network again in backward, exactly as it ran in forward.

The engine under every method that trades compute for memory. Each piece is one non-reentrant
`torch.utils.checkpoint` region that is given no tensor: it *asks* for its input when it is run
again (`Replay`), so the input may be held, rebuilt from a lower one, or reconstructed from the
streams above. Random state, autocast, hooks, DDP, FSDP2, frozen and unused parameters come from
autograd's own graph and need no special code.

What is kept besides the input: the random state before the piece, and only when the piece drew
random numbers (5,056 bytes on a CPU); nothing else.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from . import meter
from .errors import StackError


class RandomState:
    """The random state of the CPU and of the device of a tensor, taken before a piece runs."""

    __slots__ = ("cpu", "device", "device_state", "draws", "fake")

    def __init__(self, x: Tensor) -> None:
        tracker = meter.active_tracker()
        self.draws = tracker.random_draws if tracker is not None else 0
        self.fake = isinstance(x, FakeTensor)
        self.cpu = self._now()
        self.device = None if self.fake else _generator_of(x.device)
        self.device_state = None if self.device is None else self.device.read()

    def _now(self) -> Tensor:
        """The CPU's state. Under fake tensors the generators stand still; the state's bytes are
        counted all the same."""
        if self.fake:
            return torch.empty(_cpu_state_bytes(), dtype=torch.uint8)
        return torch.get_rng_state()

    def was_used(self) -> bool:
        """Whether random numbers were drawn since."""
        now = self._now()
        if self.fake:
            tracker = meter.active_tracker()
            return tracker is not None and tracker.random_draws != self.draws
        if not torch.equal(self.cpu, now):
            return True
        if self.device is None:
            return False
        assert self.device_state is not None
        return not torch.equal(self.device_state, self.device.read())

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Draw the same numbers again; the state outside is left as it was."""
        now = self._now()
        if self.fake:
            yield
            return
        torch.set_rng_state(self.cpu)
        now_device = None
        if self.device is not None:
            assert self.device_state is not None
            now_device = self.device.read()
            self.device.write(self.device_state)
        try:
            yield
        finally:
            torch.set_rng_state(now)
            if self.device is not None and now_device is not None:
                self.device.write(now_device)


@functools.cache
def _cpu_state_bytes() -> int:
    return torch.default_generator.get_state().numel()


class _DeviceGenerator(NamedTuple):
    """How a device's random state is read and set."""

    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]


def _generator_of(device: torch.device) -> _DeviceGenerator | None:
    """None where numbers are drawn from the CPU's generator, or none are. StackError for a device
    whose random state cannot be had: its dropout would be replayed with other masks."""
    if device.type in ("cpu", "meta"):
        return None
    module = getattr(torch, device.type, None)
    read, write = (getattr(module, f"{verb}_rng_state", None) for verb in ("get", "set"))
    if read is None or write is None:
        raise StackError(
            f"the random state of device {device} cannot be read",
            expected="a device with torch.<device>.get_rng_state, such as cuda, xpu or mps",
            hint="Run its blocks with method 'keep'.",
        )
    if device.type == "mps":  # there is only one
        return _DeviceGenerator(read, write)
    return _DeviceGenerator(lambda: read(device), lambda state: write(state, device))


class Modes:
    """Which parts of a module are training: `model.eval()` between forward and backward must not
    switch dropout off in what backward runs again."""

    __slots__ = ("_parts",)

    def __init__(self, module: nn.Module | None) -> None:
        self._parts = [(m, m.training) for m in module.modules()] if module is not None else []

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """As they were; outside they are left as they are now."""
        changed = [(m, m.training) for m, training in self._parts if m.training != training]
        for m, training in changed:
            m.training = not training
        try:
            yield
        finally:
            for m, training in changed:
                m.training = training


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Normalisation layers compute as they do, and their running statistics stay."""
    norms = [m for m in module.modules() if getattr(m, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True  # type: ignore[assignment]


class Evaluation:
    """One evaluation of `fn(x)` in forward that can be repeated exactly.

    A repeat uses the very parameters that forward used, also when those stood there only for the
    time of a `torch.func.functional_call`, and the modes (train or eval) that forward ran in.
    Normalisation statistics move once: a repeat computes with the batch's own statistics and
    moves copies of the running ones. A piece that changes any other buffer of its own in forward
    cannot be repeated; that is a StackError at the first forward, never a wrong gradient.
    """

    __slots__ = ("_buffers", "_modes", "_norms", "_random", "_tensors", "fn")

    def __init__(self, fn: Callable[[Tensor], Any], module: nn.Module | None) -> None:
        self.fn = fn
        self._random: RandomState | None = None
        self._norms: list[_NormBase] = []
        # Where each parameter and buffer was found, and which tensor it was.
        self._tensors: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        self._buffers: list[tuple[str, Tensor]] = []
        self._modes = Modes(module)
        for path, part in module.named_modules() if module is not None else ():
            for place in (part._parameters, part._buffers):
                self._tensors += [(place, k, t) for k, t in place.items() if t is not None]
            if isinstance(part, _NormBase):
                self._norms.append(part)
            else:
                self._buffers += [
                    (f"{path}.{k}", t) for k, t in part._buffers.items() if t is not None
                ]

    def first(self, x: Tensor) -> Any:
        before = RandomState(x)
        versions = [b._version for _, b in self._buffers]
        version = x._version
        output = self.fn(x)
        if x._version != version:
            # What the repeat saves early would be changed late: a wrong gradient, not an error.
            raise StackError(
                "a block changes its input in place, so it cannot be run again",
                expected="blocks that leave their input as it is",
                hint="Run this block with method 'keep'.",
            )
        if before.was_used():
            # A copy made by an operator, so that the bytes kept are seen by whoever counts them.
            before.cpu = before.cpu.clone()
            self._random = before
        for (name, buffer), version in zip(self._buffers, versions, strict=True):
            if buffer._version != version:
                raise StackError(
                    f"a block changes its buffer {name!r} in forward, so it cannot be run again",
                    expected="blocks without changing state (running norm statistics are fine)",
                    hint="Run this block with method 'keep'.",
                )
        return output

    def again(self, x: Tensor) -> Any:
        with contextlib.ExitStack() as stack:
            if self._random is not None:
                stack.enter_context(self._random.restored())
            stack.enter_context(self._modes.restored())
            for place, name, tensor in self._tensors:
                now = place.get(name)
                # Another tensor stands there when forward ran under functional_call. FSDP2's
                # changes between sharded and whole parameters are its own affair.
                if now is not tensor and _is_sharded(now) == _is_sharded(tensor):
                    stack.callback(place.__setitem__, name, now)
                    place[name] = tensor
            for norm in self._norms:
                if norm.training and norm.track_running_stats:
                    # Copies move in place of the statistics. Not tracking them would compute
                    # the same, but save other tensors than forward did.
                    own = dict(norm._buffers)
                    stack.callback(norm._buffers.update, own)
                    norm._buffers.update({k: b.clone() for k, b in own.items() if b is not None})
            return self.fn(x)


def _is_sharded(tensor: Tensor | None) -> bool:
    return hasattr(tensor, "device_mesh")


class _Repeating:
    """Entered when a region is run again: asks for its input. Re-enterable, as a second backward
    needs, and entered before any other context, so that asking is not seen by them."""

    __slots__ = ("ask", "inputs")

    def __init__(self, ask: Callable[[], Tensor]) -> None:
        self.ask = ask
        self.inputs: list[Tensor] = []

    def __enter__(self) -> None:
        self.inputs.append(self.ask())

    def __exit__(self, *exc: object) -> None:
        self.inputs.clear()


class _Both:
    """Two contexts as one."""

    __slots__ = ("inner", "outer")

    def __init__(self, outer: Any, inner: Any) -> None:
        self.outer, self.inner = outer, inner

    def __enter__(self) -> None:
        self.outer.__enter__()
        self.inner.__enter__()

    def __exit__(self, *exc: Any) -> Any:
        self.outer.__exit__(*exc)
        return self.inner.__exit__(*exc)


def replayed(
    evaluation: Evaluation,
    x: Tensor,
    ask: Callable[[], Tensor],
    *,
    after: Callable[[Any], None] | None = None,
    early_stop: bool = True,
    contexts: Callable[[], tuple[Any, Any]] | None = None,
) -> Any:
    """`evaluation.first(x)`, keeping nothing of its inside for backward.

    When backward needs the inside, `ask()` must return the value of x and the piece is evaluated
    again on it; `after(output)` then receives the repeated output (pass early_stop=False to be
    sure it is reached). `contexts` adds a pair of contexts around the first and the repeated
    evaluation, as torch's `context_fn`.
    """
    repeating = _Repeating(ask)
    needs_grad = x.requires_grad
    live: list[Tensor] = [x]
    del x

    def region() -> Any:
        if live:
            return evaluation.first(live.pop())
        output = evaluation.again(repeating.inputs.pop().detach().requires_grad_(needs_grad))
        if after is not None:
            after(output)
        return output

    def context_fn() -> tuple[Any, Any]:
        if contexts is None:
            return contextlib.nullcontext(), repeating
        first, again = contexts()
        return first, _Both(repeating, again)

    with set_checkpoint_early_stop(early_stop):
        return checkpoint(
            region, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn
        )
