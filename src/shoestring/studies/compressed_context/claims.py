"""What the rows say of each claim: held, did not hold, or only when.

A claim is decided by a rule that stands here with its numbers, not by who reads the table. "not
measured" where rows are missing.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..verdict import HELD, NOT, ONLY, UNKNOWN, Spread, Verdict, of_all

LOSSLESS_KL = 0.010  # nats a token
KEPT, LOST = 0.97, 0.90  # of what the plain cache gets right


class Rows:
    """Rows of a result by part and name, seeds taken together."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.of: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for row in result["rows"]:
            if "missing" not in row:
                self.of.setdefault((row["part"], row["name"]), []).append(row)

    def missing(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Why, in a few words, for names of which nothing was measured."""
        measured = {name for _, name in self.of}
        return {
            row["name"]: row["missing"].partition("; expected")[0]
            for row in result["rows"]
            if "missing" in row and row["name"] not in measured
        }

    def names(self, part: str) -> list[str]:
        """Names that were measured, in their order."""
        return [name for found, name in self.of if found == part]

    def get(self, part: str, name: str, key: str) -> Spread | None:
        """A number of a peer over its seeds, or None."""
        values = [row[key] for row in self.of.get((part, name), []) if row.get(key) is not None]
        return Spread(statistics.fmean(values), min(values), max(values)) if values else None

    def is_compressed(self, part: str, name: str) -> bool:
        """Whether it takes less than 16-bit numbers would."""
        size = self.get(part, name, "share_of_16_bits")
        return size is not None and size.mean < 0.95


def verdicts(result: Mapping[str, Any]) -> list[Verdict]:
    """Of every claim."""
    rows = Rows(result)
    return [each(rows) for each in _CLAIMS]


def _neutral(rows: Rows) -> Verdict:
    names = [n for n in rows.names("english") if n.startswith("ours")]
    found = {name: rows.get("english", name, "kl") for name in names}
    good = {n for n, kl in found.items() if kl and kl.high <= LOSSLESS_KL}
    said = "; ".join(f"{name} KL {kl}" for name, kl in found.items())
    return Verdict(
        "Rotated Lloyd-Max codes of about 3 bits leave a model's words as they were.",
        "arXiv 2504.19874 (quality neutral at 3.5 bits)",
        f"KL of every setting of ours, every seed, <= {LOSSLESS_KL}",
        of_all(found, good), said and f"{said}. Within it: {_names(good)}",
    )  # fmt: skip


def _steps(rows: Rows) -> Verdict:
    plain = {key: rows.get("chains", "float32", key) for key in ("hops_1", "hops_4")}
    kept: list[str] = []
    fell: list[str] = []
    both: list[str] = []
    for name in rows.names("chains"):
        one, four = (rows.get("chains", name, key) for key in plain)
        if name == "float32" or not one or not four or not rows.is_compressed("chains", name):
            continue
        if one.mean < KEPT * _mean(plain["hops_1"]):
            continue
        kept.append(name)
        share = four.mean / max(_mean(plain["hops_4"]), 1e-9)
        (fell if share < LOST else both).append(f"{name} ({four.mean:.1%})")
    verdict = HELD if not both else ONLY if fell else NOT
    if not kept or _mean(plain["hops_4"]) < 0.5:  # nothing to lose
        verdict = UNKNOWN
    return Verdict(
        "Needles stay found where answers in several steps are lost.",
        "vLLM's study of compressed caches, 2026; arXiv 2605.17757",
        f"of schemes that keep {KEPT:.0%} of one-hop answers, four-hop answers fall below "
        f"{LOST:.0%} of the plain cache's",
        verdict,
        f"plain: {_percent(plain['hops_1'])} one hop, {_percent(plain['hops_4'])} four. Fell with "
        f"needles kept: {_names(fell)}. Kept both: {_names(both)}",
    )  # fmt: skip


def _needles(rows: Rows) -> Verdict:
    plain = _mean(rows.get("english", "float32", "needles"))
    blind = []
    for name in rows.names("english"):
        found, kl = rows.get("english", name, "needles"), rows.get("english", name, "kl")
        if found and kl and plain and found.mean >= KEPT * plain and kl.mean > 10 * LOSSLESS_KL:
            blind.append(f"{name} (KL {kl.mean:.3f})")
    verdict = UNKNOWN if plain < 0.5 else HELD if blind else NOT
    return Verdict(
        "A needle test does not show the loss.", "vLLM's study of compressed caches, 2026",
        f"a scheme with KL > {10 * LOSSLESS_KL} finds {KEPT:.0%} of the plain cache's needles",
        verdict, f"plain finds {plain:.0%}; blind to: {_names(blind)}",
    )  # fmt: skip


def _rotation(rows: Rows) -> Verdict:
    better, said = set(), {}
    for bits in ("4/2", "2/2"):
        with_it = rows.get("english", f"rotated {bits}", "kl")
        without = rows.get("english", f"no rotation {bits}", "kl")
        if with_it and without:
            said[bits] = f"{bits}: KL {with_it.mean:.4f} rotated, {without.mean:.4f} not"
            if without.mean > 2 * with_it.mean:
                better.add(bits)
    return Verdict(
        "The rotation does most of the work.", "llama.cpp PR 21038; arXiv 2504.19874",
        "without it the KL is more than twice as large, everything else equal",
        of_all(said, better), "; ".join(said.values()),
    )  # fmt: skip


def _scores(rows: Rows) -> Verdict:
    better, said = set(), {}
    for name in rows.names("english"):
        if name.startswith("KVzip") and name.endswith("4 bits"):
            kl = rows.get("english", name, "kl")
            other = rows.get("english", name.replace("KVzip", "random eviction"), "kl")
            if kl and other:
                said[name] = f"{name}: KL {kl.mean:.3f}, at random {other}"
                if kl.mean < 0.5 * other.low:
                    better.add(name)
    return Verdict(
        "Pairs that a repetition of the context does not need can go.", "arXiv 2505.23416 (KVzip)",
        "KL less than half of that of as many pairs evicted at random",
        of_all(said, better), "; ".join(said.values()),
    )  # fmt: skip


def _first(rows: Rows) -> Verdict:
    """Ours against every peer that takes no more bytes."""
    won, said = set(), {}
    for name in rows.names("english"):
        kl, size = (rows.get("english", name, key) for key in ("kl", "bytes_per_token"))
        if not name.startswith("ours") or not kl or not size:
            continue
        ahead = []
        for other in rows.names("english"):
            of, takes = (rows.get("english", other, key) for key in ("kl", "bytes_per_token"))
            is_peer = not other.startswith(("ours", "rotated", "no rotation", "float32"))
            if is_peer and of and takes and takes.mean <= 1.02 * size.mean and of.mean < kl.low:
                ahead.append(f"{other} {of.mean:.4f} at {takes.mean:,.0f}")
        said[name] = (
            f"{name} {kl.mean:.4f} at {size.mean:,.0f} bytes: "
            + (f"behind {', '.join(ahead)}" if ahead else "ahead of all")
        )  # fmt: skip
        if not ahead:
            won.add(name)
    return Verdict(
        "Ours loses least at the bytes it takes, everything counted.", "this library",
        "no peer of as many bytes or fewer has a lower KL",
        of_all(said, won), "; ".join(said.values()),
    )  # fmt: skip


def _seeds(rows: Rows) -> Verdict:
    small, said = set(), {}
    for name in rows.names("english"):
        kl = rows.get("english", name, "kl")
        if name.startswith("ours") and kl and len(rows.of["english", name]) > 1:
            said[name] = f"{name}: KL {kl}"
            if kl.high - kl.low < 0.25 * kl.mean:
                small.add(name)
    return Verdict(
        "It does not matter which rotation is drawn.", "arXiv 2504.19874 (any rotation will do)",
        "KL of the seeds within a quarter of their mean", of_all(said, small),
        "; ".join(said.values()),
    )  # fmt: skip


_CLAIMS: Sequence[Callable[[Rows], Verdict]] = (
    _neutral, _steps, _needles, _rotation, _scores, _seeds, _first,
)  # fmt: skip


def _mean(spread: Spread | None) -> float:
    return spread.mean if spread else 0.0


def _percent(spread: Spread | None) -> str:
    return f"{spread.mean:.1%}" if spread else "-"


def _names(names: set[str] | list[str]) -> str:
    return ", ".join(sorted(names)) or "none"
