"""What does slicing the MLPs save in bytes, and what does it cost in seconds and operations?

24 blocks (attention, MLP) of width 256 on 8 x 256 tokens, all kept, recomputed block by block, and
reversible; whole MLPs, ours in 4 slices, and the same 4 slices as nested checkpoints.
Bytes are those beyond weights, gradients and the input, from one step on fake tensors. Operations
and CPU seconds (one thread, best of interleaved rounds) are of the same with 4 blocks.
Writes results/chunked_mlp.json and the table made of it, results/chunked_mlp.md.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from shoestring.meter import Meter
from shoestring.methods.chunked_mlp import ChunkedMlpConfig, slice_blocks
from shoestring.methods.reversible import ReversibleStack
from shoestring.training.receipt import environment

# B batch, T tokens, D width, H heads
RESULTS = Path(__file__).parent / "results"
B, T, D, H = 8, 256, 256, 4
MODES = ("kept", "recomputed", "reversible")
WAYS = ("whole", "4 slices", "4 nested checkpoints")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        parts = (p.view(*x.shape[:2], H, -1) for p in self.qkv(self.norm(x)).chunk(3, -1))
        q, k, v = (p.transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class NestedMlp(Mlp):
    """The obvious way: one checkpoint a slice."""

    def forward(self, x: Tensor) -> Tensor:
        run = super().forward
        parts = [
            checkpoint(run, s, use_reentrant=False, preserve_rng_state=False)
            for s in x.flatten(0, -2).chunk(4)
        ]
        return torch.cat(parts).view_as(x)


class Block(nn.Module):
    def __init__(self, mlp: type[Mlp]) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Net(nn.Module):
    """Input layer, blocks, norm, mean of squares."""

    def __init__(self, mode: str, way: str, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mode = mode
        self.first, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        mlp = NestedMlp if way == "4 nested checkpoints" else Mlp
        self.blocks = nn.ModuleList(Block(mlp) for _ in range(layers))
        if way == "4 slices":
            slice_blocks(list(self.blocks), ChunkedMlpConfig(slices=4))
        if mode == "reversible":
            halves = [half for block in self.blocks for half in (block.attention, block.mlp)]
            self.stack = ReversibleStack(halves)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.mode == "reversible":
            p, q = self.stack(x, x)
            x = 0.5 * (p + q)
        elif self.mode == "recomputed":
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        else:
            for block in self.blocks:
                x = block(x)
        return self.norm(x).square().mean()


def measured_bytes(mode: str, way: str, layers: int) -> dict[str, Any]:
    with FakeTensorMode():
        net, x = Net(mode, way, layers), torch.randn(B, T, D)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        with Meter(net) as meter:
            net(x).backward()
    return {
        "peak_bytes": meter.peak_bytes - meter.baseline_bytes,
        "retained_bytes": meter.retained_bytes,
        "operator_at_peak": meter.instant_operator,
    }


def timed(layers: int, rounds: int) -> dict[tuple[str, str], dict[str, float]]:
    torch.set_num_threads(1)
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))
    nets = {(mode, way): Net(mode, way, layers) for mode in MODES for way in WAYS}
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key, net in nets.items():
        net(x).backward()
        with FlopCounterMode(display=False) as counter:
            net(x).backward()
        found[key] = {"operations": counter.get_total_flops(), "seconds": float("inf")}
    for _ in range(rounds):
        for key, net in nets.items():
            start = time.process_time()
            net(x).backward()
            found[key]["seconds"] = min(found[key]["seconds"], time.process_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two blocks, nothing written")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    layers, small, rounds = (2, 1, 1) if arguments.smoke else (24, 4, arguments.rounds)
    times = timed(small, rounds)
    plain = times["kept", "whole"]
    rows = {
        f"{mode}, {way}": {
            **measured_bytes(mode, way, layers),
            "operations_x": times[mode, way]["operations"] / plain["operations"],
            "seconds": times[mode, way]["seconds"],
            "seconds_x": times[mode, way]["seconds"] / plain["seconds"],
        }
        for mode in MODES
        for way in WAYS
    }
    result = {
        "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
        "config": {"layers": layers, "timed_layers": small, "batch": [B, T], "width": D},
        "seed": 0,
        **environment(torch.device("cpu")),
        "rows": rows,
    }
    if not arguments.smoke:
        (RESULTS / "chunked_mlp.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "chunked_mlp.md").write_text(table(rows))


def table(rows: dict[str, Any]) -> str:
    lines = [
        "| blocks, MLP | peak MB | held from forward MB | operations x | CPU time x |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['peak_bytes'] / 1e6:.1f} | {row['retained_bytes'] / 1e6:.1f} | "
        f"{row['operations_x']:.3f} | {row['seconds_x']:.2f} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
