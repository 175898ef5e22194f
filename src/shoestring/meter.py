"""Measured bytes of a training step: the peak, what it is made of, and when it happens.

One TorchDispatchMode, the `Tracker`, charges every storage once when an operator hands it out
and refunds it when the storage dies, so that real and fake tensors are counted by the same code.
`Meter` runs a Tracker around a piece of real work and adds what the system says (RSS, CUDA).

Not seen by a Tracker: memory that kernels take and give back inside one call, library
workspaces, the CUDA context, and whatever the C allocator keeps.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from .rss import RssPeak

CATEGORIES = ("weights", "gradients", "optimizer", "saved", "transient", "cache", "other")
TIMELINE_LIMIT = 1 << 15
# The CUDA caching allocator hands out multiples of this many bytes (CUDACachingAllocator.cpp).
CUDA_ROUNDING = 512
_LOSS_OPERATORS = frozenset(
    "_log_softmax nll_loss_forward nll_loss2d_forward mse_loss binary_cross_entropy "
    "binary_cross_entropy_with_logits smooth_l1_loss huber_loss kl_div".split()
)
# Elementwise operators that bring their operands to one dtype first (on CPU, by copies).
_PROMOTING = frozenset(
    prefix + name
    for prefix in ("", "_foreach_")
    for name in "add add_ sub sub_ mul mul_ div div_ eq ne lt le gt ge maximum minimum".split()
)
_DTYPE_OF = {bool: torch.bool, int: torch.int64, float: torch.float64}
_ACTIVE: list["Tracker"] = []


def active_tracker() -> "Tracker | None":
    """The innermost Tracker that is counting now, or None."""
    return _ACTIVE[-1] if _ACTIVE else None


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator that may draw random numbers does: attention without dropout and the
    like carry the tag as well."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "p"):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            return (argument.default_value if value is None else value) != 0
    return True


class Charge(weakref.ref):
    """One live storage: the weak reference itself carries what was charged for it."""

    __slots__ = ("born", "category", "inside", "key", "ledger", "nbytes")

    key: int
    nbytes: int
    category: str
    ledger: "Ledger"
    born: int  # number of charges made in its ledger before this one
    inside: bool  # created while tracking, not before


@dataclass
class Ledger:
    """Bytes of one device type, now and at their peak."""

    device: str = "cpu"
    live: int = 0
    existing: int = 0
    by_category: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    peak: int = 0
    peak_by_category: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    peak_phase: str = ""
    peak_operator: str = ""
    peak_serial: int = -1
    serial: int = 0
    retained: int = 0
    timeline: list[tuple[str, int]] = field(default_factory=list)

    def note(self, phase: str) -> None:
        """Append one point; when the list is full, keep the higher of each two neighbours."""
        # Bytes that existed before are left out here and added on reading, because such a
        # storage may be noticed only after points were written for a time when it was there.
        self.timeline.append((phase, self.live - self.existing))
        if len(self.timeline) >= TIMELINE_LIMIT:
            pairs = zip(self.timeline[::2], self.timeline[1::2], strict=False)
            self.timeline = [max(pair, key=lambda point: point[1]) for pair in pairs]

    def settle(self, phase: str, operator: str, scratch: int = 0) -> None:
        """Take the present, with what the operator held for itself, as the peak if higher."""
        if self.live + scratch > self.peak:
            self.peak = self.live + scratch
            self.peak_by_category = dict(self.by_category)
            self.peak_by_category["transient"] += scratch
            self.peak_phase, self.peak_operator = phase, operator
            self.peak_serial = self.serial


class Tracker(TorchDispatchMode):
    """Counts live tensor bytes while it is entered.

    Every storage is charged once, at its full size (a view keeps all of its base), under one
    of `CATEGORIES`. Storages that existed before are charged when first touched, and counted
    as having been there from the start; `seed` charges a model and an optimizer at once.
    CUDA storages are rounded to 512 bytes as its allocator does.

    Phases are found without help: "forward", "loss", "loss backward", "backward",
    "after backward" (such as clipping), "optimizer step"; `mark` names them by hand.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledgers: dict[str, Ledger] = {}
        self.random_draws = 0
        self.phase = "forward"
        self._charges: dict[int, Charge] = {}
        self._parameters: dict[int, weakref.ref[Tensor]] = {}
        self._node_before = ""
        self._root = 0  # the last ones_like: the gradient of the loss itself, no part of forward
        self._saw_backward = False
        self._undo: list[Callable[[], None]] = []

    # ---- reading ---------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """The ledger of the device that does the work: an accelerator's when one was touched."""
        devices = [name for name in self.ledgers if name != "cpu"]
        return self.ledgers.get(devices[0] if devices else "cpu") or Ledger()

    @property
    def live_bytes(self) -> int:
        """Bytes alive now on the working device."""
        return self.ledger.live

    # ---- writing by hand -------------------------------------------------------------------

    def seed(self, model: nn.Module | None = None, optimizer: Optimizer | None = None) -> None:
        """Charge parameters, buffers, their gradients and the optimizer's state as existing."""
        if model is not None:
            for parameter in model.parameters():
                self._know_parameter(parameter)
            self.assign("weights", model.buffers())
        if optimizer is not None:
            self._know_optimizer(optimizer)
        self._assign_gradients()

    def assign(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Count these tensors' storages under `category` (also in the peak already noted)."""
        assert category in CATEGORIES, category
        for tensor in tensors:
            for part in _plain_tensors(tensor):
                charge = self._charge(part, inside=False, category=category)
                if charge is not None:
                    self._move(charge, category)

    def charge_created(self, tensor: Tensor) -> None:
        """Charge a tensor that was made out of sight of the dispatcher, such as an RNG state."""
        self._charge(tensor, inside=True, category="transient")
        self._settle("created")

    def mark(self, name: str) -> None:
        """Start a phase called `name` by hand; it lasts until the next one found or marked."""
        if self.phase in ("forward", "loss") or name == "backward":
            self._end_forward()
        self.phase = name

    # ---- the mode --------------------------------------------------------------------------

    def __enter__(self) -> Self:
        _ACTIVE.append(self)
        pre = register_optimizer_step_pre_hook(self._before_step)
        post = register_optimizer_step_post_hook(self._after_step)
        self._undo = [pre.remove, post.remove, _watch_rng_states(), _watch_resize(self)]
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        _ACTIVE.remove(self)
        for undo in reversed(self._undo):
            undo()
        self._assign_gradients()
        if not self._saw_backward:
            self._end_forward()
        for ledger in self.ledgers.values():
            ledger.timeline = [(name, count + ledger.existing) for name, count in ledger.timeline]
        # No refunds after this: the numbers are those of the window.
        self._charges.clear()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)  # what a fake tensor's attributes ask for
        name = func.overloadpacket.__name__
        self._find_phase(name)
        fresh = name == "lift_fresh"
        for tensor in _tensors_in(args):
            self._charge(tensor, inside=fresh)
        for tensor in _tensors_in(kwargs.values()):
            self._charge(tensor, inside=fresh)
        out = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
            self.random_draws += 1
        before = len(self._charges)
        for tensor in _tensors_in((out,)):
            self._charge(tensor, inside=True, category="transient")
        if name == "ones_like":
            self._root = out.untyped_storage()._cdata
        scratch = _scratch_bytes(name, args) if name in _PROMOTING else 0
        if scratch or len(self._charges) != before:
            self._settle(name, scratch)
        return out

    # ---- charging --------------------------------------------------------------------------

    def _charge(self, tensor: Tensor, *, inside: bool, category: str = "") -> Charge | None:
        """Charge the tensor's storage unless that is done; None for one without a storage."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return None  # functorch wrappers and opaque tensors have none of their own
        key = storage._cdata
        known = self._charges.get(key)
        if known is not None:
            return known
        device = tensor.device.type
        if device == "meta":
            return None
        charge = Charge(storage, self._refund)
        charge.key, charge.nbytes = key, _rounded(storage.nbytes(), device)
        charge.inside = inside
        ledger = charge.ledger = self._ledger_of(device)
        if not category:
            category = self._category_of(tensor)
        charge.category, charge.born = category, ledger.serial
        self._charges[key] = charge
        ledger.serial += 1
        ledger.live += charge.nbytes
        ledger.by_category[category] += charge.nbytes
        if not inside:
            # It was there all along: every number noted so far rises by it.
            charge.born = -1
            ledger.existing += charge.nbytes
            ledger.peak += charge.nbytes
            ledger.peak_by_category[category] += charge.nbytes
        return charge

    def _ledger_of(self, device: str) -> Ledger:
        ledger = self.ledgers.get(device)
        if ledger is None:
            ledger = self.ledgers[device] = Ledger(device)
        return ledger

    def _category_of(self, tensor: Tensor) -> str:
        if isinstance(tensor, nn.Parameter):
            self._parameters.setdefault(id(tensor), weakref.ref(tensor))
            return "weights"
        return "other"

    def _refund(self, reference: weakref.ref) -> None:
        assert isinstance(reference, Charge)
        if self._charges.pop(reference.key, None) is None:
            return
        reference.ledger.live -= reference.nbytes
        reference.ledger.by_category[reference.category] -= reference.nbytes

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """Follow `UntypedStorage.resize_`, which no dispatcher sees."""
        charge = self._charges.get(storage._cdata)
        if charge is None:
            return
        nbytes = _rounded(storage.nbytes(), charge.ledger.device)
        charge.ledger.live += nbytes - charge.nbytes
        charge.ledger.by_category[charge.category] += nbytes - charge.nbytes
        charge.nbytes = nbytes
        self._settle("resize_")

    def _move(self, charge: Charge, category: str) -> None:
        """Count a live storage under another category, in the noted peak too if it was there."""
        if charge.category == category:
            return
        ledger = charge.ledger
        ledger.by_category[charge.category] -= charge.nbytes
        ledger.by_category[category] += charge.nbytes
        if charge.born < ledger.peak_serial:
            ledger.peak_by_category[charge.category] -= charge.nbytes
            ledger.peak_by_category[category] += charge.nbytes
        charge.category = category

    def _settle(self, operator: str, scratch: int = 0) -> None:
        for ledger in self.ledgers.values():
            ledger.settle(self.phase, operator, scratch)
            ledger.note(self.phase)

    # ---- parameters, gradients, optimizer --------------------------------------------------

    def _know_parameter(self, parameter: Tensor) -> None:
        self._parameters.setdefault(id(parameter), weakref.ref(parameter))
        self.assign("weights", (parameter,))

    def _know_optimizer(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._know_parameter(parameter)
        self.assign("optimizer", _tensors_in(optimizer.state.values()))

    def _assign_gradients(self) -> None:
        for reference in self._parameters.values():
            parameter = reference()
            if parameter is not None and parameter.grad is not None:
                self.assign("gradients", (parameter.grad,))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._know_optimizer(optimizer)
        self._assign_gradients()
        self.phase = "optimizer step"

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._know_optimizer(optimizer)
        self.phase = "after optimizer step"

    # ---- phases ----------------------------------------------------------------------------

    def _find_phase(self, operator: str) -> None:
        if torch._C._current_graph_task_id() != -1:
            self._find_backward_phase()
        elif self.phase in ("backward", "loss backward"):
            self._assign_gradients()
            self.phase = "forward" if torch.is_grad_enabled() else "after backward"
        elif self.phase in ("after backward", "after optimizer step") and torch.is_grad_enabled():
            self.phase = "forward"
        elif self.phase == "forward" and operator in _LOSS_OPERATORS:
            self.phase = "loss"

    def _find_backward_phase(self) -> None:
        if self.phase == "optimizer step":
            return  # an optimizer that steps from a hook inside the backward
        if self.phase not in ("backward", "loss backward"):
            self._end_forward()
            self._saw_backward = True
            self.phase = "loss backward"
            self._node_before = ""
        if self.phase == "loss backward":
            node = torch._C._current_autograd_node()
            name = node.name() if node is not None else ""
            # The loss's part of the backward ends once the head's matrix product is done.
            if self._node_before.startswith(("MmB", "AddmmB", "LinearB", "BmmB")) and (
                name != self._node_before
            ):
                self.phase = "backward"
            self._node_before = name

    def _end_forward(self) -> None:
        """What is alive now, made inside and owned by nobody else, is held for the backward."""
        for charge in self._charges.values():
            if charge.inside and charge.category == "transient" and charge.key != self._root:
                self._move(charge, "saved")
        for ledger in self.ledgers.values():
            ledger.retained = max(ledger.retained, ledger.by_category["saved"])


class Meter:
    """Bytes of the work done inside a `with` block.

        with Meter(model, optimizer) as meter:
            step()
        meter.peak_bytes, meter.by_category, meter.instant

    Without a model and an optimizer, tensors that existed before count as soon as something
    touches them, and then as if they had been there from the start.

    peak_bytes: most bytes of live tensors at once.  by_category: that peak, by `CATEGORIES`.
    instant: the phase the peak fell in.  retained_bytes: held for the backward at the end of
    the forward.  baseline_bytes: what existed before.  end_bytes: what is left afterwards.
    timeline: (phase, bytes) after each operator that allocated.
    rss_peak_bytes: peak resident set of the process, or None with the reason in rss_message.
    cuda_peak_bytes: torch.cuda.max_memory_allocated, or None without CUDA.
    """

    def __init__(self, model: nn.Module | None = None, optimizer: Optimizer | None = None) -> None:
        self._model, self._optimizer = model, optimizer
        self.tracker = Tracker()
        self._rss = RssPeak()
        self.rss_peak_bytes: int | None = None
        self.rss_message: str | None = None
        self.cuda_peak_bytes: int | None = None

    def __enter__(self) -> Self:
        self.tracker.seed(self._model, self._optimizer)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self._rss.start()
        self.tracker.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ledger = self.tracker.ledger
        self.end_bytes = ledger.live
        self.tracker.__exit__(kind, error, trace)
        self.rss_peak_bytes, self.rss_message = self._rss.read()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.cuda_peak_bytes = torch.cuda.max_memory_allocated()
        ledger = self.tracker.ledger
        self.peak_bytes = ledger.peak
        self.by_category = dict(ledger.peak_by_category)
        self.instant = ledger.peak_phase
        self.instant_operator = ledger.peak_operator
        self.retained_bytes = ledger.retained
        self.baseline_bytes = ledger.existing
        self.timeline = ledger.timeline

    def mark(self, name: str) -> None:
        """Start a phase called `name`; see Tracker.mark."""
        self.tracker.mark(name)


def allocator_peak(function: Callable[[], object]) -> int:
    """Peak bytes torch's CPU allocator held above its start while `function` ran.

    Exact, kernels' own scratch included, but slow: it reads the profiler's memory events.
    Sizes are summed from zero here, because the profiler's running total is per process and
    misses what is freed between two windows.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False
    ) as profiled:
        function()
    results = profiled.profiler.kineto_results
    events = sorted(_allocations(results.experimental_event_tree()))
    live = peak = 0
    for _, nbytes in events:
        live += nbytes
        peak = max(peak, live)
    return peak


def _allocations(tree: Iterable[Any]) -> Iterator[tuple[int, int]]:
    pending = list(tree)
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag.name == "Allocation" and event.extra_fields.device.type == "cpu":
            yield event.start_time_ns, event.extra_fields.alloc_size


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Every plain tensor inside nested tuples, lists and dicts."""
    found: list[Tensor] = []
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            found.extend((value,) if value.layout is torch.strided else _plain_tensors(value))
        elif isinstance(value, Tensor):
            found.extend(_plain_tensors(value))
        elif kind is tuple or kind is list or isinstance(value, tuple | list):
            found.extend(_tensors_in(value))
        elif isinstance(value, dict):
            found.extend(_tensors_in(value.values()))
    return found


def _plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the data of a wrapper subclass or a sparse tensor; else itself."""
    if is_traceable_wrapper_subclass(tensor):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [plain for part in parts for plain in _plain_tensors(part)]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return [tensor]


def _scratch_bytes(operator: str, args: tuple[Any, ...]) -> int:
    """Bytes an elementwise operator on CPU holds for itself while it runs.

    Operands are copied to their common dtype first (TensorIterator), and a Python number is
    made a tensor of 8 bytes, and copied likewise.
    """
    first, second = (args[0], args[1]) if len(args) > 1 else (None, None)
    if isinstance(first, list):  # _foreach_*: one tensor after the other
        first, second = first[0], second[0] if isinstance(second, list) else second
    if not isinstance(first, Tensor) or first.device.type != "cpu":
        return 0
    if isinstance(second, Tensor):
        if first.dtype is second.dtype:
            return 0
        operands = [first, second]
    elif isinstance(second, bool | int | float):
        operands = [first, torch.empty((), dtype=_DTYPE_OF[type(second)], device="meta")]
    else:
        return 0
    common = torch.result_type(first, second)
    if operator.endswith("_"):
        operands.append(first)  # read and written, each through its own copy
    held = 0 if isinstance(second, Tensor) else operands[1].nbytes
    return held + sum(
        each.numel() * common.itemsize for each in operands if each.dtype is not common
    )


def _rounded(nbytes: int, device: str) -> int:
    return -(-nbytes // CUDA_ROUNDING) * CUDA_ROUNDING if device == "cuda" else nbytes


# ---- what the dispatcher does not see -----------------------------------------------------

_PATCH = threading.Lock()


def _watch_rng_states() -> Callable[[], None]:
    """Charge the tensors `torch.get_rng_state` hands out (5,056 bytes each on CPU)."""
    original = torch.random.get_rng_state

    def get_rng_state() -> Tensor:
        state = original()
        tracker = active_tracker()
        # Nested trackers each patch once more; the innermost call charges for all of them.
        if original is _GET_RNG_STATE and tracker is not None:
            for each in _ACTIVE:
                each.charge_created(state)
        return state

    with _PATCH:
        torch.get_rng_state = torch.random.get_rng_state = get_rng_state

    def undo() -> None:
        with _PATCH:
            torch.get_rng_state = torch.random.get_rng_state = original

    return undo


def _watch_resize(tracker: Tracker) -> Callable[[], None]:
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, nbytes: int) -> Any:
        out = original(storage, nbytes)
        tracker._resized(storage)
        return out

    torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment,method-assign]

    def undo() -> None:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    return undo


_GET_RNG_STATE = torch.random.get_rng_state
