"""`shoestring plan MODEL`: what fits into a budget and what it costs, from shapes alone.

MODEL is a Hugging Face config.json, a directory with one, a model's name on the hub (only its
config is fetched), or a run's TOML file, which is then planned exactly as `train` would: its
settings stand in the file, so flags for them are refused beside it. Weights are planned in
float32, whatever the config says of the saved ones, because that is how `train` makes them. No
weights are read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Table
from tyro.conf import Positional, arg

from ..errors import ConfigError
from ..training.config import RunConfig
from ..units import format_bytes, format_seconds
from .arguments import Common
from .terminal import Terminal

_BYTES_PER_TOKEN = 4.0  # where no tokenizer is at hand; English and code lie between 3 and 5
_SAMPLE_BYTES = 500_000


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """What fits into a byte budget and what it costs, before anything is allocated."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A config.json, a directory with one, a model's name on the hub, or a RUN.toml."""
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
    steps: int = 0
    """Updates to make, for the time to finish; 0 = once through the data."""
    device: str = "auto"
    """auto (CUDA when there is one, else CPU), cpu, cuda or cuda:N."""
    save: str = ""
    """Write the plan there as JSON; `train --plan.file` applies it."""

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("sequence_length", 2), ("steps", 0)):
            if getattr(self, name) < low:
                value = getattr(self, name)
                raise ConfigError(f"--{name} {value} cannot be used", expected=f"{low} or more")


@dataclass(frozen=True)
class _Length:
    """How long training will take: steps, and what they were counted from."""

    steps: int
    reason: str


def run(arguments: Arguments, terminal: Terminal) -> int:
    """Prints the plan; exit code 0, or 3 by OutOfBudget when nothing fits."""
    if arguments.model.endswith(".toml"):
        config = _run_config(arguments)
        with terminal.progress.status("measuring one block at a time"):
            plan = plan_of_run(config)
        length: _Length | None = _Length(config.run.steps, "run.steps")
    else:
        with terminal.progress.status("measuring one block at a time"):
            plan = _plan_of_model(arguments)
        length = _length(arguments)
    _show(plan, length, arguments, terminal)
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
    from dataclasses import replace

    for name, setting in _IN_A_RUN.items():
        value = getattr(arguments, name)
        if value != getattr(Arguments, name):
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} {value} is given beside {arguments.model}",
                expected=f"{setting} in the file: a run is planned as train would",
                hint=f"Set {setting} in the file.",
            )
    config = RunConfig.load(Path(arguments.model))
    budget = arguments.budget or config.run.budget
    if budget == "none":
        raise ConfigError(
            'run.budget = "none" leaves nothing to plan', expected="--budget with a number of bytes"
        )
    return replace(config, run=replace(config.run, budget=budget))


def plan_of_run(config: RunConfig) -> Any:
    """The plan that `train` would make, without its data: rows of ids are all alike."""
    import torch

    from ..data import load_tokenizer
    from ..training.distributed import world
    from ..training.optimizer import optimizer_factory
    from ..training.planning import make_plan
    from ..training.prepare import Builder, loss_function

    length, data = config.data.sequence_length, config.data
    tokenizer: Any = _Vocabulary(1 if config.model.name else data.vocabulary)
    if data.tokenizer != "auto":
        tokenizer = load_tokenizer(data.tokenizer)
    with world(config.run.device) as alone:
        builder = Builder(config.model, length=length, tokenizer=tokenizer, device=alone.device)
        ids = torch.zeros(data.batch_size, length, dtype=torch.long, device=alone.device)
        return make_plan(
            config, builder.sketch, {"input_ids": ids, "labels": ids.clone()},
            loss=loss_function(config, alone.device),
            optimizer=optimizer_factory(config.optim, alone.device), world=alone,
        )  # fmt: skip


class _Vocabulary:
    """Stands for a tokenizer that does not exist yet: only its size decides bytes."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, size: int) -> None:
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        """The highest id is all that is asked for."""
        return {"": self._size - 1}


def _plan_of_model(arguments: Arguments) -> Any:
    import torch

    from ..planner import plan_config
    from ..training.distributed import pick_device

    device, config = pick_device(arguments.device), _model_config(arguments.model)
    config.dtype = torch.float32
    with torch.device(device):
        return plan_config(
            config,
            batch_size=arguments.batch_size,
            sequence_length=arguments.sequence_length,
            budget=arguments.budget or "auto",
            allow=arguments.allow,
            optimizer=_sgd if arguments.optimizer == "sgd" else None,
            autocast=torch.bfloat16 if arguments.precision == "bf16" else None,
        )


def _sgd(parameters: Any) -> Any:
    import torch

    return torch.optim.SGD(parameters, lr=1e-3)


def _model_config(model: str) -> Any:
    """A Hugging Face config object from a path or a name; no weights are touched."""
    from transformers import AutoConfig

    from ..models import gpt  # noqa: F401 - makes our own model type known

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"no model config can be had from {model!r}: {str(error).splitlines()[0]}",
            expected="a config.json, its directory, a model's name that can be reached, or a "
            "RUN.toml",
        ) from error


def _length(arguments: Arguments) -> _Length | None:
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
    steps = max(1, round(tokens / (arguments.batch_size * arguments.sequence_length)))
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


def _show(plan: Any, length: _Length | None, arguments: Arguments, terminal: Terminal) -> None:
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
    terminal.emit(record)
    terminal.say(str(plan), "", str(plan.table()), "", _categories(plan))
    if length is not None and finish is not None:
        terminal.say(f"{length.steps:,} steps ({length.reason}): {format_seconds(finish)}")


def _categories(plan: Any) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, count in plan.by_category.items():
        if count:
            table.add_row(f"{name} at the peak", format_bytes(count))
    return table
