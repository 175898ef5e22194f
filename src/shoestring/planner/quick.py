"""FakeTensorMode with a shorter way for operators it has seen before.

A simulated step is tens of thousands of operators, nearly all of them repeats of a few hundred:
the same operator on tensors of the same layout. FakeTensorMode has a cache for that, but most of
planning would be spent on its key. Here a repeat is recognised by a cheaper one. Whatever is not
plain (symbolic shapes, sparse or complex tensors, constants, several outputs that alias) goes the
ordinary way, and so does every operator the first time.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    _DISPATCH_META_HANDLERS,
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._pytree import tree_leaves

_LIMIT = 1 << 15  # entries; a plan has hundreds
_VALUES = frozenset(
    {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout,
     torch.memory_format}
)  # fmt: skip
_UNUSUAL = frozenset({"lift", "lift_fresh", "lift_fresh_copy", "set_", "resize_", "_to_copy"})
_TAGS = (
    torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view,
)  # fmt: skip
_READ = torch.ops.aten._local_scalar_dense.default
_seen: dict[Any, Any] = {}


class QuickFakeMode(FakeTensorMode):
    """As FakeTensorMode, faster on what repeats."""

    reads: int | None = None  # what a number read from a tensor is; None = an error

    def dispatch(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = {}
    ) -> Any:
        """Called by `__torch_dispatch__` with the mode taken off."""
        kind = _kind(func)
        if kind is None:
            attribute = _DISPATCH_META_HANDLERS.get(func)  # very often: `tensor.device`
            return attribute(args) if attribute else self._unusual(func, types, args, kwargs)
        parts: list[Any] = [func, torch.get_default_dtype()]
        if not self._describe(args, parts):
            return super().dispatch(func, types, args, kwargs)
        for name, value in (kwargs or {}).items():
            parts.append(name)
            if not self._describe((value,), parts):
                return super().dispatch(func, types, args, kwargs)
        key = tuple(parts)
        entry = _seen.get(key)
        if entry is None:
            out = super().dispatch(func, types, args, kwargs)
            if len(_seen) >= _LIMIT:
                _seen.clear()
            _seen[key] = _entry(kind, args, out)
            return out
        if entry is False:
            return super().dispatch(func, types, args, kwargs)
        return self._answer(entry, args)

    def _unusual(
        self, func: Any, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        try:
            return super().dispatch(func, types, args, kwargs)
        except DataDependentOutputException:
            if self.reads is None or func is not _READ:
                raise
            dtype = args[0].dtype
            kind = bool if dtype is torch.bool else float if dtype.is_floating_point else int
            return kind(self.reads)

    def _describe(self, values: Sequence[Any], parts: list[Any]) -> bool:
        """Append what decides the outcome; False for what has no short description."""
        for value in values:
            kind = type(value)
            if kind is FakeTensor:
                if (
                    value.fake_mode is not self
                    or value.constant is not None
                    or value.layout is not torch.strided
                    or value.dtype.is_complex
                ):
                    return False
                parts += (
                    value.shape, value.stride(), value.storage_offset(), value.dtype,
                    value.fake_device,
                )  # fmt: skip
            elif kind in _VALUES:
                parts += (kind, value)
            elif kind is list or kind is tuple or kind is torch.Size:
                parts += (list, len(value))
                if not self._describe(value, parts):
                    return False
            else:
                return False
        return True

    def _answer(self, entry: tuple[str, Any], args: Sequence[Any]) -> Any:
        kind, known = entry
        if kind == "first":
            return args[0]
        if kind == "new":
            return self._new(known)
        if kind == "several":
            sort, each = known
            return sort(self._new(one) if type(one) is tuple else one for one in each)
        size, stride, dtype, device, offset = known
        with in_kernel_invocation_manager(self):
            part = torch.empty(0, dtype=dtype, device="meta")
            part.set_(args[0].untyped_storage(), offset, size, stride)
        return FakeTensor(self, part, device)

    def _new(self, layout: tuple[Any, ...]) -> FakeTensor:
        size, stride, dtype, device, _ = layout
        with in_kernel_invocation_manager(self):
            made = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        return FakeTensor(self, made, device)


@contextlib.contextmanager
def optimizers_may_read(mode: FakeTensorMode) -> Iterator[None]:
    """Within a step, an optimizer that reads a number from a tensor (Adafactor reads norms) finds
    a one. It scales an update by it, which has no bytes; a model decides by what it reads, so
    elsewhere it stays an error."""
    if not isinstance(mode, QuickFakeMode):
        yield
        return
    depth = 0  # optimizers may stand around one another

    def begin(*_: Any) -> None:
        nonlocal depth
        depth += 1
        mode.reads = 1

    def end(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        mode.reads = 1 if depth else None

    handles = [register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)]
    try:
        yield
    finally:
        mode.reads = None
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def weights_may_read(mode: FakeTensorMode) -> Iterator[None]:
    """Code that fills weights finds a zero: it asks whether a draw is out of bounds (truncated
    normals), and draws again where one is."""
    if not isinstance(mode, QuickFakeMode):
        yield
        return
    mode.reads = 0
    try:
        yield
    finally:
        mode.reads = None


Kind = Literal["first", "new", "several", "view"]


@lru_cache(maxsize=4096)
def _kind(func: Any) -> Kind | None:
    """What an operator gives back: its first argument, new tensors, or a view of the first."""
    if func.namespace != "aten" or func.overloadpacket.__name__ in _UNUSUAL:
        return None
    if any(tag in func.tags for tag in _TAGS):
        return None
    schema = func._schema
    returns, arguments = schema.returns, schema.arguments
    if not returns or not any("Tensor" in str(a.type) for a in arguments):
        return None
    aliases = [r.alias_info for r in returns]
    if schema.is_mutable:
        writes = [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        first = len(returns) == 1 and writes == [arguments[0]] and aliases[0] is not None
        return "first" if first and str(returns[0].type) == "Tensor" else None
    if func.is_view:
        return "view" if len(returns) == 1 and str(returns[0].type) == "Tensor" else None
    if any(a is not None for a in aliases):
        return None
    return "new" if len(returns) == 1 and str(returns[0].type) == "Tensor" else "several"


def _entry(kind: Kind, args: Sequence[Any], out: Any) -> Any:
    """(kind, what to answer next time), or False where it is not as simple as the operator says."""
    if kind == "first":
        return (kind, None) if out is args[0] else False
    outs = [out] if isinstance(out, Tensor) else out
    if type(outs) not in (tuple, list):
        return False
    bases = [_storage(each) for each in tree_leaves(args) if isinstance(each, Tensor)]
    if any(_storage(each) in bases for each in outs if isinstance(each, Tensor)):
        # a view, or one that its operator does not own up to, such as _unsafe_view
        mine = type(args[0]) is FakeTensor and _storage(outs[0]) == _storage(args[0])
        layout = _layout(out, fresh=False) if mine and out is not args[0] else False
        return ("view", layout) if layout else False
    if kind == "several":
        found = [_layout(each, fresh=True) if isinstance(each, Tensor) else each for each in out]
        simple = all(type(each) in (tuple, int, type(None)) for each in found)
        return (kind, (type(out), found)) if simple else False
    layout = _layout(out, fresh=True)
    return ("new", layout) if layout else False


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _layout(tensor: Any, *, fresh: bool) -> tuple[Any, ...] | Literal[False]:
    """Size, strides, dtype, device, offset of a plain tensor; `fresh`: and owner of its bytes."""
    if (
        type(tensor) is not FakeTensor
        or tensor.constant is not None
        or tensor.layout is not torch.strided
        or tensor.dtype.is_complex
        or tensor.requires_grad
    ):
        return False
    size, stride = tuple(tensor.shape), tensor.stride()
    if not all(type(n) is int for n in (*size, *stride)):
        return False
    if fresh:
        span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        needed = 0 if 0 in size else span * tensor.itemsize
        if tensor.storage_offset() or tensor.untyped_storage().nbytes() != needed:
            return False
    return size, stride, tensor.dtype, tensor.fake_device, tensor.storage_offset()
