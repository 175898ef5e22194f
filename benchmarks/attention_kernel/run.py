"""How fast is attention over coded rows on a CPU, against attention over float32 keys and values?

SmolLM2-135M's heads (9 of queries, 3 of keys and values, width 64), one new token, one thread,
coded rows of 3.25 bits a coordinate (groups of 0, 1, 2, 3, 3, 4, 5 and 8 bits, in another order
for each head). The rival is torch's scaled_dot_product_attention over float32, as transformers
calls it over a DynamicCache: with enable_gqa, or with keys and values repeated; the faster of the
two counts. What a DynamicCache pays to append a token (torch.cat) is measured apart. Each round
goes once through all layers with each, so that, as in a model, none finds its tokens in the
nearest cache ("all layers"), and then often through one layer, the best case for both ("one
layer"). Times are the processor's, of the one thread, medians of rounds, for one layer. Then what
it takes to write rows: encode one token and 64, move rows to another code, decode.
Writes results/attention_kernel.json and results/attention_kernel.md.

    python benchmarks/attention_kernel/run.py [--smoke]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from shoestring.ops import native, row_kernel
from shoestring.ops.row_code import coefficients
from shoestring.ops.row_kernel import Basis, KernelCode, Segment
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
H, GROUPS, D = 3, 3, 64
BITS = (0, 1, 2, 3, 3, 4, 5, 8)
LENGTHS = {1024: 30, 4096: 30, 16384: 8}  # tokens, and layers, so that memory suffices
LEVELS = ("plain vectors", "AVX2", "AVX-512", "AVX-512 with VBMI")


def mixed_code(generator: torch.Generator) -> KernelCode:
    order = torch.stack([torch.randperm(len(BITS), generator=generator) for _ in range(2 * H)])
    bits = torch.tensor(BITS, dtype=torch.uint8)[order].view(2, H, -1)
    return KernelCode(bits, None, 2, coefficients())


@dataclass(frozen=True)
class Layer:
    """The same number of tokens, coded and in float32."""

    code: KernelCode
    rows: Tensor
    segment: Segment
    basis: Basis
    keys: Tensor
    values: Tensor


def layer(n: int, generator: torch.Generator) -> Layer:
    code = mixed_code(generator)
    keys, values = torch.randn(2, 1, H, n, D, generator=generator).unbind(0)
    one = torch.eye(D).repeat(2, H, 1, 1)
    rows = torch.zeros(1, n + 1, code.row_bytes, dtype=torch.uint8)[:, :n]
    none = torch.zeros(2, 1, H, D)
    row_kernel.encode(keys, values, one.double(), none.double(), code, rows)
    return Layer(code, rows, Segment(code, rows), Basis(one, none), keys, values)


def repeated(x: Tensor) -> Tensor:
    """As transformers' repeat_kv does it."""
    B, heads, n, d = x.shape
    return x[:, :, None].expand(B, heads, GROUPS, n, d).reshape(B, heads * GROUPS, n, d)


def ways(q: Tensor, own: tuple[Tensor, Tensor]) -> dict[str, Callable[[Layer], Any]]:
    return {
        "kernel": lambda a: row_kernel.attend(q, *own, [a.segment], a.basis, D**-0.5),
        "gqa": lambda a: scaled_dot_product_attention(q, a.keys, a.values, enable_gqa=True),
        "repeat": lambda a: scaled_dot_product_attention(q, repeated(a.keys), repeated(a.values)),
        "append": lambda a: [torch.cat(two, -2) for two in zip((a.keys, a.values), own)],  # noqa: B905
    }


def off(a: Layer, q: Tensor, own: tuple[Tensor, Tensor]) -> float:
    """Relative error (L2) of the kernel to float64 attention over what the rows decode to."""
    back = row_kernel.decode(a.rows, a.code).double()
    keys, values = (
        repeated(torch.cat((back[:, k], own[k].double()), -2)) for k in (0, 1)
    )  # fmt: skip
    wanted = scaled_dot_product_attention(q.double(), keys, values).transpose(1, 2)
    found = row_kernel.attend(q, *own, [a.segment], a.basis, D**-0.5)
    return float((found - wanted).norm() / wanted.norm())


def length_row(n: int, layers: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(1, H * GROUPS, 1, D, generator=generator)
    keys, values = torch.randn(2, 1, H, 1, D, generator=generator).unbind(0)
    every = [layer(n, generator) for _ in range(layers)]
    every_way = ways(q, (keys, values))
    cold, warm = ({name: [] for name in every_way} for _ in range(2))  # type: dict[str, list[float]]
    for round_ in range(rounds + 1):
        for times, layers_ in ((cold, every), (warm, every[:1] * 9)):
            for name, way in every_way.items():
                seconds = timed(way, layers_)
                if round_:  # the first one is to warm up
                    times[name].append(seconds)
    return {
        "tokens": n, "layers": layers, "rounds": rounds, "row_bytes": every[0].code.row_bytes,
        "all_layers": summary(cold), "one_layer": summary(warm),
        "error": off(every[0], q, (keys, values)),
    }  # fmt: skip


def timed(way: Callable[[Layer], Any], layers: list[Layer]) -> float:
    """Seconds for one of them."""
    start = time.thread_time()
    for each in layers:
        way(each)
    return (time.thread_time() - start) / len(layers)


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    rival = [min(pair) for pair in zip(times["gqa"], times["repeat"], strict=True)]
    ratios = [theirs / ours for theirs, ours in zip(rival, times["kernel"], strict=True)]
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "ms": {name: 1e3 * statistics.median(found) for name, found in times.items()},
        "fastest_ms": {name: 1e3 * min(found) for name, found in times.items()},
        "times_faster": quarters[1], "middle_half": [quarters[0], quarters[2]],
    }  # fmt: skip


def writing(rounds: int) -> dict[str, float]:
    """Microseconds a token of one layer."""
    generator = torch.Generator().manual_seed(1)
    a, other = layer(256, generator), mixed_code(generator)
    out = torch.zeros(1, 257, other.row_bytes, dtype=torch.uint8)[:, :256]
    A = torch.randn(2, H, D, D, generator=generator, dtype=torch.float64)
    mean = torch.zeros(2, 1, H, D, dtype=torch.float64)

    def encode(t: int) -> Callable[[], Any]:
        keys, values, rows = a.keys[:, :, :t], a.values[:, :, :t], out[:, :t]
        return lambda: row_kernel.encode(keys, values, A, mean, other, rows)

    each: dict[str, tuple[Callable[[], Any], int]] = {
        "encode 1": (encode(1), 1), "encode 64": (encode(64), 64),
        "recode": (lambda: row_kernel.recode(a.rows, a.code, out, other), 256),
        "decode": (lambda: row_kernel.decode(a.rows, a.code), 256),
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(rounds):
        for name, (call, tokens) in each.items():
            start = time.thread_time()
            for _ in range(20):
                call()
            found[name].append((time.thread_time() - start) / 20 / tokens)
    return {name: 1e6 * statistics.median(times) for name, times in found.items()}


def table(result: dict[str, Any]) -> str:
    lines = [
        "| tokens | caches | coded rows, ms | float32, enable_gqa | float32, repeated "
        "| times as fast (middle half) | torch.cat of a DynamicCache |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for r in result["rows"]:
        for which in ("all_layers", "one_layer"):
            ms, (low, high) = r[which]["ms"], r[which]["middle_half"]
            lines.append(
                f"| {r['tokens']:,} | {which.replace('_', ' ')} | {ms['kernel']:.3f} "
                f"| {ms['gqa']:.3f} | {ms['repeat']:.3f} | {r[which]['times_faster']:.1f} "
                f"({low:.1f} to {high:.1f}) | {ms['append']:.3f} |"
            )
    writes = ", ".join(f"{name} {us:.1f}" for name, us in result["writing_us"].items())
    lines += [
        "",
        "One layer of SmolLM2-135M, one query, one thread; time of the processor, medians of "
        "rounds that take turns, on a machine that others used: ratios say more than times. Kernel "
        f"for {result['level']}, {8 * BYTES / (2 * H * D):.2f} bits a number with scales; error to "
        f"float64 up to {max(r['error'] for r in result['rows']):.1e}. Writing, in microseconds a "
        f"token: {writes}. Torch {result['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


BYTES = 2 * H * (sum(BITS) + 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="the shortest only; nothing written")
    given = parser.parse_args()
    if not row_kernel.available():
        raise SystemExit(f"no compiled kernel: {native.reason()}")
    torch.set_num_threads(1)
    rows = []
    for n, layers in list(LENGTHS.items())[: 1 if given.smoke else None]:
        rows.append(length_row(n, layers, 3 if given.smoke else 25))
        print(json.dumps(rows[-1]), flush=True)
    result: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0], **environment(torch.device("cpu")),
        "level": LEVELS[row_kernel.level()], "rows": rows,
        "writing_us": writing(3 if given.smoke else 25),
    }  # fmt: skip
    page = table(result)
    print(page)
    if not given.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "attention_kernel.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "attention_kernel.md").write_text(page)


if __name__ == "__main__":
    main()
