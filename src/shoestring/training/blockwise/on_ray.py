"""The blocks as jobs of Ray: on this machine, or wherever a cluster has room.

A job is `train_block` in a worker of its own, so no process ever holds two blocks, and jobs never
speak to each other. A worker that dies takes its block's job with it and nothing else: Ray starts
that job again, on any machine that sees `run.directory`, and it goes on from its newest checkpoint.
What comes of it is bit for bit what the blocks give one after another, as long as kernels are the
same and `run.threads` too (sums depend on it; a job gets what this process has).

Ray is handed text (the run as TOML) and numbers, and gives text (a receipt as JSON) back: what it
pickles on the way are its own calls. `pip install 'shoestring[ray]'`.
"""

import json
import os
import socket
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ... import errors
from ...checkpoint.directory import make_directory, unwritable
from ...errors import CheckpointError, ConfigError, ShoestringError
from .. import toml
from ..distributed import pick_device
from .config import BlockwiseConfig
from .every import cleared
from .job import Progress, Trained, folder_of, train_block
from .task import task_of

ATTEMPTS = "attempts.jsonl"
"""In a block's folder: where and when its job was started, one line each time."""


def train_on_ray(
    config: BlockwiseConfig,
    *,
    address: str = "local",
    restarts: int = 3,
    progress: Progress | None = None,
) -> list[Trained]:
    """Train all blocks as jobs of Ray and wait for them; how each ended, by number.

    address: local = start Ray here for as long as this takes; auto or host:port = a cluster that
    runs.  restarts: how often a job may lose its worker.  ConfigError where Ray is not installed or
    the cluster does not answer; CheckpointError for a job that lost its worker too often, or whose
    folder is not seen from here. The other jobs are waited for before either is raised.
    """
    ray = _ray()
    threads = config.run.threads or torch.get_num_threads()
    task_of(config)  # what is wrong with settings and data is said here, and once
    config = cleared(config)
    ours = not ray.is_initialized()
    if ours:
        _start(ray, address, threads * config.blockwise.blocks)
    try:
        gpus = 1 if pick_device(config.run.device).type == "cuda" else 0
        job = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=restarts)(_job)
        text = config.to_toml()
        done: dict[int, Trained] = {}
        for blocks, until in rounds(config):
            waiting = {job.remote(text, block, threads, until): block for block in blocks}
            ended = _collect(ray, config, waiting, progress)
            done.update({each.block: each for each in ended})
            if any(each.status == "interrupted" for each in ended):
                break
        return [done[block] for block in sorted(done)]
    finally:
        if ours:
            ray.shutdown()


def rounds(config: BlockwiseConfig) -> list[tuple[list[int], int]]:
    """(blocks whose jobs run at once, up to which update), one round after the other: what stands
    on another block waits for it."""
    blocks = list(range(1, config.blockwise.blocks + 1))
    in_order = [([block], config.updates) for block in blocks]
    if config.blockwise.sequential:
        return in_order
    apart = [(blocks, config.run.steps)]
    return [*apart, *in_order] if config.blockwise.chain_steps else apart


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"Ray is not installed ({error})", expected="it, to run blocks as its jobs",
            hint="pip install 'shoestring[ray]'; without it leave --ray out.",
        ) from error  # fmt: skip
    return ray


def _start(ray: Any, address: str, cpus: int) -> None:
    """Join a cluster, or start Ray with a place for every job."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        # Text and numbers are all that goes through its store: the least it takes.
        ray.init(
            "local", num_cpus=cpus, include_dashboard=False, object_store_memory=80 << 20, **quiet
        )
        return
    try:
        ray.init(address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address!r} ({error})",
            expected="local, or a cluster that runs",
            hint="`ray start --head` starts one.",
        ) from error


def _collect(
    ray: Any, config: BlockwiseConfig, waiting: dict[Any, int], progress: Progress | None
) -> list[Trained]:
    """The results as they come; the first error after the last of them."""
    done: dict[int, Trained] = {}
    wrong: list[ShoestringError] = []
    while waiting:
        ready, _ = ray.wait(list(waiting))
        block = waiting.pop(ready[0])
        try:
            answer = json.loads(ray.get(ready[0]))
        except ray.exceptions.RayTaskError as error:  # of no kind that we raise on purpose
            wrong.append(ShoestringError(f"the job of block {block} failed: {error}"))
            continue
        except ray.exceptions.RayError as error:
            wrong.append(
                CheckpointError(
                    f"the job of block {block} lost its worker too often ({error})",
                    expected="a worker that lives",
                    hint="Its checkpoints are kept: the same command goes on from the newest.",
                )
            )
            continue
        if "error" in answer:
            wrong.append(_error(block, answer))
            continue
        done[block] = _seen_here(config, block, answer)
        if progress is not None:
            progress({"event": "end", "block": block, **answer})
    if wrong:
        raise wrong[0]
    return [done[block] for block in sorted(done)]


def _job(text: str, block: int, threads: int, until: int) -> str:
    """What a worker does: one block, from settings to receipt, as text."""
    try:
        config = toml.from_table(tomllib.loads(text), BlockwiseConfig)
        torch.set_num_threads(threads)
        _note_attempt(config, block)
        done = train_block(config, block, until=until)
        return json.dumps({"updates": done.updates, "status": done.status, "receipt": done.receipt})
    except ShoestringError as error:
        return json.dumps({"error": type(error).__name__, "message": str(error)})


def _note_attempt(config: BlockwiseConfig, block: int) -> None:
    folder = folder_of(Path(config.run.directory), block)
    line = {"host": socket.gethostname(), "process": os.getpid(), "time": time.time()}
    try:
        make_directory(folder)
        with (folder / ATTEMPTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise unwritable(folder, error) from error


def _seen_here(config: BlockwiseConfig, block: int, answer: Mapping[str, Any]) -> Trained:
    folder = folder_of(Path(config.run.directory), block)
    if not (folder / "checkpoints").is_dir():
        raise CheckpointError(
            f"block {block} was trained on another machine, and {folder} is not seen from here",
            expected="a run.directory that all machines share",
            hint="Copy the folder from there: shoestring merge takes folders of blocks, too.",
        )
    return Trained(folder, block, answer["updates"], answer["status"], answer["receipt"])


def _error(block: int, answer: Mapping[str, Any]) -> ShoestringError:
    """The error of a job, again as what it was there."""
    kind = getattr(errors, answer["error"], ShoestringError)
    simple = (errors.ConfigError, errors.DataError, errors.CheckpointError, errors.TrainingDiverged)
    return (kind if kind in simple else ShoestringError)(f"block {block}: {answer['message']}")
