"""The training loop: plan, exercise, then update after update until done, stopped or unsound.

What a run needs is made in `prepare` and `planning`, what one update does is in `step`, what
stops it is in `guard`, what it leaves behind is written by `record` and `save`.

Evaluation and saving are tried once before the first update, so that what fails there costs
nothing. A run that ends early, by Ctrl-C or by a guard, still saves the model as it is after its
last whole update; the receipt says how it ended.
"""

import time
from collections.abc import Iterator

import torch

from ..errors import OutOfBudget, TrainingDiverged
from .config import RunConfig
from .distributed import world as joined
from .interruption import Interruption
from .job import Job, Run
from .optimizer import set_learning_rate
from .record import Progress
from .schedule import learning_rate
from .step import update

__all__ = ["Run", "train"]


def train(config: RunConfig, *, progress: Progress | None = None) -> Run:
    """Train as the config says; returns when done, or interrupted after a whole step.

    progress: called with one dict for every event, its kind under "event".

    Raises OutOfBudget (nothing fits, or a step took more than promised), TrainingDiverged (before
    the update), ConfigError, DataError, StackError, CheckpointError. The first two leave the
    model as it was after the last update in the run directory, once there was one.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with joined(config.run.device) as world, Job(config, world, progress) as job:
        job.exercise()
        with Interruption() as interruption:
            try:
                for step in _steps(job, interruption):
                    lr = learning_rate(
                        config.schedule, step, peak=config.optim.lr, steps=config.run.steps
                    )
                    set_learning_rate(job.optimizer, lr)
                    microbatches = [next(job.batches) for _ in range(config.optim.accumulate)]
                    with job.watch(step) as measured:
                        updated = update(
                            step,
                            job.wrapped,
                            job.optimizer,
                            microbatches,
                            loss=job.loss,
                            guard=job.finite,
                            world=world,
                            clip=config.optim.grad_clip,
                        )
                    job.log(step, lr, updated, measured)
                    if config.evaluate.every and step % config.evaluate.every == 0:
                        job.evaluate()
            except (TrainingDiverged, OutOfBudget) as error:
                job.stop(error)
                raise
        return job.finish("interrupted" if job.was_interrupted else "finished")


def _steps(job: Job, interruption: Interruption) -> Iterator[int]:
    """1, 2, ... up to the last step, until somebody asks to stop or the time is up."""
    settings = job.config.run
    ends = time.monotonic() + settings.minutes * 60 if settings.minutes else float("inf")
    for step in range(1, settings.steps + 1):
        asked, late = job.world.sum([interruption.asked, time.monotonic() > ends])
        job.was_interrupted = bool(asked)
        if asked or late:
            return
        yield step
