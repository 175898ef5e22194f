"""What an operator's arguments say: its tensors, what it holds for itself, whether it draws."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Elementwise operators that bring their operands to one dtype first (on CPU, by copies).
_PROMOTING = frozenset(
    prefix + name
    for prefix in ("", "_foreach_")
    for name in "add add_ sub sub_ mul mul_ div div_ eq ne lt le gt ge maximum minimum".split()
)
_DTYPE_OF = {bool: torch.bool, int: torch.int64, float: torch.float64}


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Every plain tensor inside nested tuples, lists and dicts."""
    found: list[Tensor] = []
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            found.extend((value,) if value.layout is torch.strided else plain_tensors(value))
        elif isinstance(value, Tensor):
            found.extend(plain_tensors(value))
        elif kind is tuple or kind is list or isinstance(value, tuple | list):
            found.extend(tensors_in(value))
        elif isinstance(value, dict):
            found.extend(tensors_in(value.values()))
    return found


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the data of a wrapper subclass or a sparse tensor; else itself."""
    if is_traceable_wrapper_subclass(tensor):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        # A DTensor flattens to its part and its mesh, which is no tensor.
        return [p for part in parts if isinstance(part, Tensor) for p in plain_tensors(part)]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return [tensor]


def scratch_bytes(operator: str, args: tuple[Any, ...]) -> int:
    """Bytes an elementwise operator on CPU holds for itself while it runs.

    Operands are copied to their common dtype first (TensorIterator), and a Python number is
    made a tensor of 8 bytes, and copied likewise.
    """
    if operator not in _PROMOTING:
        return 0
    first, second = (args[0], args[1]) if len(args) > 1 else (None, None)
    if isinstance(first, list):  # _foreach_*: one tensor after the other
        first, second = first[0], second[0] if isinstance(second, list) else second
    if not isinstance(first, Tensor) or first.device.type != "cpu":
        return 0
    if isinstance(second, Tensor):
        if first.dtype is second.dtype:
            return 0
        operands = [first, second]
    elif isinstance(second, bool | int | float):
        operands = [first, torch.empty((), dtype=_DTYPE_OF[type(second)], device="meta")]
    else:
        return 0
    common = torch.result_type(first, second)
    if operator.endswith("_"):
        operands.append(first)  # read and written, each through its own copy
    held = 0 if isinstance(second, Tensor) else operands[1].nbytes
    return held + sum(
        each.numel() * common.itemsize for each in operands if each.dtype is not common
    )


def draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator that may draw random numbers does: attention without dropout and the
    like carry the tag as well."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "p"):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            return (argument.default_value if value is None else value) != 0
    return True
