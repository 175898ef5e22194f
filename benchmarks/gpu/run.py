"""What does the GPU path keep of its promises, and what does it cost?

Five parts: exactness on the device (torch.equal), predicted against measured peak
(`max_memory_allocated`) for random-weight Llama shapes, peak with tokens/s beside peers
(Hugging Face gradient checkpointing, eager and under torch.compile), what a block of a diffusion
transformer holds in training, and the compressed context: what a model says through it against the
CPU's, its bytes, and the time of a step beside the plain cache's. Writes results/<device>.json; a
run that does not fit or fails is a result too.
"""

import argparse
import copy
import gc
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blocks
import torch
import transformers
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from shoestring.methods import apply_spans, method
from shoestring.methods.reversible import ReversibleStack, reversible
from shoestring.models.gpt import GPT, GPTConfig
from shoestring.planner import simulate
from shoestring.serve import CompressedCache, calibrate
from shoestring.stack import Span, Stack

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip


def sub_block(width: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
        nn.Linear(4 * width, width), nn.Dropout(dropout),
    )  # fmt: skip


def exactness() -> dict[str, bool]:
    """Gradients against the same network with stored activations, bit for bit."""
    found = {}
    for rule in ("feistel", "bdia"):
        for autocast in (False, True):
            torch.manual_seed(0)
            blocks = [sub_block(128, 0.1) for _ in range(12)]
            grads = []
            for keep_top in (0, 12):
                stack = ReversibleStack(copy.deepcopy(blocks), rule, keep_top=keep_top).to(DEVICE)
                torch.manual_seed(1)
                x = torch.randn(4, 64, 128, device=DEVICE)
                with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                    p, q = stack(x, x)
                (p.square().mean() + q.square().mean()).backward()
                grads.append([w.grad for w in stack.parameters()])
            same = all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
            found[f"reversible {rule}{' bf16 autocast' if autocast else ''}"] = same
    model = GPT(GPTConfig(vocab_size=512, hidden_size=128, dropout=0.1)).to(DEVICE)
    ids = torch.randint(0, 512, (2, 128), device=DEVICE)

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        torch.manual_seed(2)
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    stored, stack = gradients(), Stack.of(model)
    for config in ({}, {"hold": (0, 4)}, {"save": "attention"}):
        apply_spans(stack, [Span(0, len(stack), "recompute", config)])
        same = all(torch.equal(a, b) for a, b in zip(stored, gradients(), strict=True))
        found[f"recompute {config}"] = same
        stack.restore()
    return found


def batch_of(shape: dict[str, int], rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, shape["vocab_size"], (rows, length), device=DEVICE)
    return {"input_ids": ids, "labels": ids}


def spans_of(name: str, layers: int) -> list[Span]:
    if name == "recompute":
        return [Span(0, layers, "recompute")]
    if name == "nested":
        hold = tuple(range(0, layers, max(1, round(layers**0.5))))
        return [Span(0, layers, "recompute", {"hold": hold})]
    return [Span(0, layers, "keep")]


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


def arms(layers: int) -> dict[str, Callable[[nn.Module], Any]]:
    """What each row does to a plain model."""

    def ours(name: str, chunked: bool = False) -> Callable[[nn.Module], Any]:
        def change(model: nn.Module) -> None:
            apply_spans(Stack.of(model), spans_of(name, layers))
            if chunked:
                loss = method("chunked_loss")
                loss.apply(model, loss.configure())

        return change

    def feistel(model: nn.Module) -> None:
        reversible(model)
        loss = method("chunked_loss")
        loss.apply(model, loss.configure())

    def peer(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    return {
        "plain": lambda model: None,
        "recompute": ours("recompute"),
        "recompute + chunked loss": ours("recompute", chunked=True),
        "nested + chunked loss": ours("nested", chunked=True),
        "reversible (feistel) + chunked loss": feistel,
        "transformers checkpointing": peer,
        # Compiling needs a C++ compiler on a CPU, and there it says nothing about a GPU.
        **({"transformers checkpointing, compiled": peer} if DEVICE == "cuda" else {}),
    }


def measure(shape: dict[str, int], arm: str, rows: int, length: int, steps: int) -> dict[str, Any]:
    """Predicted and measured peak, and tokens/s, of one row."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        config = LlamaConfig(**shape, max_position_embeddings=length, use_cache=False)
        change = arms(shape["num_hidden_layers"])[arm]
        batch = batch_of(shape, rows, length)
        row: dict[str, Any] = {"arm": arm, "rows": rows, "length": length}
        if not arm.startswith("transformers"):

            def build() -> nn.Module:
                with torch.device(DEVICE):
                    return LlamaForCausalLM(config)

            row["predicted_bytes"] = simulate(
                build, batch, apply=change, optimizer=adamw
            ).peak_bytes
        with torch.device(DEVICE):
            model = LlamaForCausalLM(config)
        change(model)
        run = torch.compile(model) if arm.endswith("compiled") else model
        optimizer = adamw(list(model.parameters()))
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            run(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        if DEVICE == "cuda":
            row["measured_bytes"] = torch.cuda.max_memory_allocated()
            if "predicted_bytes" in row:
                row["error"] = row["predicted_bytes"] / row["measured_bytes"] - 1
        # The first steps allocate states, pick kernels and compile.
        row["step_seconds"] = statistics.median(seconds[2:] or seconds)
        row["tokens_per_second"] = rows * length / row["step_seconds"]
        row["status"] = "ok"
    except (torch.OutOfMemoryError, RuntimeError) as error:
        row["status"] = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        torch.set_default_dtype(torch.float32)
        model = run = optimizer = None
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return row


@torch.no_grad()
def context(size: str, tokens: int, steps: int) -> dict[str, Any]:
    """A calibrated cache on the device: logits against the CPU's at a tiny size, then bytes and
    milliseconds a step at `size`."""
    said = []
    torch.manual_seed(0)
    tiny = LlamaForCausalLM(LlamaConfig(**LLAMA["tiny"])).eval()
    ids = torch.randint(0, 512, (2, 400))
    made = calibrate(tiny, ids)
    for device in ("cpu", DEVICE):
        model = copy.deepcopy(tiny).to(device)
        cache = CompressedCache(model, budget="5bits", context=2048, calibration=made)
        pieces = [model(x.to(device), past_key_values=cache).logits for x in ids.split(50, dim=1)]
        said.append(torch.cat(pieces, dim=1).cpu())
    found: dict[str, Any] = {"furthest_logit": float((said[0] - said[1]).abs().max())}
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA[size])).eval().bfloat16()
    ids = torch.randint(0, LLAMA[size]["vocab_size"], (1, tokens), device=DEVICE)
    makers = {
        "plain": lambda: DynamicCache(config=model.config),
        "ours 4/2": lambda: CompressedCache(model, key_bits=4, value_bits=2),
    }
    for name, make in makers.items():
        cache = make()
        for piece in ids.split(512, dim=1):
            model(piece, past_key_values=cache, logits_to_keep=1)
        times = []
        for _ in range(steps):
            started = time.perf_counter()
            logits = model(ids[:, :1], past_key_values=cache).logits
            float(logits.flatten()[0])  # waits for the device
            times.append(time.perf_counter() - started)
        held = getattr(cache, "nbytes", None) or sum(
            x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)
        )
        found[name] = {"milliseconds": 1000 * statistics.median(times), "bytes": held / tokens}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, seconds")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or "cpu"
    result: dict[str, Any] = {
        "question": "gpu",
        "device": name,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "exactness": exactness() | blocks.exactness(DEVICE),
        "rows": [],
    }
    result["context"] = context("tiny" if arguments.smoke else "1B", 600, 8)
    print(f"context {json.dumps(result['context'])}")
    for check, same in result["exactness"].items():
        print(f"{'equal' if same else 'DIFFERS':8} {check}")
    result["blocks"] = blocks.jobs(DEVICE, smoke=arguments.smoke)
    for arm, row in result["blocks"].items():
        share = row["bytes"] / result["blocks"]["end to end"]["bytes"]
        print(
            f"DiT   {arm:38} {row['bytes'] / 2**30:7.2f} GiB  of end to end {share:.2f}  "
            f"{row['seconds']:9.3f} s a step"
        )
    sizes = [("tiny", 2, 64, 3)] if arguments.smoke else [("1B", 4, 4096, 8), ("8B", 1, 4096, 6)]
    for size, rows, length, steps in sizes:
        for arm in arms(1):
            row = measure(LLAMA[size], arm, rows, length, steps)
            result["rows"].append({"model": size, **row})
            gib = row.get("measured_bytes", 0) / 2**30
            print(
                f"{size:5} {arm:38} {gib:7.2f} GiB  predicted {row.get('error', 0):+7.2%}  "
                f"{row.get('tokens_per_second', 0):9.0f} tokens/s  {row['status']}",
                flush=True,
            )
    if not arguments.smoke:
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{slug}.json").write_text(json.dumps(result, indent=1) + "\n")
    if not all(result["exactness"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
