"""The stored numbers as Markdown tables, one file each, which the pages under docs include."""

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def write() -> None:
    """results/*.md from whatever parts were run."""
    parts = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    if "memory" in parts:
        _write("memory", memory_table(parts["memory"]))
    times = {name: part for name, part in parts.items() if name.startswith("time-")}
    if times:
        _write("time", time_table(times))
    if "depth" in parts:
        _write("depth", depth_table(parts["depth"]))
    if "inputs" in parts:
        _write("inputs", inputs_table(parts["inputs"]))
    if "accuracy" in parts:
        _write("accuracy", accuracy_table(parts["accuracy"]))
    if "equality" in parts:
        _write("equality", equality_table(parts["equality"]))
    if "behaviour" in parts:
        _write("behaviour", behaviour_table(parts["behaviour"]))


def _write(name: str, lines: list[str]) -> None:
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _head(*cells: str) -> list[str]:
    return [_row(*cells), _row("---", *["---:"] * (len(cells) - 1))]


def memory_table(receipt: dict[str, Any]) -> list[str]:
    lines = _head("", "retained MB", "peak MB", "left after the step MB", "operations x plain")
    for name, r in receipt["numbers"]["rows"].items():
        mb = (f"{r[key]:.1f}" for key in ("retained_mb", "peak_mb", "after_mb"))
        lines.append(_row(name, *mb, f"{r['flops_x']:.3f}"))
    return [*lines, "", _caption(receipt)]


def time_table(receipts: dict[str, dict[str, Any]]) -> list[str]:
    """A column for every setting and base; rows that a setting lacks are left open."""
    bases = ("plain", "checkpoint")
    columns = [(name, base) for base in bases for name in sorted(receipts)]
    lines = _head("", *(f"x {base}: {_setting(name)}" for name, base in columns))
    taken = {name: receipt["numbers"]["seconds"] for name, receipt in receipts.items()}
    for way in max(taken.values(), key=len):
        cells = [_ratios(taken[name], way, base) for name, base in columns]
        lines.append(_row(way, *cells))
    receipt = next(iter(receipts.values()))
    rounds = min(r["numbers"]["rounds"] for r in receipts.values())
    note = (
        f"Medians of the ratios of wall clock within {rounds} or more rounds; in brackets the "
        "ratio of the least processor times, which a busy machine disturbs less."
    )
    return [*lines, "", f"{note} {_caption(receipt)}"]


def _ratios(taken: dict[str, list[dict[str, float]]], way: str, base: str) -> str:
    if way not in taken:
        return ""
    pairs = zip(taken[way], taken[base], strict=True)
    wall = statistics.median(a["wall_s"] / b["wall_s"] for a, b in pairs)
    least = (min(t["processor_s"] for t in taken[name]) for name in (way, base))
    return f"{wall:.2f} ({next(least) / next(least):.2f})"


def _setting(name: str) -> str:
    _, allocator, threads = name.split("-")
    return f"{allocator} allocator, {threads} thread{'s' if threads != '1' else ''}"


def depth_table(receipt: dict[str, Any]) -> list[str]:
    rows = receipt["numbers"]["rows"]
    depths = list(next(iter(rows.values())))
    lines = _head("peak MB (retained MB)", *(f"{d} blocks" for d in depths))
    for name, by_depth in rows.items():
        cells = (f"{by_depth[d]['peak_mb']:.2f} ({by_depth[d]['retained_mb']:.2f})" for d in depths)
        lines.append(_row(name, *cells))
    return [*lines, "", _caption(receipt)]


def accuracy_table(receipt: dict[str, Any]) -> list[str]:
    rows = receipt["numbers"]["rows"]
    lines = _head("relative gradient error", *(f"weights {factor}" for factor in rows))
    for name in next(iter(rows.values())):
        digits = ".2f" if "/" in name else ".1e"
        lines.append(_row(name, *(format(errors[name], digits) for errors in rows.values())))
    return [*lines, "", _caption(receipt)]


def inputs_table(receipt: dict[str, Any]) -> list[str]:
    rows = receipt["numbers"]["rows"]
    count = receipt["numbers"]["inputs"]
    lines = _head(f"gradient error, ours / stored, {count} inputs", *(f"weights {f}" for f in rows))
    for name in ("median", "least", "most"):
        lines.append(_row(name, *(format(found[name], ".2f") for found in rows.values())))
    return [*lines, "", _caption(receipt, peers=False)]


def equality_table(receipt: dict[str, Any]) -> list[str]:
    """A row for each depth and mode, and beside it the control, whose numbers must be smaller."""
    numbers = receipt["numbers"]
    lines = _head(
        "equal to stored activations, of those compared", "loss", "gradients", "rebuilt inputs",
        "control: gradients", "control: rebuilt inputs",
    )  # fmt: skip
    for name, row in numbers["rows"].items():
        counts = [
            f"{r[f'{what}_equal']} of {r[what]}"
            for r in (row, numbers["controls"][name])
            for what in ("gradients", "inputs")
        ]
        lines.append(_row(name, "equal" if row["loss_equal"] else "differs", *counts))
    note = (
        "`torch.equal`; two sub-blocks a block, "
        f"dropout {numbers['dropout']}. Control: when backward begins, one element of the last "
        "pair of streams is too large by one step of the grid, or, where inputs are read in "
        "bfloat16, by 1/16."
    )
    return [*lines, "", f"{note} {_caption(receipt, peers=False)}"]


def behaviour_table(receipt: dict[str, Any]) -> list[str]:
    rows = receipt["numbers"]["rows"]
    lines = [_row("against the same network with stored activations", ""), _row("---", "---")]
    lines += [_row(name, found) for name, found in rows.items()]
    passed = sum(found == "pass" for found in rows.values())
    note = (
        f"{passed} of {len(rows)} pass: the checks of `tests/reversible`, with gloo where there "
        "are two processes. Control: with one stream value one step off, the first row fails."
    )
    return [*lines, "", f"{note} {_caption(receipt, peers=False)}"]


def _caption(receipt: dict[str, Any], *, peers: bool = True) -> str:
    c, hardware = receipt["config"], receipt["hardware"]
    sizes = f"{c['L']} blocks, " if c["L"] else ""
    dtype = ", float32" if peers else ""
    text = (
        f"{sizes}width {c['D']}, {c['B']} x {c['T']} tokens{dtype}; torch "
        f"{receipt['versions']['torch']}, {hardware['device']}, {hardware['cores']} cores"
    )
    versions = [f"{name} {version}" for name, version in receipt["peers"].items() if version]
    return f"{text}; {', '.join(versions)}." if peers else f"{text}."


if __name__ == "__main__":
    write()
