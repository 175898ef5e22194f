"""Does what the doctor prescribes save what it says?

Every patient is a training step with something that decides its peak. The doctor watches one step
of it (the second), and the advice in question is then really followed, on a fresh model: measured
peak before less measured peak after is held against the saving that was promised. Writes
results/doctor.json and the table made of it, results/doctor.md.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import shoestring
from shoestring import Doctor, Meter, Span, Stack
from shoestring.methods import apply_spans, method
from shoestring.training.receipt import environment

QUESTION = "Does what the doctor prescribes save what it says?"
RESULTS = Path(__file__).parent / "results"
SEED = 0
SMOKE = ("optimizer", "activations, loss in the loop")


@dataclass(frozen=True, kw_only=True)
class Patient:
    """A step, the advice it needs, and what following it changes."""

    advice: str
    vocabulary: int = 512
    width: int = 256
    layers: int = 4
    batch: int = 4
    tokens: int = 256
    adamw: dict[str, Any] | None = None
    cured_adamw: dict[str, Any] | None = None
    own_loss: bool = True
    keeps: str = ""
    steps: int = 1
    use_cache: bool = False


PATIENTS = {
    "loss": Patient(advice="chunked_loss", vocabulary=32000, layers=2, batch=2),
    "optimizer": Patient(
        advice="fused", width=512, batch=1, tokens=32, adamw={"foreach": True},
        cured_adamw={"fused": True},
    ),
    "optimizer, loss in the loop": Patient(
        advice="fused", width=512, batch=1, tokens=32, adamw={"foreach": True},
        cured_adamw={"fused": True}, own_loss=False,
    ),
    "activations": Patient(advice="recompute", layers=12),
    "activations, loss in the loop": Patient(advice="recompute", layers=12, own_loss=False),
    "two passes": Patient(advice="accumulate"),
    "gradients kept": Patient(advice="set_to_none", keeps="gradients", width=512, tokens=128),
    "gradients kept, loss in the loop": Patient(
        advice="set_to_none", keeps="gradients", width=512, tokens=128, own_loss=False
    ),
    "output held": Patient(advice="output", keeps="output", vocabulary=8192, layers=2),
    "cache held": Patient(advice="use_cache", keeps="output", use_cache=True, steps=2),
}  # fmt: skip


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Plain(nn.Module):
    """A model whose loss is the loop's business."""

    def __init__(self, patient: Patient) -> None:
        super().__init__()
        self.embed = nn.Embedding(patient.vocabulary, patient.width)
        self.blocks = nn.ModuleList(Block(patient.width) for _ in range(patient.layers))
        self.head = nn.Linear(patient.width, patient.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(patient: Patient) -> nn.Module:
    torch.manual_seed(SEED)
    if not patient.own_loss:
        return Plain(patient)
    config = transformers.LlamaConfig(
        vocab_size=patient.vocabulary, hidden_size=patient.width,
        intermediate_size=4 * patient.width, num_hidden_layers=patient.layers,
        num_attention_heads=4, use_cache=patient.use_cache,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def stepping(
    patient: Patient, model: nn.Module, optimizer: torch.optim.Optimizer, *, cured: bool
) -> Callable[[], None]:
    """One step of the loop as it is, or as it is after the advice was followed in it."""
    ids = torch.randint(patient.vocabulary, (patient.batch, patient.tokens))
    passes = 2 if cured and patient.advice == "accumulate" else 1
    frees = (cured and patient.advice == "set_to_none") or patient.keeps != "gradients"
    holds = patient.keeps == "output" and not (cured and patient.advice == "output")
    held: list[Any] = []

    def step() -> None:
        for part in ids.chunk(passes):
            if patient.own_loss:
                output = model(input_ids=part, labels=part)
                loss = output.loss
                held[:] = [output] if holds else []
                del output
            else:
                loss = F.cross_entropy(model(part).flatten(0, 1), part.flatten())
            (loss / passes if passes > 1 else loss).backward()
            del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=frees)

    return step


def follow(advice: Any, model: nn.Module) -> None:
    """What the advice says to do to the model."""
    if advice.name == "recompute":
        count = int(advice.cost.split()[0])
        apply_spans(Stack.of(model), [Span(0, count, "recompute")])
    elif advice.name == "chunked_loss":
        how = method(advice.name)
        how.apply(model, how.configure())
    elif advice.name == "use_cache":
        model.config.use_cache = False  # type: ignore[union-attr,assignment]


def examine(patient: Patient) -> dict[str, Any]:
    model = build(patient)
    optimizer = torch.optim.AdamW(model.parameters(), **(patient.adamw or {"fused": True}))
    step = stepping(patient, model, optimizer, cured=False)
    step()
    with Doctor(model, optimizer) as doctor:
        for _ in range(patient.steps):
            step()
    found = doctor.diagnosis
    advice = next(each for each in found.advice if each.name == patient.advice)
    model = build(patient)
    settings = patient.cured_adamw or patient.adamw or {"fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    follow(advice, model)
    step = stepping(patient, model, optimizer, cured=True)
    step()
    with Meter(model, optimizer) as meter:
        for _ in range(patient.steps):
            step()
    saved = found.peak_bytes - meter.peak_bytes
    return {
        "instant": found.instant, "below_bytes": found.peak_bytes - found.phases[1]["peak_bytes"],
        "next_instant": found.phases[1]["phase"], "peak_bytes": found.peak_bytes,
        "advice": advice.name, "basis": advice.basis, "what": advice.what,
        "promised_bytes": advice.saving_bytes, "saved_bytes": saved,
        "error_percent": round(100 * (advice.saving_bytes - saved) / saved, 3),
        "rank": [each.name for each in found.advice].index(advice.name) + 1,
    }  # fmt: skip


def table(rows: dict[str, dict[str, Any]], where: dict[str, Any]) -> str:
    lines = [
        "| patient | instant that wins | peak MB | advice | basis | said to save MB | saved MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['instant']} | {row['peak_bytes'] / 1e6:.1f} | {row['advice']} "
            f"| {row['basis']} | {row['promised_bytes'] / 1e6:.2f} "
            f"| {row['saved_bytes'] / 1e6:.2f} ({row['error_percent']:+.1f} %) |"
        )
    return "\n".join(lines) + f"\n\nPatients in benchmarks/doctor/run.py; torch {where['torch']}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two patients, nothing written")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = {}
    for name in SMOKE if arguments.smoke else PATIENTS:
        rows[name] = row = examine(PATIENTS[name])
        print(f"{name:34} {row['instant']:14} {row['advice']:12} {row['error_percent']:+.2f} %")
    if arguments.smoke:
        return
    RESULTS.mkdir(exist_ok=True)
    where = environment(torch.device("cpu"))
    answer = {
        "question": QUESTION, "config": "PATIENTS in run.py; the second step of each",
        "seed": SEED, "version": shoestring.__version__, **where,
        "largest_error_percent": max(abs(row["error_percent"]) for row in rows.values()),
        "numbers": rows,
    }  # fmt: skip
    (RESULTS / "doctor.json").write_text(json.dumps(answer, indent=1) + "\n")
    (RESULTS / "doctor.md").write_text(table(rows, {"torch": torch.__version__}))


if __name__ == "__main__":
    main()
