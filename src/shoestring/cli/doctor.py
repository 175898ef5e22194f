"""`shoestring doctor`: where memory goes, or what is here and whether the promise holds on it.

With --script, somebody's own training script is run in a process of its own and watched; with
--pid, the system is asked about a process that runs already.

Alone, it is a look at the machine and a self test, which trains a small reversible network for a
few steps twice, once reconstructing its activations and once storing them, and compares every
gradient with torch.equal. It is the claim of the library, tried on this machine's kernels.
"""

import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

from rich.table import Table
from tyro.conf import arg

from ..errors import ConfigError
from ..units import format_bytes
from .arguments import Common
from .terminal import Terminal

_PACKAGES = ("shoestring", "torch", "transformers", "tokenizers", "safetensors", "numpy", "tyro")
_OPTIONAL = ("datasets", "pyarrow", "peft")
_STEPS = 3
_TOTALS = {
    "rss_bytes": "resident now", "peak_bytes": "resident at most",
    "anonymous_bytes": "of it: data (tensors are among it)",
    "file_bytes": "of it: files (libraries, maps)", "shared_bytes": "of it: shared memory",
    "swap_bytes": "swapped out",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """Where the memory of a training script goes, and what would lower its peak; alone: versions,
    devices, free memory, allocator settings, and a short self test."""

    script: Annotated[str, arg(metavar="FILE [ARG ...]")] = ""
    """Run this Python file, watch its training steps, and say where the memory goes. What comes
    after FILE is the script's own. It is ended after the watched steps."""
    steps: int = 2
    """Optimizer steps to watch after the first (with --script)."""
    pid: int | None = None
    """Totals of a process that runs already; what its tensors are cannot be seen from outside."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--steps {self.steps} cannot be used", expected="1 or more")
        if self.script and self.pid is not None:
            raise ConfigError("--script and --pid do not go together", expected="one of them")


def run(arguments: Arguments, terminal: Terminal, script_arguments: Sequence[str] = ()) -> int:
    """Prints the findings; exit code 1 when the script or the self test fails."""
    if arguments.script:
        return _examine(arguments, terminal, script_arguments)
    if arguments.pid is not None:
        return _look_at(arguments.pid, terminal)
    return _check(terminal)


def _examine(arguments: Arguments, terminal: Terminal, script_arguments: Sequence[str]) -> int:
    """A script under the doctor."""
    from ..doctor.diagnosis import Diagnosis
    from ..doctor.script import examine_script

    terminal.note(f"watching {arguments.script}: {arguments.steps} steps after the first")
    record = examine_script(
        arguments.script, script_arguments, steps=arguments.steps,
        stdout=sys.stderr if terminal.json else None,
    )  # fmt: skip
    if record["diagnosis"] is not None:
        terminal.say("", str(Diagnosis.from_json(record["diagnosis"])))
    code = 0 if record["message"] is None else 1
    if record["status"] == "interrupted":
        code = 130
    report = {"script": arguments.script, "diagnosis": record["diagnosis"]}
    report |= {"status": record["status"], "steps": record["steps"]}
    if code:
        terminal.complain(record["message"])
        kind = {"interrupted": "KeyboardInterrupt"}.get(record["status"], "ScriptError")
        report["error"] = {"kind": kind, "message": record["message"], "exit_code": code}
    terminal.emit(report)
    return code


def _look_at(pid: int, terminal: Terminal) -> int:
    """Totals of another process."""
    from ..doctor.process import WHY_NOT_MORE, process_totals

    found = process_totals(pid)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in _TOTALS.items():
        if found[name] is not None:
            table.add_row(text, format_bytes(found[name]))
    for group in found["cgroups"]:
        limit, left = format_bytes(group["limit_bytes"]), format_bytes(group["left_bytes"])
        table.add_row(f"limit of cgroup {group['path']}", f"{limit}, {left} left")
    if not found["cgroups"]:
        table.add_row("limit", "none of its cgroups has one that can be seen")
    terminal.say(f"process {pid} ({found['name']})", table, WHY_NOT_MORE)
    terminal.emit(found | {"explanation": WHY_NOT_MORE})
    return 0


def _check(terminal: Terminal) -> int:
    """This machine, and the self test."""
    from ..allocator import explain, is_tuned

    report: dict[str, Any] = {
        "versions": {"python": platform.python_version()} | _versions(_PACKAGES + _OPTIONAL),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "devices": _devices(),
        "allocator": {"tuned": is_tuned(), "explanation": explain()},
    }
    terminal.say(*_facts(report))
    with terminal.progress.status("self test: reversible gradients against stored ones"):
        report["self_test"] = _self_test()
    terminal.say(_verdict(report["self_test"]))
    terminal.emit(report)
    return 0 if report["self_test"]["passed"] else 1


def _versions(names: tuple[str, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _devices() -> list[dict[str, Any]]:
    import torch

    from ..planner.budget import cpu_free_bytes

    try:
        free: int | None = cpu_free_bytes()
    except ConfigError:  # this system does not tell
        free = None
    cores = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    devices: list[dict[str, Any]] = [{"name": "cpu", **cores, "free_bytes": free}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        left, total = torch.cuda.mem_get_info(index)
        name = f"cuda:{index} {torch.cuda.get_device_name(index)}"
        devices.append({"name": name, "free_bytes": left, "total_bytes": total})
    return devices


def _facts(report: dict[str, Any]) -> list[Table]:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, found in report["versions"].items():
        table.add_row(name, found or "not installed")
    table.add_row("system", report["system"])
    for device in report["devices"]:
        free = device["free_bytes"]
        memory = "free memory unknown" if free is None else f"{format_bytes(free)} free"
        cores = f"{device['cores']} cores, {device['threads']} threads, "
        table.add_row(device["name"], (cores if "cores" in device else "") + memory)
    table.add_row("allocator", report["allocator"]["explanation"])
    return [table]


def _self_test() -> dict[str, Any]:
    """Two trainings from one seed: {"passed", "gradients", "seconds", peaks in bytes}."""
    import torch

    started = time.perf_counter()
    keeps, rebuilds = _trained(stores=True), _trained(stores=False)
    same = [
        torch.equal(stored, rebuilt)
        for stored, rebuilt in zip(keeps["gradients"], rebuilds["gradients"], strict=True)
    ]
    return {
        "passed": all(same),
        "gradients": len(same),
        "equal": sum(same),
        "steps": _STEPS,
        "stored_peak_bytes": keeps["peak_bytes"],
        "reversible_peak_bytes": rebuilds["peak_bytes"],
        "seconds": time.perf_counter() - started,
    }


def _trained(*, stores: bool) -> dict[str, Any]:
    import torch

    from ..meter import Meter
    from ..methods import apply_spans
    from ..models.gpt import GPT, GPTConfig
    from ..stack import Span, Stack

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 12}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(GPTConfig(**shape, num_attention_heads=2, rule="feistel")).to(device).train()
        ids = torch.randint(512, (4, 128)).to(device)
    if stores:
        stack = Stack.of(model)
        apply_spans(stack, [Span(0, len(stack), "reversible", {"keep_top": len(stack)})])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    for step in range(_STEPS):
        with Meter(model, optimizer) as meter:
            model(input_ids=ids, labels=ids).loss.backward()
        gradients = [p.grad for p in model.parameters()]
        if step < _STEPS - 1:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {"gradients": gradients, "peak_bytes": meter.peak_bytes}


def _verdict(test: dict[str, Any]) -> str:
    peaks = (
        f"peak {format_bytes(test['reversible_peak_bytes'])} reversible, "
        f"{format_bytes(test['stored_peak_bytes'])} stored"
    )
    if test["passed"]:
        return (
            f"self test passed: after {test['steps']} steps all {test['gradients']} gradients "
            f"are bit-identical to those of stored activations ({peaks}; {test['seconds']:.1f} s)"
        )
    return (
        f"self test FAILED: {test['gradients'] - test['equal']} of {test['gradients']} gradients "
        f"differ from those of stored activations ({peaks}); Python is {sys.executable}"
    )
