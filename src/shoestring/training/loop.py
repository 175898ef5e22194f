"""The training loop: plan, exercise, then update after update until done, stopped or unsound.

What a run needs is made in `prepare` and `planning`, what one update does is in `step`, what
stops it is in `guard`, what it leaves behind is written by `record` and `ending`.

Evaluation and saving are tried once before the first update, so that what fails there costs
nothing. A run that ends early, by Ctrl-C or by a guard, leaves a checkpoint and the model as it is
after its last whole update (only the former where the system's memory ran out); the receipt says
how it ended, and `resume` goes on from there.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import (
    OutOfBudget,
    ReplayMismatch,
    ShoestringError,
    StreamOverflow,
    TrainingDiverged,
)
from .checkpoints import config_of
from .config import RunConfig
from .distributed import world as joined
from .ending import Run, finish, interrupted, stop
from .guard import Measured
from .interruption import Interruption
from .job import Job, Mark
from .optimizer import set_learning_rate
from .out_of_memory import HalfUpdateError, is_out_of_memory
from .planning import refuse_in_group
from .quality import measure_quality
from .record import Progress
from .resuming import begin_again, save_checkpoint
from .schedule import learning_rate
from .step import update

__all__ = ["Run", "resume", "train"]

STOPPING = (TrainingDiverged, OutOfBudget, StreamOverflow, ReplayMismatch)
"""Errors that end a run but leave what it made."""


def train(config: RunConfig, *, progress: Progress | None = None) -> Run:
    """Train as the config says; returns when done, or interrupted after a whole step.

    progress: called with one dict for every event, its kind under "event".

    Raises OutOfBudget (nothing fits, or a step took more than promised), TrainingDiverged (before
    the update), StreamOverflow and ReplayMismatch (a reversible stack): these leave the model as
    it was after the last update, once there was one, and a checkpoint to go on from. ConfigError
    (also for a directory that holds a run already), DataError, StackError, CheckpointError.
    KeyboardInterrupt, which says how to go on, for SIGINT or SIGTERM before the first update and
    for a second one.
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
    with Interruption() as interruption, joined(config.run.device, config.run.sharding) as world:
        refuse_in_group(config, world)
        job = Job(config, world, progress, resume=resume)
        try:
            with job:
                while True:
                    try:
                        return _run(job, interruption)
                    except HalfUpdateError as error:
                        failure = error.with_traceback(None)  # its frames hold the old weights
                    begin_again(job, failure)
        except KeyboardInterrupt as error:
            raise interrupted(job) from error


def _run(job: Job, interruption: Interruption) -> Run:
    config = job.config
    if not job.was_resumed:
        job.exercise()
    interruption.waits = True
    job.begin()
    every = config.evaluate.every
    all_know = job.world.size == 1
    try:
        if job.was_resumed and every and job.updates % every == 0 and not job.has_evaluated:
            measure_quality(job)  # it came after the checkpoint
        votes = _vote(job, interruption)
        while job.updates < config.run.steps and not votes.to_end:
            failure = _step(job, job.updates + 1)
            votes = _vote(job, interruption, failure)
            if votes.failed:
                all_know = True
                raise failure or _elsewhere(job)
            # Saved first: an evaluation that fails then costs nothing.
            if votes.to_save:
                save_checkpoint(job)
            if every and job.updates % every == 0:
                measure_quality(job)
    except STOPPING as error:
        if all_know:  # else the others wait in the middle of something, and hear of it by this end
            stop(job, error)
        raise
    if votes.interrupted and not job.updates:
        raise KeyboardInterrupt  # there is nothing to save
    return finish(job, "interrupted" if votes.interrupted else "finished")


def _step(job: Job, step: int) -> ShoestringError | None:
    """One update. Gives back what should end the run, so that all of a group hear of it; data and
    generators are then where they were, unless the update was made."""
    mark = job.mark()
    try:
        failure = _update(job, step, mark)
    except STOPPING:
        job.back_to(mark)
        raise
    if failure is not None and job.updates < step:
        job.back_to(mark)
    return failure


def _update(job: Job, step: int, mark: Mark) -> ShoestringError | None:
    """The update; where memory runs out, once more with the microbatches split."""
    config = job.config
    lr = learning_rate(config.schedule, step, peak=config.optim.lr, steps=config.run.steps)
    set_learning_rate(job.optimizer, lr)
    microbatches = [next(job.batches) for _ in range(config.optim.accumulate)]
    while True:
        updated = None
        measured = Measured()
        try:
            with job.watch(step) as measured:
                updated = update(
                    step,
                    job.wrapped,
                    job.optimizer,
                    microbatches,
                    loss=job.objective.at(step),
                    guard=job.finite,
                    world=job.world,
                    clip=config.optim.grad_clip,
                    split=job.split,
                )
        except TrainingDiverged as error:
            return job.skip(step, error)
        except OutOfBudget as error:
            assert updated is not None  # it is held against the budget once it was made
            job.log(step, lr, updated, measured)
            return error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # its frames hold the tensors of the step
        else:
            job.log(step, lr, updated, measured)
            return None
        job.split_after(step, failure, microbatches)
        job.back_to(mark, position=False)


@dataclass(frozen=True, slots=True)
class Votes:
    """What the processes of a group want, so that all do the same."""

    failed: bool
    to_save: bool
    interrupted: bool
    late: bool

    @property
    def to_end(self) -> bool:
        """Whether to stop before the next update."""
        return self.interrupted or self.late


def _vote(job: Job, interruption: Interruption, failure: Exception | None = None) -> Votes:
    limit = job.config.run.minutes * 60
    mine = [
        failure is not None,
        job.world.is_first and job.checkpoints.is_due(job.updates),
        interruption.asked,
        bool(limit) and job.seconds > limit,
    ]
    return Votes(*map(bool, job.world.sum([float(each) for each in mine])))


def _elsewhere(job: Job) -> OutOfBudget:
    return OutOfBudget(
        f"step {job.updates}: another process of the group went over its budget",
        hint="Its own message says by how much.",
    )
