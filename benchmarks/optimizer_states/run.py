"""What do the methods of the optimizer save in bytes, and cost in seconds and in loss?

A GPT of 4 blocks of width 192 is trained on bytes of this library's source, 4 x 128
tokens a step, by AdamW, by our methods one around another, and by the 8- and 4-bit AdamW of
bitsandbytes and torchao (where they are installed). Peaks are the allocator's, of a whole step and
of the optimizer's alone, above what was there before; seconds are medians, of one thread. The loss
is the mean over the last fifth of the steps and over the seeds. A second table has the Python time
that a step within backward takes a parameter, from 300 parameters of 16 values.
Writes results/optimizer_states.json and the tables made of it.
"""

import argparse
import functools
import gc
import importlib.metadata
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shoestring.meter import allocator_peak
from shoestring.meter.operators import tensors_in
from shoestring.meter.outside import is_outside
from shoestring.methods import METHODS
from shoestring.models.gpt import GPT, GPTConfig
from shoestring.planner import simulate
from shoestring.training.receipt import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ROWS, TOKENS = 4, 128
LR, DECAY = 2e-3, 0.01
Chain = Sequence[tuple[str, dict[str, Any]]]
OFFLOAD, FUSED = ("offload_optimizer", {}), ("fused_step", {})
BF16, EIGHT, FOUR = (
    ("bf16_stochastic", {}), ("low_bit_states", {}), ("low_bit_states", {"bits": 4}),
)  # fmt: skip
NEAREST = {"rounding": "nearest"}
OURS: dict[str, Chain] = {
    "AdamW (torch, fused)": (),
    "fused_step": (FUSED,),
    "offload_optimizer": (OFFLOAD,),
    "offload_optimizer + fused_step": (OFFLOAD, FUSED),
    "low_bit_states, 8 bits": (EIGHT,),
    "low_bit_states, 8 bits, nearest": (("low_bit_states", NEAREST),),
    "low_bit_states, 4 bits": (FOUR,),
    "low_bit_states, 4 bits, nearest": (("low_bit_states", {"bits": 4, **NEAREST}),),
    "low_bit_states, 8 bits + fused_step": (EIGHT, FUSED),
    "bf16_stochastic": (BF16,),
    "bf16_stochastic + 8 bits": (BF16, EIGHT),
    "bf16_stochastic + 8 bits + fused_step": (BF16, EIGHT, FUSED),
    "bf16_stochastic + 4 bits + fused_step": (BF16, FOUR, FUSED),
    "bf16_stochastic + 8 bits + offload + fused_step": (BF16, EIGHT, OFFLOAD, FUSED),
}


def network(seed: int, layers: int) -> nn.Module:
    torch.manual_seed(seed)
    config = GPTConfig(
        vocab_size=256, hidden_size=192, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=768, max_position_embeddings=TOKENS, num_hidden_layers=layers,
        tie_word_embeddings=False,
    )  # fmt: skip
    return GPT(config).train()


@functools.cache
def text() -> Tensor:
    source = HERE.parents[1] / "src" / "shoestring"
    found = b"".join(path.read_bytes() for path in sorted(source.rglob("*.py")))
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).long()


def batch(step: int, tokens: int = TOKENS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, len(text()) - tokens, (ROWS,), generator=generator)
    ids = torch.stack([text()[s : s + tokens] for s in starts])
    return {"input_ids": ids, "labels": ids}


def adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY, fused=True)


def ours(chain: Chain, seed: int) -> Callable[[nn.Module], Optimizer]:
    def put(model: nn.Module) -> Optimizer:
        make: Any = adamw
        for name, given in chain:
            how = METHODS[name]
            settings = dict(given)
            if name in ("low_bit_states", "bf16_stochastic"):
                settings["seed"] = seed
            config = how.configure(settings)
            how.apply(model, config)
            make = functools.partial(_around, how, model, make, config)
        return make(list(model.parameters()))

    return put


def _around(how: Any, model: nn.Module, make: Any, config: Any, parameters: Any) -> Optimizer:
    return how.optimizer(model, parameters, make, config)


def libraries() -> dict[str, Callable[[nn.Module], Optimizer]]:
    """Theirs, as far as they are installed."""
    found: dict[str, Callable[[nn.Module], Optimizer]] = {}
    settings = {"lr": LR, "weight_decay": DECAY}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import bitsandbytes

            kind = bitsandbytes.optim.AdamW8bit
            found["bitsandbytes AdamW8bit"] = lambda m: kind(m.parameters(), **settings)
        except ImportError:
            print("bitsandbytes is not installed")
        try:
            from torchao.optim import AdamW4bit, AdamW8bit

            found["torchao AdamW8bit"] = lambda m: AdamW8bit(m.parameters(), **settings)
            found["torchao AdamW4bit"] = lambda m: AdamW4bit(m.parameters(), **settings)
        except ImportError:
            print("torchao is not installed")
    return found


def state_bytes(optimizer: Optimizer) -> int:
    """Of all states in memory."""
    held = {}
    for tensor in tensors_in(optimizer.state.values()):
        storage = tensor.untyped_storage()
        if not is_outside(storage):
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def measured(
    put: Callable[[int], Callable[[nn.Module], Optimizer]], *, layers: int, steps: int, seeds: int
) -> dict[str, Any]:
    """One row."""
    losses = []
    for seed in range(seeds):
        model = network(seed, layers)
        optimizer = put(seed)(model)
        curve, times = train(model, optimizer, steps)
        losses.append(statistics.mean(curve[-max(1, steps // 5) :]))
    count = sum(p.numel() for p in model.parameters())
    weights = sum(p.nbytes for p in model.parameters())
    states = state_bytes(optimizer)
    short = batch(0, tokens=4)  # activations of few tokens: the optimizer decides

    def whole() -> None:
        model(**short).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        whole()
    gc.collect()
    step_peak = allocator_peak(whole)
    model(**short).loss.backward()
    alone = allocator_peak(optimizer.step)
    optimizer.zero_grad()
    return {
        "loss": statistics.mean(losses), "losses": losses, "parameters": count,
        "weights_bytes": weights, "states_bytes": states,
        "peak_of_a_step_bytes": weights + states + step_peak,
        "peak_of_optimizer_step_bytes": alone, **times,
    }  # fmt: skip


def train(
    model: nn.Module, optimizer: Optimizer, steps: int
) -> tuple[list[float], dict[str, float]]:
    """Losses, and medians of seconds; those of the first step apart."""
    losses, whole, alone = [], [], []
    for step in range(steps):
        start = time.perf_counter()
        loss = model(**batch(step)).loss
        loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        optimizer.zero_grad()
        whole.append(end - start)
        alone.append(end - middle)
        losses.append(float(loss.detach()))
    return losses, {
        "seconds_of_a_step": statistics.median(whole[1:] or whole),
        "seconds_of_optimizer_step": statistics.median(alone[1:] or alone),
        "seconds_of_first_optimizer_step": alone[0],
    }


def overhead(rounds: int, count: int = 300) -> dict[str, Any]:
    """Microseconds a parameter of the optimizer's step, by itself and within backward."""
    found = {}
    for name, chain in {
        "together": (),
        "within backward": (FUSED,),
        "offloaded": (OFFLOAD,),
    }.items():
        model = nn.ParameterList(nn.Parameter(torch.ones(16)) for _ in range(count))
        optimizer = ours(chain, 0)(model)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            torch.stack([(p * 2).sum() for p in model]).sum().backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
            optimizer.zero_grad()
        found[name] = min(times) / count * 1e6
    return {"parameters": count, "microseconds_a_parameter": found}


def plannable(make: Callable[[nn.Module], Optimizer]) -> str:
    """Whether a step of it can be simulated on fake tensors, or why not."""
    model = network(0, 1)
    try:
        simulate(model, batch(0, 8), optimizer=lambda ps: make(nn.ParameterList(ps)))
    except Exception as error:  # whatever a library does there
        return f"no: {type(error).__name__}"
    return "yes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one block, nothing written")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"layers": 4, "steps": arguments.steps, "seeds": arguments.seeds}
    if arguments.smoke:
        sizes = {"layers": 1, "steps": 2, "seeds": 1}
    rows = {}
    for name, chain in OURS.items():
        rows[name] = measured(functools.partial(ours, chain), **sizes) | {"planned": "yes"}
        print(name, rows[name], flush=True)
    theirs = {} if arguments.smoke else libraries()
    for name, make in theirs.items():
        rows[name] = {"planned": plannable(make)}
        rows[name] |= measured(lambda seed, make=make: make, **sizes)
        print(name, rows[name], flush=True)
    result = {
        "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
        "config": {**sizes, "batch": [ROWS, TOKENS], "width": 192, "lr": LR},
        **environment(torch.device("cpu")),
        "libraries": {
            name: importlib.metadata.version(name)
            for name in ("bitsandbytes", "torchao")
            if any(name in row for row in theirs)
        },
        "overhead": overhead(3 if arguments.smoke else 50),
        "rows": rows,
    }
    if not arguments.smoke:
        (RESULTS / "optimizer_states.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "optimizer_states.md").write_text(table(result))
        (RESULTS / "overhead.md").write_text(overhead_table(result))


def table(result: dict[str, Any]) -> str:
    lines = [
        "| optimizer | states, B a parameter | peak of a step, B a parameter | peak of the "
        "optimizer's step, B a parameter | ms of its step (first) | ms of the whole step | loss | "
        "planned on fake tensors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        count = row["parameters"]
        lines.append(
            f"| {name} | {row['states_bytes'] / count:.2f} "
            f"| {row['peak_of_a_step_bytes'] / count:.2f} "
            f"| {row['peak_of_optimizer_step_bytes'] / count:.2f} "
            f"| {row['seconds_of_optimizer_step'] * 1e3:.1f} "
            f"({row['seconds_of_first_optimizer_step'] * 1e3:.0f}) "
            f"| {row['seconds_of_a_step'] * 1e3:.0f} | {row['loss']:.3f} | {row['planned']} |"
        )
    hardware, versions = result["hardware"], result["versions"]
    libraries = ", ".join(f"{k} {v}" for k, v in result["libraries"].items())
    lines += [
        "",
        f"{result['rows']['fused_step']['parameters']:,} parameters, "
        f"{result['config']['steps']} steps of {ROWS} x {TOKENS} bytes, "
        f"{result['config']['seeds']} seeds; peak of a step: weights, states and what a step on "
        f"{ROWS} x 4 tokens adds; {hardware['device']}, {hardware['threads']} thread; torch "
        f"{versions['torch']}{', ' + libraries if libraries else ''}.",
    ]
    return "\n".join(lines) + "\n"


def overhead_table(result: dict[str, Any]) -> str:
    found = result["overhead"]["microseconds_a_parameter"]
    return (
        "| fused AdamW, 300 parameters of 16 values | microseconds a parameter, forward to step |\n"
        "|---|---|\n" + "".join(f"| {name} | {value:.1f} |\n" for name, value in found.items())
    )


if __name__ == "__main__":
    main()
