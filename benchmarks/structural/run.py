"""What does training one block at a time save in bytes, and cost in seconds and in loss?

A GPT of 6 blocks of width 96 is trained on bytes of this library's source, 4 x 64 tokens a step, by
AdamW on all weights, by `block_coordinate` with turns of several lengths, and as a control on the
last block alone. Once from random weights, once from weights that AdamW trained before on the
English of its documents (a stand-in for fine-tuning: blocks, embeddings and head know something,
and the text is another one). The same number of steps for all; learning rates are tried, and the
best of each row counts, since it need not be the same. The loss is on text that is left out, as a
mean over seeds. Peaks are of a whole round of turns: predicted on a fake twin, and measured by the
meter. Seconds are the mean over the turns of the fastest of some steps in each, of one thread;
`--seconds` measures only these again.
Writes results/structural.json and the tables made of it.
"""

import argparse
import copy
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shoestring.meter import Meter
from shoestring.methods import METHODS
from shoestring.models.gpt import GPT, GPTConfig
from shoestring.optim import InTurns
from shoestring.planner import simulate
from shoestring.stack import Stack
from shoestring.training.receipt import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ROWS, TOKENS, WIDTH, LAYERS = 4, 64, 96, 6
RATES = (1e-3, 3e-3)
ROUNDS = 6  # of measuring seconds
HELD_OUT = 8  # batches of the last tenth of the text
STARTS = ("random weights", "trained weights")
CASES: dict[str, dict[str, Any] | None] = {
    "AdamW on all weights": None,
    "in turns of 5, random order": {"steps": 5},
    "in turns of 20, random order": {"steps": 20},
    "in turns of 20, ends take part": {"steps": 20, "ends": True},
    "in turns of 100, random order": {"steps": 100},
    "the last block alone": None,
}
ALONE = "the last block alone"


def network(seed: int, layers: int) -> nn.Module:
    torch.manual_seed(seed)
    config = GPTConfig(
        vocab_size=256, hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=4 * WIDTH, max_position_embeddings=128, num_hidden_layers=layers,
        tie_word_embeddings=False,
    )  # fmt: skip
    return GPT(config).train()


@functools.cache
def text(kind: str) -> Tensor:
    root = HERE.parents[1]
    paths = {"code": root.glob("src/shoestring/**/*.py"), "prose": root.glob("docs/**/*.md")}[kind]
    found = b"".join(path.read_bytes() for path in sorted(paths))
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).long()


def batch(step: int, kind: str = "code", *, held_out: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    cut = len(text(kind)) * 9 // 10
    whole = text(kind)[cut:] if held_out else text(kind)[:cut]
    starts = torch.randint(0, len(whole) - TOKENS, (ROWS,), generator=generator)
    ids = torch.stack([whole[s : s + TOKENS] for s in starts])
    return {"input_ids": ids, "labels": ids}


def adamw(parameters: Sequence[nn.Parameter], lr: float = 1e-3) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def put(name: str, model: nn.Module, lr: float, seed: int) -> Optimizer:
    """The optimizer of a case; the control freezes all but one block."""
    make = functools.partial(adamw, lr=lr)
    if name == ALONE:
        last = {id(p) for p in Stack.of(model).blocks[-1].parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in last)
        return make([p for p in model.parameters() if p.requires_grad])
    settings = CASES[name]
    parameters = list(model.parameters())
    if settings is None:
        return make(parameters)
    how = METHODS["block_coordinate"]
    return how.optimizer(model, parameters, make, how.configure({**settings, "seed": seed}))


def train(model: nn.Module, optimizer: Optimizer, steps: int, kind: str = "code") -> list[float]:
    """Seconds of the steps."""
    times = []
    for step in range(steps):
        data = batch(step, kind)
        start = time.perf_counter()
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return times


def seconds(layers: int, rounds: int, tries: int = 3) -> dict[str, float]:
    """Of a step, as a mean over the turns; the cases take turns themselves, so that what else the
    machine does falls on all of them."""
    found: dict[str, dict[int, float]] = {name: {} for name in CASES}
    for _ in range(rounds):
        for name, fastest in found.items():
            model = network(0, layers)
            optimizer = put(name, model, 1e-3, 0)
            for _ in optimizer.parts if isinstance(optimizer, InTurns) else (0,):
                part = optimizer.active if isinstance(optimizer, InTurns) else 0
                taken = min(train(model, optimizer, tries))
                fastest[part] = min(taken, fastest.get(part, taken))
                if isinstance(optimizer, InTurns):
                    optimizer.end_turn()
    return {name: statistics.mean(fastest.values()) for name, fastest in found.items()}


@torch.no_grad()
def held_out(model: nn.Module) -> float:
    model.eval()
    found = [float(model(**batch(k, held_out=True)).loss) for k in range(HELD_OUT)]
    model.train()
    return statistics.mean(found)


@functools.cache
def trained(seed: int, layers: int, steps: int) -> nn.Module:
    """A network that AdamW has trained on prose."""
    model = network(seed, layers)
    train(model, adamw(list(model.parameters())), steps, "prose")
    return model


def peaks(name: str, layers: int) -> dict[str, Any]:
    """Of a whole round: predicted, and measured."""
    data, twins = batch(0), []
    promised = simulate(
        network(0, layers), data, apply=lambda twin: _kept(twins, name, twin),
        optimizer=lambda ps: put(name, twins[0], 1e-3, 0),
    )  # fmt: skip
    model = network(0, layers)
    optimizer = put(name, model, 1e-3, 0)
    with Meter(model, optimizer) as meter:
        for _ in optimizer.parts if isinstance(optimizer, InTurns) else (0,):
            for _ in range(2):
                model(**data).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if isinstance(optimizer, InTurns):
                optimizer.end_turn()
    return {
        "predicted_bytes": promised.peak_bytes, "measured_bytes": meter.peak_bytes,
        "by_category": meter.by_category,
    }  # fmt: skip


def _kept(twins: list[nn.Module], name: str, twin: nn.Module) -> None:
    twins.append(twin)
    if name == ALONE:
        put(name, twin, 1e-3, 0)


def losses(
    name: str, start: str, *, layers: int, steps: int, before: int, seeds: int
) -> dict[str, Any]:
    """Of one case: by learning rate, over seeds."""
    rates: dict[str, list[float]] = {}
    for lr in RATES:
        for seed in range(seeds):
            fresh = start == STARTS[0]
            model = network(seed, layers) if fresh else trained(seed, layers, before)
            model = copy.deepcopy(model)
            optimizer = put(name, model, lr, seed)
            train(model, optimizer, steps)
            rates.setdefault(f"{lr:g}", []).append(held_out(model))
    means = {lr: statistics.mean(found) for lr, found in rates.items()}
    best = min(means, key=lambda lr: means[lr])
    return {"loss": means[best], "lr": best, "losses": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two blocks, nothing written")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--before", type=int, default=300, help="steps on prose")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--seconds", action="store_true", help="measure these again, nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.seconds:
        result = json.loads((RESULTS / "structural.json").read_text())
        write(result, seconds(result["config"]["layers"], ROUNDS))
        return
    sizes = {"layers": LAYERS, "steps": arguments.steps, "before": arguments.before,
             "seeds": arguments.seeds}  # fmt: skip
    if arguments.smoke:
        sizes = {"layers": 2, "steps": 2, "before": 2, "seeds": 1}
    rows: dict[str, Any] = {}
    for name in CASES:
        rows[name] = peaks(name, sizes["layers"])
        for start in STARTS:
            rows[name][start] = losses(name, start, **sizes)
        print(name, rows[name], flush=True)
    untrained = {start: statistics.mean(
        held_out(network(s, sizes["layers"]) if start == STARTS[0]
                 else trained(s, sizes["layers"], sizes["before"]))
        for s in range(sizes["seeds"])) for start in STARTS}  # fmt: skip
    result = {
        "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
        "config": {**sizes, "batch": [ROWS, TOKENS], "width": WIDTH, "lr": list(RATES)},
        **environment(torch.device("cpu")),
        "parameters": sum(p.numel() for p in network(0, sizes["layers"]).parameters()),
        "loss_before": untrained,
        "rows": rows,
    }
    found = seconds(sizes["layers"], 1 if arguments.smoke else ROUNDS)
    if not arguments.smoke:
        write(result, found)


def write(result: dict[str, Any], found: dict[str, float]) -> None:
    for name, taken in found.items():
        result["rows"][name]["seconds_of_a_step"] = taken
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "structural.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "structural.md").write_text(table(result))


def table(result: dict[str, Any]) -> str:
    lines = [
        "| trained | peak predicted, MB | measured, MB | ms a step | loss from random weights (lr) "
        "| loss from trained weights (lr) |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        fresh, tuned = (row[start] for start in STARTS)
        lines.append(
            f"| {name} | {row['predicted_bytes'] / 1e6:.3f} | {row['measured_bytes'] / 1e6:.3f} "
            f"| {row['seconds_of_a_step'] * 1e3:.0f} "
            f"| {fresh['loss']:.3f} ({fresh['lr']}) | {tuned['loss']:.3f} ({tuned['lr']}) |"
        )
    config, before, hardware = result["config"], result["loss_before"], result["hardware"]
    lines += [
        "",
        f"{result['parameters']:,} parameters in {config['layers']} blocks, embeddings and head; "
        f"{config['steps']} steps of {ROWS} x {TOKENS} bytes, {config['seeds']} seeds, the better "
        f"of two learning rates. Before them the loss is {before[STARTS[0]]:.3f} and "
        f"{before[STARTS[1]]:.3f}. {hardware['device']}, {hardware['threads']} thread; torch "
        f"{result['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
