"""What a plan was made for: data that is saved with it, and a guard against more than that.

The promise of a plan is for one model and its largest batch. What does not match is said before
it is applied (`MadeFor.differs`), and a batch that outgrows it before its step allocates
(`Guard`): growing lengths are how runs that fit at first run out of memory hours later.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..errors import ConfigError, OutOfBudget
from ..units import format_bytes
from .evaluation import INSTANT, call_bytes, tensors_in
from .given import Batch, Loss, own_loss

log = logging.getLogger("shoestring")

Shape = tuple[int, ...]
Larger = Literal["warn", "error", "ignore"]
LARGER = ("warn", "error", "ignore")


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeFor:
    """The model and the batch of a plan.

    torch: its version.  parameters, trained: elements of all weights, and of those that want a
    gradient.  dtypes: elements by dtype.  batch: shapes of what the model is called with in one
    forward, by name.  beside: bytes that lie in memory meanwhile (a copy that is being saved).
    """

    torch: str
    parameters: int
    trained: int
    dtypes: Mapping[str, int]
    batch: Mapping[str, Shape]
    beside: int = 0

    @classmethod
    def of(cls, model: nn.Module, batch: Mapping[str, Shape], *, beside: int = 0) -> Self:
        """What this model (real or fake) is."""
        dtypes: dict[str, int] = {}
        for parameter in model.parameters():
            name = str(parameter.dtype).removeprefix("torch.")
            dtypes[name] = dtypes.get(name, 0) + parameter.numel()
        return cls(
            torch=torch.__version__, parameters=sum(dtypes.values()),
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            dtypes=dtypes, batch=batch, beside=beside,
        )  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """From `dataclasses.asdict`, as JSON has it. TypeError or ValueError for what is not."""
        numbers = {name: int(value[name]) for name in ("parameters", "trained")}
        return cls(
            torch=str(value["torch"]), **numbers,
            dtypes={str(k): int(v) for k, v in dict(value["dtypes"]).items()},
            batch={str(k): _shape(v) for k, v in dict(value["batch"]).items()},
            beside=int(value.get("beside", 0)),
        )  # fmt: skip

    def differs(self, model: nn.Module) -> str | None:
        """What makes this model another than the plan's; None when nothing does."""
        found = MadeFor.of(model, {})
        if found.parameters != self.parameters:
            return f"{self.parameters:,} parameters, this one has {found.parameters:,}"
        if found.dtypes != self.dtypes:
            return (
                f"weights in {_counts(self.dtypes)}, this one has them in {_counts(found.dtypes)}"
            )
        if found.trained > self.trained:
            return f"{self.trained:,} parameters to train, this one trains {found.trained:,}"
        return None


def _shape(value: Any) -> Shape:
    if not isinstance(value, list | tuple) or not all(isinstance(n, int) for n in value):
        raise TypeError(f"{value!r} is not a shape")
    return tuple(value)


def _counts(dtypes: Mapping[str, int]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return ", ".join(f"{name} ({count:,})" for name, count in sorted(dtypes.items()))


class Watched:
    """A loss that takes note of what the model is called with, the first time it is computed."""

    def __init__(self, loss: Loss | None) -> None:
        self.loss = loss
        self.shapes: dict[str, Shape] | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        compute = self.loss or own_loss
        if self.shapes is not None:
            return compute(model, batch)
        seen: dict[str, Shape] = {}

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            for name, tensor in tensors_by_name(module, args, kwargs):
                seen[name] = _larger(tuple(tensor.shape), seen.get(name))

        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            value = compute(model, batch)
        finally:
            handle.remove()
        self.shapes = seen
        return value


def tensors_by_name(module: nn.Module, args: Any, kwargs: Any) -> list[tuple[str, Tensor]]:
    """Tensors of a call by the names of forward's parameters; by position where it has none."""
    named = [*kwargs.items()]
    if args:
        names = [p.name for p in inspect.signature(module.forward).parameters.values()
                 if p.kind is p.POSITIONAL_OR_KEYWORD]  # fmt: skip
        names += [str(i) for i in range(len(names), len(args))]
        named += zip(names, args)  # noqa: B905
    return [(name, value) for name, value in named if isinstance(value, Tensor)]


def _larger(one: Shape, other: Shape | None) -> Shape:
    if other is None:
        return one
    if len(one) != len(other):
        return max(one, other, key=prod)
    return tuple(map(max, one, other))


def in_parts(shapes: Mapping[str, Shape], parts: int) -> dict[str, Shape]:
    """The shapes of the largest of so many parts, cut by rows."""
    rows = max((shape[0] for shape in shapes.values() if shape), default=0)
    part = -(-rows // parts)
    return {
        name: (part, *shape[1:]) if shape and shape[0] == rows else shape
        for name, shape in shapes.items()
    }


def outgrows(shape: Shape, planned: Shape) -> bool:
    """Whether it may need more: it has more elements, or is longer in any dimension but the
    first. More rows of fewer tokens are fine; longer rows are not, since masks grow with the
    square of a row."""
    if shape == planned:
        return False
    longer = len(shape) == len(planned) and any(a > b for a, b in zip(shape[1:], planned[1:]))  # noqa: B905
    return longer or prod(shape) > prod(planned)


@dataclass(slots=True)
class Looked:
    """A call without gradients that was simulated: shapes by name, and the bytes up to which what
    is given beside them (a key/value cache) may grow before another look."""

    shapes: dict[str, Shape]
    cached: int
    until: int

    def covers(self, shapes: Mapping[str, Shape], cached: int) -> bool:
        if cached > self.until or bool(cached) is not bool(self.cached):
            return False
        if cached:  # masks grow with the cache; new tokens are what is computed
            return _fewest(shapes) <= _fewest(self.shapes)
        return shapes.keys() == self.shapes.keys() and not any(
            outgrows(shape, self.shapes[name]) for name, shape in shapes.items()
        )


def _fewest(shapes: Mapping[str, Shape]) -> int:
    return min(map(prod, shapes.values()), default=0)


class Guard:
    """A forward pre-hook: says when a training batch outgrows the plan, and when a call without
    gradients will need more than the budget, before anything is allocated for it.

    What is trained is known by shapes. What runs without gradients is simulated, when it comes in
    a shape that is larger than those before: a fake forward takes a fraction of the real one's
    time. It knows no tensors, so a copy of the model has a guard that works. Fake tensors and
    tracing compilers pass.
    """

    def __init__(
        self, made_for: MadeFor, larger: Larger, *, peak_bytes: int, budget_bytes: int,
        states_bytes: int, put: Callable[[nn.Module], object] | None = None,
    ) -> None:  # fmt: skip
        """put: puts into a copy of the model what is lost by copying."""
        if larger not in LARGER:
            raise ConfigError(f"larger = {larger!r}", expected=f"one of {list(LARGER)}")
        self.larger = larger
        self.planned = dict(made_for.batch)
        self.peak_bytes, self.budget_bytes = peak_bytes, budget_bytes
        self.standing = states_bytes + made_for.beside
        self.put = put
        self.looked: list[Looked] = []

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        named = tensors_by_name(module, args, kwargs)
        if not torch.is_grad_enabled():
            self._look_ahead(module, args, kwargs, named)
            return
        for name, tensor in named:
            self._look(name, tensor)

    def _look_ahead(
        self, module: nn.Module, args: Any, kwargs: Any, named: list[tuple[str, Tensor]]
    ) -> None:
        """A call without gradients: an evaluation, or a step of `generate`."""
        given = tensors_in((args, kwargs))
        if not named or any(isinstance(tensor, FakeTensor) for tensor in given):
            return
        shapes = {name: tuple(tensor.shape) for name, tensor in named}
        cached = sum(t.nbytes for t in given) - sum(t.nbytes for _, t in named)
        if any(each.covers(shapes, cached) for each in self.looked):
            return
        try:
            peak = self.standing + call_bytes(module, args, kwargs, self.put)
        except Exception as error:  # a model may do anything to what is fake
            self.looked.append(Looked(shapes, cached, sys.maxsize))
            log.info("what %s without gradients will need is not known: %s", _texts(shapes), error)
            return
        fits = peak <= self.budget_bytes
        # A layer's cache is there twice while it grows, so half of what is left is safe.
        until = cached + (self.budget_bytes - peak) // 2 if fits else 2 * cached
        if fits or self.larger != "error":
            self.looked.append(Looked(shapes, cached, until))
        if fits:
            return
        self._tell(
            OutOfBudget(
                f"a forward without gradients on {_texts(shapes)} will need {format_bytes(peak)}",
                expected=f"at most the budget of {format_bytes(self.budget_bytes)} (training was "
                f"promised {format_bytes(self.peak_bytes)})",
                hint="Run fewer or shorter rows at a time, or plan with it: evaluate=...",
                smallest_bytes=peak, instant=INSTANT,
            )
        )  # fmt: skip

    def _tell(self, error: OutOfBudget) -> None:
        if self.larger == "error":
            raise error
        log.warning("%s", error)

    def _look(self, name: str, tensor: Tensor) -> None:
        planned = self.planned.get(name)
        if planned is None or tensor.shape == planned or isinstance(tensor, FakeTensor):
            return
        shape = tuple(tensor.shape)
        if not outgrows(shape, planned):
            return
        error = OutOfBudget(
            f"a batch came with {name} of {_text(shape)}, larger than planned for",
            expected=f"at most {_text(planned)}: that was promised "
            f"{format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)}",
            hint="Plan with the largest batch that will come, or cut or pad to what was planned.",
        )
        self._tell(error)
        self.planned[name] = _larger(shape, planned)  # said once, until a still larger one comes


def _texts(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} of {_text(shape)}" for name, shape in shapes.items())


def _text(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "one number"
