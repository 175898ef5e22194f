"""From costs to a choice: the trade-off curve of a model, and the best point under a budget.

The chain model of every combination of patches (loss and module methods) gives schedules with
bytes and seconds; together they form one curve, peak rising and seconds falling. A budget is
answered by bisection on that curve, and what decides near the budget is not the model but a
simulation of whole steps: the plan's promise. The curve does not depend on the budget, and a
larger budget can only move the bisection up, so the predicted step time never rises with the
budget.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..stack import Span
from .chain import BlockCost, Chain, Kept, Option, Redone, Schedule, evaluate, keep_all, nested
from .cost import Step, Twin, measure_chain, optimizer_bytes
from .fake import Profile
from .in_place import bare, strip
from .solver import Solver
from .timing import Timer
from .ways import Allow, Offer, Way, allowed, apply_ways, offer_for, patches_for

NEAR = 0.03
"""How far the chain model may be off the simulation: within this of the budget, simulate."""
HOLDS = 4
"""Into how many steps the blocks below a kept end are cut, for those whose output is held."""
PATCHED = 1.01
"""A loss or module method counts as this much slower than the clock says, so that it is used
where it buys memory and never for noise."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One point of the curve: what to put in place, and what the chain model says of it."""

    patches: tuple[Way, ...]
    spans: tuple[Span, ...]
    peak_bytes: int
    seconds: float

    @property
    def key(self) -> str:
        patches = [(w.method, dict(w.config)) for w in self.patches]
        spans = [(s.start, s.stop, s.method, dict(s.config)) for s in self.spans]
        return json.dumps([patches, spans])


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model with patches, measured: its chain, and the bytes beside it."""

    patches: tuple[Way, ...]
    twin: Twin
    offer: Offer
    chain: Chain
    kinds: list[int]
    resident: int
    fixed_seconds: float = 0.0

    def schedules(self) -> list[Schedule]:
        """The schedules worth a look."""
        if not self.offer.streams:
            return [c.schedule for c in Solver(self.chain).frontier()]
        n, holds = len(self.chain.blocks), len(self.offer.kept) > 1
        return [
            from_the_end(n, top, hold)
            for top in range(n + 1)
            for hold in (sorted({(n - top) * k // HOLDS for k in range(HOLDS + 1)})
                         if holds else [0])
        ]  # fmt: skip

    def choice(self, schedule: Schedule, floor: int) -> Choice:
        outcome = evaluate(self.chain, schedule)
        return Choice(
            patches=self.patches, spans=spans_of(schedule, self.offer),
            peak_bytes=max(self.resident + outcome.peak_bytes, floor),
            seconds=(outcome.seconds + self.fixed_seconds) * PATCHED ** len(self.patches),
        )  # fmt: skip


def from_the_end(blocks: int, top: int, hold: int) -> Schedule:
    """The last `top` blocks kept, of `hold` below them an output held, the others run again."""
    kept, held = blocks - top, blocks - top - hold
    return tuple(Redone(i, i + 1) if i < held else Kept(i, int(i < kept)) for i in range(blocks))


def spans_of(schedule: Schedule, offer: Offer) -> tuple[Span, ...]:
    """The schedule as spans, neighbours run the same way in one span."""
    if offer.streams:
        kept = [p.option for p in schedule if isinstance(p, Kept)]
        config = {"keep_top": kept.count(0)}
        if hold := kept.count(1):
            config["hold_outputs"] = hold
        return (Span(0, len(schedule), offer.kept[0].method, config),)
    spans: list[Span] = []
    run: list[Redone] = []

    def flush() -> None:
        if run:
            assert offer.redo is not None
            spans.append(_redo_span(run, offer.redo))
            run.clear()

    for piece in schedule:
        if isinstance(piece, Redone):
            run.append(piece)
            continue
        flush()
        way, i = offer.kept[piece.option], piece.index
        last = spans[-1] if spans else None
        if last and last.stop == i and (last.method, last.config) == (way.method, way.config):
            spans[-1] = replace(last, stop=i + 1)
        else:
            spans.append(Span(i, i + 1, way.method, way.config))
    flush()
    return tuple(spans)


def _redo_span(run: Sequence[Redone], way: Way) -> Span:
    start, stop = run[0].start, run[-1].stop
    config: dict[str, Any] = dict(way.config)
    if any(p.stop - p.start > 1 for p in run):
        config["hold"] = [p.start - start for p in run]
        walks = [(i - start, k - start, [h - start for h in held])
                 for p in run for i, k, held in p.rebuild if k - i > 1]  # fmt: skip
        config["rebuild"] = [list(w) for w in walks]
    return Span(start, stop, way.method, config)


class Planner:
    """Everything that does not depend on the budget, measured once; `choose` answers budgets."""

    def __init__(self, step: Step, *, allow: Allow = "exact", seconds: bool = True) -> None:
        self.step = step
        self.allow = allow
        self.timed = seconds
        self.methods = allowed(allow)
        self.base = Twin(step, bare)
        self.offer = offer_for(self.base.stack, self.methods)
        self.timer = Timer(step)
        self._profiles: dict[str, Profile] = {}
        # by what is done to modules, and whether the stack is stripped; then by kind of block
        self._costs: dict[Any, dict[int, BlockCost]] = {}
        self._times: dict[Any, dict[int, list[tuple[float, float]]]] = {}
        if not self.offer.kept:
            raise ConfigError(
                f"allow = {allow!r} leaves no way to run the blocks of {self.base.stack!r}",
                expected="at least one method that fits",
            )

    # -- what there is ---------------------------------------------------------------------

    @cached_property
    def floor(self) -> int:
        """Bytes at the optimizer step: weights, gradients, states, its own temporaries."""
        return optimizer_bytes(self.base)[1]

    @cached_property
    def state_bytes(self) -> int:
        return optimizer_bytes(self.base)[0]

    def variant(self, patches: tuple[Way, ...], *, plain: bool = False) -> Variant:
        """Measure the model with patches; `plain` takes away what makes its stack special."""
        twin = Twin(self.step, strip) if plain else self.base
        offer = offer_for(twin.stack, self.methods) if plain else self.offer
        # What is done to the loss changes no block.
        inside = tuple(w for w in patches if w.applies_to == "module")
        known = self._costs.setdefault((inside, plain), {})
        with twin.patched(patches):
            chain, kinds, resident = measure_chain(twin, offer, known)
        return Variant(
            patches=patches, twin=twin, offer=offer, chain=chain, kinds=kinds,
            resident=resident + self.state_bytes,
        )  # fmt: skip

    @cached_property
    def variants(self) -> list[Variant]:
        """One for every combination of patches, with work in place of seconds."""
        with self.base.mode:
            patches = patches_for(self.base.model, self.methods)
        return [self.variant(p) for p in patches]

    def with_seconds(self, variant: Variant) -> Variant:
        """The same variant, timed on the device."""
        if not self.timed:
            return variant
        ways = [*variant.offer.kept, *([variant.offer.redo] if variant.offer.redo else [])]
        inside = tuple(w for w in variant.patches if w.applies_to == "module")
        times = self._times.setdefault((inside, variant.twin is not self.base), {})
        for kind in sorted(set(variant.kinds) - set(times)):
            times[kind] = self.timer.block(self.base, variant.twin, kind, ways, inside)
        blocks = []
        for block, kind in zip(variant.chain.blocks, variant.kinds, strict=True):
            blocks.append(timed_block(block, times[kind]))
        fixed = self.timer.turn(self.base, variant.patches) + self._optimizer_seconds
        return replace(
            variant, chain=replace(variant.chain, blocks=tuple(blocks)), fixed_seconds=fixed
        )

    @cached_property
    def _optimizer_seconds(self) -> float:
        return self.timer.optimizer(self.base)

    # -- the curve ---------------------------------------------------------------------------

    @cached_property
    def smallest(self) -> Choice:
        """The choice with the lowest peak; found without timing anything."""
        return min(self._curve(timed=False), key=lambda c: (c.peak_bytes, c.seconds))

    @cached_property
    def curve(self) -> list[Choice]:
        """All choices worth making, peak rising and seconds falling."""
        return self._curve(timed=True)

    def _curve(self, *, timed: bool) -> list[Choice]:
        variants = self._timed_variants if timed else self.variants
        found = []
        for v in variants:
            choices = [v.choice(s, self.floor) for s in v.schedules()]
            found += self._corrected(choices) if self.offer.streams else choices
        kept: list[Choice] = []
        for c in sorted(found, key=lambda c: (c.peak_bytes, c.seconds, len(c.patches))):
            if not kept or c.seconds < kept[-1].seconds:
                kept.append(c)
        return kept

    def _corrected(self, choices: list[Choice]) -> list[Choice]:
        """Choices for a stack that is rebuilt from its end, with corrected peaks: as far off as
        the two ends are, in the proportion of what is kept."""
        (first, last), n = self._off, len(self.base.stack)
        return [
            replace(c, peak_bytes=c.peak_bytes + first
                    + (last - first) * c.spans[0].config["keep_top"] // n)
            for c in choices
        ]  # fmt: skip

    @cached_property
    def _off(self) -> tuple[int, int]:
        """How far the chain model is off the simulation with nothing and with all kept: what a
        block holds in the middle of a stack that is rebuilt from its end cannot be measured on
        it alone."""
        base = next(v for v in self.variants if not v.patches)
        ends = [base.choice(base.schedules()[k], self.floor) for k in (0, -1)]
        first, last = (self.promise(c).peak_bytes - c.peak_bytes for c in ends)
        return first, last

    @cached_property
    def _timed_variants(self) -> list[Variant]:
        timed = [self.with_seconds(v) for v in self.variants]
        base = next(v for v in timed if not v.patches)
        return [v if v is base else no_faster(v, base) for v in timed]

    # -- the promise -------------------------------------------------------------------------

    def promise(self, choice: Choice) -> Profile:
        """What the choice is promised to need, by a simulation of whole steps."""
        if choice.key not in self._profiles:

            def put(model: nn.Module) -> None:
                bare(model)
                apply_ways(model, choice.patches, choice.spans)

            self._profiles[choice.key] = self.step.simulate(put)
        return self._profiles[choice.key]

    @cached_property
    def smallest_bytes(self) -> int:
        """The smallest budget that works."""
        return self.promise(self.smallest).peak_bytes

    def choose(self, budget: int) -> Choice | None:
        """The fastest choice whose simulated peak is within the budget, or None."""
        if not self._feasible(budget):
            return None
        # Always the same places are looked at first, whatever the budget: a larger budget then
        # never ends lower, even where the curve and the simulation disagree a little.
        low, high = -1, len(self.curve)
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(self.curve[middle], budget):
                low = middle
            else:
                high = middle
        while low >= 0 and self.promise(self.curve[low]).peak_bytes > budget:
            low -= 1
        if low >= 0:
            return self.curve[low]
        return self._slowest() if self.smallest_bytes <= budget else None

    def _feasible(self, budget: int) -> bool:
        """Whether the smallest choice fits; found out before anything is timed."""
        if self.smallest.peak_bytes < budget * (1 - NEAR):
            return True
        return self.smallest_bytes <= budget

    def _fits(self, choice: Choice, budget: int) -> bool:
        if abs(choice.peak_bytes - budget) > NEAR * budget:
            return choice.peak_bytes < budget
        return self.promise(choice).peak_bytes <= budget

    def _slowest(self) -> Choice:
        """The smallest choice, which fits where nothing of the timed curve does."""
        slowest = max(c.seconds for c in self.curve)
        return replace(self.smallest, seconds=max(slowest, self._seconds_of(self.smallest)))

    def _seconds_of(self, choice: Choice) -> float:
        for c in self.curve:
            if c.key == choice.key:
                return c.seconds
        return 0.0

    # -- what else there would be --------------------------------------------------------------

    def alternatives(self) -> list[tuple[str, Choice, str]]:
        """The usual schemes beside the plan, by the chain model, and the moment of their peak:
        everything kept, every block run again, nested."""
        plain = "plain: " if self.offer.streams else ""
        variant = self._plain_variant if plain else self._base_variant
        chain, n = variant.chain, len(variant.chain.blocks)
        schemes: list[tuple[str, Schedule]] = []
        if all(b.options for b in chain.blocks):
            schemes.append(("keep everything", keep_all(chain)))
        if all(b.redone for b in chain.blocks):
            segment = math.isqrt(n - 1) + 1
            schemes.append(("recompute every block", nested(chain, 1)))
            schemes.append((f"nested, segments of {segment}", nested(chain, segment)))
        rows = []
        for name, schedule in schemes:
            choice = variant.choice(schedule, self.floor)
            above = choice.peak_bytes > self.floor
            instant = evaluate(chain, schedule).instant if above else "optimizer step"
            rows.append((plain + name, choice, instant))
        return rows

    @cached_property
    def _plain_variant(self) -> Variant:
        return self.with_seconds(self.variant((), plain=True))

    @cached_property
    def _base_variant(self) -> Variant:
        return next(v for v in self._timed_variants if not v.patches)


def timed_block(block: BlockCost, times: Iterable[tuple[float, float]]) -> BlockCost:
    """The block with seconds: options in order, then the run from its input.

    Keeping everything is never slower than keeping less, and running again costs a forward more
    at most; what the clock says beyond that is noise.
    """
    taken = list(times)
    options: list[Option] = []
    keep = sum(taken[0])
    walk = taken[-1][0] if block.redone else 0.0
    for option, (forward, backward) in zip(block.options, taken, strict=False):
        seconds = min(max(forward + backward, keep), keep + taken[0][0])
        # A tie on the clock is noise: what runs anything again counts as slower than keeping.
        seconds = max(seconds, keep * 1.01) if options else seconds
        options.append(replace(option, seconds=seconds))
    again = min(max(taken[-1][1], taken[0][1]), keep) if block.redone else 0.0
    # Together slower than keeping, by as much as above.
    again = max(again, keep * 1.01 - walk)
    return replace(block, options=tuple(options), walk_seconds=walk, again_seconds=again)


def no_faster(patched: Variant, base: Variant) -> Variant:
    """A patched variant with seconds at least those of the model as it is: a patch trades time
    for memory, and a clock that says otherwise is not to decide."""

    def floored(block: BlockCost, plain: BlockCost) -> BlockCost:
        options = tuple(
            replace(o, seconds=max(o.seconds, p.seconds))
            for o, p in zip(block.options, plain.options, strict=True)
        )
        return replace(
            block, options=options, walk_seconds=max(block.walk_seconds, plain.walk_seconds),
            again_seconds=max(block.again_seconds, plain.again_seconds),
        )  # fmt: skip

    pairs = zip(patched.chain.blocks, base.chain.blocks, strict=True)
    chain = replace(patched.chain, blocks=tuple(floored(b, p) for b, p in pairs))
    fixed = max(patched.fixed_seconds, base.fixed_seconds)
    return replace(patched, chain=chain, fixed_seconds=fixed)
