"""One patient: what was seen, the step that can be simulated, and what was prescribed so far."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .diagnosis import Advice
from .trial import Change, Trial
from .watch import Watch

WORTH = 100
"""A change is named from a hundredth of the peak on."""


@dataclass
class Case:
    """One patient: what was seen, the step that can be simulated, what was prescribed."""

    watch: Watch
    facts: Mapping[str, Any]
    trial: Trial | None
    base: int | None = None
    found: list[Advice] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    """What the simulated advice changes in the trial."""
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The peak that is to be lowered: of a whole step where it is known."""
        return max(self.base or 0, int(self.facts["peak_bytes"]))

    @property
    def instant(self) -> str:
        return str(self.facts["instant"])

    def after(self, simulated: int) -> int:
        """The peak that a simulated one means here: what the loop holds beyond a step (a leak,
        say) is there all the same."""
        assert self.base is not None
        return self.peak - self.base + simulated

    def is_worth(self, saving: int | None) -> bool:
        return saving is not None and saving > 0 and saving * WORTH >= self.peak

    def simulated(
        self, advice: Callable[[int, int], Advice], change: Change | None = None, **fields: Any
    ) -> bool:
        """Try a change; take the advice when it is worth it."""
        if self.trial is None or self.base is None:
            return False
        changed = self.trial.having(**fields)
        peak = changed.peak(*([change] if change is not None else []))
        if peak is None or not self.is_worth(self.base - peak):
            return False
        self.found.append(advice(self.base - peak, self.after(peak)))
        self.fields |= fields
        if change is not None:
            self.changes.append(change)
        return True

    def measured(self, peak: int, **words: str) -> bool:
        """Take an advice whose saving was measured by taking tensors out."""
        saving = int(self.facts["peak_bytes"]) - peak
        if self.watch.lives.is_cut or not self.is_worth(saving):
            return False
        self.found.append(Advice(**words, saving_bytes=saving, basis="measured", peak_bytes=peak))
        return True


def simulated_advice(*, name: str, what: str, how: str, cost: str) -> Callable[[int, int], Advice]:
    """An advice that waits for its numbers: the saving, and the peak it leads to."""

    def advice(saving: int, peak: int) -> Advice:
        return Advice(
            name=name, what=what, how=how, cost=cost, saving_bytes=saving, basis="simulated",
            peak_bytes=peak,
        )  # fmt: skip

    return advice
