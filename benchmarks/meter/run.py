"""What does measuring cost, and how near is the process to its tensors?

Three parts: the time of a training step with the tracker on, against the same step without it
(medians of interleaved pairs), and what that leaves when one step in 100 is tracked, as the
training loop does; the time of reading the peak resident set, which is done on every step; and
the peak resident set over the tensor peak with and without the allocator settings, each in a
process of its own. Writes results/meter.json and results/meter.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shoestring.allocator import SETTINGS, is_tuned
from shoestring.meter import Meter
from shoestring.rss import RssPeak, status_bytes
from shoestring.training.guard import EVERY
from shoestring.training.receipt import environment

QUESTION = "What does measuring cost, and how near is the process to its tensors?"
RESULTS = Path(__file__).parent / "results"
SEED = 0
SIZES = {
    "4 layers, width 256, 4 x 256 tokens": (4, 256, 4, 256),
    "8 layers, width 128, 2 x 64 tokens": (8, 128, 2, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few repetitions, nothing written")
    parser.add_argument("--resident", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resident:
        print(json.dumps(resident()))
        return
    pairs, processes = (2, 1) if arguments.smoke else (15, 3)
    answer = {
        "question": QUESTION,
        "config": {"models": SIZES, "pairs": pairs, "processes": processes, "every": EVERY},
        "seed": SEED,
        **environment(torch.device("cpu")),
        "time": {name: overhead(size, pairs) for name, size in SIZES.items()},
        "resident": {
            name: [in_a_process(settings) for _ in range(processes)]
            for name, settings in (("glibc default", {}), ("tuned", SETTINGS))
        },
    }
    print(table(answer))
    if not arguments.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "meter.json").write_text(json.dumps(answer, indent=1) + "\n")
        (RESULTS / "meter.md").write_text(table(answer))


def training(
    layers: int, width: int, rows: int, tokens: int
) -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, 1024, (rows, tokens))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, optimizer, step


def overhead(size: tuple[int, int, int, int], pairs: int) -> dict[str, float]:
    """Seconds of a step, alone and tracked, and of reading the peak resident set."""
    model, optimizer, step = training(*size)
    rss = RssPeak()

    def tracked() -> None:
        with Meter(model, optimizer):
            step()

    def read() -> None:
        rss.start()
        rss.read()

    step()
    tracked()
    rows = [[seconds(each) for each in (step, tracked, read)] for _ in range(pairs)]
    alone, with_tracker, reading = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(row[1] / row[0] for row in rows)
    return {
        "step_seconds": alone,
        "tracked_step_seconds": with_tracker,
        "tracked_every_step_percent": 100 * (ratio - 1),
        "resident_read_seconds": reading,
        "sampled_percent": 100 * ((ratio - 1) / EVERY + reading / alone),
    }


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def resident() -> dict[str, Any]:
    """Peak resident bytes above the start of training, over the tensor peak; in this process."""
    model, optimizer, step = training(6, 256, 8, 256)
    # Code is loaded and threads are started by a step of another, tiny model.
    training(1, 64, 1, 8)[2]()
    base = status_bytes("VmRSS")
    with Meter(model, optimizer) as meter:
        for _ in range(3):
            step()
    assert meter.rss_peak_bytes is not None, meter.rss_message
    above = meter.rss_peak_bytes - base
    tensors = meter.peak_bytes - meter.baseline_bytes
    return {
        "tuned": is_tuned(),
        "tensor_peak_bytes": tensors,
        "resident_peak_bytes": above,
        "over_percent": 100 * (above / tensors - 1),
        "resident_after_bytes": status_bytes("VmRSS") - base,
    }


def in_a_process(settings: dict[str, str]) -> dict[str, Any]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, __file__, "--resident"]
    done = subprocess.run(
        command, env={**environ, **settings}, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(answer: dict[str, Any]) -> str:
    lines = [
        "| training step | alone | tracker on every step | one step in "
        f"{EVERY}, resident set on all |",
        "|---|---|---|---|",
    ]
    for name, row in answer["time"].items():
        lines.append(
            f"| {name} | {row['step_seconds'] * 1000:.0f} ms "
            f"| {row['tracked_every_step_percent']:+.0f} % | {row['sampled_percent']:+.2f} % |"
        )
    lines += [
        "",
        "| allocator | tensor peak MB | resident peak over it | resident afterwards MB |",
        "|---|---|---|---|",
    ]
    for name, runs in answer["resident"].items():
        over = ", ".join(f"{run['over_percent']:+.1f} %" for run in runs)
        after = ", ".join(f"{run['resident_after_bytes'] / 1e6:.0f}" for run in runs)
        lines.append(f"| {name} | {runs[0]['tensor_peak_bytes'] / 1e6:.1f} | {over} | {after} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
