"""Does a run survive kills, damaged files and full disks, and what does it cost?

    python benchmarks/faults/run.py [--smoke] [--part NAME ...]

kills      a run that saves after every update is killed (SIGKILL) at random moments, resumed, and
           killed again. It recovers when it goes on by itself from at least the last step that it
           had acknowledged. torch.save and DCP, overwriting one checkpoint, go through the same.
resume     runs with dropout and accumulation, killed and resumed three times, against the same runs
           left alone: weights, optimizer states and metrics by torch.equal.
flips      one random bit after the other over all files of the newest checkpoint: detected when
           the older one is used. safetensors alone, torch.save and DCP read the same flips.
disks      the disk of a run fills up at a random moment: what is left has to verify.
overhead   500 MB of weights and optimizer states: what a save costs as a share of 50 updates, in
           the foreground and in the background; measured peak against the plan.

One JSON a part in results/, and faults.md.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

from faults.victims import Victim, can_mount, small  # noqa: E402
from shoestring.checkpoint import Store  # noqa: E402
from shoestring.training.config import RunConfig  # noqa: E402
from shoestring.training.loop import train  # noqa: E402
from shoestring.training.receipt import environment  # noqa: E402
from shoestring.units import format_bytes  # noqa: E402

_FAILURES = (Exception, CheckpointException)  # DCP's own is no Exception
RESULTS = Path(__file__).parent / "results"
SEED = 0


def text_source() -> Path:
    """Real text on every machine."""
    import email

    return Path(email.__file__).parent


# ---- kills -------------------------------------------------------------------------------------


def kills(folder: Path, *, count: int) -> dict[str, Any]:
    """Kill the same run again and again; every life starts from what the last one left."""
    chance = random.Random(SEED)
    settings = {"run": {"steps": 10**9}, "evaluate": {"every": 7}}
    acknowledged, recovered, lost = 0, 0, []
    updates: list[int] = []
    checkpoints: list[int] = []
    action, config = "train", small(folder / "run", text_source(), **settings)
    first = Victim(action, config, folder / "log")
    first.wait_for("checkpoint", 1)
    for number in range(count):
        victim = first if number == 0 else Victim("resume", config, folder / "log")
        if number:
            victim.wait_for("resumed", 1)
            resumed = [event["step"] for event in victim.events("resumed")]
            good = bool(resumed) and resumed[0] >= acknowledged
            recovered += good
            if not good:
                lost.append({"life": number, "acknowledged": acknowledged, "log": victim.text()})
                break
        # from the first instant after a resume to a dozen updates later, each with a save
        victim.wait_for("step", chance.choice([0, 0, 1, 2, 4, 8, 12]))
        time.sleep(chance.random() * chance.choice([0.02, 0.1, 0.4]))
        victim.kill()
        victim.wait()
        told = [event["step"] for event in victim.events("checkpoint")]
        acknowledged = max([acknowledged, *told])
        updates.append(len(victim.events("step")))
        checkpoints.append(len(told))
    last = Victim("resume", config, folder / "log")
    last.wait_for("resumed", 1)
    resumed = [event["step"] for event in last.events("resumed")]
    recovered += bool(resumed) and resumed[0] >= acknowledged
    last.kill()
    last.wait()
    return {
        "kills": count, "recovered": recovered, "lost": lost, "last_step": acknowledged,
        "updates_a_life": _spread(updates), "checkpoints_a_life": _spread(checkpoints),
        "peers": {name: kill_peer(folder / name, name) for name in PEERS},
    }  # fmt: skip


def _spread(counts: list[int]) -> dict[str, float]:
    return {
        "mean": statistics.mean(counts), "most": max(counts), "none": counts.count(0),
        "three_or_more": sum(count >= 3 for count in counts),
    }  # fmt: skip


PEERS = ("torch.save", "DCP")
PEER_KILLS = 8


def kill_peer(folder: Path, name: str) -> dict[str, Any]:
    """The same for a checkpoint that is overwritten in place, as their documentation shows it.

    40 MB are saved in a loop and the process is killed in the middle of a save.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recovered = 0
    for number in range(PEER_KILLS):
        chance = random.Random(number)
        place = folder / f"state-{number}"
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                _save_for_ever(name, place, folder / f"acknowledged-{number}")
            os._exit(0)
        while not (folder / f"acknowledged-{number}").exists():
            time.sleep(0.01)
        while _bytes_of(place) >= 40_000_000:
            time.sleep(chance.random() * 0.001)  # until it is being overwritten
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        acknowledged = int((folder / f"acknowledged-{number}").read_text() or 0)
        recovered += _reads(name, place, acknowledged)
    return {"kills": PEER_KILLS, "recovered": recovered}


def _bytes_of(place: Path) -> int:
    files = [place] if place.is_file() else list(place.rglob("*.distcp"))
    return sum(file.stat().st_size for file in files)


def _save_for_ever(name: str, place: Path, told: Path) -> None:
    state = {"weight": torch.zeros(10_000_000)}
    for step in range(1, 10**6):
        state["weight"].fill_(step)
        if name == "torch.save":
            torch.save(state, place)
        else:
            import torch.distributed.checkpoint as dcp

            dcp.save(state, checkpoint_id=place, no_dist=True)
        told.write_text(str(step))


def _reads(name: str, place: Path, least: int) -> bool:
    """Whether what is there is whole and at least as new as what was acknowledged."""
    state = {"weight": torch.zeros(10_000_000)}
    try:
        if name == "torch.save":
            state = torch.load(place, weights_only=True)
        else:
            import torch.distributed.checkpoint as dcp

            dcp.load(state, checkpoint_id=place, no_dist=True)
    except _FAILURES:
        return False
    weight = state["weight"]
    return bool(weight[0] >= least) and bool((weight == weight[0]).all())


# ---- resume ------------------------------------------------------------------------------------


def equality(folder: Path, *, steps: int) -> dict[str, Any]:
    """Tensors and lines of a killed and resumed run that equal those of one left alone."""
    found: dict[str, Any] = {}
    for rule in ("residual", "feistel", "bdia", "random_sign"):
        shape = {"run": {"steps": steps}, "model": {"rule": rule, "dropout": 0.1}}
        whole = small(folder / f"whole-{rule}", text_source(), **shape)
        train(whole)
        config = small(folder / f"killed-{rule}", text_source(), **shape)
        for life in range(4):
            victim = Victim("resume" if life else "train", config, folder / "log")
            if life < 3:
                victim.wait_for("step", max(1, steps // 5))
                victim.kill()
            victim.wait()
        places = [Path(each.run.directory) for each in (whole, config)]
        mine, other = map(_state, places)
        lines = [_lines(place) for place in places]
        found[rule] = {
            "tensors": len(mine),
            "equal": sum(torch.equal(tensor, other[name]) for name, tensor in mine.items()),
            "lines": len(lines[0]),
            "equal_lines": sum(a == b for a, b in zip(*lines, strict=True)),
        }
    return {"rules": found}


def _state(directory: Path) -> dict[str, torch.Tensor]:
    saved, _ = Store(directory / "checkpoints").newest()
    assert saved is not None
    files = ("model.safetensors", "optimizer.safetensors", "random.safetensors")
    return {f"{file} {name}": t for file in files for name, t in saved.tensors(file)}


def _lines(directory: Path) -> list[dict[str, Any]]:
    clocks = ("seconds", "tokens_per_s")
    found = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in line.items() if name not in clocks}
        for line in found
        if line["event"] in ("step", "evaluation")
    ]


# ---- flips -------------------------------------------------------------------------------------


def flips(folder: Path, *, count: int, peer_count: int) -> dict[str, Any]:
    """Flip a bit, look, flip it back."""
    config = small(folder / "run", text_source(), run={"steps": 3})
    train(config)
    store = Store(folder / "run" / "checkpoints")
    newest = store.directory / "step-3"
    files = sorted(path for path in newest.iterdir())
    sizes = [path.stat().st_size for path in files]
    chance = random.Random(SEED)
    detected = 0
    for number in range(count):
        # every file gets its share, and beyond that by size
        file = files[number % len(files)] if number % 2 else chance.choices(files, sizes)[0]
        with _flipped(file, chance):
            found, _ = store.newest()
            detected += found is not None and found.step == 2
    return {
        "flips": count, "detected": detected,
        "files": dict(zip([f.name for f in files], sizes, strict=True)),
        "peers": {n: flip_peer(folder / n, n, peer_count) for n in ("safetensors", *PEERS)},
    }  # fmt: skip


@contextlib.contextmanager
def _flipped(file: Path, chance: random.Random):
    place = chance.randrange(8 * file.stat().st_size)
    with file.open("r+b") as opened:
        opened.seek(place // 8)
        byte = opened.read(1)[0]
        opened.seek(place // 8)
        opened.write(bytes([byte ^ 1 << place % 8]))
    try:
        yield
    finally:
        with file.open("r+b") as opened:
            opened.seek(place // 8)
            opened.write(bytes([byte]))


def flip_peer(folder: Path, name: str, count: int) -> dict[str, Any]:
    """How many flips over the files of a 1 MB state make the peer refuse to load it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(SEED)
    state = {"weight": torch.randn(250_000, generator=generator)}
    place = folder / "state"
    if name == "safetensors":
        save_file(state, place)
    elif name == "torch.save":
        torch.save(state, place)
    else:
        import torch.distributed.checkpoint as dcp

        dcp.save(state, checkpoint_id=place, no_dist=True)
    files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.is_file())
    chance = random.Random(SEED)
    detected = 0
    for _ in range(count):
        file = chance.choices(files, [f.stat().st_size for f in files])[0]
        with _flipped(file, chance):
            try:
                if name == "safetensors":
                    load_file(place)
                elif name == "torch.save":
                    torch.load(place, weights_only=True)
                else:
                    dcp.load({"weight": torch.zeros(250_000)}, checkpoint_id=place, no_dist=True)
            except _FAILURES:
                detected += 1
    return {"flips": count, "detected": detected}


# ---- disks -------------------------------------------------------------------------------------


def disks(folder: Path, *, count: int) -> dict[str, Any]:
    """Fill the disk of a run at random moments."""
    if not can_mount():
        return {"skipped": "this system does not let a process mount a disk of its own"}
    verifies, ended, went_on, other = 0, 0, 0, []
    for seed in range(count):
        config = small(
            folder / f"run-{seed}", text_source(), run={"steps": 30}, evaluate={"every": 10}
        )
        victim = Victim("train", config, folder / "log", "full_disk", 3 << 20, seed)
        code = victim.wait()
        left, errors = victim.events("left"), victim.events("error")
        acknowledged = max((e["step"] for e in victim.events("checkpoint")), default=0)
        good = bool(left) and not left[0]["wrong"] and left[0]["step"] == acknowledged
        verifies += good
        clear = bool(errors) and any(
            words in errors[0]["message"] for words in ("room to write", "No space left")
        )
        went_on += code == 0
        ended += code == 1 and clear
        if not good or not (code == 0 or clear):
            other.append({"seed": seed, "code": code, "log": victim.text()[-2000:]})
    return {
        "disks": count, "verifies": verifies, "went_on": went_on, "clear_error": ended,
        "other": other,
    }  # fmt: skip


# ---- overhead ----------------------------------------------------------------------------------


EVERY, SAVED_EVERY, TOUCHED = 50, 8, 3
"""Updates from save to save: as the bar has it, and as measured; updates that a save touches."""


def overhead(folder: Path, *, saves: int, width: int) -> dict[str, Any]:
    """Wall time of checkpoints in a run that trains 12 bytes a parameter of state.

    Every save is held against the updates just before it, so that other work on the machine, which
    comes and goes, is in both; what one costs is then a share of `EVERY` updates.
    """
    updates = SAVED_EVERY * saves + TOUCHED
    found: dict[str, Any] = {"every": EVERY, "saved_every": SAVED_EVERY, "updates": updates}
    for name, settings in (("foreground", {}), ("background", {"background": True})):
        config = RunConfig.load(ROOT / "tests" / "faults" / "small.toml")
        config = small(
            folder / name, text_source(),
            run={"steps": updates, "budget": "2GiB", "threads": 1},
            model={"rule": "residual", "hidden_size": width, "num_hidden_layers": 14,
                   "num_attention_heads": 8, "dropout": 0.0},
            data={"sequence_length": 128, "batch_size": 4},
            evaluate={"every": 0, "batches": 1}, optim={"accumulate": 1},
            checkpoint={"every": SAVED_EVERY, "keep": 1, **settings},
        )  # fmt: skip
        written: list[dict[str, Any]] = []
        steps: dict[int, float] = {}

        def tell(event: dict[str, Any], written: list = written, steps: dict = steps) -> None:
            if event["event"] == "checkpoint":
                written.append({k: event[k] for k in ("bytes", "seconds", "step")})
            if event["event"] == "step":
                steps[event["step"]] = time.perf_counter()

        run = train(config, progress=tell)
        shutil.rmtree(folder / name / "checkpoints")
        # gaps between the ends of neighbouring updates; a save in the background is still being
        # written in those after the next one
        gaps = {step: steps[step] - steps[step - 1] for step in range(4, updates + 1)}
        rows = []
        for step in range(SAVED_EVERY, updates - TOUCHED + 1, SAVED_EVERY):
            before = [gaps[s] for s in range(step - SAVED_EVERY + TOUCHED + 1, step + 1)]
            after = [gaps[s] for s in range(step + 1, step + TOUCHED + 1)]
            usual = statistics.median(before)
            extra = sum(after) - TOUCHED * usual
            rows.append({
                "update_seconds": usual, "extra_seconds": extra,
                "share_of_wall": extra / (EVERY * usual + extra),
            })  # fmt: skip
        memory = run.receipt["memory"]
        found[name] = {
            "state_bytes": written[0]["bytes"], "save_seconds": [w["seconds"] for w in written],
            "saves": rows, "share_of_wall": statistics.median(r["share_of_wall"] for r in rows),
            "promised_bytes": memory["promised_bytes"], "measured_bytes": memory["measured_bytes"],
            "status": run.receipt["status"],
        }  # fmt: skip
    return found


# ---- the table ---------------------------------------------------------------------------------


def table(found: dict[str, dict[str, Any]]) -> str:
    """What the stored results say, as a page shows it."""
    lines = ["| what | ours | others, same treatment |", "| --- | --- | --- |"]
    if "kills" in found:
        kill = found["kills"]
        peers = ", ".join(f"{n} {p['recovered']} of {p['kills']}" for n, p in kill["peers"].items())
        life = kill["updates_a_life"]
        lines.append(
            f"| killed at random moments ({life['mean']:.1f} updates a life, "
            f"{life['most']} at most), recovered by itself | {kill['recovered']} of "
            f"{kill['kills']} | {peers} (overwritten in place) |"
        )
    if "resume" in found:
        rules = found["resume"]["rules"].values()
        sums = {
            key: sum(rule[key] for rule in rules)
            for key in ("tensors", "equal", "lines", "equal_lines")
        }
        lines.append(
            f"| killed three times and resumed, against left alone: equal tensors, equal lines of "
            f"metrics | {sums['equal']} of {sums['tensors']}, {sums['equal_lines']} of "
            f"{sums['lines']} | |"
        )
    if "flips" in found:
        flip = found["flips"]
        peers = ", ".join(f"{n} {p['detected']} of {p['flips']}" for n, p in flip["peers"].items())
        lines.append(
            f"| a flipped bit detected, older checkpoint used | {flip['detected']} of "
            f"{flip['flips']} | {peers} |"
        )
    if disk := found.get("disks", {}).get("disks"):
        part = found["disks"]
        lines.append(
            f"| disk full at random moments: a checkpoint that verifies | {part['verifies']} of "
            f"{disk} ({part['went_on']} went on, {part['clear_error']} ended with a clear error) "
            "| |"
        )
    if "overhead" in found:
        part = found["overhead"]
        for name in ("foreground", "background"):
            row = part[name]
            lines.append(
                f"| {format_bytes(row['state_bytes'])} saved every {part['every']} updates, "
                f"{name}: share of wall time | {row['share_of_wall']:.1%}; peak "
                f"{format_bytes(row['measured_bytes'])}, promised "
                f"{format_bytes(row['promised_bytes'])} | |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parts = ["kills", "resume", "flips", "disks", "overhead"]
    parser.add_argument("--part", nargs="*", default=parts)
    arguments = parser.parse_args()
    few = arguments.smoke
    sizes: dict[str, Callable[[Path], dict[str, Any]]] = {
        "kills": lambda folder: kills(folder, count=3 if few else 200),
        "resume": lambda folder: equality(folder, steps=6 if few else 20),
        "flips": lambda folder: flips(folder, count=20 if few else 1000, peer_count=300),
        "disks": lambda folder: disks(folder, count=2 if few else 50),
        "overhead": lambda folder: overhead(
            folder, saves=2 if few else 8, width=64 if few else 512
        ),
    }
    results = Path(tempfile.mkdtemp()) if few else RESULTS
    for part in arguments.part:
        with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as folder:
            os.environ["SHOESTRING_CACHE"] = str(Path(folder) / "cache")
            started = time.monotonic()
            result = sizes[part](Path(folder))
        result |= {
            "part": part, "seed": SEED, "seconds": time.monotonic() - started,
            **environment(torch.device("cpu")),
        }  # fmt: skip
        (results / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(part, f"{result['seconds']:.0f} s")
    found = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    (results / "faults.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
