"""Processes that train, to be killed, starved and cut off.

They are forked from a server that has imported everything, so each starts in a fraction of a
second. What a victim is to suffer is done inside it, by name, because it has to be its own
process's limit, mount or clock.
"""

import ctypes
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoestring.errors import ShoestringError
from shoestring.training.config import RunConfig

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["shoestring.training.loop", "shoestring.models.gpt", "faults.victims", "transformers"]
)
# linux/sched.h and linux/mount.h
_NEW_MOUNTS, _NEW_USERS = 0x00020000, 0x10000000
_MMAP_THRESHOLD = -3  # malloc.h
_PRIVATE, _RECURSIVE, _READ_ONLY = 1 << 18, 1 << 14, 1


class Victim:
    """A run in a process of its own. fate: a function of this file, by name, and its arguments."""

    def __init__(self, action: str, config: RunConfig, log: Path, *fate: Any) -> None:
        self.log = log
        log.unlink(missing_ok=True)
        self._process = _CONTEXT.Process(
            target=_suffer, args=(action, config.to_toml(), str(log), fate), daemon=True
        )
        self._process.start()

    def wait(self, seconds: float = 120) -> int:
        """The exit code, negative for a signal."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still running: {self.text()}"
        return self._process.exitcode

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal."""
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind that it has told so far."""
        found = []
        for line in self.text().splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # it was killed in the middle of a line, or said something else
            if isinstance(event, dict) and event.get("event") == kind:
                found.append(event)
        return found

    def wait_for(self, kind: str, count: int = 1, seconds: float = 60) -> None:
        """Until it has told so many events of a kind, or has ended."""
        until = time.monotonic() + seconds
        while len(self.events(kind)) < count and self._process.is_alive():
            assert time.monotonic() < until, self.text()
            time.sleep(0.01)

    def text(self) -> str:
        """All that it wrote."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _suffer(action: str, toml: str, log: str, fate: tuple[Any, ...]) -> None:
    import torch

    from shoestring.training.loop import resume, train

    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command does
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    file = Path(log).with_suffix(".toml")
    file.write_text(toml)
    config = RunConfig.load(file)
    on_event: Callable[[dict[str, Any]], None] = lambda event: None  # noqa: E731
    if fate:
        on_event = globals()[fate[0]](config, *fate[1:])

    def tell(event: dict[str, Any]) -> None:
        plain = {k: v for k, v in event.items() if isinstance(v, str | int | float | dict)}
        os.write(out, (json.dumps(plain, default=str) + "\n").encode())
        on_event(event)

    code = 0
    try:
        tell({"event": "started"})
        run = (
            train(config, progress=tell)
            if action == "train"
            else resume(config.run.directory, steps=config.run.steps, progress=tell)
        )
        code = 130 if run.receipt["status"] == "interrupted" else 0
    except ShoestringError as error:
        tell({"event": "error", "kind": type(error).__name__, "message": str(error)})
        code = error.exit_code
    except KeyboardInterrupt as error:
        tell({"event": "interrupted", "message": str(error)})
        code = 130
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
        code = 1
    on_event({"event": "over"})
    sys.stdout.flush()
    os._exit(code)


# ---- fates -------------------------------------------------------------------------------------


def little_memory(
    config: RunConfig, more_bytes: int, after: int = 0, even_less: int | None = None
) -> Callable[..., None]:
    """Once a step was made (or before the first), so much more memory and not a byte beyond.

    even_less: what there is from the moment on when that has run out.
    """
    is_set = False
    # Large blocks as mappings of their own: what the heap keeps for later would be more memory.
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 17)

    def on_event(event: dict[str, Any]) -> None:
        nonlocal is_set
        kind = "step" if after else "evaluation"
        if not is_set and event["event"] == kind and event["step"] == after:
            is_set = True
            _limit_memory(more_bytes)
        if even_less is not None and event["event"] == "out of memory":
            _limit_memory(even_less)

    return on_event


def starved_optimizer(
    config: RunConfig, step: int, keeps_average: bool, times: int = 1
) -> Callable[..., None]:
    """In the optimizer's step of an update not a byte more than there is, and plenty again once
    the run has given up what it held; so many times.

    keeps_average: a hook of that step copies every weight, once they are new; else the states of
    the first update are what does not fit.
    """
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 17)
    calls = 0
    average: list[Any] = []

    def before(optimizer: Any, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if step <= calls < step + times:
            _limit_memory(0)

    def after(optimizer: Any, *arguments: Any) -> None:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        average[:] = [weight.detach().clone() for weight in weights]

    register_optimizer_step_pre_hook(before)
    if keeps_average:
        register_optimizer_step_post_hook(after)

    def on_event(event: dict[str, Any]) -> None:
        if calls >= step and event["event"] == "model":
            _limit_memory(1 << 28)

    return on_event


def _limit_memory(more: int) -> None:
    status = Path("/proc/self/status").read_text()
    data = int(status.partition("VmData:")[2].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (data + more, resource.RLIM_INFINITY))


def full_disk(config: RunConfig, size: int, seed: int) -> Callable[..., None]:
    """The run directory on a disk of its own, which fills up at a random moment and stays full.

    At the end tells which checkpoint verifies there, because nobody else can see that disk.
    """
    directory = own_disk(config, size)
    chance = random.Random(seed)
    moment = chance.randrange(1, 40)
    seen = 0

    def on_event(event: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            _fill(directory, chance.choice([0, 512, 5_000, 60_000, 200_000]))
        if event["event"] == "over":
            from shoestring.checkpoint import Store

            saved, wrong = Store(directory / "checkpoints").newest()
            step = saved.step if saved else 0
            left = {"event": "left", "step": step, "wrong": wrong, "moment": moment}
            sys.stdout.write(json.dumps(left) + "\n")

    return on_event


def own_disk(config: RunConfig, size: int) -> Path:
    """A new file system of so many bytes at the run directory, seen by this process only."""
    directory = Path(config.run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    mount(directory, size=size)
    return directory


def read_only(config: RunConfig) -> Callable[..., None]:
    """The run directory on a disk that cannot be written; what it held is still there."""
    directory = Path(config.run.directory)
    kept = {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    mount(directory, size=1 << 26)
    for name, content in kept.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    mount(directory, size=1 << 26, flags=32 | _READ_ONLY)  # 32: remount
    return lambda event: None


def mount(directory: Path, *, size: int, flags: int = 0) -> None:
    """A tmpfs in a mount namespace of this process. OSError where the system forbids it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not flags:
        spaces = _NEW_MOUNTS if os.geteuid() == 0 else _NEW_MOUNTS | _NEW_USERS
        if libc.unshare(spaces):
            raise OSError(ctypes.get_errno(), "unshare")
        libc.mount(None, b"/", None, _PRIVATE | _RECURSIVE, None)
    where, data = os.fsencode(directory), f"size={size}".encode()
    if libc.mount(b"tmpfs", where, b"tmpfs", flags, data):
        raise OSError(ctypes.get_errno(), "mount")


def can_mount() -> bool:
    """Whether this system lets a process have a disk of its own."""

    pid = os.fork()
    if pid == 0:
        try:
            mount(Path("/tmp"), size=1 << 20)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _fill(directory: Path, leave: int) -> None:
    """Take all of the disk but so many bytes."""
    free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
    try:
        with (directory / "ballast").open("wb") as file:
            file.write(b"\0" * max(0, free - leave))
    except OSError:
        pass


def poison(config: RunConfig, step: int, what: str, count: int) -> Callable[..., None]:
    """Before a step, a weight becomes NaN ("weight"), or losses do for some steps ("loss")."""
    import torch

    from shoestring.training import job

    made: list[Any] = []
    build = job.Job._build

    def remember(self: Any) -> None:
        build(self)
        made.append(self)
        if what == "loss":
            loss = self.objective.plain

            def bad(model: Any, batch: Any) -> torch.Tensor:
                is_bad = step <= self.updates + 1 < step + count
                return loss(model, batch) * (float("nan") if is_bad else 1.0)

            self.objective.plain = bad

    job.Job._build = remember  # type: ignore[method-assign]

    def on_event(event: dict[str, Any]) -> None:
        if what == "weight" and event["event"] == "step" and event["step"] == step - 1:
            with torch.no_grad():
                next(made[0].model.parameters())[0, 0] = float("nan")

    return on_event


def clock_jumps(config: RunConfig) -> Callable[..., None]:
    """The wall clock goes back a day, then ahead a year: `time.time` of this process."""
    real = time.time
    offset = 0.0
    time.time = lambda: real() + offset

    def on_event(event: dict[str, Any]) -> None:
        nonlocal offset
        if event["event"] == "step":
            offset = -86_400.0 if event["step"] % 2 else 31_536_000.0

    return on_event


def signalled(config: RunConfig, moment: str, number: int) -> Callable[..., None]:
    """A signal to itself at an event, or a moment after it has begun to read."""

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == moment:
            os.kill(os.getpid(), number)
        elif event["event"] == "started" and moment == "reading":
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()

    return on_event


def small(directory: Path, source: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run of seconds on real text, saved at every step."""
    whole = RunConfig.load(Path(__file__).with_name("small.toml"))
    sections = {
        **sections,
        "run": {"directory": str(directory), **sections.get("run", {})},
        "data": {"source": str(source), **sections.get("data", {})},
    }
    changed = {
        name: dataclasses.replace(getattr(whole, name), **fields)
        for name, fields in sections.items()
    }
    return dataclasses.replace(whole, **changed)
