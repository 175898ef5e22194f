"""How far off is a peak that is predicted without running?

For every case: predicted on a fake twin, measured by the meter over two training steps, measured
by torch's allocator through the profiler (some cases), and two peers: four times the parameters
(the training column of `accelerate estimate-memory`) and torch's MemTracker under fake tensors.

For every configuration: planned from nothing but a function that builds the model (nothing is
run, nothing timed), at the smallest budget and half way to the largest plan; then built, planned
into, trained by the plan's optimizer and backward, and measured.

    python benchmarks/prediction/run.py [--smoke] [--out DIRECTORY]

Writes results/prediction.json, and the tables made of it: prediction.md, configurations.md and
(one line a family) families.md.
"""

import argparse
import contextlib
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import planned
import torch
import transformers
from cases import CASES, Case
from configurations import CONFIGURATIONS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shoestring.meter import Meter, allocator_peak
from shoestring.planner.fake import fake_batch, fake_model, simulate
from shoestring.training.receipt import environment

QUESTION = "How far off is a peak that is predicted without running?"
RESULTS = Path(__file__).parent / "results"
SEED = 0
PROFILED = 8  # every eighth case is also held against the profiler, which is slow
SMOKE = ("Llama, grouped, padded", "GPT-2, dropout, checkpointed")
SMOKE_CONFIGURATIONS = (0, 9, 15)
BAR = (0.0, 3.0)  # percent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few of each, nothing written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    rows = unplanned(SMOKE if arguments.smoke else tuple(CASES), smoke=arguments.smoke)
    places = SMOKE_CONFIGURATIONS if arguments.smoke else range(len(CONFIGURATIONS))
    made = with_plans(places)
    if not arguments.smoke:
        arguments.out.mkdir(parents=True, exist_ok=True)
        answer = {
            "question": QUESTION,
            "config": "cases.py and configurations.py beside this file; two training steps each",
            "seed": SEED,
            **environment(torch.device("cpu")),
            "summary": {**summary(rows), "planned": summary_of_plans(made)},
            "numbers": rows,
            "planned": made,
        }
        (arguments.out / "prediction.json").write_text(json.dumps(answer, indent=1) + "\n")
        (arguments.out / "prediction.md").write_text(table(rows))
        (arguments.out / "configurations.md").write_text(table_of_plans(made))
        (arguments.out / "families.md").write_text(table_of_families(made))


def unplanned(names: Sequence[str], *, smoke: bool) -> dict[str, dict[str, Any]]:
    """Models as they are."""
    rows = {}
    for at, name in enumerate(names):
        rows[name] = row = examine(CASES[name], profiled=smoke or at % PROFILED == 0)
        print(f"{name:34} {row['measured_bytes'] / 1e6:8.2f} MB {row['error_percent']:+.3f} %")
    return rows


def with_plans(places: Sequence[int]) -> list[dict[str, Any]]:
    """Models with plans, two budgets each."""
    rows = []
    for at in places:
        rows += planned.examine(CONFIGURATIONS[at], seed=SEED, profiled=at % PROFILED == 0)
        row = rows[-1]
        print(
            f"{row['configuration']:60} {row['measured_bytes'] / 1e6:8.2f} MB "
            f"{row['error_percent']:+.3f} %"
        )
    return rows


def examine(case: Case, *, profiled: bool) -> dict[str, Any]:
    torch.manual_seed(SEED)
    model, batch = case.build(), case.batch()
    started = time.perf_counter()
    profile = simulate(model, batch, optimizer=case.factory(), **case.settings)
    seconds = time.perf_counter() - started
    tracked = mem_tracker(model, batch, case)
    parameters = sum(each.nbytes for each in model.parameters())
    meter, allocated = measure(model, batch, case, profiled=profiled)
    return {
        "predicted_bytes": profile.peak_bytes,
        "measured_bytes": meter.peak_bytes,
        "allocator_bytes": allocated,
        "error_percent": percent(profile.peak_bytes, meter.peak_bytes),
        "predicted_instant": profile.instant,
        "measured_instant": meter.instant,
        "prediction_seconds": round(seconds, 2),
        "four_times_parameters_bytes": 4 * parameters,
        "four_times_parameters_error_percent": percent(4 * parameters, meter.peak_bytes),
        "mem_tracker_bytes": tracked,
        "mem_tracker_error_percent": (
            None if isinstance(tracked, str) else percent(tracked, meter.peak_bytes)
        ),
    }


def percent(predicted: int, measured: int) -> float:
    return round(100 * (predicted - measured) / measured, 4)


def step(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, case: Case) -> None:
    """One step as `simulate` makes it."""
    settings = case.settings
    autocast, accumulate = settings.get("autocast"), settings.get("accumulate", 1)
    for _ in range(accumulate):
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            loss = model(**batch).loss
        (loss / accumulate if accumulate > 1 else loss).backward()
        del loss
    if "grad_clip" in settings:
        nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(
    model: nn.Module, batch: Any, case: Case, *, profiled: bool
) -> tuple[Meter, int | None]:
    """Two real steps under the meter; and a third under the profiler, plus what existed."""
    model.train()
    optimizer = case.factory()(list(model.parameters()))
    with Meter(model, optimizer) as meter:
        meter.tracker.assign("other", batch.values())
        for _ in range(2):
            step(model, batch, optimizer, case)
    if not profiled:
        return meter, None
    return meter, meter.end_bytes + allocator_peak(lambda: step(model, batch, optimizer, case))


def mem_tracker(model: nn.Module, batch: Any, case: Case) -> int | str:
    """torch's MemTracker over the same two fake steps, or why it gives nothing."""
    from torch.distributed._tools.mem_tracker import MemTracker

    mode = FakeTensorMode()
    twin, fake = fake_model(model, mode), fake_batch(batch, mode)
    with mode:
        twin.train()
        optimizer = case.factory()(list(twin.parameters()))
        tracker = MemTracker()
        tracker.track_external(twin, optimizer)
        try:
            with tracker:
                step(twin, fake, optimizer, case)
                tracker.reset_mod_stats()
                step(twin, fake, optimizer, case)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        peak: int = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
    return peak


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    def spread(name: str) -> list[float]:
        found = [row[name] for row in rows.values() if row[name] is not None]
        return [min(found), max(found)]

    return {
        "cases": len(rows),
        "error_percent": spread("error_percent"),
        "four_times_parameters_error_percent": spread("four_times_parameters_error_percent"),
        "mem_tracker_error_percent": spread("mem_tracker_error_percent"),
        "mem_tracker_failures": sum(isinstance(r["mem_tracker_bytes"], str) for r in rows.values()),
        "allocator_over_measured_bytes": spread_of_allocator(rows),
    }


def spread_of_allocator(rows: dict[str, dict[str, Any]]) -> list[int]:
    gaps = [
        row["allocator_bytes"] - row["measured_bytes"]
        for row in rows.values()
        if row["allocator_bytes"] is not None
    ]
    return [min(gaps), max(gaps)]


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| case | measured MB | predicted | MemTracker, fake | 4 x parameters | instant |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        peer = row["mem_tracker_error_percent"]
        lines.append(
            f"| {name} | {row['measured_bytes'] / 1e6:.2f} | {row['error_percent']:+.2f} % "
            f"| {'fails' if peer is None else f'{peer:+.2f} %'} "
            f"| {row['four_times_parameters_error_percent']:+.1f} % | {row['measured_instant']} |"
        )
    return "\n".join(lines) + "\n"


def summary_of_plans(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    errors = [row["error_percent"] for row in rows]
    inside = [BAR[0] <= error <= BAR[1] for error in errors]
    by_name = {row["configuration"]: True for row in rows}
    for row, good in zip(rows, inside, strict=True):
        by_name[row["configuration"]] &= good
    gaps = [r["allocator_bytes"] - r["measured_bytes"] for r in rows if r["allocator_bytes"]]
    return {
        "configurations": len(by_name), "plans": len(rows),
        "error_percent": [min(errors), statistics.median(errors), max(errors)],
        "bar_percent": BAR, "configurations_in_bar": sum(by_name.values()),
        "plans_in_bar": sum(inside), "plans_within_budget": sum(r["within_budget"] for r in rows),
        "instants_right": sum(r["predicted_instant"] == r["measured_instant"] for r in rows),
        "allocator_over_measured_bytes": [min(gaps), max(gaps)] if gaps else None,
        "methods": {
            name: sum(name in row["methods"] for row in rows)
            for name in sorted({name for row in rows for name in row["methods"]})
        },
    }  # fmt: skip


def table_of_plans(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| configuration | allowed | budget | measured MB | predicted | instant | methods |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['configuration']} | {row['allow']} | {row['budget']} "
        f"| {row['measured_bytes'] / 1e6:.2f} | {row['error_percent']:+.2f} % "
        f"| {row['measured_instant']} | {', '.join(row['methods'])} |"
        for row in rows
    ]
    found = summary_of_plans(rows)
    low, middle, high = found["error_percent"]
    lines += [
        "",
        f"{found['configurations']} configurations, {found['plans']} plans: the prediction is off "
        f"by {low:+.4f} % at least, {middle:+.4f} % in the median, {high:+.4f} % at most; "
        f"{found['configurations_in_bar']} configurations within [0, +3 %], "
        f"{found['plans_within_budget']} plans measured within their budget.",
    ]
    return "\n".join(lines) + "\n"


def table_of_families(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| family | configurations | plans | prediction error | within budget | methods |",
        "|---|---|---|---|---|---|",
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = [row for row in rows if row["family"] == family]
        found = summary_of_plans(mine)
        low, _, high = found["error_percent"]
        lines.append(
            f"| {family} | {found['configurations']} | {len(mine)} | {low:+.2f} .. {high:+.2f} % "
            f"| {found['plans_within_budget']} of {len(mine)} | {', '.join(found['methods'])} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
