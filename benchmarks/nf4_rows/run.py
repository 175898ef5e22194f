"""Does bitsandbytes' NF4 come back right on a CPU, whatever the length of a row?

Weights (64, width) with normal values are coded in blocks of 64, then decoded as the library does
it by itself (with the weight's shape) and as `ops.weight_codes` asks for it (flat). Both are held
against the equations in float64 (`round_trip_ref`). Writes results/nf4_rows.json and .md.

    python benchmarks/nf4_rows/run.py [--smoke]
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoestring.ops.weight_codes import BLOCK, encode, round_trip_ref
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
ROWS, WIDTHS = 64, (32, 64, 80, 96, 128, 160, 576)


def off(found: Tensor, expected: Tensor) -> float:
    """Relative error (L2)."""
    return float((found.double() - expected).norm() / expected.norm())


def row(width: int) -> dict[str, Any]:
    """One width: both ways to decode, and what coding itself loses."""
    weight = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(width))
    codes, scale, form = encode(weight, "nf4")
    expected = round_trip_ref(weight, "nf4")
    library: Any = torch.ops.bitsandbytes
    by_shape = library.dequantize_4bit(codes, scale, BLOCK, "nf4", list(weight.shape), weight.dtype)
    return {
        "width": width, "coding": off(expected, weight.double()),
        "library": off(by_shape, expected), "flat": off(form.decode(codes, scale), expected),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The widths, one a line."""
    lines = [
        "| values in a row | error of the codes themselves | library, by shape | flat |",
        "|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['width']} | {r['coding']:.4f} | {r['library']:.2g} | {r['flat']:.2g} |"
        for r in result["rows"]
    ]
    lines += [
        "",
        f"Relative L2, {ROWS} rows of normal values, float32; bitsandbytes "
        f"{result['bitsandbytes']} on a CPU.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """All widths; `--smoke` writes nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "environment": environment(torch.device("cpu")), "bitsandbytes": version("bitsandbytes"),
        "threads": torch.get_num_threads(), "rows": [row(w) for w in WIDTHS],
    }  # fmt: skip
    page = table(result)
    print(page)
    if not given.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "nf4_rows.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "nf4_rows.md").write_text(page)


if __name__ == "__main__":
    main()
