"""Settings of a trainer that a plan cannot go with: each is an error that says what to do."""

from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConfigError, StackError
from ..methods import METHODS, Method
from ..planner.ways import HANDED_OVER, Allow, allowed


def autocast_of(args: Any) -> torch.dtype | None:
    """The dtype that the model's forward is run in by TrainingArguments; None for that of its
    weights."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def refuse_conflicts(trainer: Any) -> None:
    """Everything in a trainer that a plan cannot go with."""
    refuse_arguments(trainer.args)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise _conflict("DeepSpeed or FSDP", "a plan is for one process that holds the weights "
                        "whole", "Train without it.")  # fmt: skip
    if trainer.model_init is not None:
        raise _conflict("model_init", "train() makes another model than the one that is planned",
                        "Pass model=.")  # fmt: skip
    if getattr(trainer, "is_model_parallel", False) or trainer.model_wrapped is not trainer.model:
        raise StackError(
            f"the trainer's model is wrapped in {type(trainer.model_wrapped).__name__} or spread "
            "over devices",
            expected="the model itself on one device",
            hint="Call plan_trainer after the trainer is made and before it trains.",
        )
    refuse_checkpointing(trainer.model)


def refuse_arguments(args: Any) -> None:
    """The settings in TrainingArguments (and what derives from them)."""
    once = "the plan decides what is computed again, and that would be paid for twice"
    # transformers renamed it in 5.2x, and keeps the old name beside the new one.
    names = ("activation_checkpointing", "gradient_checkpointing")
    if any(vars(args).get(name) for name in names):
        name = next(name for name in names if name in vars(args))
        raise _conflict(name, once, f"Set {name}=False (TRL's configs set it when it is left out).")
    if getattr(args, "activation_offloading", False):
        raise _conflict("activation_offloading", "the plan decides what is kept where",
                        "Set activation_offloading=False.")  # fmt: skip
    if args.torch_compile:
        raise _conflict("torch_compile", "a compiled step has another peak than a planned one",
                        "Set torch_compile=False.")  # fmt: skip
    if args.deepspeed:
        raise _conflict("deepspeed", "it owns weights and optimizer", "Train without deepspeed.")
    if args.fsdp:
        raise _conflict("fsdp", "it owns weights and optimizer", "Train without fsdp.")
    if args.use_liger_kernel:
        raise _conflict("use_liger_kernel", "it changes the model when training begins, after it "
                        "was planned", "Apply Liger's kernels to the model first, and set "
                        "use_liger_kernel=False.")  # fmt: skip
    if args.auto_find_batch_size:
        raise _conflict("auto_find_batch_size", "it runs out of memory on purpose, and the plan "
                        "is for the batch size that is set", "Set auto_find_batch_size=False; "
                        "what does not fit is said before anything runs.")  # fmt: skip
    if args.world_size > 1 or args.n_gpu > 1:
        count = max(args.world_size, args.n_gpu)
        raise _conflict(
            f"more than one device ({count})", "the trainer wraps the model for them",
            "Let it see one: CUDA_VISIBLE_DEVICES=0, and no torchrun.",
        )  # fmt: skip
    if str(getattr(args.optim, "value", args.optim)) in ("lomo", "adalomo"):
        raise _conflict(f"optim={args.optim!r}", "it steps by hooks of its own within backward",
                        "Choose another optim.")  # fmt: skip


def refuse_checkpointing(model: Any) -> None:
    """ConfigError for a model whose own checkpointing is switched on."""
    if any(vars(module).get("gradient_checkpointing") for module in model.modules()):
        raise _conflict(
            "gradient checkpointing of the model",
            "the plan decides what is computed again, and that would be paid for twice",
            "Call model.gradient_checkpointing_disable() first.",
        )


def _conflict(what: str, why: str, todo: str) -> ConfigError:
    return ConfigError(f"{what} does not go with a plan: {why}", hint=todo)


def usable(allow: Allow, why_not: Callable[[Method], str | None]) -> list[str]:
    """Names of the methods that are allowed and can be used. ConfigError for one that is asked
    for by name and cannot."""
    named = [] if isinstance(allow, str) and allow not in METHODS else allow
    found = []
    # The loop is ours to set up, so all of it is handed over; `why_not` keeps back what it must.
    for method in allowed(allow, hands_over=HANDED_OVER):
        reason = why_not(method)
        if reason is None:
            found.append(method.name)
        elif method.name in ([named] if isinstance(named, str) else named):
            raise ConfigError(
                f"method {method.name!r} cannot be used here: {reason}",
                hint="Leave it out of allow.",
            )
    return found
