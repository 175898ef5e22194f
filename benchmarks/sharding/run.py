"""Is a group of processes that divides its weights one process, and does it survive its dead?

    python benchmarks/sharding/run.py [--smoke] [--part NAME ...]

equal      50 updates of 2 processes over gloo, weights divided by FSDP2, against one process that
           reads the same microbatches one after the other, or all rows at once; with gradients
           clipped and not (the norm of parts is summed in another order than that of the whole).
           The largest difference of a parameter.
resume     the run of 2 processes stopped after 25 updates and gone on with by 2, by 1 and by 4,
           with as many rows an update, against the run that was not stopped.
killed     one of 2 processes under torchrun gets SIGKILL: seconds until all have ended, whether its
           rank was named, and whether the run gone on with equals the one left alone.
peaks      the plan's peak against the meter's, of every process, for several budgets and rules.

One JSON in results/ for each part, and sharding.md.
"""

import argparse
import dataclasses
import email
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402

from shoestring.checkpoint import Store  # noqa: E402
from shoestring.training.config import (  # noqa: E402
    DataConfig,
    EvaluateConfig,
    JobConfig,
    ModelConfig,
    RunConfig,
)
from shoestring.training.loop import resume, train  # noqa: E402
from shoestring.training.receipt import environment  # noqa: E402
from shoestring.units import format_bytes  # noqa: E402
from training.group import run as run_group  # noqa: E402

RESULTS = Path(__file__).parent / "results"
ROWS = 8
"""Rows an update, whoever reads them."""
RULES = ("residual", "feistel")
BAR = 1.5e-7


def settings(directory: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run of a small network on real text; keywords replace fields of sections."""
    whole = RunConfig(
        run=JobConfig(
            directory=str(directory), device="cpu", threads=1, budget="none", replace=True,
            sharding="full",
        ),
        model=ModelConfig(preset="tiny"),
        data=DataConfig(
            source=str(Path(email.__file__).parent), vocabulary=512, sequence_length=64,
            batch_size=ROWS // 2, held_out=0.2,
        ),
        evaluate=EvaluateConfig(batches=2),
    )  # fmt: skip
    changed = {k: dataclasses.replace(getattr(whole, k), **v) for k, v in sections.items()}
    return dataclasses.replace(whole, **changed)


def newest(directory: Path, file: str) -> dict[str, torch.Tensor]:
    """The tensors of a file of the newest checkpoint."""
    saved, _ = Store(directory / "checkpoints").newest()
    assert saved is not None
    return dict(saved.tensors(f"{file}.safetensors"))


def differences(one: Path, other: Path) -> dict[str, Any]:
    """Largest absolute ones of parameters and of optimizer states; whether all bits are equal."""
    found: dict[str, Any] = {}
    equal = True
    for file in ("model", "optimizer"):
        mine, theirs = newest(one, file), newest(other, file)
        assert mine.keys() == theirs.keys()
        found[file] = max(
            (t.double() - theirs[name].double()).abs().max().item() for name, t in mine.items()
        )
        equal &= all(torch.equal(t, theirs[name]) for name, t in mine.items())
    return {"parameters": found["model"], "states": found["optimizer"], "bit_equal": equal}


# ---- equal -------------------------------------------------------------------------------------


def equal(folder: Path, *, steps: int) -> list[dict[str, Any]]:
    """Two processes against one."""
    rows = []
    for rule, clip in itertools.product(RULES, (0.0, 1.0)):

        def at(name: str, rows: int = ROWS // 2, accumulate: int = 1) -> RunConfig:
            return settings(
                folder / name,
                run={"steps": steps},
                model={"rule": rule},  # noqa: B023 - called before the next one
                data={"batch_size": rows},
                optim={"accumulate": accumulate, "grad_clip": clip},  # noqa: B023
            )

        run_group("train", at("two"), 2, folder / "logs")
        train(at("parts", accumulate=2))
        train(at("whole", ROWS))
        for name, what in (("parts", "the same microbatches"), ("whole", "all rows at once")):
            against = differences(folder / "two", folder / name)
            rows.append(
                {"rule": rule, "steps": steps, "grad_clip": clip, "one_reads": what, **against}
            )
    return rows


# ---- resume ------------------------------------------------------------------------------------


def resumed(folder: Path, *, steps: int) -> list[dict[str, Any]]:
    def at(name: str, steps: int, **sections: Any) -> RunConfig:
        run = {"directory": str(folder / name), "steps": steps}
        # of another number of steps, with the same learning rates
        schedule = {"kind": "constant", "warmup_share": 0.0}
        return settings(folder, run=run, schedule=schedule, **sections)

    run_group("train", at("whole", steps), 2, folder / "logs")
    run_group("train", at("half", steps // 2), 2, folder / "logs")
    changes: dict[int, dict[str, Any]] = {
        2: {}, 1: {"optim": {"accumulate": 2}}, 4: {"data": {"batch_size": ROWS // 4}}
    }  # fmt: skip
    rows = []
    for count, change in changes.items():
        place = folder / f"on-{count}"
        shutil.copytree(folder / "half", place)
        config = at(place.name, steps, **change)
        (place / "config.toml").write_text(config.to_toml())
        if count == 1:
            resume(place)
        else:
            run_group("resume", config, count, folder / "logs")
        against = differences(folder / "whole", place)
        rows.append({"saved_on": 2, "at": steps // 2, "steps": steps, "on": count, **against})
    return rows


# ---- killed ------------------------------------------------------------------------------------


def killed(folder: Path, *, steps: int) -> list[dict[str, Any]]:
    rows = []
    for sharding in ("full", "none"):

        def at(name: str, sharding: str = sharding) -> RunConfig:
            run = {"directory": str(folder / name), "steps": steps, "sharding": sharding}
            return settings(folder, run=run, checkpoint={"every": 5})

        whole = folder / f"whole-{sharding}"
        run_group("train", at(whole.name), 2, folder / "logs")
        for victim in (0, 1):
            name = f"broken-{sharding}-{victim}"
            seconds, code, said = kill_one(at(name), folder / f"{name}.toml", victim, steps // 2)
            saved, _ = Store(folder / name / "checkpoints").newest()
            run_group("resume", at(name), 2, folder / "logs")
            rows.append(
                {
                    "sharding": sharding, "victim": victim, "seconds_to_end": seconds,
                    "exit_code": code, "named": f"rank {victim} of 2 is gone" in said,
                    "newest_checkpoint": saved.step if saved else None,
                    **differences(whole, folder / name),
                }
            )  # fmt: skip
    return rows


def kill_one(config: RunConfig, file: Path, victim: int, step: int) -> tuple[float, int, str]:
    """(seconds from the kill to the end of torchrun, its exit code, what all of them said)."""
    file.write_text(config.to_toml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "-m", "shoestring", "train", str(file)]  # fmt: skip
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen(
        command, env={**os.environ, **paths}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    metrics = Path(config.run.directory) / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"step", ') < step:
        assert torchrun.poll() is None, torchrun.stderr.read() if torchrun.stderr else ""
        time.sleep(0.02)
    process = next(pid for pid, rank in ranks_below(torchrun.pid) if rank == victim)
    os.kill(process, signal.SIGKILL)
    began = time.monotonic()
    said = torchrun.communicate(timeout=60)[1]
    return time.monotonic() - began, torchrun.returncode, said


def ranks_below(parent: int) -> Iterator[tuple[int, int]]:
    """(process, rank) of torchrun's workers."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            variables = (status.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for variable in variables:
            if variable.startswith(b"RANK="):
                yield int(status.parent.name), int(variable[5:])


# ---- peaks -------------------------------------------------------------------------------------


def peaks(folder: Path, *, cases: list[tuple[str, int, str, int]]) -> list[dict[str, Any]]:
    rows = []
    for rule, count, budget, accumulate in cases:
        config = settings(
            folder,
            run={"directory": str(folder / "run"), "steps": 4, "budget": budget},
            model={"rule": rule, "num_hidden_layers": 6},
            optim={"accumulate": accumulate},
        )
        group = run_group("train", config, count, folder / "logs", seconds=400)
        memory = [receipt["memory"] for receipt in group.receipts]
        measured = [each["measured_bytes"] for each in memory]
        promised = memory[0]["promised_bytes"]
        rows.append(
            {
                "rule": rule, "processes": count, "accumulate": accumulate, "budget": budget,
                "methods": sorted({each["method"] for each in group.receipts[0]["methods"]}),
                "promised_bytes": promised, "measured_bytes": measured,
                "errors": [(promised - each) / each for each in measured],
                "by_category": memory[0]["promised_by_category"],
            }
        )  # fmt: skip
    return rows


CASES = [
    ("residual", 2, "1GiB", 1), ("residual", 2, "1GiB", 2), ("residual", 2, "5MiB", 1),
    ("residual", 4, "1GiB", 1), ("residual", 4, "4.5MiB", 1), ("feistel", 2, "6.5MiB", 1),
]  # fmt: skip


# ---- out -----------------------------------------------------------------------------------------


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """What docs show."""
    lines = ["| what | measured |", "| --- | --- |"]
    for row in results.get("equal", []):
        clipped = "clipped" if row["grad_clip"] else "not clipped"
        lines.append(
            f"| 2 processes against one that reads {row['one_reads']}, {row['rule']}, {clipped}:"
            f" largest difference of a parameter after {row['steps']} updates |"
            f" {amount(row['parameters'])} |"
        )
    for row in results.get("resume", []):
        lines.append(
            f"| saved on 2 after {row['at']} updates, gone on with on {row['on']} to"
            f" {row['steps']}, against 2 throughout | {amount(row['parameters'])} |"
        )
    for row in results.get("killed", []):
        how = "divided" if row["sharding"] == "full" else "DDP"
        equal = "bit-equal" if row["bit_equal"] else "not equal"
        lines.append(
            f"| rank {row['victim']} of 2 killed ({how}): until all have ended |"
            f" {row['seconds_to_end']:.2f} s, {'named' if row['named'] else 'not named'}; gone on"
            f" with: {equal} |"
        )
    for row in results.get("peaks", []):
        errors = [100 * error for error in row["errors"]]
        lines.append(
            f"| peak of {row['processes']} processes, {row['rule']}, {', '.join(row['methods'])}"
            f"{', 2 microbatches' if row['accumulate'] > 1 else ''}: promised, and by how much"
            f" that is above measured | {format_bytes(row['promised_bytes'])},"
            f" {min(errors):.2f} % to {max(errors):.2f} % |"
        )
    return "\n".join(lines) + "\n"


def amount(difference: float) -> str:
    """A difference as text."""
    return "none" if difference == 0 else f"{difference:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few updates, nothing written")
    parser.add_argument("--part", nargs="+", default=["equal", "resume", "killed", "peaks"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = 6 if arguments.smoke else 50
    cases = CASES[:1] if arguments.smoke else CASES
    parts: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        "equal": lambda folder: equal(folder, steps=steps),
        "resume": lambda folder: resumed(folder, steps=steps),
        "killed": lambda folder: killed(folder, steps=30 if arguments.smoke else 200),
        "peaks": lambda folder: peaks(folder, cases=cases),
    }
    results = {}
    for name in parts:
        path = RESULTS / f"{name}.json"
        if name not in arguments.part:
            if path.exists():
                results[name] = json.loads(path.read_text())["rows"]
            continue
        with tempfile.TemporaryDirectory() as folder:
            results[name] = parts[name](Path(folder))
        if not arguments.smoke:
            answer = {
                "question": __doc__.splitlines()[0], "part": name, "bar": BAR, "backend": "gloo",
                **environment(torch.device("cpu")), "rows": results[name],
            }  # fmt: skip
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(answer, indent=1) + "\n")
    print(table(results))
    if not arguments.smoke:
        (RESULTS / "sharding.md").write_text(table(results))


if __name__ == "__main__":
    main()
