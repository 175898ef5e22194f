"""Does giving freed memory back between phases lower what a process holds?

A Llama is trained for some steps, evaluated on a larger batch, and its weights are copied as a
background save would: three phases that want memory of other sizes, round after round. In some
processes `shoestring.release()` is called between them. The resident set is read from the system
at the end of every phase and at its highest. Each row is a process of its own; with the default
allocator of glibc and with the library's settings of it. Writes results/release.json and .md.

    python benchmarks/release/run.py [--smoke]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "planner"))
from models import llama, llama_batch
from shoestring.allocator import SETTINGS, release
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
ROWS = [
    (allocator, releases)
    for allocator in ("default", "tuned")
    for releases in (False, True)
]  # fmt: skip


def status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{field}:")[2].split()[0]) * 1024


def phases(*, releases: bool, smoke: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    vocabulary = 256 if smoke else 8192
    shape = {"depth": 2, "width": 32} if smoke else {"depth": 6, "width": 256}
    model = llama(**shape, vocabulary=vocabulary)
    few, many = (llama_batch(r, 32 if smoke else 256, vocabulary) for r in (2, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train() -> None:
        for _ in range(3):
            model(**few).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def evaluate() -> None:
        with torch.no_grad():
            float(model(**many).loss)

    def save() -> None:
        copies = [p.detach().clone() for p in model.parameters()]
        del copies

    train()  # states exist, kernels are warm
    held = sum(p.nbytes for p in model.parameters()) * 3
    before = status("VmRSS")
    ends: dict[str, list[int]] = {"train": [], "evaluate": [], "save": []}
    taken = []
    for _ in range(3):
        for name, phase in (("train", train), ("evaluate", evaluate), ("save", save)):
            phase()
            if releases:
                started = time.perf_counter()
                release()
                taken.append(time.perf_counter() - started)
            ends[name].append(status("VmRSS"))
    return {
        "live_bytes": held, "before_bytes": before, "peak_bytes": status("VmHWM"),
        "after": {name: statistics.median(found) for name, found in ends.items()},
        "release_seconds": statistics.median(taken) if taken else None,
    }  # fmt: skip


def one(allocator: str, *, releases: bool, smoke: bool) -> dict[str, Any]:
    """A row, in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k not in SETTINGS} | {"OMP_NUM_THREADS": "1"}
    env |= SETTINGS if allocator == "tuned" else {}
    command = [sys.executable, __file__, "--row", *["--releases"] * releases, *["--smoke"] * smoke]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return {"allocator": allocator, "releases": releases, **json.loads(done.stdout)}


def table(result: dict[str, Any]) -> str:
    lines = [
        "| allocator | between phases | after training MB | after evaluation MB | after a copy MB "
        "| highest MB | ms a call |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in result["rows"]:
        called = f"{r['release_seconds'] * 1e3:.1f}" if r["releases"] else ""
        after = " | ".join(f"{r['after'][n] / 1e6:.0f}" for n in ("train", "evaluate", "save"))
        lines.append(
            f"| {r['allocator']} | {'release()' if r['releases'] else 'nothing'} | {after} "
            f"| {r['peak_bytes'] / 1e6:.0f} | {called} |"
        )
    lines += [
        "",
        f"Resident set of the whole process (libraries included), medians of three rounds; tensors "
        f"that stay alive: {result['rows'][0]['live_bytes'] / 1e6:.0f} MB; "
        f"torch {result['versions']['torch']}, {result['hardware']['device']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--releases", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(phases(releases=given.releases, smoke=given.smoke)))
        return
    result: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0], **environment(torch.device("cpu")),
        "rows": [one(a, releases=r, smoke=given.smoke) for a, r in ROWS],
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    name = "smoke" if given.smoke else "release"
    (given.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (given.out / f"{name}.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
