"""A plan: what is done to every span, to the loss and to modules, and what it promises.

    plan = shoestring.plan(model, batch, budget="6 GiB", optimizer=make_optimizer)
    plan.apply(model)     # in place; plan.restore(model) undoes it
    optimizer = plan.optimizer(model)
    plan.verify(step)     # measured against promised

The promise, `peak_bytes`, is the peak of whole simulated steps with the plan in place; the budget
counts live tensors on the device: weights, gradients, optimizer states, batch, activations.
"""

import functools
import json
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import NoneType
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError, DataError, StackError
from ..meter import Meter
from ..methods import MakeOptimizer, method
from ..objectives.next_token import num_targets
from ..rows import cut, rows_of
from ..stack import Span
from ..units import format_bytes, format_seconds
from .given import Loss, loss_of
from .in_place import InPlace, has_moved_weights, note_of, put, put_again, take_out
from .made_for import Guard, Larger, MadeFor
from .told import told
from .ways import Way, optimizer_for, stack_of

log = logging.getLogger("shoestring")

FORMAT = 1


def _size(batch: Mapping[str, Any]) -> int:
    labels = batch.get("labels")
    tokens = isinstance(labels, torch.Tensor) and labels.dim() == 2
    return num_targets(batch) if tokens else rows_of(batch)


@dataclass(frozen=True, slots=True)
class Verification:
    """Bytes promised and measured; error = (predicted - measured) / measured."""

    predicted: int
    measured: int

    @property
    def error(self) -> float:
        return (self.predicted - self.measured) / self.measured

    def __str__(self) -> str:
        return (
            f"predicted {format_bytes(self.predicted)}, measured {format_bytes(self.measured)} "
            f"({self.error:+.2%})"
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the plan's table. Bytes; seconds a step, None when nothing was timed."""

    name: str
    peak_bytes: int
    seconds: float | None
    instant: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A method for every span, the loss and modules, with a predicted peak and step time.

    budget_bytes: what was given.  peak_bytes: promised peak of live tensors.  by_category: that
    peak in the words of Meter.  instant: the phase it falls in.  step_seconds: predicted, None
    when nothing was timed.  rows: the usual schemes beside this plan, by the chain model (within
    a few percent).  blocks: how many blocks the stack has.  history: what a step will hold from
    instant to instant, by category, as `Meter.history` tells it afterwards; None in older plans.
    made_for: the model and the batch, None in older plans.
    """

    budget_bytes: int
    peak_bytes: int
    by_category: Mapping[str, int]
    instant: str
    step_seconds: float | None
    spans: tuple[Span, ...]
    patches: tuple[Way, ...]
    rows: tuple[Row, ...]
    blocks: int
    model: str
    history: Mapping[str, Any] | None = field(default=None, repr=False)
    made_for: MadeFor | None = field(default=None, repr=False)
    make: MakeOptimizer | None = field(default=None, compare=False, repr=False)
    """The optimizer that was planned for; None for a plan that was read from JSON."""
    loss: Loss | None = field(default=None, compare=False, repr=False)
    """The loss that was planned for; None = that of the model's output."""
    _applied: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[InPlace]]" = field(
        default_factory=weakref.WeakKeyDictionary, compare=False, repr=False
    )

    @property
    def methods(self) -> list[dict[str, Any]]:
        """What is done, as JSON-able entries: patches first, then spans from the bottom up."""
        patches = [{"method": w.method, "config": dict(w.config)} for w in self.patches]
        return [*patches, *(asdict(s) for s in self.spans)]

    # -- use -----------------------------------------------------------------------------------

    def apply(self, model: nn.Module, *, larger: Larger = "warn") -> None:
        """Put the plan in place, instead of any plan that is. StackError when it is not for
        this model, which is then left as it was.

        larger: what is done about a training batch that is larger than planned for, and about a
        forward without gradients (an evaluation, a step of `generate`) that will need more than
        the budget, before it allocates: "warn" logs it, "error" raises OutOfBudget, "ignore".
        """
        self._refuse_others(model)
        guard = None
        if self.made_for is not None:
            if self.made_for.torch != torch.__version__:
                log.warning(
                    "this plan was made with torch %s, this is %s: it may need another peak than "
                    "promised", self.made_for.torch, torch.__version__,
                )  # fmt: skip
            sizes = {
                "peak_bytes": self.peak_bytes, "budget_bytes": self.budget_bytes,
                "states_bytes": self.by_category.get("optimizer", 0),
            }  # fmt: skip
            moves = any(way.applies_to == "weights" for way in self.patches)
            again = functools.partial(put_again, self.patches, self.spans) if moves else None
            guard = Guard(self.made_for, larger, put=again, **sizes) if larger != "ignore" else None
        self._applied[model] = weakref.ref(put(model, self.patches, self.spans, guard))

    def _refuse_others(self, model: nn.Module) -> None:
        """StackError for a model that this plan was not made for."""
        name, blocks = type(model).__name__, len(stack_of(model))
        what = None
        if blocks != self.blocks:
            what = f"{self.blocks} blocks of {self.model}, {name} has {blocks}"
        elif self.made_for is not None and not has_moved_weights(model):
            different = self.made_for.differs(model)
            what = f"{self.model} with {different}" if different else None
        if what is not None:
            raise StackError(
                f"this plan is for {what}",
                expected="the model the plan was made for",
                hint="Plan this model: shoestring.plan(model, batch, ...).",
            )

    def build(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The model that `build()` makes or loads, for `apply`: where the plan keeps weights
        outside memory they go there as they are made, so that they never are in memory all at
        once."""
        for way in self.patches:
            if way.applies_to == "weights":
                how, inner = method(way.method), build
                build = functools.partial(how.build, inner, how.configure(way.config))
        return build()

    @property
    def maps_files(self) -> bool:
        """Whether tensors live in mapped files; see `Promises.maps_files`."""
        return any(way.promises.maps_files for way in self.patches)

    def optimizer(self, model: nn.Module, make: MakeOptimizer | None = None) -> Optimizer:
        """The optimizer of a model the plan was applied to, as the plan has it.

        make: trainable parameters -> optimizer; the one the plan was made with when left out.
        The loop around it stays as it is. Without optimizer methods in the plan it is `make`'s.
        StackError when the plan is not in place, ConfigError when there is nothing to make.
        """
        make = make or self.make
        if make is None:
            raise ConfigError(
                "a plan that was read from a file does not know its optimizer",
                expected="plan.optimizer(model, make) with make(parameters) -> optimizer",
            )
        if not self._is_in(model):
            raise StackError(
                f"this plan is not applied to this {type(model).__name__}",
                expected="plan.apply(model) before plan.optimizer(model)",
            )
        trained = [p for p in model.parameters() if p.requires_grad]
        return optimizer_for(model, self.patches, make)(trained)

    def backward(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        *,
        loss: Loss | None = None,
        size: Callable[[Mapping[str, Any]], float] | None = None,
    ) -> torch.Tensor:
        """Forward and backward of one batch, in the parts that the plan has; returns the loss.

        loss: as for `shoestring.plan`; the one the plan was made with when left out.  size: what
        the loss of a batch is a mean over: the targets where it has labels of tokens (the first
        of a row is no target), else its rows. Gradients are those of the whole batch. Autocast
        belongs into `loss`, around the forward alone: weights cast for it else stay to the end.
        """
        loss, size = loss or self.loss, size or _size
        parts = next((w.config["parts"] for w in self.patches if w.applies_to == "batch"), 1)
        pieces = cut(batch, parts) if parts > 1 else [batch]
        sizes = [float(size(piece)) for piece in pieces] if parts > 1 else [1.0]
        if not sum(sizes):
            raise DataError(
                "this batch has no target to learn from",
                expected="at least one label that is not -100",
            )
        total: torch.Tensor | None = None
        for piece, share in zip(pieces, sizes, strict=True):
            if not share:
                continue  # a mean over nothing is NaN, and adds nothing
            value = loss_of(model, piece, loss)
            if parts > 1:
                value = value * (share / sum(sizes))
            value.backward()
            total = value.detach() if total is None else total + value.detach()
            del value
        assert total is not None
        return total

    def restore(self, model: nn.Module) -> None:
        """Take the plan out of a model it was applied to."""
        if not self._is_in(model):
            raise StackError(
                f"this plan is not applied to this {type(model).__name__}",
                expected="a model that plan.apply(model) was called with",
            )
        take_out(model)
        del self._applied[model]

    def _is_in(self, model: nn.Module) -> bool:
        """Whether this plan, and no later one, is in place there."""
        note = self._applied.get(model)
        return note is not None and note() is not None and note() is note_of(model)

    def verify(self, step: Callable[[], object], *, steps: int = 2) -> Verification:
        """Run `step()` (forward, backward, optimizer step, zero_grad) under the meter and hold
        the measured peak against the promise. It runs twice, because the optimizer's states
        appear only in the first step; pass steps=1 when they exist."""
        models = [model for model in list(self._applied.keys()) if self._is_in(model)]
        with Meter(models[0] if len(models) == 1 else None) as meter:
            for _ in range(steps):
                step()
        return Verification(self.peak_bytes, meter.peak_bytes)

    # -- for people ----------------------------------------------------------------------------

    def table(self) -> "Table":
        """The usual schemes and this plan, with peak and seconds: data, and text by `str`."""
        mine = Row("this plan", self.peak_bytes, self.step_seconds, self.instant)
        return Table((*self.rows, mine), self.budget_bytes)

    def __str__(self) -> str:
        return told(self)

    # -- as JSON ---------------------------------------------------------------------------------

    def to_json(self, *, history: bool = True) -> str:
        """The plan as JSON; `from_json` gives an equal plan back.

        history: with the instants of a step, which are most of the text.
        """
        value: dict[str, Any] = {"format": FORMAT, "torch": torch.__version__}
        for name in _FIELDS:
            value[name] = getattr(self, name)
        value["by_category"] = dict(self.by_category)
        value["spans"] = [asdict(s) for s in self.spans]
        value["patches"] = [{"method": w.method, "config": dict(w.config)} for w in self.patches]
        value["rows"] = [asdict(r) for r in self.rows]
        if self.made_for is not None:
            value["made_for"] = asdict(self.made_for)
        text = json.dumps(value, indent=2)
        if self.history is None or not history:
            return text
        # Thousands of numbers: on one line, so that the rest stays readable.
        return f'{text[:-2]},\n  "history": {json.dumps(self.history)}\n}}'

    @classmethod
    def from_json(cls, text: str) -> Self:
        """A plan from `to_json`. ConfigError when it is not one, or of another format."""
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"this is not a plan: {error}", expected="Plan.to_json()") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            found = value.get("format") if isinstance(value, dict) else type(value).__name__
            raise ConfigError(
                f"a plan of format {found!r} cannot be read",
                expected=f"format {FORMAT}", hint="Make the plan again with this version.",
            )  # fmt: skip
        missing = [n for n in (*_FIELDS, *_PARTS) if n not in value]
        if missing:
            raise ConfigError(f"this plan lacks {missing}", expected="Plan.to_json()")
        made_for = _read_made_for(value["made_for"]) if "made_for" in value else None
        return cls(**{name: _read(name, value[name]) for name in (*_FIELDS, *_PARTS)},
                   history=value.get("history"), made_for=made_for)  # fmt: skip


_FIELDS = ("model", "blocks", "budget_bytes", "peak_bytes", "by_category", "instant",
           "step_seconds")  # fmt: skip
_PARTS = {"spans": Span, "patches": Way, "rows": Row}
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("model", "instant", "method", "name"), str),
    **dict.fromkeys(("blocks", "budget_bytes", "peak_bytes", "start", "stop"), int),
    **dict.fromkeys(("by_category", "config"), dict),
    **dict.fromkeys(("step_seconds", "seconds"), (int, float, NoneType)),
}


def _read_made_for(value: Any) -> MadeFor:
    try:
        return MadeFor.from_json(value)
    except (TypeError, ValueError, KeyError) as error:
        raise _unreadable("made_for", error) from None


def _unreadable(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"this plan's {name} cannot be read: {error}", expected="Plan.to_json()",
        hint="Make the plan again.",
    )  # fmt: skip


def _read(name: str, value: Any) -> Any:
    """A field of a plan from JSON. ConfigError when it is not of its kind."""
    try:
        if name not in _PARTS:
            return _checked(name, value)
        if not isinstance(value, list):
            raise TypeError(f"{value!r} is not a list")
        parts = [{k: _checked(k, v) for k, v in dict(each).items()} for each in value]
        return tuple(_PARTS[name](**each) for each in parts)
    except (TypeError, ValueError) as error:
        raise _unreadable(name, error) from None


def _checked(name: str, value: Any) -> Any:
    if not isinstance(value, _KINDS.get(name, object)):
        raise TypeError(f"{name} = {value!r}")
    return value


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a plan's table; `str` makes text of them, `data` JSON-able rows."""

    rows: Sequence[Row]
    budget_bytes: int

    @property
    def data(self) -> list[dict[str, Any]]:
        return [{**asdict(r), "fits": r.peak_bytes <= self.budget_bytes} for r in self.rows]

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __str__(self) -> str:
        lines = [("", "peak", "a step", "highest in", "")]
        for row in self.rows:
            seconds = format_seconds(row.seconds) if row.seconds is not None else "-"
            fits = "fits" if row.peak_bytes <= self.budget_bytes else "does not fit"
            lines.append((row.name, format_bytes(row.peak_bytes), seconds, row.instant, fits))
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        return "\n".join(
            "  ".join(
                cell.rjust(w) if i in (1, 2) else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
