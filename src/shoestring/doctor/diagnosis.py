"""What the doctor found, as data and as a page for people. No torch here."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from ..errors import ConfigError
from ..units import format_bytes

FORMAT = 1
_WORDS = {
    "saved": "saved for backward",
    "optimizer": "optimizer states",
    "logits": "logits and their gradients",
    "transient": "temporaries",
    "cache": "key/value cache",
    "other": "other (batch, what the script made before)",
}
_LARGEST = 6
_MANY = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """Something to do, and what it saves."""

    name: str
    what: str
    how: str
    """Code or a flag."""
    cost: str
    saving_bytes: int
    """Of the peak; of every step for a leak."""
    basis: str
    """Where the number comes from: "simulated" (the step on fake tensors, with and without) or
    "measured" (the tensors that would not have been there)."""
    peak_bytes: int | None = None
    """The peak it leads to; None where that is not known."""

    def __str__(self) -> str:
        saving = format_bytes(self.saving_bytes)
        led = f", to {format_bytes(self.peak_bytes)}" if self.peak_bytes is not None else ""
        text = f"{self.what}: saves {saving}{led} ({self.basis}). Cost: {self.cost}"
        return "\n".join([text, *(f"    {line}" for line in self.how.splitlines())])


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Where the memory of a piece of work was when it was highest.

    peak_bytes: most bytes of live tensors at once.  instant, operator, module: when, and what
    allocated last.  phases: [{"phase", "peak_bytes"}], highest first.  parts: what the peak is
    made of, adding up to it.  blocks: [{"name", "saved_bytes" (at the peak), "retained_bytes"
    (at the end of the forward)}] for the blocks of the stack, and outside for what other modules
    saved; blocks is None without a stack, and blocks_message says why.  retained_bytes: held for
    the backward at the end of the forward.  largest: the largest tensors of the peak, with what
    made them.  allocator: what the process has beyond its tensors.  leak: what every step left
    behind, or None.  failure: what ended the work early, or None.  step_bytes: peak of a later
    step, simulated, or None.  advice: cheapest first.  together_bytes: the peak with all
    simulated advice, or None.  notes: what could not be found out, and why.
    """

    model: str | None
    device: str
    steps: int
    peak_bytes: int
    instant: str
    operator: str
    module: str
    baseline_bytes: int
    end_bytes: int
    retained_bytes: int
    phases: Sequence[Mapping[str, Any]]
    parts: Mapping[str, int]
    blocks: Sequence[Mapping[str, Any]] | None
    blocks_message: str | None
    outside: Sequence[Mapping[str, Any]]
    largest: Sequence[Mapping[str, Any]]
    allocator: Mapping[str, Any]
    leak: Mapping[str, Any] | None = None
    failure: Mapping[str, Any] | None = None
    step_bytes: int | None = None
    advice: Sequence[Advice] = ()
    together_bytes: int | None = None
    notes: Sequence[str] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """A diagnosis from `to_json`. ConfigError when it is none."""
        names = {f.name for f in fields(cls)}
        if value.get("format") != FORMAT or names - set(value):
            raise ConfigError(
                f"a diagnosis of format {value.get('format')!r} cannot be read",
                expected=f"Diagnosis.to_json() of format {FORMAT}",
            )
        known = {name: value[name] for name in names}
        return cls(**known | {"advice": [Advice(**each) for each in known["advice"]]})

    # ---- for people --------------------------------------------------------------------------

    def __str__(self) -> str:
        parts = [self._head(), self._phases(), self._parts(), self._blocks(), self._largest(),
                 self._allocator(), self._leak(), self._advice(), self._notes()]  # fmt: skip
        return "\n\n".join(part for part in parts if part)

    def _head(self) -> str:
        where = f" in {self.module}" if self.module else ""
        steps = f"{self.steps} step" + "s" * (self.steps != 1)
        lines = [
            f"{self.model or 'no model'} on {self.device}, {steps} watched",
            f"peak {format_bytes(self.peak_bytes)} of tensors, in the {self.instant} "
            f"({self.operator}{where})",
        ]
        if self.failure is not None:
            lines.insert(0, _failure(self.failure))
        if self.step_bytes is not None and (self.failure or self.step_bytes > self.peak_bytes):
            lines.append(f"a whole step needs {format_bytes(self.step_bytes)} (simulated)")
        return "\n".join(lines)

    def _phases(self) -> str:
        rows = [
            (each["phase"], format_bytes(each["peak_bytes"]),
             "wins" if not at else f"{format_bytes(self.peak_bytes - each['peak_bytes'])} below")
            for at, each in enumerate(self.phases)
        ]  # fmt: skip
        return _table("highest in each phase", rows)

    def _parts(self) -> str:
        rows = [
            (_WORDS.get(name, name), format_bytes(nbytes), _share(nbytes, self.peak_bytes))
            for name, nbytes in sorted(self.parts.items(), key=lambda item: -item[1])
            if nbytes
        ]
        return _table("what the peak is made of", rows)

    def _blocks(self) -> str:
        if self.blocks is None:
            return f"saved by block: not known, {self.blocks_message}"
        rows = [
            (each["name"], format_bytes(each["retained_bytes"]), format_bytes(each["saved_bytes"]))
            for each in (*_short(self.blocks), *self.outside)
        ]
        return _table("saved for backward   (at the end of the forward, at the peak)", rows)

    def _largest(self) -> str:
        rows = [
            (f"{each['dtype']} {list(each['shape'])}", format_bytes(each["bytes"]),
             f"{each['category']}, {_maker(each)}" + f", {each['count']} like it" * (
                 each["count"] > 1))
            for each in self.largest[:_LARGEST]
        ]  # fmt: skip
        return _table("largest tensors at the peak", rows)

    def _allocator(self) -> str:
        found = self.allocator
        lines = []
        if found.get("reserved_bytes") is not None:
            over = found["reserved_bytes"] - found["allocated_bytes"]
            lines.append(
                f"CUDA: {format_bytes(found['reserved_bytes'])} reserved at most, "
                f"{format_bytes(over)} over what was allocated; "
                f"{found['retries']} allocations tried again"
            )
        if found.get("rss_peak_bytes") is not None:
            lines.append(
                f"process: {format_bytes(found['rss_peak_bytes'])} resident at most, of which "
                f"{format_bytes(found['rss_start_bytes'])} when the watch began"
            )
            if found.get("over_bytes") is not None:
                over = found["over_bytes"]
                word = "more" if over >= 0 else "less"
                lines.append(f"it grew by {format_bytes(abs(over))} {word} than its tensors did")
        elif found.get("rss_message"):
            lines.append(found["rss_message"])
        return "\n".join([*lines, found["explanation"]])

    def _leak(self) -> str:
        if self.leak is None:
            return ""
        rows = [
            (f"{each['dtype']} {list(each['shape'])}", format_bytes(each["bytes"]), _maker(each))
            for each in self.leak["tensors"]
        ]
        head = f"every step left {format_bytes(self.leak['bytes_per_step'])} behind"
        return _table(f"{head} (seen over {self.leak['steps']} steps)", rows)

    def _advice(self) -> str:
        if not self.advice:
            return "advice: nothing that was tried saves a hundredth of the peak"
        lines = [f"{at}. {each}" for at, each in enumerate(self.advice, 1)]
        if self.together_bytes is not None:
            lines.append(f"all simulated ones together: {format_bytes(self.together_bytes)}")
        return "\n".join(["what to do, cheapest first", *lines])

    def _notes(self) -> str:
        return "\n".join(f"note: {note}" for note in self.notes)


def _failure(failure: Mapping[str, Any]) -> str:
    where = f" in {failure['module']}" if failure["module"] else ""
    asked = failure["asked_bytes"]
    wanted = f", asking for {format_bytes(asked)}" if asked else ""
    return (
        f"{failure['kind']} in the {failure['phase']} ({failure['operator']}{where}){wanted}, "
        f"with {format_bytes(failure['live_bytes'])} of tensors alive; what follows was until then"
    )


def _maker(tensor: Mapping[str, Any]) -> str:
    if tensor.get("name"):
        return str(tensor["name"])
    if not tensor["operator"]:
        return "there before"
    where = f" in {tensor['module']}" if tensor["module"] else ""
    return f"{tensor['operator']}{where}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ""


def _short(blocks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Neighbours that hold the same become one line when there are many."""
    if len(blocks) <= _MANY:
        return list(blocks)
    rows: list[dict[str, Any]] = []
    for block in blocks:
        last = rows[-1] if rows else None
        alike = last and all(last[k] == block[k] for k in ("retained_bytes", "saved_bytes"))
        if last and alike:
            last["last"] = block["name"]
        else:
            rows.append(dict(block))
    for row in rows:
        if "last" in row:
            row["name"] = f"{row['name']} to {row['last']}, each"
    return list(rows)


def _table(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [title]
    for row in rows:
        cells = [
            cell.rjust(width) if at == 1 else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)
