"""A trainer's own code on a fake twin of its model.

What a trainer computes is known best by itself: label smoothing, a loss function of the user's,
numbers of items, metrics on the way. So its own `compute_loss` and `prediction_step` are run, on a
copy of the trainer that holds the twin, whose lists and dicts are copies, and which logs nothing.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode

WAITING = "waiting"
"""Tensors of a batch whose names begin so are there during the step and not given to the model."""

BESIDE = 1024
"""Bytes of small things that a trainer keeps during a step: losses, norms, counts."""

_READ: Mapping[Any, Any] = {
    Tensor.item: 1,
    Tensor.__bool__: True,
    Tensor.__int__: 1,
    Tensor.__float__: 1.0,
    Tensor.__index__: 1,
}


class Bookkeeping(TorchFunctionMode):
    """Answers what a trainer reads of a fake tensor, such as a number of tokens for its logs, by
    a one: what it does with it has no bytes. Inside of the model it is off, since what a model
    reads decides what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.on = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.on and func in _READ and isinstance(args[0], FakeTensor):
            return _READ[func]
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


@contextlib.contextmanager
def as_prepared(model: nn.Module, dtype: torch.dtype | None, convert: bool) -> Iterator[None]:
    """The model as Accelerate runs it: its forward, and no more, under autocast to `dtype`, and
    what it returns in float32 (`convert`). Autocast that is on outside is off, but in there."""
    rebind(model)
    device = next(model.parameters()).device.type
    inner, before = model.forward, vars(model).get("forward")
    book = Bookkeeping()

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with book.off():
            if dtype is None:
                return inner(*args, **kwargs)
            with torch.autocast(device, dtype):
                output = inner(*args, **kwargs)
        return _in_float32(output) if convert else output

    outside = torch.autocast(device, enabled=False) if dtype else contextlib.nullcontext()
    model.__dict__["forward"] = forward
    try:
        with book, outside:
            yield
    finally:
        if before is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = before


def _in_float32(output: Any) -> Any:
    from accelerate.utils.operations import convert_to_fp32

    return convert_to_fp32(output)


def rebind(model: nn.Module) -> None:
    """Functions that a library put into `forward`s of the model, and that remember the method they
    replaced, remember in a copy that of the original (TRL's head does): let them call the copy's.
    """
    for module in model.modules():
        forward = vars(module).get("forward")
        function = getattr(forward, "__func__", None)
        if (
            not isinstance(function, FunctionType)
            or getattr(forward, "__self__", None) is not module
        ):
            continue
        cells = function.__closure__ or ()
        if not any(_is_of_another(cell, module) for cell in cells):
            continue
        new = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__,
            tuple(
                CellType(MethodType(cell.cell_contents.__func__, module))
                if _is_of_another(cell, module) else cell
                for cell in cells
            ),
        )  # fmt: skip
        new.__kwdefaults__ = function.__kwdefaults__
        functools.update_wrapper(new, function)
        module.__dict__["forward"] = MethodType(new, module)


def _is_of_another(cell: CellType, module: nn.Module) -> bool:
    """Whether this is a method of another module of the same class."""
    try:
        value = cell.cell_contents
    except ValueError:
        return False  # not filled yet
    owner = value.__self__ if isinstance(value, MethodType) else None
    return owner is not None and owner is not module and type(owner) is type(module)


def stand_in(trainer: Any, model: nn.Module, *, accumulate: int = 1) -> Any:
    """A copy of the trainer for this model. What it writes down is lost."""
    twin = copy.copy(trainer)
    for name, value in vars(trainer).items():
        if isinstance(value, dict | list | set):
            setattr(twin, name, _containers_copied(value))
    twin.model = twin.model_wrapped = model
    twin.current_gradient_accumulation_steps = accumulate
    twin.log = _nothing
    return twin


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _containers_copied(value: Any) -> Any:
    """Containers of containers copied, what they hold shared."""
    if isinstance(value, dict):
        new = copy.copy(value)
        new.update({k: _containers_copied(v) for k, v in value.items()})
        return new
    if isinstance(value, list):
        return [_containers_copied(v) for v in value]
    return copy.copy(value) if isinstance(value, set) else value


ComputeLoss = Callable[[nn.Module, dict[str, Any], Any], Tensor]
_ITEMS = f"{WAITING} items"


def loss_of_trainer(
    compute: ComputeLoss, dtype: torch.dtype | None, *, convert: bool
) -> Callable[[nn.Module, Mapping[str, Any]], Tensor]:
    """(model, batch) -> loss for the planner. compute: (model, inputs, number of items) -> loss."""

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        inputs = {k: v for k, v in batch.items() if not k.startswith(WAITING)}
        with as_prepared(model, dtype, convert):
            return compute(model, inputs, batch.get(_ITEMS))

    return loss


def with_waiting(
    batch: Mapping[str, Any], *, items: Any, others: int, beside: int
) -> dict[str, Any]:
    """The batch with what lies in memory while it is learned from: the number of items,
    so many other batches of its size, and `beside` bytes of small things."""
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
    waiting = {
        f"{WAITING} {i} {name}": torch.empty_like(tensor)  # only its size matters
        for i in range(others)
        for name, tensor in tensors.items()
    }
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    waiting[f"{WAITING} beside"] = torch.empty(beside, dtype=torch.uint8, device=device)
    return {**batch, **waiting, **({} if items is None else {_ITEMS: items})}
