"""The dispatch mode that counts live tensor bytes."""

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .history import EXISTING, History
from .ledger import CATEGORIES, Charge, Ledger, rounded
from .operators import draws, plain_tensors, scratch_bytes, tensors_in
from .outside import is_outside
from .unseen import watch_resize, watch_rng_states
from .watcher import Watcher

_LOSS_OPERATORS = frozenset(
    "_log_softmax nll_loss_forward nll_loss2d_forward mse_loss binary_cross_entropy "
    "binary_cross_entropy_with_logits smooth_l1_loss huber_loss kl_div".split()
)
_ACTIVE: list["Tracker"] = []


def active_tracker() -> "Tracker | None":
    """The innermost Tracker that is counting now, or None."""
    return _ACTIVE[-1] if _ACTIVE else None


class Tracker(TorchDispatchMode):
    """Counts live tensor bytes while it is entered.

    Every storage is charged once, at its full size (a view keeps all of its base), under one
    of `CATEGORIES`. Storages that existed before are charged when first touched, and counted
    as having been there from the start; `seed` charges a model and an optimizer at once.
    CUDA storages are rounded to 512 bytes as its allocator does.

    Phases are found without help: "forward", "loss", "loss backward", "backward",
    "after backward" (such as clipping), "optimizer step"; `mark` names them by hand.

    history: keep the lives of all storages too, for a timeline by category.
    watcher: told of every storage as it comes and goes.
    """

    def __init__(self, *, history: bool = False, watcher: Watcher | None = None) -> None:
        super().__init__()
        self._keeps_history = history
        self._watcher = watcher
        self.ledgers: dict[str, Ledger] = {}
        self.random_draws = 0
        self.phase = "forward"
        self._charges: dict[int, Charge] = {}
        self._parameters: dict[int, weakref.ref[Tensor]] = {}
        self._node_before = ""
        self._root = 0  # the last ones_like: the gradient of the loss itself, no part of forward
        self._saw_backward = False
        self._steps = 0  # optimizers that are within their step
        self._phase_before = ""
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

    def charge_of(self, tensor: Tensor) -> Charge | None:
        """What is charged for the storage of a plain tensor; None when it is not counted."""
        try:
            return self._charges.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):
            return None

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
            for part in plain_tensors(tensor):
                charge = self._charge(part, inside=False, category=category)
                if charge is not None:
                    self._move(charge, category)

    def charge_created(self, tensor: Tensor) -> None:
        """Charge a tensor that was made out of sight of the dispatcher, such as an RNG state."""
        self._charge(tensor, inside=True, category="transient")
        self._settle("created")

    def set_aside(self) -> None:
        """Count what was made so far and is nobody's as `other`: a step begins only now."""
        for charge in self._charges.values():
            if charge.category == "transient":
                self._move(charge, "other")

    def restart(self) -> None:
        """Count from here on: what is alive now existed before. Not with a history."""
        assert not self._keeps_history
        for charge in self._charges.values():
            charge.inside, charge.born = False, -1
            if charge.category in ("transient", "saved"):
                self._move(charge, "other")
        for ledger in self.ledgers.values():
            ledger.peak = ledger.existing = ledger.live
            ledger.peak_by_category = dict(ledger.by_category)
            ledger.peak_serial, ledger.retained, ledger.timeline = ledger.serial, 0, []
        self._saw_backward = False

    def mark(self, name: str) -> None:
        """Start a phase called `name` by hand; it lasts until the next one found or marked."""
        if self.phase in ("forward", "loss") or name == "backward":
            self._end_forward()
        self._assign_gradients()
        self.phase = name

    # ---- the mode --------------------------------------------------------------------------

    def __enter__(self) -> Self:
        _ACTIVE.append(self)
        pre = register_optimizer_step_pre_hook(self._before_step)
        post = register_optimizer_step_post_hook(self._after_step)
        self._undo = [
            pre.remove,
            post.remove,
            watch_rng_states(self.charge_created),
            watch_resize(self._resized),
        ]
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
        for charge in self._charges.values():
            if charge.ledger.history is not None:
                charge.ledger.history.left(charge.since, charge.nbytes, charge.category)
            if self._watcher is not None:
                self._watcher.gone(charge)
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
        if self._watcher is not None:
            self._watcher.started(name, args)
        fresh = name == "lift_fresh"
        for tensor in tensors_in(args):
            self._charge(tensor, inside=fresh)
        for tensor in tensors_in(kwargs.values()):
            self._charge(tensor, inside=fresh)
        out = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and draws(func, args, kwargs):
            self.random_draws += 1
        before = len(self._charges)
        for tensor in tensors_in((out,)):
            self._charge(tensor, inside=True, category="transient")
        if name == "ones_like":
            self._root = out.untyped_storage()._cdata
        scratch = scratch_bytes(name, args)
        if scratch or len(self._charges) != before:
            self._settle(name, scratch)
        return out

    # ---- charging --------------------------------------------------------------------------

    def _charge(self, tensor: Tensor, *, inside: bool, category: str = "") -> Charge | None:
        """Charge the tensor's storage unless that is done; None for one without a storage, or
        with one that is left out."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return None  # functorch wrappers and opaque tensors have none of their own
        key = storage._cdata
        known = self._charges.get(key)
        if known is not None:
            return known
        device = tensor.device.type
        if device == "meta" or is_outside(storage):
            return None
        charge = Charge(storage, self._refund)
        charge.key, charge.nbytes = key, rounded(storage.nbytes(), device)
        charge.inside = inside
        ledger = charge.ledger = self._ledger_of(device)
        if not category:
            category = self._category_of(tensor)
        charge.category, charge.born = category, ledger.serial
        if ledger.history is not None:
            charge.since = ledger.history.began() if inside else EXISTING
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
        if self._watcher is not None:
            self._watcher.made(charge, tensor)
        return charge

    def _ledger_of(self, device: str) -> Ledger:
        ledger = self.ledgers.get(device)
        if ledger is None:
            ledger = self.ledgers[device] = Ledger(device)
            ledger.history = History(CATEGORIES) if self._keeps_history else None
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
        history = reference.ledger.history
        if history is not None:
            history.ended(reference.since, reference.nbytes, reference.category)
        if self._watcher is not None:
            self._watcher.gone(reference)
        reference.ledger.live -= reference.nbytes
        reference.ledger.by_category[reference.category] -= reference.nbytes

    def _resized(self, storage: torch.UntypedStorage, before: int) -> None:
        """Follow `UntypedStorage.resize_`, which no dispatcher sees."""
        charge = self._charges.get(storage._cdata)
        if charge is None:
            if not before and storage.device.type != "meta":
                # An empty one is given memory, as FSDP2 does for every gathering: made now.
                with _disable_current_modes():
                    view = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                self.charge_created(view)
            return
        nbytes = rounded(storage.nbytes(), charge.ledger.device)
        history = charge.ledger.history
        if history is not None:
            history.ended(charge.since, charge.nbytes, charge.category)
            charge.since = history.began()
        if self._watcher is not None:
            self._watcher.resized(charge, nbytes)
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
        if self._watcher is not None:
            self._watcher.settled(self.ledgers.values(), operator, scratch)

    # ---- parameters, gradients, optimizer --------------------------------------------------

    def _know_parameter(self, parameter: Tensor) -> None:
        self._parameters.setdefault(id(parameter), weakref.ref(parameter))
        self.assign("weights", (parameter,))

    def _know_optimizer(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._know_parameter(parameter)
                # Not all of the states: a step within backward has one parameter of many.
                if parameter in optimizer.state:
                    self.assign("optimizer", tensors_in((optimizer.state[parameter],)))

    def _assign_gradients(self) -> None:
        for reference in self._parameters.values():
            parameter = reference()
            if parameter is not None and parameter.grad is not None:
                self.assign("gradients", (parameter.grad,))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._know_optimizer(optimizer)
        self._assign_gradients()
        if self.phase != "optimizer step":  # optimizers may stand around one another
            self._phase_before = self.phase
        self._steps += 1
        self.phase = "optimizer step"

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._know_optimizer(optimizer)
        self._steps -= 1
        if self._steps == 0:
            # A step made by a hook is over before the backward it was made in.
            in_backward = torch._C._current_graph_task_id() != -1
            self.phase = self._phase_before if in_backward else "after optimizer step"
        if self._watcher is not None:
            self._watcher.stepped(optimizer)

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
        if self._watcher is not None:
            self._watcher.forward_ended(self._charges.values())
