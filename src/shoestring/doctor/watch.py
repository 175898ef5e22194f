"""The watcher of a step: which operator of which module made every storage, and when.

Modules are found by their calls (`nn.Module.__call__` is replaced meanwhile; torch's global hooks
do not tell keyword arguments), so that nothing is put into the model. In the backward, where no
module runs, an operator belongs to the module whose forward made the autograd node: nodes and
operators of the forward share torch's sequence number.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import StackError
from ..meter import Charge, Ledger, Tracker, Watcher
from ..meter.operators import tensors_in
from ..stack import Stack
from .capture import Call, captured
from .lives import Life, Lives
from .timeline import Segment, Visit
from .trial import loss_in

_next_node: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
_LOGITS_OPERATORS = frozenset({"_log_softmax"})
_Place = tuple[str, int | None]  # path of a module, and its block


class Watch(Watcher):
    """Everything a diagnosis is made of. `start` and `stop` put the hooks in and take them out.

    model: where it is not given, the largest module that is called from outside of any other.
    warm_up: steps after which everything is counted anew, when the model is next trained on.
    on_phase: called with the watch when a phase begins.  on_restart: called when it does so.
    """

    def __init__(
        self,
        model: nn.Module | None,
        *,
        warm_up: int = 0,
        on_phase: Callable[["Watch"], None] | None = None,
        on_restart: Callable[[], None] | None = None,
    ) -> None:
        self.tracker = Tracker(watcher=self)
        self.model = model
        self.is_given = model is not None
        self.warm_up, self.on_phase, self.on_restart = warm_up, on_phase, on_restart
        self.steps_in_all = 0
        self.optimizers: list[Optimizer] = []
        self.lives = Lives()
        self.now = 0
        self.step = 0
        self.step_ends: list[int] = []
        self.segments: list[Segment] = []
        self.visits: list[Visit] = []
        self.has_loss: bool | None = None
        self.call: Call | str = "the model was not called in training"
        self.calls_in_pieces = False
        self.logits: tuple[int, int] | None = None  # (elements, vocabulary)
        self.retained: dict[str, dict[_Place, int]] = {}
        self.operator = ""
        self.place: _Place = ("", None)
        self.stack: Stack | None = None
        self.stack_message: str | None = "no model was called"
        self._names: dict[int, str] = {}
        self._blocks: dict[int, int] = {}
        self._running: list[_Place] = []
        self._made_by: dict[int, _Place] = {}
        self._peaks: dict[str, tuple[int, int]] = {}  # device -> (bytes less existing, instant)
        self._undo: Callable[[], None] | None = None
        if model is not None:
            self._know(model)

    # ---- modules ---------------------------------------------------------------------------

    def start(self) -> None:
        """Watch every module's forward."""
        original = nn.Module.__call__
        watch = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            visit, output = watch._enter(module, args, kwargs), None
            try:
                output = original(module, *args, **kwargs)
                return output
            finally:
                watch._leave(module, visit, output)

        nn.Module.__call__ = call  # type: ignore[method-assign]

        def undo() -> None:
            nn.Module.__call__ = original  # type: ignore[method-assign]

        self._undo = undo

    def stop(self) -> None:
        """No more."""
        if self._undo is not None:
            self._undo()
        self._undo = None

    def _know(self, model: nn.Module) -> None:
        self.model = model
        self._names = {id(m): name or type(m).__name__ for name, m in model.named_modules()}
        try:
            self.stack, self.stack_message = Stack.of(model), None
        except StackError as error:
            self.stack, self.stack_message = None, error.what
        blocks = self.stack.blocks if self.stack is not None else ()
        self._blocks = {id(block): index for index, block in enumerate(blocks)}

    def _consider(self, module: nn.Module) -> None:
        """A module that is called from outside: the model, when it is the largest such one."""
        size = sum(p.numel() for p in module.parameters())
        if self.is_given or not size or module is self.model:
            return
        known = sum(p.numel() for p in self.model.parameters()) if self.model is not None else 0
        inside = self.model is not None and any(m is module for m in self.model.modules())
        self.calls_in_pieces |= self.model is not None and not inside
        if size > known:
            self._know(module)
            self.tracker.seed(module)
            if not self.step:
                self.tracker.set_aside()

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Visit | None:
        in_backward = torch._C._current_graph_task_id() != -1
        if not self._running and not in_backward:
            self._consider(module)
        block = self._blocks.get(id(module), self._running[-1][1] if self._running else None)
        self._running.append((self._names.get(id(module), type(module).__name__), block))
        is_model = module is self.model
        if is_model and self.warm_up and self.step >= self.warm_up and not in_backward:
            self._restart()
        if not is_model and id(module) not in self._blocks:
            return None
        visit = Visit(
            block=self._blocks.get(id(module)), step=self.step, start=self.now + 1,
            is_training=module.training, has_grad=torch.is_grad_enabled(),
            in_backward=in_backward,
        )  # fmt: skip
        self.visits.append(visit)
        if is_model and self.segments:
            self.segments[-1].is_called = True
        if is_model and visit.is_training and visit.has_grad and not in_backward:
            self.call = captured(module, args, kwargs)
        return visit

    def _restart(self) -> None:
        """Count from here on."""
        self.warm_up, self.step = 0, 0
        self.tracker.restart()
        self.lives.restart()
        self.step_ends, self.segments, self.visits = [], [], []
        self.logits, self.retained, self._peaks = None, {}, {}
        if self.on_restart is not None:
            self.on_restart()

    def _leave(self, module: nn.Module, visit: Visit | None, output: Any) -> None:
        self._running.pop()
        if visit is None:
            return
        visit.stop = self.now
        self.now += 1  # so that what dies after it is told from what died in it
        if module is self.model and visit.has_grad and output is not None:
            loss = loss_in(output)
            self.has_loss = loss is not None and loss.requires_grad
        for tensor in tensors_in((output,)):
            charge = self.tracker.charge_of(tensor)
            if charge is not None:
                charge.note.is_output = True
                visit.outputs.append(charge.note)

    # ---- what the tracker tells --------------------------------------------------------------

    def started(self, operator: str, args: tuple[Any, ...]) -> None:
        self.operator = operator
        node = None
        if torch._C._current_graph_task_id() != -1:
            node = torch._C._current_autograd_node()
        if self._running:
            self.place = self._running[-1]
        elif node is not None:
            self.place = self._made_by.get(node._sequence_nr(), ("", None))
        else:
            self.place = ("", None)
        if node is None and torch.is_grad_enabled():
            # The node of this operator was made just before; the first operator seen is its own.
            self._made_by.setdefault(_next_node() - 1, self.place)
            if operator in _LOGITS_OPERATORS:
                shape = args[0].shape
                if self.logits is None or args[0].numel() > self.logits[0]:
                    self.logits = (args[0].numel(), shape[-1])
        elif operator == "add_" and node is not None and node.name().endswith("AccumulateGrad"):
            charge = self.tracker.charge_of(args[0])
            if charge is not None:
                charge.note.written.append(self.now + 1)
        self._begin_segment()
        if node is not None and self.place[1] is not None:
            self.segments[-1].blocks.setdefault(self.place[1], self.now + 1)

    def _begin_segment(self) -> None:
        phase = self.tracker.phase
        if not self.segments or self.segments[-1].phase != phase or (
            self.segments[-1].step != self.step
        ):  # fmt: skip
            self.segments.append(Segment(phase, self.step, self.now + 1))
            if self._running:
                self.segments[-1].is_called = True
            if self.on_phase is not None:
                self.on_phase(self)

    def made(self, charge: Charge, tensor: Tensor) -> None:
        module, block = self.place
        charge.note = Life(
            born=self.now + 1 if charge.inside else 0, nbytes=charge.nbytes,
            device=charge.ledger.device, shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."), step=self.step,
        )  # fmt: skip
        if charge.inside:
            charge.note.operator, charge.note.module = self.operator, module
            charge.note.block, charge.note.phase = block, self.tracker.phase
        self.lives.begin(charge.note)

    def gone(self, charge: Charge) -> None:
        life: Life = charge.note
        life.category = charge.category
        self.lives.end(life, self.now, (instant for _, instant in self._peaks.values()))

    def resized(self, charge: Charge, nbytes: int) -> None:
        old: Life = charge.note
        self.gone(charge)
        charge.note = Life(
            born=self.now + 1, nbytes=nbytes, device=old.device, shape=old.shape, dtype=old.dtype,
            operator=old.operator, module=old.module, block=old.block, phase=old.phase,
            step=self.step,
        )  # fmt: skip
        self.lives.begin(charge.note)

    def settled(self, ledgers: Iterable[Ledger], operator: str, scratch: int) -> None:
        self.now += 1
        if not self.segments:
            self._begin_segment()
        for ledger in ledgers:
            if scratch:
                self.lives.scratch[ledger.device, self.now] = scratch
            held = ledger.live - ledger.existing + scratch
            self.segments[-1].note(ledger.device, held, self.now, operator)
            if held > self._peaks.get(ledger.device, (-(1 << 62), 0))[0]:
                self._peaks[ledger.device] = (held, self.now)

    def forward_ended(self, charges: Iterable[Charge]) -> None:
        found: dict[str, dict[_Place, int]] = {}
        for charge in charges:
            if charge.category == "saved":
                where = found.setdefault(charge.ledger.device, {})
                key = (charge.note.module, charge.note.block)
                where[key] = where.get(key, 0) + charge.nbytes
        for device, places in found.items():
            if sum(places.values()) > sum(self.retained.get(device, {}).values()):
                self.retained[device] = places

    def stepped(self, optimizer: Optimizer) -> None:
        if not any(each is optimizer for each in self.optimizers):
            self.optimizers.append(optimizer)
        if optimizer is not self.optimizers[0]:
            return  # of several, the first tells the steps
        self.steps_in_all += 1
        self.step += 1
        self.step_ends.append(self.now)
        self._made_by.clear()

    # ---- reading ---------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """The device type that does the work."""
        return self.tracker.ledger.device

    def peak_instant(self) -> int:
        """When the peak was."""
        return self._peaks.get(self.device, (0, 0))[1]
