"""How a run ends: done, interrupted, or stopped by a guard; what is left, and how to go on."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import OutOfBudget, ShoestringError
from ..report import write_report
from .out_of_memory import OutOfMemory
from .quality import measure_quality
from .receipt import receipt_of
from .resuming import save_checkpoint
from .save import receipt_text, save_model

if TYPE_CHECKING:
    from .job import Job


@dataclass(frozen=True, slots=True)
class Run:
    """A run that ended. receipt: also in receipt.json; receipt["status"] says how it ended."""

    directory: Path
    model: nn.Module
    tokenizer: Any
    receipt: dict[str, Any]


def finish(job: "Job", status: str) -> Run:
    """A last checkpoint, a last evaluation (unless interrupted), the model, the receipt."""
    save_checkpoint(job, is_last=True)
    if status == "finished":
        step, result = job.evaluated or (-1, None)
        job.quality["after"] = result if step == job.updates else measure_quality(job)
    receipt = _save(job, status)
    return Run(job.record.directory, job.model, job.data.tokenizer, receipt)


def stop(job: "Job", error: ShoestringError) -> None:
    """Save what the updates before an error have made, with the error in the receipt. Where the
    system's memory ran out there is no model/, only the checkpoint it would be made of."""
    job.optimizer.zero_grad(set_to_none=True)
    if job.updates:
        save_checkpoint(job, is_last=True)
        status = "over budget" if isinstance(error, OutOfBudget) else "diverged"
        _save(job, status, str(error), with_model=not isinstance(error, OutOfMemory))


def interrupted(job: "Job") -> KeyboardInterrupt:
    """What a signal that was not waited for has cost, and how to go on."""
    is_new = not job.updates and not job.resumes
    when = "interrupted before the first update" if is_new else "interrupted"
    lost = job.updates - job.checkpoints.saved_step
    cost = f"{lost} updates are to be made again" if lost > 0 else "nothing was lost"
    directory = shlex.quote(str(job.record.directory))
    if job.has_begun or job.resumes:
        return KeyboardInterrupt(f"{when}; {cost}: shoestring resume {directory} goes on")
    return KeyboardInterrupt(f"{when}; {cost}: the same command starts it again")


def _save(
    job: "Job", status: str, error: str | None = None, *, with_model: bool = True
) -> dict[str, Any]:
    if job.plan is not None:
        job.plan.restore(job.model)
    receipt = receipt_of(job, status, error)
    directory = job.record.directory / "model"
    if with_model:
        save_model(job.model, job.data.tokenizer, directory, receipt, world=job.world)
    if job.world.is_first:
        job.record.text("receipt.json", receipt_text(receipt))
        _write_report(job)
        if with_model:
            job.record.tell("saved", directory=str(directory))
    job.world.barrier()
    return receipt


def _write_report(job: "Job") -> None:
    """The page of the run; a run is not lost because its picture cannot be drawn."""
    try:
        write_report([job.record.directory])
    except Exception as error:  # whatever it is, the run was made
        job.record.tell("report failed", message=str(error))
