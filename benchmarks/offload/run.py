"""What does moving saved activations to a disk save, and what does it cost?

12 blocks (attention, MLP) of width 256 on 8 x 256 tokens, float32, forward and backward, each way
in a process of its own with the tuned allocator and one thread: kept, recomputed, and offloaded to
a file (all that is saved; the input of blocks that are run again). Bytes are those beyond weights
and gradients; RSS is what the system saw above the start; seconds are of the processor (the least
of several rounds), with the part of them that went into writing and reading. Where the disk does
not keep up, waiting for it comes on top.
Writes results/offload.json and the table made of it, results/offload.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring import mapped, spill
from shoestring.allocator import tuned_environment
from shoestring.meter import Meter
from shoestring.methods import apply_spans
from shoestring.stack import Span, Stack
from shoestring.training.receipt import environment

# B batch, T tokens, D width, H heads
RESULTS = Path(__file__).parent / "results"
B, T, D, H, LAYERS = 8, 256, 256, 4, 12
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "keep": ("keep", {}),
    "recompute": ("recompute", {}),
    "offload, saved": ("offload", {"what": "saved"}),
    "offload, input": ("offload", {"what": "input"}),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        parts = (p.view(*x.shape[:2], H, -1) for p in self.qkv(self.norm1(x)).chunk(3, -1))
        q, k, v = (p.transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(D, D)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Timed:
    """Seconds spent inside a function of SpillFile, and the bytes it moved."""

    def __init__(self, name: str) -> None:
        self.seconds, self.nbytes = 0.0, 0
        inner = getattr(spill.SpillFile, name)

        def timed(file: Any, first: int, flat: Tensor) -> None:
            started = time.process_time()
            inner(file, first, flat)
            self.seconds += time.process_time() - started
            self.nbytes += flat.nbytes

        setattr(spill.SpillFile, name, timed)


def one(name: str, layers: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    method, settings = WAYS[name]
    net, x = Net(layers), torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))
    stack = Stack.of(net)
    apply_spans(stack, [Span(0, layers, method, settings)])
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net(x).backward()  # libraries and threads have what they take for themselves
    start = rss_now()
    with Meter(net) as meter:
        net(x).backward()
    result = {
        "peak_bytes": meter.peak_bytes - meter.baseline_bytes,
        "retained_bytes": meter.retained_bytes,
        "rss_peak_bytes": None if meter.rss_peak_bytes is None else meter.rss_peak_bytes - start,
        "gradient": float(sum(p.grad.double().square().sum() for p in net.parameters())),
    }
    write, read = Timed("write"), Timed("read")
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        net(x).backward()
        taken.append(time.process_time() - started)
    return {
        **result,
        "seconds": min(taken),
        "mean_seconds": sum(taken) / rounds,
        "write_seconds": write.seconds / rounds,
        "read_seconds": read.seconds / rounds,
        "written_bytes": write.nbytes // rounds,
        "read_bytes": read.nbytes // rounds,
        "file_system": mapped.filesystem(mapped.spill_directory()),
    }  # fmt: skip


def rss_now() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two blocks, nothing written")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one", help="one way, as JSON on standard output")
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.layers, arguments.rounds)))
        return
    layers, rounds = (2, 1) if arguments.smoke else (arguments.layers, arguments.rounds)
    rows = {}
    for name in WAYS:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name, "--layers", str(layers), "--rounds",
             str(rounds)],
            env={**os.environ, **tuned_environment(), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, check=True, text=True,
        )  # fmt: skip
        rows[name] = json.loads(done.stdout)
    if len({row.pop("gradient") for row in rows.values()}) != 1:
        raise SystemExit("the gradients differ")
    result = {
        "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
        "config": {"layers": layers, "batch": [B, T], "width": D, "heads": H, "rounds": rounds},
        "seed": 0,
        **environment(torch.device("cpu")),
        "rows": rows,
    }
    result["hardware"] |= {"threads": 1, "allocator": tuned_environment()}
    print(table(rows))
    if not arguments.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "offload.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "offload.md").write_text(table(rows))


def table(rows: dict[str, Any]) -> str:
    lines = [
        "| blocks | held from forward MB | peak MB | RSS peak MB | written MB | CPU time x keep "
        "| of it writing, reading |",
        "|---|---|---|---|---|---|---|",
    ]
    keep = rows["keep"]["seconds"]
    for name, row in rows.items():
        rss = row["rss_peak_bytes"]
        shares = [row[f"{verb}_seconds"] / row["mean_seconds"] for verb in ("write", "read")]
        lines.append(
            f"| {name} | {row['retained_bytes'] / 1e6:.1f} | {row['peak_bytes'] / 1e6:.1f} "
            f"| {'-' if rss is None else f'{rss / 1e6:.0f}'} | {row['written_bytes'] / 1e6:.0f} "
            f"| {row['seconds'] / keep:.2f} | {shares[0]:.0%}, {shares[1]:.0%} |"
        )
    system = rows["keep"]["file_system"]
    lines += ["", f"File system: {system}; processor seconds for keep: {keep:.2f}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
