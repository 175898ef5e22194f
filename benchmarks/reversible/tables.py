"""The stored numbers as Markdown tables, one file each, which the pages under docs include."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def write() -> None:
    """results/*.md from whatever parts were run."""
    parts = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    if "memory" in parts:
        _write("memory", memory_table(parts["memory"]))
    if "time" in parts:
        _write("time", time_table(parts["time"]))
    if "depth" in parts:
        _write("depth", depth_table(parts["depth"]))
    if "accuracy" in parts:
        _write("accuracy", accuracy_table(parts["accuracy"]))


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


def time_table(receipt: dict[str, Any]) -> list[str]:
    """Ratios are medians over rounds; wall clock, and processor time in brackets."""
    settings = receipt["numbers"]
    lines = _head(
        "", *(f"{s}: x plain" for s in settings), *(f"{s}: x checkpoint" for s in settings)
    )
    for name in next(iter(settings.values()))["rows"]:
        cells = [
            f"{rows[name][f'wall_x_{base}']:.2f} ({rows[name][f'processor_x_{base}']:.2f})"
            for base in ("plain", "checkpoint")
            for rows in (s["rows"] for s in settings.values())
        ]
        lines.append(_row(name, *cells))
    rounds = next(iter(settings.values()))["rounds"]
    return [
        *lines,
        "",
        f"Wall clock (processor time), medians of {rounds} rounds. {_caption(receipt)}",
    ]


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


def _caption(receipt: dict[str, Any]) -> str:
    c, hardware = receipt["config"], receipt["hardware"]
    sizes = f"{c['L']} blocks, " if c["L"] else ""
    return (
        f"{sizes}width {c['D']}, {c['B']} x {c['T']} tokens, float32; torch "
        f"{receipt['versions']['torch']}, {hardware['device']}, {hardware['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in receipt["peers"].items() if version)
        + "."
    )


if __name__ == "__main__":
    write()
