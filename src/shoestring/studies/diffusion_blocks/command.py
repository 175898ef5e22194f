"""What `shoestring study diffusion-blocks` runs and shows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..catalogue import Shown, Told
from . import study
from .claims import verdicts, wrong_tool
from .page import write_page
from .rows import MEASURES, Rows

__all__ = ["run", "shown", "verdicts", "write_page"]


def run(directory: Path, size: str, told: Told, options: Mapping[str, str]) -> dict[str, Any]:
    """See `study.run_study`."""
    sizes = {"quick": study.QUICK, "tiny": study.TINY, "full": study.FULL}
    return study.run_study(directory, sizes[size], told=told, digits=options.get("digits", ""))


def shown(result: Mapping[str, Any]) -> Shown:
    """A row for each arm of each part: its peak, and its measures to end to end's."""
    rows = Rows(result)
    heads = ["", "peak, of end to end", "loss or bits", "x end to end", "distance", "x end to end"]
    found = []
    for part in rows.parts():
        for name in rows.names(part):
            peak = rows.ratio(part, name, "peak_bytes")
            cells = [f"{part}: {name}", f"{peak.mean:.2f}" if peak else ""]
            for key in ("score", "distance"):
                mean, ratio = rows.get(part, name, key), rows.ratio(part, name, key)
                is_there = any((m.part, m.key) == (part, key) for m in MEASURES)
                cells += [f"{mean.mean:.4g}" if mean and is_there else "",
                          f"{ratio.mean:.3f}" if ratio and is_there else ""]  # fmt: skip
            found.append(cells)
    left_out = [f"left out: {part}; {why}" for part, why in result.get("left_out", {}).items()]
    return Shown(heads, found, ["", *left_out, *wrong_tool(result)])
