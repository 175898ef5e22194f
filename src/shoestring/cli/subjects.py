"""What `shoestring plan` plans: a model's config or a run, at any batch size and length."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..training.config import RunConfig

if TYPE_CHECKING:
    from ..planner import Plan, PlanFor
    from ..training.distributed import World
    from .plan import Arguments


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that can be planned at any size.

    plans: (batch size, sequence length, whether to time) -> its plans.  scope: what that, and
    all that is done with the plans, must run in.  most_length: the model's own limit, if it has
    one.  least_length: what still has a token to predict.
    """

    name: str
    batch_size: int
    length: int
    budget: int | str
    plans: Callable[[int, int, bool], "PlanFor"]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    most_length: int | None = None
    least_length: int = 2

    def plans_now(self, *, seconds: bool = True) -> "PlanFor":
        """Its plans at the sizes it has."""
        return self.plans(self.batch_size, self.length, seconds)


def subject_of_model(
    arguments: "Arguments", model: str, *, allow: str = "", rank: int = 0, bits: int = 32
) -> Subject:
    """A Hugging Face config. allow: in place of the flag's.  rank: of a LoRA, 0 = all weights are
    trained.  bits: of weights that are frozen."""
    import torch

    from ..planner import planner_for_config
    from ..training.distributed import pick_device

    device, config = pick_device(arguments.device), model_config(model)
    config.dtype = torch.float32 if bits == 32 else torch.bfloat16
    build = None
    if rank:
        from ..planner.adapters import lora

        build = lora(config, rank)

    def plans(batch_size: int, length: int, seconds: bool) -> "PlanFor":
        return planner_for_config(
            config, batch_size=batch_size, sequence_length=length, seconds=seconds, build=build,
            allow=allow or arguments.allow,
            hands_over=arguments.hands_over,
            optimizer=_sgd if arguments.optimizer == "sgd" else None,
            autocast=torch.bfloat16 if arguments.precision == "bf16" else None,
        )  # fmt: skip

    return Subject(
        name=model, batch_size=arguments.batch_size, length=arguments.sequence_length,
        budget=arguments.budget or "auto", plans=plans, scope=lambda: torch.device(device),
        most_length=_positions(config),
    )  # fmt: skip


def subject_of_run(config: RunConfig, name: str) -> Subject:
    """A run, planned as `train` would; its data is not read."""
    from ..training.distributed import world
    from ..training.planning import budget_of_run

    def plans(batch_size: int, length: int, seconds: bool) -> "PlanFor":
        data = replace(config.data, batch_size=batch_size, sequence_length=length)
        return _plans_of_run(replace(config, data=data), seconds=seconds)

    most = config.model.gpt_fields().get("max_position_embeddings")
    if config.model.name:
        most = _positions(model_config(config.model.name))
    with world(config.run.device) as alone:
        budget = budget_of_run(config, alone)
    return Subject(
        name=name, batch_size=config.data.batch_size, length=config.data.sequence_length,
        budget=budget, plans=plans, most_length=most,
    )  # fmt: skip


def plan_of_run(config: RunConfig) -> "Plan":
    """The plan that `train` would make, or is told to use."""
    from ..planner import Plan
    from ..training.planning import read_plan

    if config.plan.file:
        return Plan.from_json(read_plan(config.plan.file))
    if config.turns.blocks:
        return _plan_in_turns(config)
    subject = subject_of_run(config, "")
    return subject.plans_now()(subject.budget)


def _plan_in_turns(config: RunConfig) -> "Plan":
    from ..training.distributed import world
    from ..training.planning import make_plan
    from ..training.turns import Objective

    with world(config.run.device) as alone:
        parts = _parts_of_run(config, alone)
        objective = Objective(config, parts["loss"], alone.device)
        plan = make_plan(config, **parts, world=alone, objective=objective)
    assert plan is not None
    return plan


def _plans_of_run(config: RunConfig, *, seconds: bool) -> "PlanFor":
    from ..training.distributed import world
    from ..training.planning import plans_of_run

    with world(config.run.device) as alone:
        return plans_of_run(config, **_parts_of_run(config, alone), seconds=seconds, world=alone)


def _parts_of_run(config: RunConfig, alone: "World") -> dict[str, Any]:
    """What a plan of a run is made of, without its data: rows of ids are all alike."""
    import torch

    from ..data import load_tokenizer
    from ..training.optimizer import optimizer_factory
    from ..training.prepare import Builder, loss_function
    from ..training.turns import prepared

    length, data = config.data.sequence_length, config.data
    tokenizer: Any = _Vocabulary(1 if config.model.name else data.vocabulary)
    if data.tokenizer != "auto":
        tokenizer = load_tokenizer(data.tokenizer)
    builder = Builder(
        config.model, length=length, tokenizer=tokenizer, device=alone.device,
        prepare=functools.partial(prepared, config),
    )  # fmt: skip
    ids = torch.zeros(data.batch_size, length, dtype=torch.long, device=alone.device)
    return {
        "build": builder.sketch,
        "batch": {"input_ids": ids, "labels": ids.clone()},
        "loss": loss_function(config, alone.device),
        "optimizer": optimizer_factory(config.optim, alone.device),
    }


class _Vocabulary:
    """Stands for a tokenizer that does not exist yet: only its size decides bytes."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, size: int) -> None:
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        """The highest id is all that is asked for."""
        return {"": self._size - 1}


def _sgd(parameters: Any) -> Any:
    import torch

    return torch.optim.SGD(parameters, lr=1e-3)


def _positions(config: Any) -> int | None:
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else None


def model_config(model: str) -> Any:
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
