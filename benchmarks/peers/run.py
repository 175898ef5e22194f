"""Is a plan ever slower than the recipe that somebody would use by hand, in no more memory?

For every recipe of recipes.py, on two models: its peak is measured, a plan is made for that budget,
and both are run in turn, a step of one beside a step of the other. The peaks are the C allocator's,
of a whole step with weights and states, so kernels' scratch and what other libraries take count
too. The optimizer is left to the plan, a disk is not: no recipe uses one. Exact recipes are held
against exact plans, the one with 8-bit states against plans that may be unbiased. Written: time
of the plan over that of the recipe, median over the rounds and its 95 % interval (of order
statistics). One thread.

    python benchmarks/peers/run.py [--smoke] [--rounds N]

Writes results/peers.json and results/peers.md.
"""

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recipes import RECIPES, UNBIASED, Case, adamw, quiet_compiler
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "planner"))
from models import llama, llama_batch
from shoestring.allocator import tuned_environment
from shoestring.errors import OutOfBudget
from shoestring.meter import allocator_peak
from shoestring.meter.operators import tensors_in
from shoestring.meter.outside import is_outside
from shoestring.planner import Plan, planner
from shoestring.planner.ways import allowed
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
ON_DISK = {"offload", "offload_optimizer", "stream_weights"}
Step = Callable[[], object]


def gpt2(*, smoke: bool) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    vocabulary, rows, tokens = (256, 2, 32) if smoke else (2048, 8, 256)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=tokens, n_embd=32 if smoke else 256, n_head=4,
        n_layer=2 if smoke else 8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    return _case(model, model.transformer, model.transformer.h, rows, tokens, vocabulary)


def _case(
    model: Any, body: Any, blocks: nn.ModuleList, rows: int, tokens: int, vocabulary: int
) -> Case:
    name = next(n for n, m in model.named_modules() if m is body)
    model.config.use_cache = False  # a layer that is run again would append to it

    def own(model: Any, batch: Any) -> Tensor:
        value: Tensor = model(**batch).loss
        return value

    def taken_apart(model: Any, batch: Any) -> tuple[Tensor, Tensor, nn.Module]:
        run = model.get_submodule(name)
        hidden = run(batch["input_ids"]).last_hidden_state[:, :-1]
        return hidden.flatten(0, 1), batch["labels"][:, 1:].flatten(), model.lm_head

    return Case(model, blocks, llama_batch(rows, tokens, vocabulary), own, taken_apart)


def hf_llama(*, smoke: bool) -> Case:
    vocabulary, rows, tokens = (256, 2, 32) if smoke else (8192, 4, 256)
    shape = {"depth": 2, "width": 32} if smoke else {"depth": 8, "width": 256}
    model = llama(**shape, vocabulary=vocabulary)
    return _case(model, model.model, model.model.layers, rows, tokens, vocabulary)


MODELS = {"GPT-2 of 8 blocks": gpt2, "Llama of 8 blocks, vocabulary 8192": hf_llama}


def stepping(loss: Callable[[], Tensor], optimizer: Any) -> Step:
    def step() -> None:
        value = loss()
        value.backward()
        del value
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak(step: Step, model: nn.Module, optimizer: Any) -> int:
    """Of a step, with the weights and states that are in memory; bytes."""
    step()
    tensors = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        tensors += tensors_in(list(state.values()))
    inside = (t.untyped_storage() for t in tensors if not is_outside(t.untyped_storage()))
    held = sum({s.data_ptr(): s.nbytes() for s in inside}.values())
    return held + allocator_peak(step)


def interval(values: list[float]) -> tuple[float, float]:
    """Of the median, 95 %, from order statistics."""
    ordered, n = sorted(values), len(values)
    below = 0.0
    for k in range(n // 2):
        below += math.comb(n, k) / 2**n
        if below > 0.025:
            return ordered[max(0, k - 1)], ordered[n - 1 - max(0, k - 1)]
    return ordered[0], ordered[-1]


def against(name: str, case: Case, plans: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One recipe and the plan for its peak."""
    allow = "unbiased" if name in UNBIASED else "exact"
    theirs_model = copy.deepcopy(case.model)
    blocks = theirs_model.get_submodule(_path_of(case))
    theirs_case = Case(theirs_model, blocks, case.batch, case.loss, case.hidden_and_head)
    with quiet_compiler():
        peer = RECIPES[name](theirs_case)
        theirs = stepping(peer.loss, peer.optimizer)
        budget = peak(theirs, theirs_model, peer.optimizer)
        found: dict[str, Any] = {"recipe": name, "allow": allow, "their_peak_bytes": budget}
        try:
            plan: Plan = plans[allow](budget)
        except OutOfBudget as error:
            return {**found, "fits": False, "message": str(error)}
        model = copy.deepcopy(case.model)
        plan.apply(model)
        optimizer = plan.optimizer(model)
        ours = stepping(lambda: case.loss(model, case.batch), optimizer)
        our_peak = peak(ours, model, optimizer)
        ratios, seconds = in_turn(ours, theirs, rounds)
        plan.restore(model)
    low, high = interval(ratios)
    return {
        **found, "fits": True, "our_peak_bytes": our_peak, "promised_bytes": plan.peak_bytes,
        "plan": [w.label for w in plan.patches]
        + [f"{s.start}-{s.stop - 1} {s.method}" for s in plan.spans],
        "predicted_seconds": plan.step_seconds,
        "our_seconds": statistics.median(seconds[0]),
        "their_seconds": statistics.median(seconds[1]),
        "ratio": statistics.median(ratios), "low": low, "high": high, "ratios": ratios,
    }  # fmt: skip


def _path_of(case: Case) -> str:
    return next(name for name, m in case.model.named_modules() if m is case.blocks)


def in_turn(ours: Step, theirs: Step, rounds: int) -> tuple[list[float], tuple[list[float], ...]]:
    """Ratios ours / theirs, round by round, and the seconds."""
    seconds: tuple[list[float], ...] = ([], [])
    for turn in range(rounds + 1):
        order = (0, 1) if turn % 2 else (1, 0)
        for which in order:
            started = time.perf_counter()
            (ours, theirs)[which]()
            taken = time.perf_counter() - started
            if turn:  # the first round warms up
                seconds[which].append(taken)
    return [a / b for a, b in zip(*seconds, strict=True)], seconds


def overhead(case: Case, plans: Any, rounds: int) -> dict[str, Any]:
    """A plan that keeps everything, against the model as it is."""
    model, plain = copy.deepcopy(case.model), copy.deepcopy(case.model)
    plan: Plan = plans(1 << 40)
    assert not plan.patches
    assert {s.method for s in plan.spans} == {"keep"}
    plan.apply(model)
    steps = [
        stepping(lambda m=m: case.loss(m, case.batch), adamw(m.parameters()))
        for m in (model, plain)
    ]  # fmt: skip
    ratios, seconds = in_turn(steps[0], steps[1], rounds)
    plan.restore(model)
    low, high = interval(ratios)
    return {
        "ratio": statistics.median(ratios), "low": low, "high": high, "rounds": rounds,
        "plain_seconds": statistics.median(seconds[1]), "ratios": ratios,
    }  # fmt: skip


def run_model(make: Callable[..., Case], rounds: int, *, smoke: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    case = make(smoke=smoke)
    plain = copy.deepcopy(case.model)
    optimizer = adamw(plain.parameters())
    whole = peak(stepping(lambda: case.loss(plain, case.batch), optimizer), plain, optimizer)
    plans = {
        allow: planner(
            case.model, case.batch, loss=case.loss, optimizer=adamw, allow=in_memory(allow)
        )
        for allow in ("exact", "unbiased")
    }
    kept = overhead(case, plans["exact"], 4 * rounds)
    rows = []
    for name in RECIPES:
        try:
            rows.append(against(name, case, plans, rounds))
        except (ImportError, RuntimeError) as error:  # not installed, or it does not run this model
            rows.append({"recipe": name, "missing": " ".join(str(error).split())[:120]})
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "ratios"}), flush=True)
    return {"plain_peak_bytes": whole, "overhead": kept, "rows": rows}


def in_memory(allow: str) -> list[str]:
    """The methods of a fidelity that use no disk, as no recipe does."""
    return [m.name for m in allowed(allow, hands_over=["optimizer"]) if m.name not in ON_DISK]


def table(result: dict[str, Any]) -> str:
    lines = [
        "| recipe | their peak MB | plan's peak MB | time, plan / recipe | 95 % | the plan |",
        "|---|---:|---:|---:|---|---|",
    ]
    for name, found in result["models"].items():
        kept = found["overhead"]
        lines.append(
            f"| **{name}**: everything kept | {found['plain_peak_bytes'] / 1e6:.1f} | the same "
            f"| {kept['ratio']:.3f} | {kept['low']:.3f} .. {kept['high']:.3f} | keep |"
        )
        for r in found["rows"]:
            if "missing" in r or not r["fits"]:
                lines.append(f"| {r['recipe']} | | | | | {r.get('missing') or r['message']} |")
                continue
            lines.append(
                f"| {r['recipe']} | {r['their_peak_bytes'] / 1e6:.1f} "
                f"| {r['our_peak_bytes'] / 1e6:.1f} | {r['ratio']:.2f} "
                f"| {r['low']:.2f} .. {r['high']:.2f} | {', '.join(r['plan'])} |"
            )
    ratios = [r["ratio"] for m in result["models"].values() for r in m["rows"] if r.get("fits")]
    lines += [
        "",
        f"Median over all {len(ratios)}: {statistics.median(ratios):.2f}; slowest "
        f"{max(ratios):.2f}. Medians of {result['rounds']} rounds in turn, one thread; AdamW; "
        f"torch {result['versions']['torch']}, {result['hardware']['device']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny models, three rounds")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    wanted = {**tuned_environment(), "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(k) != v for k, v in wanted.items()):
        raise SystemExit(subprocess.call([sys.executable, *sys.argv], env={**os.environ, **wanted}))
    rounds = 3 if given.smoke else given.rounds
    result: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0], "rounds": rounds,
        **environment(torch.device("cpu")),
        "models": {n: run_model(make, rounds, smoke=given.smoke) for n, make in MODELS.items()},
    }  # fmt: skip
    page = table(result)
    print(page)
    given.out.mkdir(parents=True, exist_ok=True)
    name = "smoke" if given.smoke else "peers"
    (given.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (given.out / f"{name}.md").write_text(page)


if __name__ == "__main__":
    main()
