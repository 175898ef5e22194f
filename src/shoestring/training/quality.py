"""The held-out loss of a run in progress, and a sample: inside its budget, one line each."""

from typing import TYPE_CHECKING

from .. import allocator
from .evaluate import HeldOut, continuation
from .out_of_memory import gave_up, held_by_category, is_out_of_memory, release, said
from .prepare import precision

if TYPE_CHECKING:
    from .job import Job


def measure_quality(job: "Job") -> HeldOut:
    """Held-out loss, and a sample when the config wants one.

    Where memory runs out, with half as many rows at once, down to one; OutOfBudget after that.
    """
    while True:
        try:
            result = _measure(job)
            allocator.release()  # an evaluation has other sizes than a step
            return result
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or job.world.size > 1:
                raise
            message = said(error)
        release(job.world.device)
        held = held_by_category(job.model, job.optimizer)
        if job.data.held_out.batch == 1:
            raise gave_up(_where(job), held, message, was_split=True)
        job.data.held_out.batch //= 2
        job.record.line("out of memory", step=job.updates, message=message, held=held)


def _measure(job: "Job") -> HeldOut:
    with job.budget.watch(
        _where(job), job.model, job.optimizer, tracked=job.updates == 0
    ) as measured:
        with precision(job.config, job.world.device):
            result = job.data.held_out.score(job.model)
        # A divided model is gathered by all processes together.
        sample = _sample(job) if job.world.is_first or job.world.shards else None
    job.record.line("evaluation", step=job.updates, **result.to_json(), seconds=measured.seconds)
    if sample is not None:
        job.record.line("sample", step=job.updates, **sample)
    job.evaluated = (job.updates, result)
    return result


def _where(job: "Job") -> str:
    return f"evaluation after step {job.updates}"


def _sample(job: "Job") -> dict[str, str] | None:
    count = job.config.evaluate.sample_tokens
    if not count:
        return None
    tokenizer = job.data.tokenizer
    prompt = job.data.prompt.to(job.world.device)
    new = continuation(
        job.model,
        prompt,
        num_tokens=count,
        seed=job.config.run.seed,
        end=tokenizer.eos_token_id,
    )
    return {"prompt": tokenizer.decode(prompt[0]), "text": tokenizer.decode(new[0])}
