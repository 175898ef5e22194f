"""What do the loss and its gradients cost in bytes and seconds, with and without all logits?

Arms: the plain loss, ours with gradients made in forward and in backward, torch's own chunked
`F.linear_cross_entropy` where this torch has one, and other libraries' where they import. Then
one small language model with a vocabulary of 50,257, plain and with chunked_loss applied.
Seconds are CPU seconds of forward + backward, medians of interleaved rounds (torch's own, which
takes very long on a CPU, is timed once a case).
Writes results/chunked_loss.json and the table made of it, results/chunked_loss.md.
"""

import argparse
import contextlib
import importlib
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shoestring.meter import Meter
from shoestring.methods.chunked_loss import ChunkedLoss
from shoestring.ops.chunked_loss import linear_cross_entropy
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
SEED = 0
# N tokens, d width, V vocabulary
CASES = {
    "1024 tokens, width 256, vocabulary 50257": ((1024, 256, 50257), None),
    "512 tokens, width 768, vocabulary 50257": ((512, 768, 50257), None),
    "1024 tokens, width 256, vocabulary 50257, bf16 autocast": ((1024, 256, 50257), "autocast"),
    "2048 tokens, width 256, vocabulary 8192": ((2048, 256, 8192), None),
}
SMOKE = {"64 tokens, width 32, vocabulary 997": ((64, 32, 997), None)}
LIBRARIES = {
    "Liger": "liger_kernel.transformers",
    "Cut Cross Entropy": "cut_cross_entropy",
}
TORCH = "torch F.linear_cross_entropy"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one tiny case, nothing written")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    cases, rounds = (SMOKE, 1) if arguments.smoke else (CASES, arguments.rounds)
    result = {
        "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
        "config": {"rounds": rounds, "seconds": "CPU seconds of forward + backward, median"},
        "seed": SEED,
        **environment(torch.device("cpu")),
        "cases": {name: compare(*case, rounds) for name, case in cases.items()},
        "model": whole_model(smoke=arguments.smoke),
        "not_run": {name: reason for name in LIBRARIES if (reason := missing(name))},
    }
    if not arguments.smoke:
        (RESULTS / "chunked_loss.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "chunked_loss.md").write_text(table(result))


def missing(name: str) -> str | None:
    """Why a library cannot be an arm here."""
    try:
        importlib.import_module(LIBRARIES[name])
    except ImportError as error:
        return str(error)
    return "imports, but its kernels need a GPU"


def arms() -> dict[str, Loss]:
    def plain(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).float(), t)

    found: dict[str, Loss] = {
        "plain": plain,
        "ours, gradients in forward": partial(linear_cross_entropy, gradients="forward"),
        "ours, gradients in backward": partial(linear_cross_entropy, gradients="backward"),
    }
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is not None:
        found[TORCH] = partial(F.linear_cross_entropy, options=options(), ignore_index=-100)
    return found


def problem(n: int, d: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(n, d, generator=g).requires_grad_()
    weight = (0.05 * torch.randn(v, d, generator=g)).requires_grad_()
    targets = torch.randint(0, v, (n,), generator=g)
    targets[::16] = -100
    return hidden, weight, targets


def compare(shape: tuple[int, int, int], mode: str | None, rounds: int) -> dict[str, Any]:
    hidden, weight, targets = problem(*shape)

    def step(loss: Loss) -> tuple[Tensor, ...]:
        hidden.grad = weight.grad = None
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast")
        with autocast:
            value = loss(hidden, weight, targets)
        value.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return value.detach(), hidden.grad, weight.grad

    rows: dict[str, Any] = {}
    expected = tuple(t.clone() for t in step(arms()["plain"]))
    for name, loss in arms().items():
        start = time.process_time()
        got = step(loss)
        once = time.process_time() - start
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]
        del got
        hidden.grad = weight.grad = None
        with Meter() as meter:
            step(loss)
        rows[name] = {
            "peak_bytes": meter.peak_bytes - meter.baseline_bytes,
            "retained_bytes": meter.retained_bytes,
            "relative_error": dict(zip(("loss", "hidden", "weight"), errors, strict=True)),
            "seconds": [once] * rounds if name == TORCH else [],
        }
    for _ in range(rounds):
        for name, loss in arms().items():
            if name == TORCH:
                continue
            start = time.process_time()
            step(loss)
            rows[name]["seconds"].append(time.process_time() - start)
    plain = rows["plain"]["seconds"]
    for row in rows.values():
        row["times_plain"] = statistics.median(
            a / b for a, b in zip(row["seconds"], plain, strict=True)
        )
    n, _, v = shape
    return {"logits_bytes": n * v * 4, "weight_bytes": shape[1] * v * 4, "arms": rows}


def whole_model(*, smoke: bool) -> dict[str, Any]:
    """Peak of a training step beyond the weights: does the loss still decide?"""
    sizes = (2, 16, 997) if smoke else (2, 256, 50257)
    rows, tokens, vocabulary = sizes
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(1))

    def measured() -> dict[str, Any]:
        model.zero_grad()
        with Meter(model) as meter:
            model(input_ids=ids, labels=ids).loss.backward()
        return {
            "peak_bytes": meter.peak_bytes,
            "beyond_weights_bytes": meter.peak_bytes - meter.by_category["weights"],
            "instant": meter.instant,
        }

    found = {
        "batch": [rows, tokens],
        "weights_bytes": 4 * sum(map(Tensor.numel, model.parameters())),
    }
    method = ChunkedLoss()
    for name, settings in (("plain", None), ("forward", "forward"), ("backward", "backward")):
        undo = contextlib.nullcontext
        if settings is not None:
            undo = method.apply(model, method.configure({"gradients": settings}))
        found["plain" if settings is None else f"chunked_loss, gradients in {name}"] = measured()
        undo()
    return found


def table(result: dict[str, Any]) -> str:
    lines = []
    for case, found in result["cases"].items():
        lines += [
            f"{case} (all logits: {found['logits_bytes'] / 1e6:.0f} MB, "
            f"weight: {found['weight_bytes'] / 1e6:.0f} MB)",
            "",
            "| loss | peak MB | held from forward MB | CPU time x plain | dW error |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {row['peak_bytes'] / 1e6:.1f} | {row['retained_bytes'] / 1e6:.1f} | "
            f"{row['times_plain']:.2f} | {row['relative_error']['weight']:.1e} |"
            for name, row in found["arms"].items()
        ]
        lines.append("")
    model = result["model"]
    lines += [
        f"Llama, 4 layers, width 256, vocabulary 50257 tied, batch {model['batch']}",
        "",
        "| loss | peak MB beyond weights | instant |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['beyond_weights_bytes'] / 1e6:.1f} | {row['instant']} |"
        for name, row in model.items()
        if isinstance(row, dict)
    ]
    lines += [""] + [f"{name}: not run ({why})." for name, why in result["not_run"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
