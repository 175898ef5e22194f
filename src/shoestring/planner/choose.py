"""From costs to a choice: the trade-off curve of a model, and the best point under a budget.

The chain model of every combination of patches gives schedules with bytes and seconds; together
they form one curve, peak rising and seconds falling. A budget is answered by bisection on that
curve, and what decides near the budget is not the model but a simulation of whole steps: the
plan's promise. The curve does not depend on the budget, and a larger budget can only move the
bisection up, so the predicted step time never rises with the budget.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from ..errors import ShoestringError, StackError
from ..stack import Span
from .chain import Outcome, Schedule, evaluate, keep_all, nested
from .cost import Step
from .fake import Profile
from .in_place import bare
from .variants import Costs, Variant, spans_of
from .ways import FIDELITIES, Allow, Offer, Way, allowed, apply_ways

NEAR = 0.03
"""How far the chain model may be off the simulation: within this of the budget, simulate."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One point of the curve: what to put in place, and what the chain model says of it."""

    patches: tuple[Way, ...]
    schedule: Schedule
    offer: Offer = field(repr=False)
    peak_bytes: int
    seconds: float

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The schedule as spans."""
        return spans_of(self.schedule, self.offer)

    @cached_property
    def key(self) -> str:
        """Equal for choices that put the same in place."""
        patches = [(w.method, dict(w.config)) for w in self.patches]
        spans = [(s.start, s.stop, s.method, dict(s.config)) for s in self.spans]
        return json.dumps([patches, spans])


def choice(variant: Variant, schedule: Schedule, outcome: Outcome | None = None) -> Choice:
    """That schedule of a variant."""
    outcome = outcome or evaluate(variant.chain, schedule)
    return Choice(
        patches=variant.patches, schedule=schedule, offer=variant.offer,
        peak_bytes=variant.peak_bytes(outcome), seconds=variant.seconds(outcome),
    )  # fmt: skip


class Planner:
    """Everything that does not depend on the budget, measured once; `choose` answers budgets."""

    def __init__(
        self,
        step: Step,
        *,
        allow: Allow = "exact",
        seconds: bool = True,
        hands_over: Sequence[str] = (),
    ) -> None:
        self.step = step
        self.allow = allow
        self.timed = seconds
        self.hands_over = tuple(hands_over)
        self.methods = allowed(allow, hands_over=self.hands_over)
        self.costs = Costs(step, self.methods)
        self.base, self.offer = self.costs.base, self.costs.offer
        self._profiles: dict[str, Profile] = {}
        self.stricter: Planner | None = None
        """Asked first: another function is trained only where the given one does not fit."""
        if allow == "structural":
            self.stricter = Planner(
                step, allow="unbiased", seconds=seconds, hands_over=self.hands_over
            )

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
        self._refuse_left_out()
        found: list[Choice] = []
        for patches in self.costs.combinations:
            variant = self.costs.variant(patches, timed=timed and self.timed)
            choices = [choice(variant, s, o) for s, o in variant.outcomes]
            if self.offer.streams:
                choices = self._corrected(choices)
            elif self.step.division is not None:
                choices = self._corrected_by_peak(choices)
            found += choices
        kept: list[Choice] = []
        for c in sorted(found, key=lambda c: (c.peak_bytes, c.seconds, len(c.patches))):
            if not kept or c.seconds < kept[-1].seconds:
                kept.append(c)
        return kept

    def _refuse_left_out(self) -> None:
        """StackError for a structural method that was asked for by name and that this model does
        not take: who trains another function wants to know whether it is."""
        for m in () if isinstance(self.allow, str) and self.allow in FIDELITIES else self.methods:
            if m.promises.fidelity != "structural" or m.promises.applies_to in ("span", "batch"):
                continue
            if any(way.method == m.name for each in self.costs.combinations for way in each):
                continue
            way = Way(m.name, dict((m.variants or ({},))[0]))
            try:
                with self.base.mode:
                    apply_ways(self.base.model, [way], ())()
            except ShoestringError as error:
                raise StackError(
                    f"allow names {m.name!r}, which this model does not take: {error.what}",
                    expected=error.expected,
                    hint=error.hint or "Leave it out.",
                ) from error

    def _corrected(self, choices: list[Choice]) -> list[Choice]:
        """Choices for a stack that is rebuilt from its end, with corrected peaks: as far off as
        the two ends are, in the proportion of what is kept."""
        (first, last), n = self._off, len(self.base.stack)
        return [
            replace(c, peak_bytes=c.peak_bytes + first
                    + (last - first) * c.spans[0].config["keep_top"] // n)
            for c in choices
        ]  # fmt: skip

    def _corrected_by_peak(self, choices: list[Choice]) -> list[Choice]:
        """Choices for a divided stack: as far off as the two ends are, in between in proportion
        to their peaks."""
        (low, first), (high, last) = self._off_by_peak

        def corrected(peak: int) -> int:
            share = min(max((peak - low) / (high - low), 0.0), 1.0) if high > low else 0.0
            return peak + round(first + (last - first) * share)

        return [replace(c, peak_bytes=corrected(c.peak_bytes)) for c in choices]

    @cached_property
    def _off_by_peak(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(peak by the chain model, how far that is off the simulation) of the choice with the
        lowest peak and of that with the highest: when units are gathered and freed is known there
        only."""
        base = self.costs.variant(())
        choices = [choice(base, s, o) for s, o in base.outcomes]
        ends = min(choices, key=lambda c: c.peak_bytes), max(choices, key=lambda c: c.peak_bytes)
        off = [(c.peak_bytes, self.promise(c).peak_bytes - c.peak_bytes) for c in ends]
        return off[0], off[1]

    @cached_property
    def _off(self) -> tuple[int, int]:
        """How far the chain model is off the simulation with nothing and with all kept: what a
        block holds in the middle of a stack that is rebuilt from its end cannot be measured on
        it alone."""
        base = self.costs.variant(())
        ends = [choice(base, *base.outcomes[k]) for k in (0, -1)]
        first, last = (self.promise(c).peak_bytes - c.peak_bytes for c in ends)
        return first, last

    # -- the promise -------------------------------------------------------------------------

    def promise(self, choice: Choice) -> Profile:
        """What the choice is promised to need, by a simulation of whole steps, and of what is
        evaluated between them."""
        if choice.key not in self._profiles:
            self._profiles[choice.key] = self.simulated(choice, self.step)
        return self._profiles[choice.key]

    def simulated(self, choice: Choice, step: Step) -> Profile:
        """The choice in a simulation of whole steps, this planner's or others."""

        def put(model: nn.Module) -> None:
            bare(model)
            apply_ways(model, choice.patches, choice.spans)

        profile = step.cut(choice.patches).simulate(put, choice.patches)
        evaluation = step.evaluation(put, choice.patches)
        if evaluation is None or evaluation.peak_bytes <= profile.peak_bytes:
            return profile
        return replace(
            profile, peak_bytes=evaluation.peak_bytes, by_category=evaluation.by_category,
            instant=evaluation.instant, operator=evaluation.operator,
        )  # fmt: skip

    @cached_property
    def smallest_bytes(self) -> int:
        """The smallest budget that works."""
        return self.promise(self.smallest).peak_bytes

    def choose(self, budget: int) -> Choice | None:
        """The fastest choice whose simulated peak is within the budget, or None."""
        if self.stricter is not None:
            found = self.stricter.choose(budget)
            if found is not None:
                return found
        if self._untouched is not None:
            # Nothing is faster, so where it fits nothing else needs to be measured.
            if self.promise(self._untouched).peak_bytes <= budget:
                return self._untouched
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

    @cached_property
    def _untouched(self) -> Choice | None:
        """Everything kept and nothing patched; None where that is not sure to be the fastest."""
        if any(m.promises.changes_weights for m in self.methods):
            return None  # other numbers may be computed with faster
        variant = self.costs.variant((), timed=self.timed)
        if not all(b.options for b in variant.chain.blocks):
            return None
        return choice(variant, keep_all(variant.chain))

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
        variant = self.costs.variant((), plain=bool(plain), timed=self.timed)
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
            outcome = evaluate(chain, schedule)
            above = variant.peak_bytes(outcome) > variant.floor
            instant = outcome.instant if above else "optimizer step"
            rows.append((plain + name, choice(variant, schedule, outcome), instant))
        return rows
