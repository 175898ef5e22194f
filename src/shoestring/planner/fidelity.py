"""Where fake tensors would lead a model another way than real ones, and what sets it right.

Two kinds: an operator whose fake rule refuses or mis-shapes what the CPU kernel does, and a
branch on values that fake tensors do not have. Both are narrow, named and undone on exit.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class RealKernels(TorchDispatchMode):
    """Gives what the CPU kernels give for operators whose fake rule knows only CUDA's.

    To be entered inside a FakeTensorMode and outside of what counts.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        rule = _RULES.get(func)
        if rule is not None and _first_device(args) == "cpu":
            return rule(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _grouped_mm(
    left: Tensor,
    right: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """(S, K) x (E, K, N) -> (S, N); (K, S) x (S, N) -> (E, K, N); any dtype, rows not padded.

    The fake rule asks for bfloat16, the CPU kernel does not. Bytes do not depend on how many
    rows each group gets, so routing needs no assumption here.
    """
    if left.dim() == 2 and right.dim() == 2:
        assert offs is not None
        shape = [offs.size(0), left.size(0), right.size(1)]
    elif left.dim() == 2:
        shape = [left.size(0), right.size(-1)]
    elif right.dim() == 2:
        shape = [left.size(1), right.size(1)]
    else:
        shape = [left.size(0), left.size(1), right.size(-1)]
    return left.new_empty(shape, dtype=out_dtype or left.dtype)


_RULES: dict[Any, Callable[..., Any]] = {}
if hasattr(torch.ops.aten, "_grouped_mm"):
    _RULES[torch.ops.aten._grouped_mm.default] = _grouped_mm


def _first_device(args: tuple[Any, ...]) -> str:
    return args[0].device.type if args and isinstance(args[0], Tensor) else ""


@contextlib.contextmanager
def known_positions(batch: Mapping[str, Any]) -> Iterator[None]:
    """Keep transformers from assuming packed sequences when the batch has no position ids.

    Without a mask and a cache (gradient checkpointing switches the cache off) it looks at the
    *values* of the positions; not seeing any, it would build a mask that a real run does not.
    Positions it made itself by counting are never packed.
    """
    masks = _module("transformers.masking_utils")
    original = getattr(masks, "find_packed_sequence_indices", None)
    if original is None or "position_ids" in batch:
        yield
        return
    masks.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = original


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def without_trivial_masks(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch less an attention mask that is all ones, which a real SDPA run drops."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask != 0).all()):
        return {name: value for name, value in batch.items() if name != "attention_mask"}
    return dict(batch)
