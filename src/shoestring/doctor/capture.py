"""How the model was called, kept without keeping its floating-point tensors alive."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

_PLAIN = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class _Floats:
    """A tensor of which only the layout matters."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def tensor(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the model in training: its arguments by name, and the autocast it ran under."""

    arguments: dict[str, Any]
    autocast: torch.dtype | None

    def batch(self) -> dict[str, Any]:
        """The arguments again; what was floating point has no values."""
        return tree_map(lambda x: x.tensor() if isinstance(x, _Floats) else x, self.arguments)


def captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | str:
    """The call, or why it cannot be made again by names alone."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        return f"the arguments of {type(model).__name__}.forward have no names ({error})"
    arguments: dict[str, Any] = {}
    for name, parameter in bound.signature.parameters.items():
        if name not in bound.arguments:
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= bound.arguments[name]
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            return f"{type(model).__name__}.forward takes arguments without names"
        else:
            arguments[name] = bound.arguments[name]
    for leaf in tree_leaves(arguments):
        if not isinstance(leaf, _PLAIN):
            return f"{type(model).__name__} is called with a {type(leaf).__name__}"
    with _disable_current_modes():
        return Call(tree_map(_kept, arguments), _autocast(model))


def _kept(value: Any) -> Any:
    """Numbers that steer the model (ids, masks) are copied: their values count."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point() or value.is_complex():
        return _Floats(tuple(value.shape), value.stride(), value.dtype, value.device)
    return value.detach().clone()


def _autocast(model: nn.Module) -> torch.dtype | None:
    parameter = next(model.parameters(), None)
    kind = parameter.device.type if parameter is not None else "cpu"
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
