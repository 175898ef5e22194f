"""Where fake tensors would lead a model another way than real ones, and what sets it right.

Two kinds: an operator whose fake rule refuses what the CPU kernel does, and a branch on values
that fake tensors do not have. Both are narrow and named.
"""

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode


def _grouped_mm(
    mode: FakeTensorMode,
    func: Any,
    left: Tensor,
    right: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """(S, K) x (E, K, N) -> (S, N); (K, S) x (S, N) -> (E, K, N); any dtype, rows not padded.

    torch's rule asks for bfloat16, as the CUDA kernel does and the CPU kernel does not. Bytes do
    not depend on how many rows each group gets, so routing needs no assumption here.
    """
    if left.device.type != "cpu":
        return NotImplemented
    if left.dim() == 2 and right.dim() == 2:
        assert offs is not None
        shape = [offs.size(0), left.size(0), right.size(1)]
    elif left.dim() == 2:
        shape = [left.size(0), right.size(-1)]
    elif right.dim() == 2:
        shape = [left.size(1), right.size(1)]
    else:
        shape = [left.size(0), left.size(1), right.size(-1)]
    with mode:
        return torch.empty(shape, dtype=out_dtype or left.dtype, device="cpu")


def _norm(mode: FakeTensorMode, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Mean and deviation of a half-precision input are float32 where the weights are (autocast).

    torch's rule gives them the input's dtype on CPU (`param_scalar_type` in the kernels).
    """
    others = [each for each in args if isinstance(each, Tensor)]
    mixed = any(each.dtype is torch.float32 is not x.dtype for each in others)
    if x.device.type != "cpu" or not mixed:
        return NotImplemented
    with mode:
        alike = [each.to(x.dtype) if isinstance(each, Tensor) else each for each in args]
        out, mean, deviation = func(x, *alike, **kwargs)
        return out, mean.float(), deviation.float()


_RULES = {
    "_grouped_mm": _grouped_mm,
    "native_layer_norm": _norm,
    "native_group_norm": _norm,
}


def _register() -> None:
    """Put the rules before torch's own, which stay in charge of all that is not theirs."""
    table = fake_impls.op_implementations_dict
    for name, rule in _RULES.items():
        operator = getattr(torch.ops.aten, name, None)
        if operator is not None:
            table[operator.default] = _before(table.get(operator.default), rule)


def _before(torchs: Any, rule: Any) -> Any:
    def either(mode: FakeTensorMode, func: Any, *args: Any, **kwargs: Any) -> Any:
        out = rule(mode, func, *args, **kwargs)
        if out is NotImplemented and torchs is not None:
            return torchs(mode, func, *args, **kwargs)
        return out

    return either


_register()


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
