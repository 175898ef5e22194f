"""The training loop: plan, exercise, then update after update until done, stopped or unsound.

What a run needs is made in `prepare` and `planning`, what one update does is in `step`, what
stops it is in `guard`, what it leaves behind is written by `record` and `save`.

Evaluation and saving are tried once before the first update, so that what fails there costs
nothing. A run that ends early, by Ctrl-C or by a guard, leaves a checkpoint and the model as it is
after its last whole update; the receipt says how it ended, and `resume` goes on from there.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import OutOfBudget, TrainingDiverged
from .checkpoints import config_of
from .config import RunConfig
from .distributed import world as joined
from .interruption import Interruption
from .job import Job, Run
from .optimizer import set_learning_rate
from .out_of_memory import is_out_of_memory
from .record import Progress
from .schedule import learning_rate
from .step import update

__all__ = ["Run", "resume", "train"]


def train(config: RunConfig, *, progress: Progress | None = None) -> Run:
    """Train as the config says; returns when done, or interrupted after a whole step.

    progress: called with one dict for every event, its kind under "event".

    Raises OutOfBudget (nothing fits, or a step took more than promised), TrainingDiverged (before
    the update), ConfigError (also for a directory that holds a run already), DataError,
    StackError, CheckpointError. The first two leave the model as it was after the last update in
    the run directory, once there was one, and a checkpoint to go on from.
    """
    return _train(config, progress, resume=False)


def resume(
    directory: str | Path,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    progress: Progress | None = None,
) -> Run:
    """Go on with the run in a directory, bit for bit, from its newest good checkpoint.

    The directory may have been moved or renamed. Settings are those of its config.toml, where
    lr, schedule, evaluation, checkpoints and trackers may have been edited; steps and minutes
    replace run.steps and run.minutes. A run without a checkpoint yet starts from its beginning.

    Raises what `train` raises; ConfigError names the first setting that may not have changed.
    """
    config = config_of(Path(directory))
    run = dataclasses.replace(
        config.run,
        directory=str(directory),
        replace=False,
        steps=config.run.steps if steps is None else steps,
        minutes=config.run.minutes if minutes is None else minutes,
    )
    return _train(dataclasses.replace(config, run=run), progress, resume=True)


def _train(config: RunConfig, progress: Progress | None, *, resume: bool) -> Run:
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with (
        joined(config.run.device) as world,
        Job(config, world, progress, resume=resume) as job,
        Interruption() as interruption,
    ):
        if not job.was_resumed:
            job.exercise()
        job.begin()
        every = config.evaluate.every
        try:
            if job.was_resumed and every and job.updates % every == 0:
                job.evaluate()  # it came after the checkpoint
            for step in _steps(job, interruption):
                _step(job, step)
                # Saved first: an evaluation that fails then costs nothing.
                if _is_due(job, step):
                    job.save_checkpoint()
                if every and step % every == 0:
                    job.evaluate()
        except (TrainingDiverged, OutOfBudget) as error:
            job.stop(error)
            raise
        return job.finish("interrupted" if job.was_interrupted else "finished")


def _step(job: Job, step: int) -> None:
    """One update; where memory runs out, once more with the microbatches split."""
    config = job.config
    lr = learning_rate(config.schedule, step, peak=config.optim.lr, steps=config.run.steps)
    set_learning_rate(job.optimizer, lr)
    microbatches = [next(job.batches) for _ in range(config.optim.accumulate)]
    while True:
        try:
            with job.watch(step) as measured:
                updated = update(
                    step,
                    job.wrapped,
                    job.optimizer,
                    microbatches,
                    loss=job.loss,
                    guard=job.finite,
                    world=job.world,
                    clip=config.optim.grad_clip,
                    split=job.split,
                )
        except TrainingDiverged as error:
            return job.skip(step, error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # its frames hold the tensors of the step
        else:
            return job.log(step, lr, updated, measured)
        job.split_after(step, failure, microbatches)


def _is_due(job: Job, step: int) -> bool:
    """Whether to save now: the first process's clock decides for all."""
    wants = job.world.is_first and job.checkpoints.is_due(step)
    return bool(job.world.sum([float(wants)])[0])


def _steps(job: Job, interruption: Interruption) -> Iterator[int]:
    """The next step, and the next, up to the last, until somebody asks to stop or time is up."""
    settings = job.config.run
    limit = settings.minutes * 60 if settings.minutes else float("inf")
    for step in range(job.updates + 1, settings.steps + 1):
        asked, late = job.world.sum([interruption.asked, job.seconds > limit])
        job.was_interrupted = bool(asked)
        if asked or late:
            return
        yield step
