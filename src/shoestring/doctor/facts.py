"""A watched piece of work -> what is to be told of it: parts, blocks, phases, leaks."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..meter import CATEGORIES
from .lives import Life
from .timeline import BACKWARD, Segment
from .watch import Watch

LARGEST = 10
LEAK_SHARE = 1000
"""A leak is told from a thousandth of the peak a step on; a kept number is none."""
_LOGITS_SLACK = 10  # a loss that leaves out the last token has a little fewer
_SUPPORTING = ("weights", "gradients", "optimizer")


def highest(watch: Watch) -> list[dict[str, Any]]:
    """[{"phase", "peak_bytes", "operator", "instant"}], highest first."""
    found: dict[str, tuple[int, int, str]] = {}
    for segment in watch.segments:
        peak = segment.peaks.get(watch.device)
        if peak is not None and (segment.phase not in found or peak > found[segment.phase]):
            found[segment.phase] = peak
    existing = watch.tracker.ledger.existing
    rows = [
        {"phase": phase, "peak_bytes": held + existing, "operator": operator, "instant": instant}
        for phase, (held, instant, operator) in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["peak_bytes"], row["instant"]))


def is_logits(watch: Watch, life: Life) -> bool:
    """Whether it is of the size of the logits that the loss is taken of."""
    if watch.logits is None or life.block is not None or life.category in _SUPPORTING:
        return False
    elements, vocabulary = watch.logits
    count = 1
    for size in life.shape:
        count *= size
    near = abs(count - elements) * _LOGITS_SLACK <= elements
    return near and (life.shape[-1:] == (vocabulary,) or count == elements)


def parts(watch: Watch, present: Sequence[Life], scratch: int) -> dict[str, int]:
    """Bytes at the peak by category, the logits apart from what they would count as."""
    found = dict.fromkeys((*CATEGORIES, "logits"), 0)
    for life in present:
        found["logits" if is_logits(watch, life) else life.category] += life.nbytes
    found["transient"] += scratch
    return found


def blocks(
    watch: Watch, present: Sequence[Life]
) -> tuple[list[dict[str, Any]] | None, list[dict[str, Any]]]:
    """(rows of the stack's blocks, rows of what other modules saved): at the end of the forward,
    and what is left of it at the peak."""
    retained: Counter[Any] = Counter()
    for (module, block), nbytes in watch.retained.get(watch.device, {}).items():
        retained[_row(module, block)] += nbytes
    saved: Counter[Any] = Counter()
    for life in present:
        if life.category == "saved":
            saved[_row(life.module, life.block)] += life.nbytes
    rows = None
    if watch.stack is not None:
        path = f"{watch.stack.path}." if watch.stack.path else ""
        rows = [_saved(f"{path}{i}", saved[i], retained[i]) for i in range(len(watch.stack))]
    names = [key for key in retained | saved if isinstance(key, str)]
    outside = [_saved(name, saved[name], retained[name]) for name in names]
    return rows, sorted(outside, key=lambda row: -row["retained_bytes"])


def _row(module: str, block: int | None) -> int | str:
    return block if block is not None else module or "outside of modules"


def _saved(name: str, saved: int, retained: int) -> dict[str, Any]:
    return {"name": name, "saved_bytes": saved, "retained_bytes": retained}


def largest(watch: Watch, present: Sequence[Life]) -> list[dict[str, Any]]:
    """The largest tensors, those that are alike as one."""
    alike: dict[Any, list[Life]] = defaultdict(list)
    for life in present:
        kind = "logits" if is_logits(watch, life) else life.category
        key = (life.nbytes, life.shape, life.dtype, kind, life.operator)
        alike[(*key, life.module if life.block is None else "")].append(life)
    groups = sorted(alike.values(), key=lambda group: -group[0].nbytes)
    return [_tensor(watch, group) for group in groups[:LARGEST]]


def _tensor(watch: Watch, group: Sequence[Life]) -> dict[str, Any]:
    first = group[0]
    return {
        "bytes": first.nbytes, "shape": list(first.shape), "dtype": first.dtype,
        "category": "logits" if is_logits(watch, first) else first.category,
        "operator": first.operator, "module": first.module, "phase": first.phase,
        "count": len(group), "name": _name(watch.model, first),
    }  # fmt: skip


def _name(model: nn.Module | None, life: Life) -> str | None:
    """Of a weight that existed before, found by its shape; the first of several."""
    if model is None or life.category != "weights":
        return None
    named = (name for name, p in model.named_parameters() if tuple(p.shape) == life.shape)
    return next(named, None)


# ---- leaks -------------------------------------------------------------------------------------


def leaked(watch: Watch) -> list[Life]:
    """What earlier steps made and nobody let go of: the same sort of tensor (operator, module)
    from every step that was over, and one more from the last."""
    ends = watch.step_ends
    if len(ends) < 2:
        return []
    at = ends[-1]
    alive = [
        life for life in watch.lives
        if life.device == watch.device and life.born > 0 and life.at(at)
        and life.category not in _SUPPORTING
    ]  # fmt: skip
    sorts: dict[tuple[str, str], dict[int, list[Life]]] = defaultdict(lambda: defaultdict(list))
    for life in alive:
        sorts[life.operator, life.module][_step_of(life, ends)].append(life)
    last = len(ends) - 1
    return [
        life
        for by_step in sorts.values()
        if all(by_step.get(step) for step in range(len(ends)))
        for step in range(last)
        for life in by_step[step]
    ]


def _step_of(life: Life, ends: Sequence[int]) -> int:
    return sum(life.born > end for end in ends)


def leak(watch: Watch, lives: Iterable[Life], peak: int) -> dict[str, Any] | None:
    """What is told of them; None where it is not worth it."""
    lives = list(lives)
    over = len(watch.step_ends) - 1
    each = sum(life.nbytes for life in lives) // over if over > 0 else 0
    if each * LEAK_SHARE < peak or not each:
        return None
    first = [life for life in lives if _step_of(life, watch.step_ends) == over - 1]
    return {
        "bytes_per_step": each, "steps": len(watch.step_ends),
        "tensors": [_tensor(watch, [life]) for life in sorted(first, key=lambda x: -x.nbytes)[:3]],
    }  # fmt: skip


# ---- habits that cost memory -------------------------------------------------------------------


def gradients_in_forward(watch: Watch) -> int:
    """Bytes of gradients of the step before that were there in a forward (not the second and
    later of an accumulation)."""
    if not watch.step_ends:
        return 0
    skipped = {0} if accumulated(watch) > 1 else set()  # it may have begun before the watch
    found = [s for s in first_forwards(watch) if s.step not in skipped]
    return max((_gradients_at(watch, segment) for segment in found), default=0)


def first_forwards(watch: Watch) -> list[Segment]:
    """The forward that begins each step, where the model ran."""
    found: dict[int, Segment] = {}
    for at, segment in enumerate(watch.segments):
        if segment.phase in BACKWARD:
            found.setdefault(segment.step, watch.segments[max(at - 1, 0)])
    return [s for s in found.values() if s.phase in ("forward", "loss")]


def _gradients_at(watch: Watch, segment: Segment) -> int:
    held = 0
    for life in watch.lives:
        if life.category == "gradients" and life.device == watch.device:
            held += life.nbytes * life.at(segment.start)
    return held


def accumulated(watch: Watch) -> int:
    """Backwards a step has."""
    counts: Counter[int] = Counter()
    before = ""
    for segment in watch.segments:
        if segment.phase in BACKWARD and before not in BACKWARD:
            counts[segment.step] += 1
        before = segment.phase
    return max(counts.values(), default=1)


def held_outputs(watch: Watch) -> list[Life]:
    """What the model returned and was still there when the backward was over, but for the loss."""
    found = []
    for visit in watch.visits:
        if visit.block is None and visit.is_training and visit.stop is not None:
            end = backward_end(watch, visit.stop)
            if end is not None:
                found += [life for life in visit.outputs if life.died >= end]
    return [life for life in found if life.nbytes and life.category not in _SUPPORTING]


def backward_end(watch: Watch, after: int) -> int | None:
    """The first instant after the first backward that begins later than `after`."""
    in_backward = False
    for segment in watch.segments:
        if segment.start <= after and not in_backward:
            continue
        if segment.phase in BACKWARD:
            in_backward = True
        elif in_backward:
            return segment.start
    return None


def evaluations(watch: Watch) -> list[Life]:
    """What forwards in evaluation kept for a backward that never came."""
    found: list[Life] = []
    starts = [s.start for s in watch.segments if s.phase in BACKWARD]
    models = [v for v in watch.visits if v.block is None and not v.in_backward]
    for at, visit in enumerate(models):
        if visit.is_training or not visit.has_grad or visit.stop is None:
            continue
        later = models[at + 1].start if at + 1 < len(models) else watch.now + 1
        if any(visit.start < start <= later for start in starts):
            continue  # trained in evaluation mode, without dropout
        found += [
            life for life in watch.lives
            if visit.start <= life.born <= visit.stop < life.died
            and life.device == watch.device and life not in visit.outputs
        ]  # fmt: skip
    return found


def facts_of(watch: Watch) -> Mapping[str, Any]:
    """The fields of a Diagnosis that only reading gives."""
    ledger = watch.tracker.ledger
    phases = highest(watch)
    instant = watch.peak_instant()
    present = watch.lives.at(instant, watch.device)
    rows, outside = blocks(watch, present)
    made = max((life for life in present if life.born), key=lambda x: x.born, default=None)
    stack_message = watch.stack_message if watch.stack is None else None
    return {
        "model": type(watch.model).__name__ if watch.model is not None else None,
        "device": watch.device, "steps": len(watch.step_ends), "peak_bytes": ledger.peak,
        "instant": phases[0]["phase"] if phases else ledger.peak_phase,
        "operator": ledger.peak_operator, "module": made.module if made is not None else "",
        "baseline_bytes": ledger.existing,
        "retained_bytes": ledger.retained,
        "phases": [{k: row[k] for k in ("phase", "peak_bytes")} for row in phases],
        "parts": parts(watch, present, watch.lives.scratch.get((watch.device, instant), 0)),
        "blocks": rows, "blocks_message": stack_message, "outside": outside,
        "largest": largest(watch, present),
    }  # fmt: skip
