"""Does a model whose weights alone are three times the budget train, with the same numbers?

A Llama with random weights. Its weights are given, the budget is a third of their bytes. Two jobs:
adapters (LoRA by peft, the base frozen), and full fine-tuning with AdamW. Each is planned for the
budget, with exact methods only, and built outside memory from the start; and, for comparison, runs
in memory, planned for as much as it wants. Every arm is a process of its own; both take the same
steps on the same text (the standard library's source), and the trained weights are compared by
their SHA-256: equal means equal bit for bit.

Reported: promised and measured peak of live tensors, peak of the resident set (anonymous and file
pages apart), seconds a step. Writes results/stream_weights.json and results/stream_weights.md.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from shoestring.allocator import tuned_environment
from shoestring.data import encode, open_source, train_tokenizer
from shoestring.meter import Meter
from shoestring.methods.stream_weights import build_outside
from shoestring.planner import planner
from shoestring.rss import status_bytes
from shoestring.training.receipt import environment
from shoestring.units import format_bytes

RESULTS = Path(__file__).parent / "results"
JOBS = ("adapters", "full")
ARMS = ("streamed", "in memory")
VOCABULARY = 2048
FULL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 20, "heads": 12}
SMOKE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 12, "heads": 4}


def config(smoke: bool) -> LlamaConfig:
    shape = dict(SMOKE if smoke else FULL)
    return LlamaConfig(
        vocab_size=VOCABULARY, num_attention_heads=shape.pop("heads"), tie_word_embeddings=False,
        use_cache=False, **shape,
    )  # fmt: skip


def weight_bytes(shape: LlamaConfig) -> int:
    with torch.device("meta"):
        return sum(p.nbytes for p in LlamaForCausalLM(shape).parameters())


def text(rows: int, tokens: int) -> list[dict[str, Tensor]]:
    """Batches of real text."""
    source, _ = open_source("stdlib").split(0.02)
    tokenizer = train_tokenizer(source, VOCABULARY)
    ids = torch.as_tensor(encode(source, tokenizer).ids[: 64 * rows * tokens].astype("int64"))
    return [{"input_ids": part, "labels": part} for part in ids.view(-1, rows, tokens)]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def digest(model: nn.Module) -> str:
    """Of every weight, by name."""
    found = hashlib.sha256()
    for name, weight in model.state_dict().items():
        found.update(name.encode())
        found.update(weight.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Resident:
    """Peaks of anonymous and file pages of this process, sampled a hundred times a second."""

    def __init__(self) -> None:
        self.peaks = {"RssAnon": 0, "RssFile": 0}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.base = {name: status_bytes(name) for name in self.peaks}

    def __enter__(self) -> "Resident":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            for name in self.peaks:
                self.peaks[name] = max(self.peaks[name], status_bytes(name))


def built(job: str, smoke: bool) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(config(smoke))
    if job == "adapters":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        settings = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
        model = get_peft_model(model, settings)
    return model.train()


def run_arm(
    job: str, arm: str, *, smoke: bool, steps: int, rows: int, tokens: int
) -> dict[str, Any]:
    """One job in one way, in this process."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    batches = text(rows, tokens)
    budget = weight_bytes(config(smoke)) // (2 if smoke else 3)
    before = {name: status_bytes(name) for name in ("RssAnon", "RssFile")}
    with Resident() as resident:
        started = time.monotonic()
        model = build_outside(lambda: built(job, smoke)) if arm == "streamed" else built(job, smoke)
        built_s = time.monotonic() - started
        started = time.monotonic()
        plans = planner(model, batches[0], optimizer=adamw, hands_over=["optimizer"])
        plan = plans(budget if arm == "streamed" else "64 GiB")
        planned_s = time.monotonic() - started
        plan.apply(model)
        optimizer = plan.optimizer(model)
        seconds, losses = [], []

        def step(index: int) -> None:
            started = time.monotonic()
            loss = model(**batches[index % len(batches)]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            seconds.append(time.monotonic() - started)

        with Meter(model, optimizer) as meter:
            for index in range(2):
                step(index)
        seconds.clear()  # counting slows them
        for index in range(2, steps):
            step(index)
    return {
        "job": job, "arm": arm, "budget_bytes": budget if arm == "streamed" else None,
        "promised_bytes": plan.peak_bytes, "measured_bytes": meter.peak_bytes,
        "by_category": meter.by_category, "instant": plan.instant,
        "smallest_bytes": plans.smallest_bytes,
        "resident_anonymous_bytes": resident.peaks["RssAnon"] - before["RssAnon"],
        "resident_file_bytes": resident.peaks["RssFile"] - before["RssFile"],
        "patches": [w.label for w in plan.patches],
        "spans": [f"{s.start}-{s.stop - 1} {s.method}" for s in plan.spans],
        "step_seconds": median(seconds), "build_seconds": built_s, "plan_seconds": planned_s,
        "losses": losses, "digest": digest(model),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }  # fmt: skip


def in_process(job: str, arm: str, settings: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--arm", job, arm, *settings]
    with tempfile.NamedTemporaryFile("r", suffix=".json") as out:
        environment = {**os.environ, **tuned_environment()}
        subprocess.run([*command, "--out", out.name], check=True, env=environment)
        return dict(json.load(out))


def table(result: dict[str, Any]) -> str:
    lines = [
        "| job | where | budget | promised | measured | resident, anonymous | s a step | "
        "same weights after training |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for job in JOBS:
        rows = {r["arm"]: r for r in result["rows"] if r["job"] == job}
        same = rows["streamed"]["digest"] == rows["in memory"]["digest"]
        for arm in ARMS:
            r = rows[arm]
            budget = format_bytes(r["budget_bytes"]) if r["budget_bytes"] else "-"
            equal = ("yes" if same else "**no**") if arm == "streamed" else ""
            lines.append(
                f"| {job} | {arm} | {budget} | {format_bytes(r['promised_bytes'])} "
                f"| {format_bytes(r['measured_bytes'])} "
                f"| {format_bytes(r['resident_anonymous_bytes'])} "
                f"| {r['step_seconds']:.2f} | {equal} |"
            )
    shape = result["shape"]
    lines += [
        "",
        f"Llama, {shape['num_hidden_layers']} layers of width {shape['hidden_size']}, "
        f"{format_bytes(result['weight_bytes'])} of float32 weights, "
        f"{result['rows_a_batch']} x {result['tokens']} tokens, {result['steps']} steps; "
        f"torch {result['environment']['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--arm", nargs=2)
    parser.add_argument("--out")
    given = parser.parse_args()
    if given.arm:
        found = run_arm(
            *given.arm, smoke=given.smoke, steps=given.steps, rows=given.rows, tokens=given.tokens
        )
        Path(given.out).write_text(json.dumps(found))
        return
    settings = [f"--steps={given.steps}", f"--rows={given.rows}", f"--tokens={given.tokens}"]
    settings += ["--smoke"] if given.smoke else []
    rows = [in_process(job, arm, settings) for job in JOBS for arm in ARMS]
    shape = config(given.smoke)
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "environment": environment(torch.device("cpu")),
        "shape": {k: getattr(shape, k) for k in ("hidden_size", "intermediate_size",
                                                "num_hidden_layers", "vocab_size")},
        "weight_bytes": weight_bytes(shape), "rows_a_batch": given.rows, "tokens": given.tokens,
        "steps": given.steps, "rows": rows,
    }  # fmt: skip
    page = table(result)
    print(page)
    if not given.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "stream_weights.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "stream_weights.md").write_text(page)


if __name__ == "__main__":
    main()
