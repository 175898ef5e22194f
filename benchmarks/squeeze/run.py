"""What does keeping saved activations at 8 or 4 bits save, and what does it do to the gradient?

4 blocks of width 256 (4 heads, MLP 4 x, vocabulary 1024) on 4 x 256 tokens, float32: fresh weights,
and the same network after 100 updates on the standard library's source. Peak bytes are those above
weights and gradients, which exist before the step, counted on real tensors and predicted on fake
ones. The gradient's error is relative to keeping everything (L2 over all parameters), over several
seeds of weights, batch and rounding: median and range. Beside it: plain stochastic rounding (the
dither not taken off), offload, and recompute.
How the error of a mean of R draws falls shows whether there is a bias.
Writes results/squeeze.json and the tables made of it, results/squeeze.md and results/draws.md.
"""

import argparse
import contextlib
import json
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoestring.meter import Meter
from shoestring.methods import apply_spans
from shoestring.ops import group_quant
from shoestring.planner import simulate
from shoestring.stack import Span, Stack
from shoestring.training.receipt import environment

# B batch, T tokens, D width, H heads, V vocabulary
RESULTS = Path(__file__).parent / "results"
B, T, D, H, V, LAYERS = 4, 256, 256, 4, 1024, 4
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "keep": ("keep", {}),
    "squeeze, 8 bits": ("squeeze", {"bits": 8}),
    "squeeze, mixed": ("squeeze", {"bits": "mixed"}),
    "squeeze, 4 bits": ("squeeze", {"bits": 4}),
    "squeeze, 4 bits, groups of 64": ("squeeze", {"bits": 4, "group": 64}),
    "stochastic rounding, 8 bits": ("squeeze", {"bits": 8}),
    "stochastic rounding, 4 bits": ("squeeze", {"bits": 4}),
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
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.norm = nn.Embedding(V, D), nn.LayerNorm(D)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(D, V, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        loss = F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())
        return argparse.Namespace(loss=loss)


def random_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, T + 1), generator=generator)
    return {"ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def source_batches(seed: int) -> Iterator[dict[str, Tensor]]:
    """Pieces of the standard library's source, a byte a token."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(text) - T - 1, (B,), generator=generator).tolist()
        ids = torch.stack([text[s : s + T + 1] for s in starts]).long()
        yield {"ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def trained(seed: int, updates: int) -> tuple[Net, dict[str, Tensor], float]:
    """The network after so many updates, a batch it has not seen, and its loss there."""
    net, batches = Net(seed), source_batches(seed)
    adamw = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    for _ in range(updates):
        adamw.zero_grad()
        net(**next(batches)).loss.backward()
        adamw.step()
    batch = next(batches)
    with torch.no_grad():
        return net, batch, float(net(**batch).loss)


@contextlib.contextmanager
def another_rounding(name: str) -> Iterator[None]:
    """What is compared with, made of our own kernel."""
    dequantize, dither = group_quant.dequantize, group_quant._dither

    def dither_left(packed: Any) -> Tensor:
        group_quant._dither = lambda key, first, count: torch.full((count,), 0.5)
        try:
            return dequantize(packed)
        finally:
            group_quant._dither = dither

    if name.startswith("stochastic"):
        group_quant.dequantize = dither_left
    try:
        yield
    finally:
        group_quant.dequantize = dequantize


@contextlib.contextmanager
def running(net: nn.Module, name: str) -> Iterator[None]:
    method, settings = WAYS[name]
    stack = Stack.of(net)
    apply_spans(stack, [Span(0, len(stack), method, settings)])
    try:
        with another_rounding(name):
            yield
    finally:
        stack.restore()


def gradient(net: nn.Module, batch: dict[str, Tensor], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    net.zero_grad(set_to_none=True)
    net(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def peak_bytes(name: str) -> tuple[int, int]:
    """(measured, predicted) above weights and gradients."""
    net, batch = Net(), random_batch(0)
    predicted = simulate(net, batch, apply=lambda twin: put(twin, name), accumulate=2, steps=1)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    with running(net, name), Meter(net) as meter:
        net(**batch).loss.backward()
    fixed = sum(2 * p.nbytes for p in net.parameters()) + sum(t.nbytes for t in batch.values())
    return meter.peak_bytes - fixed, predicted_beyond(predicted, fixed)


def put(twin: nn.Module, name: str) -> None:
    method, settings = WAYS[name]
    stack = Stack.of(twin)
    apply_spans(stack, [Span(0, len(stack), method, settings)])


def predicted_beyond(profile: Any, fixed: int) -> int:
    """The highest point of the backward passes of two accumulated ones: gradients exist then."""
    before_step = [count for phase, count in profile.timeline if phase != "optimizer step"]
    return max(before_step) - fixed


def seconds(rounds: int) -> dict[str, float]:
    """Of one forward and backward, the median of interleaved rounds (wall time)."""
    net, batch = Net(), random_batch(0)
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, times in taken.items():
            with running(net, name):
                started = time.perf_counter()
                net(**batch).loss.backward()
                times.append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def errors(seeds: int, updates: int) -> dict[str, Any]:
    """Per state of the network and way: the error of every seed."""
    found: dict[str, dict[str, list[float]]] = {
        state: {name: [] for name in WAYS} for state in ("fresh", "trained")
    }
    losses = []
    for seed in range(seeds):
        net, batch, loss = trained(seed, updates)
        losses.append(loss)
        for state, (model, data) in {
            "fresh": (Net(seed), random_batch(seed)), "trained": (net, batch),
        }.items():  # fmt: skip
            exact = gradient(model, data)
            for name in WAYS:
                with running(model, name):
                    found[state][name].append(error(gradient(model, data, seed), exact))
    return {"errors": found, "trained_losses": losses}


def mean_of_draws(draws: list[int], updates: int) -> dict[str, dict[str, list[float]]]:
    """Error of the mean of the first R draws, for each R, on the fresh and the trained network."""
    net, batch, _ = trained(0, updates)
    found: dict[str, dict[str, list[float]]] = {}
    for state, (model, data) in {
        "fresh": (Net(), random_batch(0)), "trained": (net, batch),
    }.items():  # fmt: skip
        exact = gradient(model, data)
        for name in ("squeeze, 8 bits", "squeeze, mixed", "squeeze, 4 bits"):
            total, at = torch.zeros_like(exact, dtype=torch.float64), []
            with running(model, name):
                for draw in range(1, draws[-1] + 1):
                    total += gradient(model, data, draw)
                    if draw in draws:
                        at.append(error((total / draw).float(), exact))
            found.setdefault(state, {})[name] = at
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one seed, nothing written")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=100)
    arguments = parser.parse_args()
    seeds, updates, draws, rounds = arguments.seeds, arguments.updates, [1, 4, 16, 64], 7
    if arguments.smoke:
        seeds, updates, draws, rounds = 1, 1, [1, 2], 1
    torch.set_num_threads(1)
    bytes_of = {name: peak_bytes(name) for name in WAYS}
    times = seconds(rounds)
    result = {
        "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
        "config": {"layers": LAYERS, "batch": [B, T], "width": D, "heads": H, "vocabulary": V,
                   "seeds": seeds, "updates": updates, "draws": draws, "rounds": rounds},
        **environment(torch.device("cpu")),
        "peak_bytes": {name: measured for name, (measured, _) in bytes_of.items()},
        "predicted_bytes": {name: predicted for name, (_, predicted) in bytes_of.items()},
        "seconds": times,
        **errors(seeds, updates),
        "mean_of_draws": mean_of_draws(draws, updates),
    }  # fmt: skip
    print(table(result), draws_table(result), sep="\n")
    if not arguments.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "squeeze.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "squeeze.md").write_text(table(result))
        (RESULTS / "draws.md").write_text(draws_table(result))


def spread(values: list[float]) -> str:
    if max(values) == 0:
        return "0"
    return f"{statistics.median(values):.2%} ({min(values):.2%} to {max(values):.2%})"


def table(result: dict[str, Any]) -> str:
    lines = [
        "| what is saved | peak MB | predicted | gradient error, fresh | trained | time x keep |",
        "|---|---|---|---|---|---|",
    ]
    for name in WAYS:
        measured, predicted = result["peak_bytes"][name], result["predicted_bytes"][name]
        lines.append(
            f"| {name} | {measured / 1e6:.2f} | {predicted / measured - 1:+.2%} "
            f"| {spread(result['errors']['fresh'][name])} "
            f"| {spread(result['errors']['trained'][name])} "
            f"| {result['seconds'][name] / result['seconds']['keep']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draws_table(result: dict[str, Any]) -> str:
    draws = result["config"]["draws"]
    lines = [
        "| mean of R draws | " + " | ".join(f"R = {r}" for r in draws) + " |",
        "|---" * (len(draws) + 1) + "|",
    ]
    for state, ways in result["mean_of_draws"].items():
        for name, at in ways.items():
            lines.append(f"| {name}, {state} | " + " | ".join(f"{e:.3%}" for e in at) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
