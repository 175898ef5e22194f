"""Checkpoint files from a stranger: does anything but CheckpointError come out of them?

    python benchmarks/faults/fuzz.py --minutes 60

A good checkpoint is mutated (bits, bytes, spliced names and numbers; half of the manifests are
signed again, so that the mutation gets past the checksum) and read back. It fails on any exception
that is not ours, on a verified directory that differs from the good one without being signed
again, and on a name that leads outside. Writes results/fuzz.json.
"""

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from shoestring.checkpoint import MANIFEST, Store, read_manifest, verify
from shoestring.checkpoint.tensors import read_tensors
from shoestring.errors import CheckpointError
from shoestring.training.receipt import environment

RESULTS = Path(__file__).parent / "results"
NASTY = [
    b"../", b"/", b"\\\\", b'"..": ', b"\\u0000", b"\\ud800", b"NaN", b"Infinity", b"-1", b"1e999",
    b"9" * 400, b"true", b"null", b"[]", b"{}", b'"', b"}", b"\n}\n", b"[" * 2000, b"\xff", b"",
    b'"format": 3', b'"format": 1', b'"bytes": 0', b"C:", b"con", b"/etc/passwd", b"a/b/../../../x",
]  # fmt: skip


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The content after a few random changes."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data) + 1)
        kind = chance.randrange(5)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place:place] = chance.choice(NASTY)
        elif kind == 2:
            del data[place : place + chance.randint(1, 30)]
        elif kind == 3:
            data[place : place + chance.randint(1, 12)] = chance.choice(NASTY)
        else:
            end = place + chance.randint(1, 60)
            data[place:place] = data[place:end]
    return bytes(data)


def signed(content: bytes) -> bytes:
    """The content as a manifest whose own checksum is right."""
    body = content.rpartition(b"\n}\n")[0] + b"\n}\n" if b"\n}\n" in content else content
    return body + hashlib.sha256(body).hexdigest().encode() + b"\n"


def once(directory: Path, good: dict[str, bytes], chance: random.Random) -> str:
    """One mutation and what came of it; AssertionError where that must not be."""
    name = chance.choice([MANIFEST, MANIFEST, *good])
    content = mutated(good[name], chance)
    resigned = name == MANIFEST and chance.random() < 0.5
    if resigned:
        content = signed(content)
    file = directory / name
    file.write_bytes(content)
    try:
        if name.endswith(".safetensors") and chance.random() < 0.5:
            list(read_tensors(file))
            return "tensors read"
        entries = read_manifest(directory) or {}
        for each in entries:
            inside = (directory / each).resolve()
            assert inside.is_relative_to(directory.resolve()), each
        verify(directory)
        assert resigned or content == good[name], "a change was not seen"
        return "verified"
    except CheckpointError:
        return "refused"
    finally:
        file.write_bytes(good[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    minutes = 0.05 if arguments.smoke else arguments.minutes
    chance = random.Random(arguments.seed)
    counts: dict[str, int] = {}
    failures: list[dict[str, Any]] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tensors = {"weight": torch.arange(12.0).view(3, 4), "count": torch.tensor(3)}
        store = Store(Path(folder))
        texts = {"state.json": '{"step": 1}\n', "config.toml": "[run]\nsteps = 3\n"}
        directory = store.save(1, tensors={"model.safetensors": tensors}, texts=texts)
        good = {path.name: path.read_bytes() for path in directory.iterdir()}
        while time.monotonic() - started < 60 * minutes and len(failures) < 20:
            try:
                outcome = once(directory, good, chance)
            except Exception as error:
                outcome = "failed"
                failures.append({"case": sum(counts.values()), "error": repr(error)})
            counts[outcome] = counts.get(outcome, 0) + 1
        assert store.newest()[0] is not None
    found = {
        "minutes": (time.monotonic() - started) / 60, "cases": sum(counts.values()),
        "outcomes": counts, "failures": failures, "seed": arguments.seed,
        **environment(torch.device("cpu")),
    }  # fmt: skip
    print(json.dumps({k: found[k] for k in ("minutes", "cases", "outcomes", "failures")}, indent=1))
    if not arguments.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "fuzz.json").write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
