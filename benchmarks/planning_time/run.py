"""How long does planning take, and what does the page with every budget add?

Plans a Llama of 12 and of 32 blocks from its config alone, for bytes only and with seconds, and
then makes its page. Each case runs in a process of its own, so that none finds what another has
warmed up; what a process spends on importing is not counted.

    python benchmarks/planning_time/run.py [--smoke]

Writes results/planning_time.json, results/planning_time.md, and results/sweep.json, the plans of
the 12 blocks that docs/budget-page.png is drawn from (picture.py).
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
from transformers import LlamaConfig

from shoestring.planner import planner_for_config, sweep
from shoestring.report.budget import budget_page
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
QUESTION = "How long does planning take, and what does the page with every budget add?"
SHAPE = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688,
         "num_attention_heads": 4}  # fmt: skip
BATCH, LENGTH = 8, 256
OVER_SMALLEST = 1.5
"""The budget that is planned for, over the smallest that works."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one small case, nothing written")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        blocks, timed = arguments.case.split(",")
        print(json.dumps(case(int(blocks), timed == "timed")))
        return
    depths = (2,) if arguments.smoke else (12, 32)
    rows = [in_a_process(blocks, timed) for blocks in depths for timed in (False, True)]
    kept = without_instants(
        next(row for row in rows if row["blocks"] == depths[0] and row["timed"])["sweep"]
    )
    for row in rows:
        del row["sweep"]
    answer = {
        "question": QUESTION,
        "config": {**SHAPE, "batch": BATCH, "length": LENGTH, "over_smallest": OVER_SMALLEST},
        "load_average": os.getloadavg()[0],
        **environment(torch.device("cpu")),
        "rows": rows,
    }
    print(table(answer))
    if not arguments.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "planning_time.json").write_text(json.dumps(answer, indent=1) + "\n")
        (RESULTS / "planning_time.md").write_text(table(answer))
        (RESULTS / "sweep.json").write_text(json.dumps(kept) + "\n")


def without_instants(found: dict[str, Any]) -> dict[str, Any]:
    """The sweep with the instants of the plan of its budget only: they are most of the text."""
    shown = max(i for i, p in enumerate(found["plans"]) if p["peak_bytes"] <= found["budget_bytes"])
    for each in (*found["recipes"], *found["plans"][:shown], *found["plans"][shown + 1 :]):
        each["history"] = None
    return found


def in_a_process(blocks: int, timed: bool) -> dict[str, Any]:
    name = f"{blocks},{'timed' if timed else 'bytes'}"
    done = subprocess.run([sys.executable, __file__, "--case", name], check=True,
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def case(blocks: int, timed: bool) -> dict[str, Any]:
    """One model planned, then its page made. Seconds of wall clock and of this process."""
    config = LlamaConfig(**SHAPE, num_hidden_layers=blocks, architectures=["LlamaForCausalLM"])
    watch = Watch()
    plans = planner_for_config(config, batch_size=BATCH, sequence_length=LENGTH, seconds=timed)
    smallest = plans.smallest_bytes
    watch.lap("smallest")
    budget = int(OVER_SMALLEST * smallest)
    plan = plans(budget)
    watch.lap("plan")
    found = sweep(plans, budget)
    watch.lap("sweep")
    page = budget_page(found.data())
    watch.lap("page")
    return {
        "blocks": blocks, "timed": timed, "combinations": len(plans.planner.costs.combinations),
        "choices": found.choices, "plans": len(found.plans), "recipes": len(found.recipes),
        "smallest_bytes": smallest, "budget_bytes": budget, "peak_bytes": plan.peak_bytes,
        "page_bytes": len(page.encode()), **watch.taken,
        "widest_guess": max(abs(p.modelled_bytes / p.peak_bytes - 1) for p in found.plans),
        "sweep": found.data(),
    }  # fmt: skip


class Watch:
    """Laps: the time since the last one."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = {}
        self._at = (time.perf_counter(), time.process_time())

    def lap(self, name: str) -> None:
        now = (time.perf_counter(), time.process_time())
        self.taken[f"{name}_s"] = now[0] - self._at[0]
        self.taken[f"{name}_cpu_s"] = now[1] - self._at[1]
        self._at = now


def table(answer: dict[str, Any]) -> str:
    """Processor seconds: on a shared machine they depend less on the neighbours."""
    lines = [
        "| blocks | timed | choices | a plan, s | the page adds, s | times a plan | page MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in answer["rows"]:
        plan = row["smallest_cpu_s"] + row["plan_cpu_s"]
        page = row["sweep_cpu_s"] + row["page_cpu_s"]
        lines.append(
            f"| {row['blocks']} | {'yes' if row['timed'] else 'no'} | {row['choices']} "
            f"| {plan:.1f} | {page:.1f} | {page / plan:.1f} | {row['page_bytes'] / 1e6:.2f} |"
        )
    hardware = answer["hardware"]
    return "\n".join(lines) + (
        f"\n\nProcessor seconds, {hardware['threads']} thread, on {hardware['device']} "
        f"({hardware['cores']} cores, shared).\n"
    )


if __name__ == "__main__":
    main()
