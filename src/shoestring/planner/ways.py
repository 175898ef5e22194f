"""What may be done to a model: the methods on offer, as data.

A `Way` is a method with settings. Span methods are told apart by what they declare to rebuild
from (`promises.rebuilds`), never by name: "nothing" keeps a block's graph; "input" runs blocks
again from held inputs, as its settings `hold` and `rebuild` say; "streams" rebuilds a whole stack
from its end, and its setting `keep_top` says how many last blocks keep their graph (and
`hold_outputs`, if it has that, of how many below them the output of the last branch is held). A
method may list further settings worth trying in `variants`.
"""

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from ..errors import ConfigError, ShoestringError, StackError, closest
from ..methods import METHODS, MakeOptimizer, Method, Promises, Undo, apply_spans, method
from ..stack import Executor, Span, Stack

FIDELITIES = ("bitwise", "exact", "unbiased", "structural")
"""What `allow` may be, from strict to free; bitwise is exact without reordered sums."""
HANDED_OVER = ("optimizer", "batch")
"""What a loop may leave to a plan: it takes its optimizer from `Plan.optimizer`; it calls
`Plan.backward`."""
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
        """What it is done to, as its method promises."""
        return self.promises.applies_to

    @property
    def promises(self) -> Promises:
        """What its method promises."""
        return method(self.method).promises

    @property
    def changes_blocks(self) -> bool:
        """Whether a block costs something else with it."""
        promises = self.promises
        inside = promises.applies_to in ("module", "weights")
        when = promises.frees_gradients or promises.takes_turns
        return inside or when or promises.changes_weights

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


def allowed(allow: Allow, *, hands_over: Sequence[str] = ()) -> list[Method]:
    """The methods that `allow` lets in: a fidelity lets in all that promise as much or more; a
    list names them. Keeping is always allowed.

    hands_over: what the loop leaves to the plan, of `HANDED_OVER`. Methods that are applied there
    are let in only so, or by name: a loop that does not know of them would not use them.
    """
    hands_over = (hands_over,) if isinstance(hands_over, str) else hands_over
    for each in hands_over:
        if each not in HANDED_OVER:
            raise ConfigError(
                f"hands_over has {each!r}",
                expected=f"some of {list(HANDED_OVER)}",
                hint=closest(each, HANDED_OVER),
            )
    kept_back = {*HANDED_OVER} - {*hands_over}
    if "optimizer" in kept_back:
        kept_back.add("adapters")  # what is trained beside frozen weights is there after apply
    if isinstance(allow, str) and allow in FIDELITIES:
        good = FIDELITIES[: FIDELITIES.index(allow) + 1]
        return [
            m
            for m in METHODS.values()
            if {m.promises.fidelity, m.promises.grade} & {*good}
            and m.promises.applies_to not in kept_back
        ]
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


def patches_for(
    model: nn.Module, methods: Iterable[Method], make: MakeOptimizer, *, keeps_gradients: bool
) -> list[tuple[Way, ...]]:
    """Every combination of at most one module, one loss, one weights and one adapters method that
    this model takes, and of optimizer methods that its optimizer takes.

    keeps_gradients: whether the loop needs gradients after backward (to clip or to add up).
    """
    groups: dict[str, list[tuple[Way, ...]]] = {"module": [()], "loss": [()], "weights": [()]}
    groups["adapters"] = [()]
    optimizers = []
    for m in methods:
        if m.promises.applies_to in ("span", "batch"):
            continue
        ways = [Way(m.name, dict(v)) for v in m.variants or ({},)]
        if m.promises.applies_to == "optimizer":
            optimizers += [] if keeps_gradients and m.promises.frees_gradients else ways
        elif m.promises.for_frozen or takes(model, ways[:1]):
            groups[m.promises.applies_to] += [(way,) for way in ways]
    known: dict[tuple[str, ...], bool] = {}
    together = [tuple(itertools.chain(*each)) for each in itertools.product(*groups.values())]
    together = [each for each in together if _tried(model, each, known)]
    parts = itertools.product(together, _together(model, optimizers, make))
    return [tuple(itertools.chain(*part)) for part in parts]


def _tried(model: nn.Module, ways: Sequence[Way], known: dict[tuple[str, ...], bool]) -> bool:
    """Whether these go together. Adapters are modules that others may not know how to run, and
    freeze what others are for; a loss knows of neither."""
    inside = [w for w in ways if w.applies_to != "loss"]
    if not any(w.promises.for_frozen for w in inside) and (
        len(inside) < 2 or inside[-1].applies_to != "adapters"
    ):
        return True
    key = tuple(w.label for w in inside)
    if key not in known:
        known[key] = takes(model, inside)
    return known[key]


def _together(model: nn.Module, ways: Sequence[Way], make: MakeOptimizer) -> list[tuple[Way, ...]]:
    """Combinations of optimizer methods: up to two that say what the optimizer holds, then up to
    one that says when it steps."""
    holding = [w for w in ways if not w.promises.frees_gradients]
    stepping = [w for w in ways if w.promises.frees_gradients]
    pairs = [p for p in itertools.combinations(holding, 2) if p[0].method != p[1].method]
    held = [(), *((w,) for w in holding), *pairs]
    tried = (h + s for h in held for s in [(), *((w,) for w in stepping)])
    return [each for each in tried if not each or takes(model, each, make)]


def takes(model: nn.Module, ways: Sequence[Way], make: MakeOptimizer | None = None) -> bool:
    """Whether they can be put into this model; where not, they have nothing to do there."""
    try:
        undo = apply_ways(model, ways, ())
    except ShoestringError:
        return False
    try:
        if make is not None:
            optimizer_for(model, ways, make)([p for p in model.parameters() if p.requires_grad])
    except ShoestringError:
        return False
    finally:
        undo()
    return True


def optimizer_for(model: nn.Module, ways: Iterable[Way], make: MakeOptimizer) -> MakeOptimizer:
    """`make` as the optimizer methods among `ways` have it, each around those before it."""

    def around(way: Way, inner: MakeOptimizer) -> MakeOptimizer:
        how = method(way.method)
        config = how.configure(way.config)
        return lambda parameters: how.optimizer(model, parameters, inner, config)

    for way in ways:
        if way.applies_to == "optimizer":
            make = around(way, make)
    return make


def frees_gradients(ways: Iterable[Way]) -> bool:
    """Whether the optimizer steps inside backward, and gradients are gone after it."""
    return any(way.promises.frees_gradients for way in ways)


def takes_turns(ways: Iterable[Way]) -> bool:
    """Whether weights are trained in turns, by an `InTurns`."""
    return any(way.promises.takes_turns for way in ways)


def apply_ways(model: nn.Module, patches: Iterable[Way], spans: Sequence[Span]) -> Undo:
    """Put patches and spans in place; returns what undoes it, last first. Errors undo it.

    Those that put the weights elsewhere come last, after those that change them.
    """
    with contextlib.ExitStack() as undos:
        for way in sorted(patches, key=_place):
            how = method(way.method)
            undos.callback(how.apply(model, how.configure(way.config)))
        if spans:
            stack = stack_of(model)
            apply_spans(stack, spans)
            undos.callback(stack.restore)
        return undos.pop_all().close


def _place(way: Way) -> int:
    return 2 if way.applies_to == "weights" else int(way.promises.changes_weights)


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
