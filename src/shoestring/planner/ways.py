"""What may be done to a model: the methods on offer, as data.

A `Way` is a method with settings. Span methods are told apart by what they declare to rebuild
from (`promises.rebuilds`), never by name: "nothing" keeps a block's graph; "input" runs blocks
again from held inputs, as its settings `hold` and `rebuild` say; "streams" rebuilds a whole stack
from its end, and its setting `keep_top` says how many last blocks keep their graph (and
`hold_outputs`, if it has that, of how many below them the output of the last branch is held). A
method may list further settings worth trying in `variants`.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from ..errors import ConfigError, ShoestringError, StackError, closest
from ..methods import METHODS, Method, Undo, apply_spans, method
from ..stack import Executor, Span, Stack

FIDELITIES = ("bitwise", "exact", "unbiased", "structural")
"""What `allow` may be, from strict to free; bitwise is exact without reordered sums."""
Allow = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class Way:
    """A method with settings (JSON-able)."""

    method: str
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        settings = ", ".join(f"{k}={v}" for k, v in self.config.items())
        return f"{self.method}({settings})" if settings else self.method

    @property
    def applies_to(self) -> str:
        """What it is done to: "span", "loss", "module", "weights" or "optimizer"."""
        return method(self.method).promises.applies_to

    def executor(self, stack: Stack, start: int, stop: int) -> Executor:
        how = method(self.method)
        return how.executor(stack, start, stop, how.configure(self.config))


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What the planner may do with the blocks of one stack."""

    kept: tuple[Way, ...]
    """Ways to keep (part of) a block's graph; the first keeps all of it."""
    redo: Way | None = None
    """The way that runs blocks again from their inputs, or from the streams."""
    streams: bool = False
    """Whether the whole stack is rebuilt from its end: one span then, and what is kept is its
    last `keep_top` blocks, or of `hold_outputs` more an output (the second way to keep, if there
    is one). The ways above are those of a stack of one block."""


def allowed(allow: Allow) -> list[Method]:
    """The methods that `allow` lets in: a fidelity lets in all that promise as much or more; a
    list names them. Keeping is always allowed."""
    if isinstance(allow, str) and allow in FIDELITIES:
        good = FIDELITIES[: FIDELITIES.index(allow) + 1]
        return [m for m in METHODS.values() if {m.promises.fidelity, m.promises.grade} & {*good}]
    names = [allow] if isinstance(allow, str) else list(allow)
    for name in names:
        if name not in METHODS:
            raise ConfigError(
                f"allow = {allow!r}: {name!r} is neither a fidelity nor a method",
                expected=f"one of {list(FIDELITIES)}, or a list of methods {sorted(METHODS)}",
                hint=closest(name, [*FIDELITIES, *METHODS]),
            )
    return [m for m in METHODS.values() if m.name in names or m.promises.always_allowed]


def _keeps(m: Method) -> bool:
    return m.promises.applies_to == "span" and m.promises.rebuilds == "nothing"


def offer_for(stack: Stack, methods: Iterable[Method]) -> Offer:
    """What is on offer for the blocks of this stack."""
    spans = [m for m in methods if m.promises.applies_to == "span" and m.fits(stack) is None]
    streams = [m for m in spans if m.promises.rebuilds == "streams"]
    if streams:
        return _streams_offer(streams[0])
    kept = [
        Way(m.name, dict(v))
        for m in sorted(spans, key=lambda m: not m.promises.always_allowed)
        if _keeps(m)
        for v in m.variants or ({},)
    ]
    redo = next((m for m in spans if m.promises.rebuilds == "input"), None)
    if redo is None:
        return Offer(kept=tuple(kept))
    kept += [Way(redo.name, dict(v)) for v in getattr(redo, "variants", ())]
    return Offer(kept=tuple(kept), redo=Way(redo.name))


def _streams_offer(how: Method) -> Offer:
    kept = [Way(how.name, {"keep_top": 1})]
    if "hold_outputs" in {f.name for f in fields(how.Config)}:
        kept.append(Way(how.name, {"keep_top": 0, "hold_outputs": 1}))
    return Offer(kept=tuple(kept), redo=Way(how.name, {"keep_top": 0}), streams=True)


def patches_for(model: nn.Module, methods: Iterable[Method]) -> list[tuple[Way, ...]]:
    """Every combination of at most one loss and one module method that this model takes."""
    groups: dict[str, list[tuple[Way, ...]]] = {"loss": [()], "module": [()]}
    for m in methods:
        if m.promises.applies_to not in groups:
            continue
        try:
            undo = m.apply(model, m.configure())
        except ShoestringError:
            continue  # it has nothing to do in this model
        undo()
        tries: tuple[Mapping[str, Any], ...] = getattr(m, "variants", ()) or ({},)
        for settings in tries:
            groups[m.promises.applies_to].append((Way(m.name, dict(settings)),))
    return [loss + module for loss in groups["loss"] for module in groups["module"]]


def apply_ways(model: nn.Module, patches: Iterable[Way], spans: Sequence[Span]) -> Undo:
    """Put patches and spans in place; returns what undoes it, last first. Errors undo it."""
    with contextlib.ExitStack() as undos:
        for way in patches:
            how = method(way.method)
            undos.callback(how.apply(model, how.configure(way.config)))
        if spans:
            stack = stack_of(model)
            apply_spans(stack, spans)
            undos.callback(stack.restore)
        return undos.pop_all().close


def stack_of(model: nn.Module) -> Stack:
    """The stack that is planned. StackError says what a plan can do where there is not one."""
    try:
        return Stack.of(model)
    except StackError as error:
        raise StackError(
            f"{error.what}; a plan covers one stack", expected=error.expected,
            hint="Outside of plans, Stack.of(model, path=...) takes one of several lists of "
            "layers, and methods.apply_spans runs its blocks.",
        ) from None  # fmt: skip
