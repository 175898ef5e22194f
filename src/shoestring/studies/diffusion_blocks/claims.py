"""What the rows say of each claim, of the bars, and where block-wise training is the wrong tool.

A claim is decided by a rule that stands here with its numbers. "Better" is lower in every seed;
"as good" allows the bar in the mean of the seeds. "not measured" where rows are missing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..verdict import HELD, NOT, ONLY, UNKNOWN, Spread, Verdict, of_all
from .rows import MEASURES, Rows
from .size import COUNTS, ENDS, GREEDY, LOG, LONG, RECOMPUTED, SHALLOW, TOTAL, UNIFORM

__all__ = ["HELD", "NOT", "ONLY", "UNKNOWN", "Bar", "bars", "verdicts", "wrong_tool"]

PAPER = "arXiv 2506.14202"
THREE = "3 blocks"
SLACK = 1.1  # of a B-th of the memory
SEEDS = 3
READ = 0.01  # share by which an answer has to get worse


def verdicts(result: Mapping[str, Any]) -> list[Verdict]:
    """Of every claim; of the tiny form, which only shows that it runs, none is decided."""
    rows = Rows(result)
    judged = [each(rows) for each in _CLAIMS]
    if _is_tiny(result):
        return [replace(each, verdict=UNKNOWN) for each in judged]
    return judged


def _is_tiny(result: Mapping[str, Any]) -> bool:
    return bool(result.get("size", {}).get("name") == "tiny")


def _equal_updates(rows: Rows) -> Verdict:
    return _as_good(
        rows, [f"{count} blocks" for count in COUNTS],
        "Blocks train as well as the whole, at equal updates of each block.",
        f"{PAPER}, tables 2 and 3",
    )  # fmt: skip


def _equal_total(rows: Rows) -> Verdict:
    return _as_good(
        rows, [TOTAL], "Blocks train as well as the whole, at equal updates in all.",
        "read into the same work per update; no source measured it",
    )  # fmt: skip


def _as_good(rows: Rows, names: Sequence[str], claim: str, source: str) -> Verdict:
    cases, good = {}, set()
    for measure in MEASURES:
        for name in names:
            ratio = rows.ratio(measure.part, name, measure.key)
            if ratio:
                case = f"{measure.name}, {name}"
                cases[case] = f"{case}: {_x(ratio)} (bar {measure.bar})"
                if ratio.mean <= measure.bar:
                    good.add(case)
    rule = "the mean ratio to end to end, seed by seed, is at most 1.05 (bits: 1.03)"
    return Verdict(claim, source, rule, of_all(cases, good), "; ".join(cases.values()))


def _counts(rows: Rows) -> Verdict:
    cases, good = {}, set()
    names = [ENDS, *(f"{count} blocks" for count in COUNTS)]
    for measure in MEASURES:
        found = rows.means(measure.part, measure.key, names)
        if len(found) < len(names):
            continue
        best = rows.best(measure.part, measure.key, names)
        assert best is not None
        said = ", ".join(f"{name} {mean:.4f}" for name, mean in found.items())
        cases[measure.name] = f"{measure.name}: {said}"
        wins = [rows.is_ahead(measure.part, best, measure.key, of) for of in (ENDS, "4 blocks")]
        if best in ("2 blocks", THREE) and all(wins):
            good.add(measure.name)
    return Verdict(
        "2 or 3 blocks work best.", f"{PAPER}, tables 8 and 10",
        "the lowest mean is that of 2 or 3 blocks, and below 1 and 4 in every seed",
        of_all(cases, good), "; ".join(cases.values()),
    )  # fmt: skip


def _edges(rows: Rows) -> Verdict:
    return _ahead(
        rows, THREE, (UNIFORM, LOG), "Equal shares of the training are the best edges.",
        f"{PAPER}, table 7",
    )  # fmt: skip


def _shallow(rows: Rows) -> Verdict:
    return _ahead(
        rows, THREE, (SHALLOW,), "Blocks beat the network with the layers of one of them.",
        "the control the paper leaves out: it needs the memory of one block, and no second one",
    )  # fmt: skip


def _as_long(rows: Rows) -> Verdict:
    return _ahead(
        rows, THREE, (LONG,), "They beat it, too, when it is trained as long as all of them.",
        "the same memory, the same work and the same calls; no source has it",
    )  # fmt: skip


def _greedy(rows: Rows) -> Verdict:
    return _ahead(
        rows, THREE, (GREEDY,), "Blocks beat greedy local losses.",
        "the rival of the literature, arXiv 1812.11446 and 2101.10832",
    )  # fmt: skip


def _ahead(rows: Rows, name: str, others: Sequence[str], claim: str, source: str) -> Verdict:
    cases, good = {}, set()
    for measure in MEASURES:
        for other in others:
            ratio = rows.ratio(measure.part, name, measure.key, other)
            if ratio:
                case = f"{measure.name} against {other}"
                cases[case] = f"{case}: {_x(ratio)}"
                if ratio.high < 1:
                    good.add(case)
    rule = f"{name} are lower in every seed"
    return Verdict(claim, source, rule, of_all(cases, good), "; ".join(cases.values()))


def _factor(rows: Rows) -> Verdict:
    cases, good = {}, set()
    for part in rows.parts():
        for count in COUNTS:
            ratio = rows.ratio(part, f"{count} blocks", "peak_bytes")
            if ratio:
                case = f"{part}, {count} blocks"
                cases[case] = f"{case}: {_x(ratio)} of 1/{count} = {1 / count:.3f}"
                if ratio.high <= SLACK / count:
                    good.add(case)
    return Verdict(
        "Memory falls by the factor B.", f"{PAPER}, App. G, by argument",
        f"an isolated job's measured peak is at most {SLACK} / B of end to end's",
        of_all(cases, good), "; ".join(cases.values()),
    )  # fmt: skip


def _recompute(rows: Rows) -> Verdict:
    cases, good = {}, set()
    for part in rows.parts():
        plain = rows.ratio(part, RECOMPUTED, "peak_bytes")
        for count in COUNTS:
            ratio = rows.ratio(part, f"{count} blocks", "peak_bytes")
            if ratio and plain:
                case = f"{part}, {count} blocks"
                cases[case] = f"{case}: {_x(ratio)}, recomputed {_x(plain)}"
                if ratio.high < plain.low:
                    good.add(case)
    return Verdict(
        "A block takes less memory than recomputing activations.",
        "the rival that everybody has, which is exact",
        "an isolated job's peak is below that of end to end with every layer recomputed",
        of_all(cases, good), "; ".join(cases.values()),
    )  # fmt: skip


def _reads(rows: Rows) -> Verdict:
    cases, good = {}, set()
    for part in rows.parts():
        for count in COUNTS:
            for block, shares in enumerate(_read(rows, part, f"{count} blocks"), start=1):
                case = f"{part}, block {block} of {count}"
                cases[case] = f"{case}: {shares.mean:+.1%}"
                if shares.low >= READ:
                    good.add(case)
    return Verdict(
        "Every block reads its condition.",
        "the shuffled-input control, which the paper leaves out",
        f"with another's condition (class, or visible tokens) the loss rises by {READ:.0%} or more "
        "in every seed", of_all(cases, good), "; ".join(cases.values()),
    )  # fmt: skip


def _read(rows: Rows, part: str, name: str) -> list[Spread]:
    """By how much the loss rises with another condition, of each range of noise."""
    found = [row["read"] for row in rows.of.get((part, name), {}).values() if row.get("read")]
    spreads = []
    for of_range in zip(*found, strict=True):
        shares = [each["other"] / each["right"] - 1 for each in of_range]
        spreads.append(Spread(sum(shares) / len(shares), min(shares), max(shares)))
    return spreads


def _front(rows: Rows) -> Verdict:
    """A point of the front that nothing exact has."""
    cases, good = {}, set()
    for part in rows.parts():
        measures = [measure for measure in MEASURES if measure.part == part]
        plain = rows.get(part, RECOMPUTED, "peak_bytes")
        said = []
        for count in COUNTS:
            name = f"{count} blocks"
            ratios = [rows.ratio(part, name, measure.key) for measure in measures]
            peak = rows.get(part, name, "peak_bytes")
            if not plain or not peak or not all(ratios):
                continue
            means = [ratio.mean for ratio in ratios if ratio]
            numbers = ", ".join(
                f"{measure.name} {mean:.3f}" for measure, mean in zip(measures, means, strict=True)
            )
            said.append(
                f"{name}: {numbers}, its peak {peak.mean / plain.mean:.2f} of recomputing's"
            )
            if max(means) <= 1 and peak.high < plain.low:
                good.add(part)
        if said:
            cases[part] = f"{part}, of end to end: {'; '.join(said)}"
    return Verdict(
        "Some number of blocks is no worse than end to end and takes less memory than recomputing.",
        "the front of quality and memory, measured here",
        "for all measures of a part the mean ratio is at most 1, and the peak below",
        of_all(cases, good), "; ".join(cases.values()),
    )  # fmt: skip


_CLAIMS: Sequence[Callable[[Rows], Verdict]] = (
    _equal_updates, _equal_total, _counts, _edges, _factor, _shallow, _as_long, _greedy, _reads,
    _recompute, _front,
)  # fmt: skip


# ---- bars --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bar:
    """what was to be reached, with which number, and which arm has the best one."""

    what: str
    bar: str
    found: str
    status: str
    best: str

    def to_json(self) -> dict[str, str]:
        """As plain JSON."""
        return asdict(self)


def bars(result: Mapping[str, Any]) -> list[Bar]:
    """The bars that the study was given: met, missed, or not measured."""
    rows = Rows(result)
    found = []
    for measure in MEASURES:
        ratio = rows.ratio(measure.part, THREE, measure.key)
        best = rows.best(measure.part, measure.key, rows.names(measure.part)) or ""
        if ratio:
            is_met = ratio.mean <= measure.bar
            said = f"at most {measure.bar} x end to end"
            found.append(Bar(f"3 blocks: {measure.name}", said, _x(ratio), _met(is_met), best))
        for other in (SHALLOW, UNIFORM):
            against = rows.ratio(measure.part, THREE, measure.key, other)
            if against:
                found.append(Bar(
                    f"3 blocks: {measure.name}", f"below {other}, every seed", _x(against),
                    _met(against.high < 1), best,
                ))  # fmt: skip
    for measure in MEASURES:
        names = [f"{count} blocks" for count in COUNTS]
        seeds = [len(rows.values(measure.part, name, measure.key)) for name in names]
        if all(seeds):
            found.append(Bar(
                f"2, 3 and 4 blocks: {measure.name} and peak", "the front, of three seeds",
                f"{min(seeds)} seed(s)", "measured" if min(seeds) >= SEEDS else "not all seeds",
                rows.best(measure.part, measure.key, names) or "",
            ))  # fmt: skip
    return found


def _met(is_met: bool) -> str:
    return "met" if is_met else "missed"


# ---- where it is the wrong tool ----------------------------------------------------------------


def wrong_tool(result: Mapping[str, Any]) -> list[str]:
    """Sentences made of the numbers: where something else does better, and what."""
    if _is_tiny(result):
        return [
            "This is the tiny form: it shows that the study runs, and its numbers mean nothing."
        ]
    rows = Rows(result)
    said = [
        *_one_machine(rows), *_work_is_fixed(rows), *_only_activations(rows),
        *_another_wins(rows), *_unread(rows),
    ]  # fmt: skip
    return said or ["Nothing that was measured here does better than blocks."]


def _one_machine(rows: Rows) -> list[str]:
    said = []
    for measure in MEASURES:
        ratio = rows.ratio(measure.part, THREE, measure.key, LONG)
        if ratio and ratio.mean > 1:
            said.append(
                "Where one machine does all the work: a network with the layers of one block, "
                "trained as long as 3 blocks together, needs the same memory and has a third of "
                f"their weights. The {measure.name} of the blocks: {_x(ratio)} x that network's."
            )
    return said


def _work_is_fixed(rows: Rows) -> list[str]:
    said = []
    for measure in MEASURES:
        ratio = rows.ratio(measure.part, TOTAL, measure.key)
        if ratio and ratio.mean > measure.bar:
            said.append(
                f"Where the number of updates is given: shared out among 3 blocks they leave the "
                f"{measure.name} at {_x(ratio)} of end to end."
            )
    return said


def _only_activations(rows: Rows) -> list[str]:
    said = []
    for part in rows.parts():
        peak = rows.ratio(part, RECOMPUTED, "peak_bytes")
        row = next(iter(rows.of.get((part, RECOMPUTED), {}).values()), None)
        if peak and row and row["equal"] and peak.mean < 1:
            said.append(
                f"Where only activations are too many ({part}): recomputing takes {peak.mean:.2f} "
                f"of the memory in {row['seconds_ratio']:.2f} of the time, and its weights were "
                f"equal to the last bit after {row['compared']} updates."
            )
    return said


def _another_wins(rows: Rows) -> list[str]:
    said = []
    for measure in MEASURES:
        names = [n for n in rows.names(measure.part) if rows.get(measure.part, n, measure.key)]
        best = rows.best(measure.part, measure.key, names)
        blocks = [name for name in names if name in {f"{count} blocks" for count in COUNTS}]
        if best and blocks and best not in (*blocks, LONG):
            ours = rows.best(measure.part, measure.key, blocks)
            assert ours is not None
            ratio = rows.ratio(measure.part, ours, measure.key, best)
            if ratio:
                said.append(
                    f"For the {measure.name}, where its memory can be had: {best} is the best, and "
                    f"{ours} have {_x(ratio)} of it."
                )
    return said


def _unread(rows: Rows) -> list[str]:
    blind = [
        f"block {block} of {count} ({part})"
        for part in rows.parts() for count in COUNTS
        for block, shares in enumerate(_read(rows, part, f"{count} blocks"), start=1)
        if shares.high < READ
    ]  # fmt: skip
    if not blind:
        return []
    return [
        "Where every layer is to use the condition: with another one the loss of these rises by "
        f"less than {READ:.0%} in every seed: {', '.join(blind)}."
    ]


def _x(spread: Spread) -> str:
    """A ratio over seeds."""
    if spread.high - spread.low < 0.0005:
        return f"{spread.mean:.3f}"
    return f"{spread.mean:.3f} ({spread.low:.3f} to {spread.high:.3f})"
