"""A run in progress into a checkpoint, and out of one again.

The way out is one and the same for `resume` and, within a process, for a run whose memory ran out
in the middle of the optimizer's step: weights that are partly new are of no use to anybody.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from .checkpoints import FORMAT, lost, saved_facts, texts_of
from .evaluate import HeldOut
from .guard import bad_weight
from .out_of_memory import HalfUpdateError, gave_up, held_by_category, is_out_of_memory, release
from .receipt import machine
from .snapshot import Snapshot, restore

if TYPE_CHECKING:
    from .job import Job


def save_checkpoint(job: "Job", *, is_last: bool = False) -> None:
    """Everything as it is after the last update. All processes take part."""
    job.checkpoints.wait()
    # Only the first process knows what was written, and all have to do the same.
    has_it = job.world.is_first and job.checkpoints.saved_step == job.updates
    if not job.updates or (is_last and job.world.sum([float(has_it)])[0]):
        return
    if (name := _bad_weight(job)) is not None:
        # It would push a good one out, and every resume would stop again.
        message = f"{name} is not finite; the checkpoint of step {job.checkpoints.saved_step}"
        job.record.tell("checkpoint failed", message=f"{message} stays the newest")
        return
    job.record.sync()
    before = job.quality["before"]
    snapshot = Snapshot.of(
        job.model,
        job.optimizer,
        job.world,
        format=FORMAT,
        step=job.updates,
        split=job.split,
        skipped_in_a_row=job.skipped_in_a_row,
        seconds=job.seconds,
        data=job.batches.state(),
        metrics_bytes=job.record.num_bytes,
        before=before.to_json() if before else None,
        guard=job.budget.state(),
        has_evaluated=(job.evaluated or (-1,))[0] == job.updates,
        identity=job.identity,
        machine=machine(job.world),
    )
    try:
        if job.world.is_first:
            texts = texts_of(job.config, job.plan)
            job.checkpoints.save(job.updates, snapshot, texts, is_last=is_last)
    finally:
        snapshot.finish()
    job.world.barrier()


def _bad_weight(job: "Job") -> str | None:
    """As `bad_weight`; in a group that has divided the weights, of all processes."""
    name = bad_weight(job.model)
    if job.world.shards and job.world.sum([float(name is not None)])[0]:
        return name or "a weight in another process"
    return name


def restore_job(job: "Job", saved: Checkpoint, facts: dict[str, Any]) -> None:
    """Put a checkpoint in place of the fresh weights, states, positions and generators."""
    try:
        job.batches.load_state(facts["data"])
        job.updates, job.split = facts["step"], facts["split"]
        job.skipped_in_a_row = facts["skipped_in_a_row"]
        job.seconds_before = facts["seconds"]
        job.quality["before"] = HeldOut(**facts["before"]) if facts["before"] else None
        job.has_evaluated = bool(facts.get("has_evaluated"))
        if job.planned_anew:  # the peaks of another plan are not this one's
            job.budget.first_step = job.updates
        else:
            job.budget.load_state(facts["guard"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{saved.path} lacks what a run needs to go on ({error})",
            expected="a checkpoint that this version wrote",
        ) from error
    restore(saved, job.model, job.optimizer, job.world)
    timed = [(line.get("step"), line.get("seconds")) for line in job.record.lines("step")]
    job.step_seconds = [
        seconds
        for step, seconds in timed
        if isinstance(step, int) and isinstance(seconds, float) and not job.budget.tracks(step)
    ]
    job.record.line("resumed", step=job.updates, processes=job.world.size)
    _tell_of_another_machine(job, facts.get("machine", {}))


def _tell_of_another_machine(job: "Job", then: Mapping[str, Any]) -> None:
    """Sums are made in another order there: going on is right, to say nothing is not."""
    now = machine(job.world)
    changed = {n: [then[n], now[n]] for n in now if n in then and then[n] != now[n]}
    if changed:
        told = (f"{name} {was} then, {is_now} now" for name, (was, is_now) in changed.items())
        job.record.line("other machine", step=job.updates, message="; ".join(told), changed=changed)


def begin_again(job: "Job", error: HalfUpdateError) -> None:
    """After a half-made update: back to the newest checkpoint, or to the beginning where there is
    none yet, and on from there with split microbatches. Once; OutOfBudget after that.

    error: without its traceback, whose frames hold the old weights.
    """
    step, spent = job.updates + 1, job.seconds
    job.optimizer.zero_grad(set_to_none=True)
    release(job.world.device)
    held = held_by_category(job.model, job.optimizer)
    where, was_split = f"the optimizer's part of step {step}", job.split > 1
    failure = gave_up(where, held, error.message, was_split=was_split)
    # In a group the others are waiting inside the step, and cannot be told.
    if was_split or job.world.size > 1 or job.config.data.batch_size < 2:
        raise failure
    job.checkpoints.wait()
    had = job.checkpoints.saved_step
    saved = job.checkpoints.find()
    if saved is None and had:
        raise lost(job.record.directory)
    try:
        job.go_back(saved, saved_facts(saved) if saved is not None else {})
    except (MemoryError, RuntimeError) as another:
        if not is_out_of_memory(another):
            raise
        raise failure from another
    job.seconds_before = spent  # what was lost took its time, too
    job.split = 2
    job.record.line(
        "out of memory", step=step, message=error.message, held=held, split=job.split,
        back_to=job.updates,
    )  # fmt: skip
