"""Run directories written by hand, in the format that a run leaves."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MIB = 2**20
CATEGORIES = {"weights": 4 * MIB, "optimizer": 8 * MIB, "saved": 9 * MIB, "transient": 2 * MIB}
CONFIG = """
[run]
directory = "runs/mine"
steps = 50
budget = "30MiB"
[model]
preset = "tiny"
rule = "residual"
[optim]
lr = 0.001
betas = [0.9, 0.95]
"""


def history() -> dict[str, Any]:
    """A step of ten instants: saved bytes come and go."""
    saved = [0, 2, 4, 6, 9, 9, 6, 4, 2, 0]
    transient = [1, 1, 1, 1, 2, 1, 1, 1, 1, 0]
    return {
        "instants": 10,
        "is_cut": False,
        "peak_bytes": 23 * MIB,
        "at": list(range(10)),
        "phases": [["forward", 0], ["loss backward", 4], ["backward", 5], ["optimizer step", 9]],
        "bytes": {
            "weights": [4 * MIB] * 10,
            "optimizer": [8 * MIB] * 10,
            "saved": [n * MIB for n in saved],
            "transient": [n * MIB for n in transient],
        },
    }


def plan() -> dict[str, Any]:
    return {
        "format": 1,
        "model": "GPT",
        "blocks": 8,
        "budget_bytes": 30 * MIB,
        "peak_bytes": 24 * MIB,
        "by_category": CATEGORIES,
        "instant": "loss backward",
        "step_seconds": 0.2,
        "spans": [
            {"start": 0, "stop": 3, "method": "recompute", "config": {"segments": 1}},
            {"start": 3, "stop": 8, "method": "keep", "config": {}},
        ],
        "patches": [{"method": "chunked_loss", "config": {"chunks": 4}}],
        "rows": [
            {"name": "keep everything", "peak_bytes": 40 * MIB, "seconds": 0.15, "instant": "loss"}
        ],
        "history": history(),
    }


def receipt() -> dict[str, Any]:
    return {
        "status": "finished",
        "error": None,
        "steps": 50,
        "seed": 0,
        "processes": 1,
        "model": {"name": "GPT", "parameters": 493_000, "rule": "residual"},
        "data": {"source": "stdlib", "digest": "77aa", "tokens": 9_183_904, "epochs": 0.5},
        "memory": {
            "budget_bytes": 30 * MIB,
            "promised_bytes": 24 * MIB,
            "measured_bytes": 23 * MIB,
            "promised_by_category": CATEGORIES,
            "measured_by_category": CATEGORIES,
        },
        "seconds": {"promised_step": 0.2, "measured_step": 0.19, "total": 61.0},
        "quality": {"before": score(0), "after": score(50)},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": {"device": "a processor", "cores": 2, "allocator": {"MALLOC_TRIM": "1"}},
    }


def score(step: int) -> dict[str, float]:
    nats = 8.0 - 3.0 * step / 50
    return {"nats_per_token": nats, "bits_per_byte": nats / 2.5, "tokens": 1000, "bytes": 3600}


def metrics(steps: int = 50) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"event": "evaluation", "step": 0, **score(0)}]
    lines.append({"event": "sample", "step": 0, "prompt": "def main(", "text": "argv):\n    pass"})
    lines += [
        {
            "event": "step",
            "step": step,
            "loss": 8.0 - 3.0 * step / steps + 0.1 * math.sin(step),
            "lr": 1e-3,
            "norm": 1.0,
            "tokens_per_s": 5000.0,
            "seconds": 0.2,
            "peak_bytes": 23 * MIB if step <= 2 else None,
        }
        for step in range(1, steps + 1)
    ]
    return [*lines, {"event": "evaluation", "step": steps, **score(50)}]


def files() -> dict[str, str]:
    """Every file of a whole run, by name."""
    return {
        "config.toml": CONFIG,
        "plan.json": json.dumps(plan()),
        "receipt.json": json.dumps(receipt()),
        "memory.json": json.dumps({"measured": history(), "predicted": history()}),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in metrics()),
    }


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Makes a run directory; keywords replace files by name (dots are underscores), None leaves
    one out."""

    def make(name: str = "mine", **changed: str | None) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        whole = files() | {key.replace("_", "."): text for key, text in changed.items()}
        for file, text in whole.items():
            if text is not None:
                (directory / file).write_text(text, encoding="utf-8")
        return directory

    return make
