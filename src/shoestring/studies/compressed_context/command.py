"""What `shoestring study compressed-context` runs and shows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..catalogue import Shown, Told
from . import study
from .claims import Rows, verdicts
from .page import write_page

__all__ = ["run", "shown", "verdicts", "write_page"]

_HEADS = ("", "bytes a token", "KL", "needles", "copied", "1 hop", "4 hops")
_KEYS = (
    ("english", "bytes_per_token", ",.0f"), ("english", "kl", ".4f"),
    ("english", "needles", ".0%"), ("english", "copied", ".0%"),
    ("chains", "hops_1", ".1%"), ("chains", "hops_4", ".1%"),
)  # fmt: skip


def run(directory: Path, size: str, told: Told, options: Mapping[str, str]) -> dict[str, Any]:
    """See `study.run_study`."""
    sizes = {"quick": study.QUICK, "tiny": study.TINY, "full": study.FULL}
    return study.run_study(directory, sizes[size], told=told)


def shown(result: Mapping[str, Any]) -> Shown:
    """A row for each cache."""
    rows = Rows(result)
    missing = rows.missing(result)
    found = []
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        cells = [
            format(spread.mean, how) if (spread := rows.get(part, name, key)) else ""
            for part, key, how in _KEYS
        ]
        why = missing.get(name)
        found.append([name, *([why, *[""] * 5] if why else cells)])
    for part, why in result.get("left_out", {}).items():
        found.append([f"{part} was left out", why, *[""] * 5])
    return Shown(_HEADS, found)
