"""How large is the report of a long run, and how soon is it open?

A record of 100,000 updates is made up in the format that a run leaves (an evaluation and a sample
every 1,000 updates, a step of 600 instants), for one run and for four laid over one another.
Stored: seconds to write the page, its bytes, and the seconds until Chromium has loaded and
painted it, the median of 5 times at laptop and at phone width. Writes results/report.json and
results/report.md.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from browser import Browser, find_browser

from shoestring.report import write_report
from shoestring.training.receipt import environment

QUESTION = "How large is the report of a long run, and how soon is it open?"
RESULTS = Path(__file__).parent / "results"
SEED = 0
MIB = 2**20
MOST_BYTES, MOST_SECONDS = 5_000_000, 2.0
WIDTHS = {"laptop": 1280, "phone": 390}
BLOCKS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a short record, nothing written")
    arguments = parser.parse_args()
    updates, times = (2_000, 1) if arguments.smoke else (100_000, 5)
    program = find_browser()
    with tempfile.TemporaryDirectory() as folder:
        runs = [made_up(Path(folder) / f"run-{seed}", updates, seed) for seed in range(4)]
        rows = [measure(runs[:count], Path(folder) / "page.html", times) for count in (1, 4)]
    answer = {
        "question": QUESTION,
        "config": {"updates": updates, "times": times, "widths": WIDTHS, "blocks": BLOCKS},
        "seed": SEED,
        "browser": version(program) if program else None,
        **environment(torch.device("cpu")),
        "rows": rows,
    }
    print(table(answer))
    if not arguments.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "report.json").write_text(json.dumps(answer, indent=1) + "\n")
        (RESULTS / "report.md").write_text(table(answer))


def version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def measure(runs: list[Path], page: Path, times: int) -> dict[str, Any]:
    """Write the page of these runs and open it."""
    started = time.perf_counter()
    write_report(runs, page)
    row: dict[str, Any] = {
        "runs": len(runs),
        "write_seconds": time.perf_counter() - started,
        "bytes": page.stat().st_size,
        "record_bytes": sum((run / "metrics.jsonl").stat().st_size for run in runs),
    }
    if find_browser() is None:
        return row | {"open_seconds": None, "errors": None}
    opened: dict[str, list[float]] = {}
    with Browser() as browser:
        browser.open(page)  # the browser itself has settled
        for name, width in WIDTHS.items():
            browser.look(width=width)
            opened[name] = [browser.open(page) for _ in range(times)]
        errors = list(browser.errors)
    row["open_seconds"] = {name: statistics.median(each) for name, each in opened.items()}
    return row | {"open_seconds_all": opened, "errors": errors}


# ---- a run that never was -----------------------------------------------------------------------


def made_up(directory: Path, updates: int, seed: int) -> Path:
    """A run directory with a record of so many updates."""
    directory.mkdir()
    draw = random.Random(SEED + seed)
    with (directory / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(updates + 1):
            for event in events(step, updates, draw, seed):
                file.write(json.dumps(event) + "\n")
    peak = 2048 * MIB
    held = {
        "weights": 480 * MIB,
        "optimizer": 960 * MIB,
        "saved": 440 * MIB,
        "transient": 168 * MIB,
    }
    plan = {
        "format": 1, "model": "GPT", "blocks": BLOCKS, "budget_bytes": 2200 * MIB,
        "peak_bytes": peak, "instant": "loss backward", "step_seconds": 0.25, "by_category": held,
        "spans": [{"start": block, "stop": block + 1, "method": ("keep", "recompute")[block % 2],
                   "config": {}} for block in range(BLOCKS)],
        "patches": [], "rows": [],
    }  # fmt: skip
    memory = {"measured": instants(draw), "predicted": instants(draw)}
    receipt = {
        "status": "finished", "steps": updates, "seed": seed,
        "model": {"name": "GPT", "parameters": 124_000_000, "rule": "residual"},
        "memory": {"budget_bytes": 2200 * MIB, "promised_bytes": peak, "measured_bytes": peak,
                   "promised_by_category": held, "measured_by_category": held},
        "seconds": {"promised_step": 0.25, "measured_step": 0.24, "total": 0.24 * updates},
        "quality": {"before": score(0, updates, seed), "after": score(updates, updates, seed)},
    }  # fmt: skip
    for name, content in (("plan", plan), ("receipt", receipt), ("memory", memory)):
        (directory / f"{name}.json").write_text(json.dumps(content))
    (directory / "config.toml").write_text(f"[run]\nsteps = {updates}\nseed = {seed}\n")
    return directory


def score(step: int, updates: int, seed: int) -> dict[str, float]:
    nats = 3.0 + 0.1 * seed + 7.8 * math.exp(-12 * step / updates)
    return {"nats_per_token": nats, "bits_per_byte": nats / 2.7, "tokens": 10_000, "bytes": 39_000}


def events(step: int, updates: int, draw: random.Random, seed: int) -> list[dict[str, Any]]:
    """What the loop writes for one update."""
    found: list[dict[str, Any]] = []
    if step:
        loss = score(step, updates, seed)["nats_per_token"] + draw.gauss(0, 0.12)
        if draw.random() < 1e-4:
            loss = draw.uniform(20, 400)  # a spike, as real runs have them
        tracked = step <= 2 or step % 100 == 0
        found.append({
            "event": "step", "step": step, "loss": loss, "lr": 1e-3 * (1 - step / updates),
            "norm": draw.lognormvariate(0, 0.4), "tokens": 4096,
            "tokens_per_s": draw.gauss(17_000, 900), "seconds": draw.gauss(0.24, 0.01),
            "peak_bytes": 2048 * MIB if tracked else None,
            "by_category": {"weights": 500 * MIB, "saved": 900 * MIB} if tracked else None,
        })  # fmt: skip
    if step % 1000 == 0:
        found.append({"event": "evaluation", "step": step, **score(step, updates, seed)})
        words = " ".join(draw.choices(["def", "return", "x", "=", "(", ")", "<b>", "&"], k=80))
        found.append({"event": "sample", "step": step, "prompt": "def main(", "text": words})
    return found


def instants(draw: random.Random) -> dict[str, Any]:
    """A step of 600 instants."""
    rise = [min(at, 600 - at) / 300 for at in range(600)]
    rows = {
        "weights": [480 * MIB] * 600,
        "optimizer": [960 * MIB] * 600,
        "gradients": [int(480 * MIB * max(0, at - 300) / 300) for at in range(600)],
        "saved": [int(440 * MIB * share) for share in rise],
        "transient": [int(draw.uniform(0, 120) * MIB) for _ in range(600)],
    }
    phases = [["forward", 0], ["loss", 290], ["loss backward", 300], ["backward", 320],
              ["optimizer step", 590]]  # fmt: skip
    return {"instants": 60_000, "is_cut": False, "peak_bytes": 0, "at": list(range(600)),
            "phases": phases, "bytes": rows}  # fmt: skip


# ---- the table ----------------------------------------------------------------------------------


def table(answer: dict[str, Any]) -> str:
    updates = answer["config"]["updates"]
    lines = [
        f"| runs of {updates:,} updates | their metrics MB | written in s | page MB | opens in s, "
        "laptop | opens in s, phone |",
        "|---|---|---|---|---|---|",
    ]
    for row in answer["rows"]:
        opened = row["open_seconds"] or {}
        shown = [f"{opened[name]:.2f}" if name in opened else "-" for name in WIDTHS]
        lines.append(
            f"| {row['runs']} | {row['record_bytes'] / 1e6:.0f} | {row['write_seconds']:.1f} "
            f"| {row['bytes'] / 1e6:.2f} | {' | '.join(shown)} |"
        )
    where = f"{answer['browser'] or 'no Chromium'}, {answer['hardware']['device']}"
    bar = f"The bar: under {MOST_BYTES / 1e6:.0f} MB, open in under {MOST_SECONDS:.0f} s."
    return "\n".join([*lines, "", f"{bar} {where}, {answer['hardware']['cores']} cores."]) + "\n"


if __name__ == "__main__":
    main()
