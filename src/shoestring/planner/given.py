"""What the user gives to be planned: the loss it has, and its copy. What cannot be used is said
in the user's words, not in those of a call far below."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError
from ..quiet import quiet_fakes

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]

_GIVE_LOSS = "pass loss=, a function (model, batch) -> scalar tensor."
_OTHER_MODELS = (
    "For another model call shoestring.plan(model, batch, loss=...) in Python, with a batch of "
    "its own."
)


def loss_of(model: nn.Module, batch: Batch, loss: Loss | None) -> Tensor:
    """The loss that a step takes the gradient of. ConfigError for what has none."""
    value = (loss or own_loss)(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"({value!r})"
        raise ConfigError(
            f"loss(model, batch) gave a {type(value).__name__} {shape}",
            expected="a tensor of one element",
            hint="Return the loss itself, such as loss.mean(), not its number.",
        )
    if not value.requires_grad:
        raise ConfigError(
            "loss(model, batch) gave a tensor that no weight wants a gradient of",
            expected="a loss computed from weights with requires_grad, gradients on",
            hint="Check for frozen weights, detach() and no_grad() on its way.",
        )
    return value


def output_of(model: nn.Module, batch: Batch) -> Any:
    """`model(**batch)`. ConfigError for a batch of other names."""
    names = ", ".join(batch)
    try:
        return model(**batch)
    except TypeError as error:
        if _takes(model, batch):
            raise
        raise ConfigError(
            f"{type(model).__name__}.forward does not take a batch of {names}",
            expected=", ".join(_parameters(model)) or "nothing",
            hint=f"Name the batch's tensors so, or {_GIVE_LOSS}",
        ) from error


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """`model(**batch).loss`."""
    names, output = ", ".join(batch), output_of(model, batch)
    value: Tensor | None = getattr(output, "loss", None)
    if value is None:
        kind = "a tensor" if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"{type(model).__name__} gave {kind} without a loss for a batch of {names}",
            expected="an output with .loss, as Hugging Face models give for a batch with labels",
            hint=f"Put labels into the batch, or {_GIVE_LOSS}",
        )
    return value


def refuse_other_kinds(kind: type[nn.Module]) -> None:
    """ConfigError for a class that gives no loss for token ids with labels."""
    names, name = _parameters(kind), kind.__name__
    if "input_ids" not in names:
        raise ConfigError(
            f"{name} takes {', '.join(names)}, and no token ids",
            expected="the config of a language model, which is planned for ids and labels",
            hint=_OTHER_MODELS,
        )
    if "labels" not in names:
        raise ConfigError(
            f"{name} takes no labels, so it gives no loss",
            expected="architectures of a class with a loss in the config, such as LlamaForCausalLM",
            hint=_OTHER_MODELS,
        )


def _takes(model: nn.Module, batch: Batch) -> bool:
    try:
        inspect.signature(model.forward).bind(**batch)
    except TypeError:
        return False
    return True


def _parameters(model: nn.Module | type[nn.Module]) -> list[str]:
    found = inspect.signature(model.forward).parameters.values()
    several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in found if p.name != "self" and p.kind not in several]


@contextlib.contextmanager
def explained(model: str) -> Iterator[None]:
    """Says what to do about a model that branches on values, which fake tensors do not have."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigError(
            f"{model} decides by the values of its tensors ({error.func}), so its "
            "memory cannot be predicted without running it",
            expected="shapes that follow from the shapes of the batch",
            hint="For a mixture of experts, load it with experts_implementation='grouped_mm'",
        ) from error


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that modules hold beside them, in lists and dicts too."""
    yield from model.parameters()
    yield from model.buffers()
    for value in _attributes(model):
        if isinstance(value, Tensor):
            yield value


def generators_of(model: nn.Module) -> Iterator[torch.Generator]:
    """Sources of random numbers that modules hold."""
    return (value for value in _attributes(model) if isinstance(value, torch.Generator))


def _attributes(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield from tree_leaves(dict(vars(module)))


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy with what `memo` knows in the place of tensors. ConfigError names what in the
    model cannot be copied."""
    known = dict(memo)
    for generator in generators_of(model):
        # Its own state is not the twin's to move on.
        memo[id(generator)] = torch.Generator(generator.device)
    with quiet_fakes():
        try:
            return copy.deepcopy(model, memo)
        except Exception as error:
            where = _culprit(model, known | {id(g): g for g in generators_of(model)})
            raise ConfigError(
                f"{type(model).__name__} cannot be copied: {where}: {str(error).splitlines()[0]}",
                expected="a model that copy.deepcopy can copy",
                hint="Take it out of the model while it is planned, or give plan a function that "
                "builds the model in its place.",
            ) from error


def _culprit(model: nn.Module, known: dict[int, Any]) -> str:
    """Where the first attribute is that cannot be copied."""
    modules = {id(module): module for module in model.modules()}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                copy.deepcopy(value, known | modules)
            except Exception:
                return f"{path or 'its'} {name!r}"
    return "it"
