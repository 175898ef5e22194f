"""How much do coded vectors lose, against the best scalar code there is and the paper's bounds?

Random unit vectors are coded under several rotations. `mse` is the mean squared error of the plain
scale, beside that of the Lloyd-Max codebook and Theorem 1's bound of arXiv 2504.19874; then d times
the squared error of inner products of pairs with cosine 0.45, for the three scales and the sketch,
beside Theorem 2's bound; and vectors made to be hard, relative to the codebook's error.
Writes results/distortion.json and results/distortion.md.

    python benchmarks/distortion/run.py [--smoke]
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from shoestring.ops.codebook import codebook
from shoestring.ops.vector_code import VectorCode
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
WIDTHS, BITS, COSINE = (64, 128, 1536), (1, 2, 3, 4), 0.45
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"scale": "plain"}, "norm": {}, "unbiased": {"scale": "unbiased"},
    "sketch": {"sketch": True},
}  # fmt: skip


def pairs(count: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = normalize(torch.randn(count, width, generator=generator), dim=-1)
    other = torch.randn(count, width, generator=generator)
    across = normalize(other - (other * x).sum(-1, keepdim=True) * x, dim=-1)
    return x, COSINE * x + math.sqrt(1 - COSINE**2) * across


def hard(width: int) -> dict[str, Tensor]:
    """Vectors that a code without a rotation would lose."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(200, width, generator=generator)
    loud = x.clone()
    loud[:, :2] *= 40
    return {
        "one-hot": torch.eye(width)[:64], "constant": torch.ones(1, width),
        "two loud channels": loud, "common offset": x + 30,
    }  # fmt: skip


def row(width: int, bits: int, *, count: int, draws: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(width * 10 + bits)
    found: dict[str, list[float]] = {name: [] for name in FORMS}
    slopes: dict[str, list[float]] = {name: [] for name in FORMS}
    mse = []
    for seed in range(draws):
        x, y = pairs(count, width, generator)
        for name, settings in FORMS.items():
            code = VectorCode(
                width, bits, rotation="dense", seed=seed, scale_dtype=torch.float32, **settings
            )
            back = code.decode(code.encode(x))
            products = (back * y).sum(-1)
            found[name].append(width * float((products - COSINE).square().mean()))
            slopes[name].append(float(products.mean()) / COSINE)
            if name == "plain":
                mse.append(float((back - x).square().sum(-1).mean()))
    best = codebook(bits, width).error
    worst = {}
    for name, x in hard(width).items():
        per_kind = {}
        for kind in ("dense", "hadamard"):
            errors = []
            for seed in range(draws):
                code = VectorCode(width, bits, scale="plain", rotation=kind, seed=seed)
                off = code.decode(code.encode(x)) - x
                errors.append(float((off.square().sum(-1) / x.square().sum(-1)).mean()) / best)
            per_kind[kind] = statistics.mean(errors)
        worst[name] = per_kind
    return {
        "width": width, "bits": bits, "mse": statistics.mean(mse), "lloyd_max": best,
        "mse_bound": math.sqrt(3) * math.pi / 2 * 4.0**-bits,
        "products": {name: statistics.mean(errors) for name, errors in found.items()},
        "slopes": {name: statistics.mean(values) for name, values in slopes.items()},
        "product_bound": math.sqrt(3) * math.pi**2 * 4.0**-bits, "hard": worst,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    lines = [
        "| d | bits | mse | over Lloyd-Max | bound | products: plain | norm | unbiased | sketch "
        "| bound | worst hard vectors, dense | Hadamard |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in result["rows"]:
        products = " | ".join(f"{r['products'][name]:.4f}" for name in FORMS)
        worst = [
            max(r["hard"].items(), key=lambda each: each[1][kind]) for kind in ("dense", "hadamard")
        ]
        words = [
            f"{found[kind]:.2f} ({name})"
            for (name, found), kind in zip(worst, ("dense", "hadamard"), strict=True)
        ]
        lines.append(
            f"| {r['width']} | {r['bits']} | {r['mse']:.5f} | {r['mse'] / r['lloyd_max'] - 1:+.2%} "
            f"| {r['mse_bound']:.4f} | {products} | {r['product_bound']:.3f} | {words[0]} "
            f"| {words[1]} |"
        )
    lines += [
        "",
        f"Unit vectors, {result['count']:,} for each of {result['draws']} rotations. Products: d "
        f"times the mean squared error of inner products of pairs with cosine {COSINE}, dense "
        f"rotation. Hard: error over the codebook's; torch {result['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one width, few vectors")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    count, draws = (200, 2) if given.smoke else (4000, 8)
    rows = []
    for width in WIDTHS[:1] if given.smoke else WIDTHS:
        for bits in BITS:
            rows.append(row(width, bits, count=count, draws=draws))
            print(json.dumps(rows[-1]), flush=True)
    result: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0], "count": count, "draws": draws,
        **environment(torch.device("cpu")), "rows": rows,
    }  # fmt: skip
    page = table(result)
    print(page)
    given.out.mkdir(parents=True, exist_ok=True)
    name = "smoke" if given.smoke else "distortion"
    (given.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (given.out / f"{name}.md").write_text(page)


if __name__ == "__main__":
    main()
