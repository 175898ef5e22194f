"""Groups of processes as torchrun starts them, for tests.

They are forked from a server that has imported everything, so each starts in a fraction of a
second. What befalls one of them is done inside it, by the name of a function here.
"""

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from shoestring.errors import ShoestringError
from shoestring.training.config import RunConfig

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["shoestring.training.loop", "shoestring.models.gpt", "training.group", "transformers"]
)


class Group:
    """A run in `count` processes.  fate: a function of this file, by name, and its arguments."""

    def __init__(self, action: str, config: RunConfig, count: int, logs: Path, *fate: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        logs.mkdir(exist_ok=True)
        self.logs = [logs / f"rank-{rank}.txt" for rank in range(count)]
        file = logs / "run.toml"
        file.write_text(config.to_toml())
        self.processes = [
            _CONTEXT.Process(target=_live, args=(action, str(file), count, rank, port, log, fate))
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 60) -> list[int | None]:
        """The exit codes: of a signal, less than 0; None for one that had to be killed."""
        end = time.monotonic() + seconds
        codes = []
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
            codes.append(process.exitcode)
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        return codes

    @property
    def said(self) -> list[str]:
        """What each wrote to stderr."""
        return [log.read_text() for log in self.logs]

    @property
    def receipts(self) -> list[dict[str, Any]]:
        """The receipt of each: what was measured is a process's own."""
        return [json.loads(log.with_suffix(".json").read_text()) for log in self.logs]


def run(
    action: str, config: RunConfig, count: int, logs: Path, *fate: Any, seconds: float = 120
) -> Group:
    """A group that ends well."""
    group = Group(action, config, count, logs, *fate)
    codes = group.wait(seconds)
    assert codes == [0] * count, "\n".join(group.said)
    return group


def _live(
    action: str, file: str, count: int, rank: int, port: str, log: Path, fate: tuple[Any, ...]
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    faulthandler.enable()
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(count), RANK=str(rank),
        LOCAL_WORLD_SIZE=str(count), LOCAL_RANK=str(rank),
    )  # fmt: skip
    import torch

    from shoestring.training.loop import resume, train

    torch.set_num_threads(1)
    if fate:
        globals()[fate[0]](rank, *fate[1:])
    config = RunConfig.load(file)
    code = 0
    try:
        done = train(config) if action == "train" else resume(config.run.directory)
        log.with_suffix(".json").write_text(json.dumps(done.receipt))
        code = 130 if done.receipt["status"] == "interrupted" else 0
    except ShoestringError as error:
        sys.stderr.write(f"{error}\n")
        code = error.exit_code
    sys.stderr.flush()
    os._exit(code)  # what the system's libraries do afterwards is not what is tested


def killed_in_update(rank: int, victim: int, step: int) -> None:
    """The victim is killed in the forward of an update, while the others go on."""
    if rank == victim:
        from shoestring.training import loop

        update = loop.update

        def fatal(number: int, *args: Any, **kwargs: Any) -> Any:
            if number == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(number, *args, **kwargs)

        loop.update = fatal


def stuck_when_killed(rank: int, victim: int, step: int) -> None:
    """As above, and the others wait for the victim in something that never fails (as NCCL)."""
    if rank == victim:
        killed_in_update(rank, victim, step)
        return
    from shoestring.training import loop

    update = loop.update

    def waits(number: int, *args: Any, **kwargs: Any) -> Any:
        if number == step:
            threading.Event().wait()
        return update(number, *args, **kwargs)

    loop.update = waits


def fails_alone(rank: int, victim: int) -> None:
    """The victim meets an error of its own before its second update."""
    if rank == victim:
        from shoestring.training import loop

        update = loop.update

        def fails(number: int, *args: Any, **kwargs: Any) -> Any:
            if number == 2:
                raise ZeroDivisionError("on this machine alone")
            return update(number, *args, **kwargs)

        loop.update = fails


def killed_in_checkpoint(rank: int, victim: int, step: int) -> None:
    """All are told to end after an update; the victim is killed while the checkpoint that follows
    is being written, its part half handed over."""
    from shoestring.training import loop, sharding

    update = loop.update

    def asked(number: int, *args: Any, **kwargs: Any) -> Any:
        out = update(number, *args, **kwargs)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
            if rank == victim:
                _die_at(sharding.Spread, "finish" if rank else "_from", 3)
        return out

    loop.update = asked


def _die_at(owner: type, name: str, count: int) -> None:
    calls = iter(range(count))
    method = getattr(owner, name)

    def fatal(*args: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args)

    setattr(owner, name, fatal)


def full_disk_once(rank: int, count: int) -> None:
    """The disk is full in the middle of the first checkpoint, after so many parts."""
    if rank == 0:
        import errno

        from shoestring.training import sharding

        parts, left = sharding.Spread.parts, iter(range(count))
        broken = []

        def fails(self: sharding.Spread) -> Any:
            if next(left, None) is None and not broken and self._next == 0:
                broken.append(True)
                raise OSError(errno.ENOSPC, "No space left on device")
            return parts(self)

        from shoestring.training import checkpoints

        save = checkpoints.Store.save

        def saves(*args: Any, **kwargs: Any) -> Any:
            sharding.Spread.parts = fails
            try:
                return save(*args, **kwargs)
            finally:
                sharding.Spread.parts = parts

        checkpoints.Store.save = saves


def infinite_gradient(rank: int, victim: int, step: int) -> None:
    """One process's part of a gradient is not finite before an update."""
    if rank == victim:
        from shoestring.training import step as module

        norm, calls = module.gradient_norm, iter(range(1, step))

        def spoiled(parameters: Any, *rest: Any) -> Any:
            if next(calls, None) is None:
                parameters[0].grad.to_local().view(-1)[0] = float("inf")
            return norm(parameters, *rest)

        module.gradient_norm = spoiled
