"""Does the planner keep every budget, and is its choice the best there is?

Sweeps 20 budgets (12 where more methods are on offer) from the smallest feasible to "keep
everything" on G4 (with and without accumulated gradients) and on a Hugging Face Llama, with the
loop as it is and with its optimizer and batch handed over, with unbiased methods, with an
evaluation between steps and a copy that is being saved, and on a reversible network: measured peak
against budget and prediction, predicted seconds, gradients against the unplanned model. Then holds
the plans for six blocks against every schedule there is.

    python benchmarks/planner/run.py [--smoke]

Writes results/planner.json and results/planner.md.
"""

import argparse
import copy
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from every import schedules_ref
from torch import Tensor, nn

from models import PlainGPT, llama, llama_batch, plain_batch, plain_loss
from shoestring.models.gpt import GPT, GPTConfig
from shoestring.planner import Plan, planner
from shoestring.planner.choose import NEAR, Choice, Planner, choice
from shoestring.planner.make import PlanFor
from shoestring.training.receipt import environment
from shoestring.units import format_bytes

RESULTS = Path(__file__).parent / "results"
QUESTION = "Does the planner keep every budget, and is its choice the best there is?"
SEED = 0
BITWISE = ["keep", "recompute"]
IN_SLICES = "the same, loss and MLP in slices allowed"
HANDED_OVER = "the same, optimizer and batch handed over"
UNBIASED = "the same, unbiased methods allowed"
EVALUATED = "the same, an evaluation of 32 rows, saved in the background"
REVERSIBLE = "GPT, reversible, AdamW, optimizer and batch handed over"
BOTH_OVER = ("optimizer", "batch")
OURS = ["recompute", "squeeze", "low_bit_states", "bf16_stochastic", "fused_step", "microbatch"]
Loss = Callable[[nn.Module, Any], Tensor]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """lr 0, so that every step of the sweep has the same weights."""
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)


def reversible(depth: int = 6, width: int = 128, vocabulary: int = 1024) -> GPT:
    """As `llama`, with two streams."""
    return GPT(
        GPTConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=depth,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            rule="leapfrog",
        )
    )  # fmt: skip


def stateless(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def sweep(
    model: nn.Module, batch: Any, loss: Loss, make: Any, budgets: int, accumulate: int = 1,
    allow: str | list[str] = "exact", **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Plan, apply and measure `budgets` budgets on one model. settings: more of `planner`'s."""
    started = time.perf_counter()
    plans = planner(
        model, batch, optimizer=make, loss=loss, accumulate=accumulate, allow=allow, **settings
    )
    low, high = plans.smallest_bytes, plans.planner.curve[-1].peak_bytes
    high = max(high, plans.planner.promise(plans.planner.curve[-1]).peak_bytes)
    expected = gradients(model, batch, loss)
    rows = [
        one(plans, model, batch, loss, accumulate,
            low + (high - low) * k // max(1, budgets - 1), expected)
        for k in range(budgets)
    ]  # fmt: skip
    seconds = [r["predicted_seconds"] for r in rows]
    return {
        "smallest_bytes": low,
        "keep_all_bytes": high,
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "choices_on_the_curve": len(plans.planner.curve),
        "methods": used(rows),
        "rows": rows,
        "all_within_budget": all(r["measured_bytes"] <= r["budget_bytes"] for r in rows),
        "seconds_never_rise": seconds == sorted(seconds, reverse=True),
        "gradients_equal": all(r["gradients_equal"] for r in rows),
        "wall_s": time.perf_counter() - started,
    }


def one(
    plans: PlanFor, model: nn.Module, batch: Any, loss: Loss, accumulate: int, budget: int,
    expected: list[Tensor],
) -> dict[str, Any]:  # fmt: skip
    """One budget: the plan, its measured peak, its gradients."""
    plan = plans(budget)
    before = copy.deepcopy(model.state_dict()) if changes_weights(plan) else {}
    plan.apply(model)
    found = gradients(model, batch, loss, plan)
    equal = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    off = max(
        float((a.float() - b).norm() / b.norm().clamp_min(1e-30))
        for a, b in zip(found, expected, strict=True)
    )
    del found
    optimizer = plan.optimizer(model)
    step = plans.planner.step
    held: list[Tensor] = []  # what a save in the background writes

    def mean(model: nn.Module, batch: Any) -> Tensor:
        value = loss(model, batch)
        return value / accumulate if accumulate > 1 else value

    def train() -> None:
        for _ in range(accumulate):
            plan.backward(model, batch, loss=mean)
        optimizer.step()
        optimizer.zero_grad()
        if step.evaluate is not None:
            evaluate(model, step.evaluate, loss)
        if step.beside:
            held.clear()
            held.extend(copied(model, optimizer))

    checked = plan.verify(train)
    plan.restore(model)
    if before:
        model.load_state_dict(before)
    return {
        "budget_bytes": budget, "predicted_bytes": checked.predicted,
        "measured_bytes": checked.measured, "error": checked.error, "instant": plan.instant,
        "predicted_seconds": plan.step_seconds, "gradients_equal": equal,
        "gradient_error": off,
        "methods": plan.methods,
    }  # fmt: skip


def evaluate(model: nn.Module, batch: Any, loss: Loss) -> None:
    """Scores a batch as an evaluation between steps does."""
    model.eval()
    with torch.no_grad():
        loss(model, batch)
    model.train()


def copied(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What a save in the background writes from."""
    states = [v for state in optimizer.state.values() for v in state.values()]
    for tensor in [*model.state_dict().values(), *states]:
        if isinstance(tensor, Tensor):
            yield tensor.detach().clone()
    yield torch.get_rng_state()


def changes_weights(plan: Plan) -> bool:
    """Whether the model has other weights after the plan than before it."""
    return any(way.promises.changes_weights for way in plan.patches)


def used(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """In how many of the plans each method is."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update({
            f"{m['method']}({m['config']['save']})" if "save" in m["config"] else m["method"]
            for m in row["methods"]
        })  # fmt: skip
    return dict(sorted(counts.items()))


def gradients(model: nn.Module, batch: Any, loss: Loss, plan: Plan | None = None) -> list[Tensor]:
    """Gradients of one pass; the model is left without any."""
    model.zero_grad()
    if plan is None:
        loss(model, batch).backward()
    else:
        plan.backward(model, batch, loss=loss)
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def against_every_schedule(budgets: int, depth: int) -> dict[str, Any]:
    """What `plans(budget)` gives for `depth` blocks, against the best of all schedules with all
    patches: the fastest by the same timings whose simulated peak is within the budget."""
    model = PlainGPT(depth=depth)
    loss: Loss = plain_loss
    plans = planner(model, plain_batch(), loss=loss, optimizer=stateless)
    chosen = plans.planner
    variants = [chosen.costs.variant(p, timed=True) for p in chosen.costs.combinations]
    every = sorted(
        (choice(v, schedule) for v in variants for schedule in schedules_ref(v.chain)),
        key=lambda c: c.seconds,
    )
    low, high = plans.smallest_bytes, chosen.promise(chosen.curve[-1]).peak_bytes
    rows: list[dict[str, Any]] = []
    for k in range(budgets):
        budget = low + (high - low) * k // max(1, budgets - 1)
        found = plans(budget).step_seconds
        assert found is not None
        best = fastest(chosen, every, budget, found)
        rows.append({
            "budget_bytes": budget, "best_seconds": best, "chosen_seconds": found,
            "over_best": found / best - 1,
        })  # fmt: skip
    return {
        "blocks": depth, "schedules": len(every), "patched": len(variants) - 1,
        "simulated": len(chosen._profiles), "rows": rows,
        "worst_over_best": max(r["over_best"] for r in rows),
    }  # fmt: skip


def fastest(chosen: Planner, every: list[Choice], budget: int, found: float) -> float:
    """Seconds of the fastest of `every` that fits, `found` where none is faster than that."""
    for each in every:
        if each.seconds >= found:
            break
        # Further off than this no simulation has been seen to be (see `sweeps`).
        if each.peak_bytes <= budget * (1 + NEAR):
            if chosen.promise(each).peak_bytes <= budget:
                return each.seconds
    return found


def table(result: dict[str, Any]) -> str:
    """The sweeps as Markdown."""
    lines = [
        "| model | budgets | smallest | keep everything | measured within budget | "
        "prediction error | seconds never rise | gradients equal | plans that use |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, s in result["sweeps"].items():
        errors = [r["error"] for r in s["rows"]]
        kept = sum(r["measured_bytes"] <= r["budget_bytes"] for r in s["rows"])
        lines.append(
            f"| {name} | {len(errors)} | {format_bytes(s['smallest_bytes'])} | "
            f"{format_bytes(s['keep_all_bytes'])} | {kept} of {len(errors)} | "
            f"{min(errors):+.2%} .. {max(errors):+.2%} | "
            f"{'yes' if s['seconds_never_rise'] else 'no'} | "
            f"{same_or_error(s)} | {', '.join(f'{m} {n}' for m, n in s['methods'].items())} |"
        )
    b = result["brute_force"]
    lines += [
        "",
        f"{b['blocks']} blocks, {len(b['rows'])} budgets: the plan is at most "
        f"{b['worst_over_best']:.1%} slower than the best of all {b['schedules']} schedules "
        f"({b['simulated']} of them simulated: those that are faster and by the chain model "
        "within 3 % of the budget).",
    ]
    return "\n".join(lines) + "\n"


def same_or_error(swept: dict[str, Any]) -> str:
    """How near the gradients are to those of the model as it is."""
    worst = max(r["gradient_error"] for r in swept["rows"])
    return "bit for bit" if swept["gradients_equal"] else f"to {worst:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny models, three budgets")
    parser.add_argument("--out", type=Path, default=RESULTS)
    smoke, out = (args := parser.parse_args()).smoke, args.out
    torch.manual_seed(SEED)
    budgets, fewer = (3, 3) if smoke else (20, 12)
    gpt: dict[str, Any] = {"depth": 2, "width": 32, "heads": 2} if smoke else {}
    rows = plain_batch(2, 32) if smoke else plain_batch()
    hf: dict[str, Any] = {"depth": 2, "width": 32} if smoke else {"depth": 8}
    hf_rows = llama_batch(2, 32) if smoke else llama_batch()
    more_rows = llama_batch(16, 32) if smoke else llama_batch(32, 128)

    def own(model: nn.Module, batch: Any) -> Tensor:
        value: Tensor = model(**batch).loss
        return value

    result: dict[str, Any] = {
        "question": QUESTION, "config": {"budgets": budgets, "smoke": smoke}, "seed": SEED,
        **environment(torch.device("cpu")),
        "sweeps": {
            "G4, SGD": sweep(PlainGPT(**gpt), rows, plain_loss, stateless, budgets, allow=BITWISE),
            "G4, gradients accumulated": sweep(
                PlainGPT(**gpt), rows, plain_loss, stateless, budgets, accumulate=2, allow=BITWISE
            ),
            "Llama, grouped-query, AdamW": sweep(
                llama(**hf), hf_rows, own, adamw, budgets, allow=BITWISE
            ),
            IN_SLICES: sweep(
                llama(**hf), hf_rows, own, adamw, budgets
            ),
            HANDED_OVER: sweep(
                llama(**hf), hf_rows, own, adamw, fewer, hands_over=BOTH_OVER
            ),
            UNBIASED: sweep(
                llama(**hf), hf_rows, own, adamw, fewer, allow=OURS, hands_over=BOTH_OVER
            ),
            EVALUATED: sweep(
                llama(**hf), hf_rows, own, adamw, fewer, hands_over=("optimizer",),
                evaluate=more_rows, background_save=True,
            ),
            REVERSIBLE: sweep(
                reversible(**hf), hf_rows, own, adamw, fewer, hands_over=BOTH_OVER
            ),
        },
        "brute_force": against_every_schedule(budgets, 3 if smoke else 6),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    name = "smoke" if smoke else "planner"
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{name}.md").write_text(table(result))
    print(table(result))
    assert all(swept["all_within_budget"] for swept in result["sweeps"].values())
    in_slices = result["sweeps"][IN_SLICES]["methods"]
    assert smoke or any(name.startswith("chunked") for name in in_slices), in_slices


if __name__ == "__main__":
    main()
