"""`shoestring plan MODEL`: what fits into a budget and what it costs, from shapes alone.

MODEL is a Hugging Face config.json, a directory with one, a model's name on the hub (only its
config is fetched), or a run's TOML file, which is then planned exactly as `train` would: its
settings stand in the file, so flags for them are refused beside it. Weights are planned in
float32, whatever the config says of the saved ones, because that is how `train` makes them. No
weights are read. Several MODELs are a question of its own: which of them fits, and trained how.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Table
from tyro.conf import Positional, arg

from ..errors import ConfigError, OutOfBudget
from ..training.config import RunConfig
from ..units import format_bytes, format_seconds
from .arguments import Common
from .subjects import Subject, subject_of_model, subject_of_run
from .terminal import Terminal

Question = Literal["batch", "length", "budget"]

_BYTES_PER_TOKEN = 4.0  # where no tokenizer is at hand; English and code lie between 3 and 5
_SAMPLE_BYTES = 500_000


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """What fits into a byte budget and what it costs, before anything is allocated."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL [MODEL ...]")]
    """A config.json, a directory with one, a model's name on the hub, or a RUN.toml; of several,
    which fits, with which adapter and bits."""
    data: str = ""
    """What it will be trained on (as data.source in a run), for the time to finish."""
    budget: str | None = None
    """Peak bytes, such as 6GiB, or auto = what is free less a margin (measured on CPU, assumed on
    CUDA). Without it: auto, or what the RUN.toml says."""
    batch_size: int = 1
    """Rows a step."""
    sequence_length: int = 512
    """Tokens a row."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw has two states a weight, sgd none."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 by autocast; weights stay float32."""
    allow: Literal["bitwise", "exact", "unbiased", "structural"] = "exact"
    """What may be changed about the network as given."""
    hands_over: tuple[Literal["optimizer", "batch"], ...] = ()
    """What the loop leaves to the plan: its optimizer (by plan.optimizer), its batch (by
    plan.backward). `train` leaves its optimizer."""
    steps: int = 0
    """Updates to make, for the time to finish; 0 = once through the data."""
    device: str = "auto"
    """auto (CUDA when there is one, else CPU), cpu, cuda or cuda:N."""
    max: Annotated[tuple[Question, ...] | None, arg(metavar="[{batch,length,budget} ...]")] = None
    """The inverse questions: the largest batch, the longest context, the smallest budget; all of
    them where none is named. With one, the plan is that of its answer."""
    lora_rank: int | None = None
    """Plan a LoRA of that rank (by peft) in the place of all weights. Among several models it is
    what is tried where all weights do not fit: 16 when left out, 0 for never."""
    bits: Literal[32, 16] = 32
    """Of the weights that a LoRA leaves frozen; among several models both are tried."""
    save: str = ""
    """Write the plan there as JSON; `train --plan.file` applies it."""
    page: str = ""
    """Write a page with a budget slider there: the plan, peak and time of every budget."""

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("sequence_length", 2), ("steps", 0)):
            _at_least(name, getattr(self, name), low)
        if self.lora_rank is not None:
            _at_least("lora-rank", self.lora_rank, 0)
        if not self.models:
            raise ConfigError("no MODEL is given", expected="a config, a name or a RUN.toml")
        if self.bits != 32 and not self.lora_rank and len(self.models) == 1:
            raise ConfigError(f"--bits {self.bits} is given without --lora-rank",
                              expected="32: weights that are trained are float32")  # fmt: skip
        several = len(self.models) > 1 or len(self.questions) > 1
        for name in ("save", "page") if several else ():
            if getattr(self, name):
                raise ConfigError(f"--{name} is given where no single plan is asked for",
                                  expected="one MODEL, and one question at most")  # fmt: skip

    @property
    def questions(self) -> tuple[Question, ...]:
        """What --max asks, nothing without it."""
        return (
            ("batch", "length", "budget")
            if self.max == ()
            else tuple(dict.fromkeys(self.max or ()))
        )

    @property
    def model(self) -> str:
        """The first, and mostly the only one."""
        return self.models[0]


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"--{name} {value} cannot be used", expected=f"{low} or more")


@dataclass(frozen=True)
class _Length:
    """How long training will take: steps, and what they were counted from."""

    steps: int
    reason: str


def run(arguments: Arguments, terminal: Terminal) -> int:
    """Prints the plan; exit code 0, or 3 by OutOfBudget when nothing fits."""
    if len(arguments.models) > 1:
        from .which import which_fits

        return which_fits(arguments, terminal)
    config = _run_config(arguments) if arguments.model.endswith(".toml") else None
    if config is not None and (config.plan.file or config.turns.blocks):
        return _show_given(config, arguments, terminal)
    subject = (
        subject_of_model(arguments, arguments.model, rank=arguments.lora_rank or 0,
                         bits=arguments.bits)
        if config is None else subject_of_run(config, arguments.model)
    )  # fmt: skip
    answers: dict[str, Any] = {}
    with subject.scope():
        for question in arguments.questions:
            from .inverse import answer

            with terminal.progress.status(f"looking for the answer to --max {question}"):
                answers[question], found, words = answer(question, subject)
            terminal.say(words)
        if len(answers) > 1:
            terminal.emit({"max": answers})
            return 0
        subject = found if answers else subject
        with terminal.progress.status("measuring one block at a time"):
            plan, page = _planned(subject, arguments)
    length = _Length(config.run.steps, "run.steps") if config else _length(arguments, subject)
    _show(plan, length, arguments, terminal, {"max": answers or None, "page": page})
    return 0


def _planned(subject: Subject, arguments: Arguments) -> tuple[Any, str | None]:
    """The plan, and where the page was written; the page also where nothing fits."""
    plans = subject.plans_now()
    try:
        plan = plans(subject.budget)
    except OutOfBudget:
        _page(plans, subject, arguments)
        raise
    return plan, _page(plans, subject, arguments)


def _page(plans: Any, subject: Subject, arguments: Arguments) -> str | None:
    if not arguments.page:
        return None
    import torch

    from ..planner import sweep
    from ..report.budget import write_budget_page
    from ..training.receipt import environment

    known = environment(torch.device(plans.planner.base.device))
    found = sweep(plans, plans.limit_bytes(subject.budget)).data()
    versions = ", ".join(f"{name} {value}" for name, value in known["versions"].items())
    name = Path(subject.name).name if Path(subject.name).exists() else subject.name
    return str(write_budget_page({**found, "versions": versions}, Path(arguments.page), title=name))


def _show_given(config: RunConfig, arguments: Arguments, terminal: Terminal) -> int:
    """A run that brings its plan, or says how it is to be trained: nothing is chosen."""
    from .subjects import plan_of_run

    setting = "plan.file" if config.plan.file else "turns.blocks"
    value = config.plan.file or config.turns.blocks
    for flag in ("page", "max"):
        if getattr(arguments, flag) not in ("", None):
            raise ConfigError(f"--{flag} is given beside {setting} = {value!r}",
                              expected="a run that is to be planned")  # fmt: skip
    _show(plan_of_run(config), _Length(config.run.steps, "run.steps"), arguments, terminal, {})
    return 0


_IN_A_RUN = {
    "data": "data.source",
    "batch_size": "data.batch_size",
    "sequence_length": "data.sequence_length",
    "optimizer": "optim.name",
    "precision": "precision.compute",
    "allow": "run.allow",
    "steps": "run.steps",
    "device": "run.device",
}
"""Flags for a config, and the settings of a run that say the same."""


def _run_config(arguments: Arguments) -> RunConfig:
    for name, setting in _IN_A_RUN.items():
        value = getattr(arguments, name)
        if value != getattr(Arguments, name):
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} {value} is given beside {arguments.model}",
                expected=f"{setting} in the file: a run is planned as train would",
                hint=f"Set {setting} in the file.",
            )
    for flag, why in (("lora_rank", "trains all weights"), ("hands_over", "has a loop of its own")):
        if getattr(arguments, flag):
            raise ConfigError(f"--{flag.replace('_', '-')} is given beside {arguments.model}",
                              expected=f"a model's config: train {why}")  # fmt: skip
    config = RunConfig.load(Path(arguments.model))
    budget = arguments.budget or config.run.budget
    if budget == "none":
        raise ConfigError(
            'run.budget = "none" leaves nothing to plan', expected="--budget with a number of bytes"
        )
    return replace(config, run=replace(config.run, budget=budget))


def _length(arguments: Arguments, subject: Subject) -> _Length | None:
    """Steps that were asked for, or one pass through the data; None when neither is known."""
    if arguments.steps:
        return _Length(arguments.steps, "--steps")
    if not arguments.data:
        return None
    from ..data import open_source

    source = open_source(arguments.data)
    size = sum(len(document.content()) for document in source)
    per_token, reason = _bytes_per_token(arguments.model, source)
    tokens = size / per_token
    steps = max(1, round(tokens / (subject.batch_size * subject.length)))
    return _Length(steps, f"once through {format_bytes(size)} of {source.name}, {reason}")


def _bytes_per_token(model: str, source: Any) -> tuple[float, str]:
    """Measured on a sample where a tokenizer lies beside the config, else assumed."""
    directory = Path(model) if Path(model).is_dir() else Path(model).parent
    if not (directory / "tokenizer.json").is_file():
        return _BYTES_PER_TOKEN, f"{_BYTES_PER_TOKEN:.0f} bytes a token assumed"
    from ..data import load_tokenizer

    tokenizer = load_tokenizer(directory)
    text = "".join(document.text for document in source.sample(_SAMPLE_BYTES))
    tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not tokens:
        return _BYTES_PER_TOKEN, f"{_BYTES_PER_TOKEN:.0f} bytes a token assumed"
    per_token = len(text.encode()) / tokens
    return per_token, f"{per_token:.2f} bytes a token measured on a sample"


def _show(
    plan: Any, length: _Length | None, arguments: Arguments, terminal: Terminal,
    more: dict[str, Any],
) -> None:  # fmt: skip
    import json

    if arguments.save:
        try:
            Path(arguments.save).write_text(plan.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--save {arguments.save}: {error}") from None
    finish = None
    if length is not None and plan.step_seconds is not None:
        finish = length.steps * plan.step_seconds
    record = {"plan": json.loads(plan.to_json(history=False)), "methods": plan.methods}
    record |= {"peak_bytes": plan.peak_bytes, "step_seconds": plan.step_seconds}
    record |= {"budget_bytes": plan.budget_bytes}
    record |= {"by_category": dict(plan.by_category), "table": plan.table().data}
    record |= {"steps": length.steps if length else None, "seconds_to_finish": finish}
    terminal.emit(record | {key: value for key, value in more.items() if value})
    terminal.say(str(plan), "", str(plan.table()), "", _categories(plan))
    if length is not None and finish is not None:
        terminal.say(f"{length.steps:,} steps ({length.reason}): {format_seconds(finish)}")


def _categories(plan: Any) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, count in plan.by_category.items():
        if count:
            table.add_row(f"{name} at the peak", format_bytes(count))
    return table
