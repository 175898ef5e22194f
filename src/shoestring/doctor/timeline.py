"""Stretches of a piece of work: its phases, and the calls of the model and its blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .lives import Life

BACKWARD = ("loss backward", "backward")


@dataclass(slots=True)
class Segment:
    """A phase of a step, from the instant it begins at."""

    phase: str
    step: int
    start: int
    is_called: bool = False
    """Whether the model ran in it."""
    blocks: dict[int, int] = field(default_factory=dict)
    """For a backward: when each block's part of it begins."""
    peaks: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    """By device: (bytes above what existed before, instant, operator)."""

    def note(self, device: str, held: int, instant: int, operator: str) -> None:
        """Take the present as the peak of the phase if it is."""
        if device not in self.peaks or held > self.peaks[device][0]:
            self.peaks[device] = (held, instant, operator)


@dataclass(slots=True)
class Visit:
    """A call of the model (block is None), or of one of its blocks."""

    block: int | None
    step: int
    start: int
    stop: int | None = None
    """None: it did not come back."""
    is_training: bool = True
    has_grad: bool = True
    in_backward: bool = False
    outputs: list[Life] = field(default_factory=list)


def name_phases(segments: Sequence[Segment], visits: Sequence[Visit], *, failed: bool) -> None:
    """Give phases the names that only the end tells: what comes after a backward and calls no
    model is no forward, and a forward in evaluation that no backward follows is an evaluation."""
    for at, segment in enumerate(segments):
        if segment.phase in BACKWARD or segment.phase == "optimizer step":
            continue
        end = segments[at + 1].start if at + 1 < len(segments) else 1 << 62
        if failed and at == len(segments) - 1:
            continue
        inside = [v for v in visits if v.block is None and segment.start <= v.start < end]
        if inside and not any(v.is_training for v in inside):
            if not _leads_to_backward(segments, at):
                segment.phase = "evaluation"
        elif segment.phase == "forward" and not segment.is_called and at:
            before = segments[at - 1].phase
            if before in (*BACKWARD, "after backward"):
                segment.phase = "after backward"
            elif before in ("evaluation", "after optimizer step", "optimizer step") and (
                not _leads_to_backward(segments, at)
            ):
                segment.phase = "after optimizer step"


def _leads_to_backward(segments: Sequence[Segment], at: int) -> bool:
    for later in segments[at + 1 :]:
        if later.phase in BACKWARD:
            return True
        if later.phase == "optimizer step" or later.is_called:
            return False
    return False
