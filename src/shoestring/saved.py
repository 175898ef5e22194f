"""What autograd saves for backward, kept some other way until backward asks for it.

`SavedTensors.of(block)` is a context around a block's forward (`saved_tensors_hooks`). Every tensor
saved in it is either left alone, or the *storage* under it is handed to a `keep` function once, and
the tensor becomes a `Handle`: where it lay in that storage. Tensors that share a storage (queries,
keys and values cut out of one product; an activation that two nodes save) share what was kept, and
come back with their strides, since kernels choose by layout.

Sharing goes by a weak reference to the live storage, never by its address: a freed address is soon
another tensor's. What comes back is held until every handle that shares it has been asked once, so
that nothing is fetched twice in a backward; a second backward (`retain_graph`) fetches again.

Left alone: parameters and buffers of the block and their views, what the block is handed beside its
hidden state (masks and rotary tables, which all blocks share), unusual kinds of tensors, small
ones.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from .errors import ReplayMismatch
from .stack import BlockCall

SMALLEST_BYTES = 4096
"""Tensors of fewer bytes stay where they are: a page of memory, and less than what it takes to
keep account of them is worth."""


class Content(Protocol):
    """The elements of one storage, kept some other way."""

    def back(self) -> Tensor:
        """They as a fresh one-dimensional tensor."""


class Owner(Protocol):
    """Whoever wants to know when backward first asks for something of a block."""

    def asked(self) -> None:
        """A handle of it is asked."""


Keep = Callable[[Tensor, Tensor], Content]
"""(the elements of a storage, one-dimensional and still alive; the first tensor that needs them)
-> the content that replaces them."""


class Slot:
    """One kept storage, and how many handles have not been asked yet in this backward."""

    __slots__ = ("__weakref__", "content", "handles", "held", "round", "waiting")

    def __init__(self, content: Content) -> None:
        self.content = content
        self.handles = self.waiting = self.round = 0
        self.held: Tensor | None = None

    def ask(self, asked_in: int) -> Tensor:
        """The elements. `asked_in`: the round in which the handle was asked last."""
        if asked_in == self.round:  # again, before all others: another backward
            self._next_round()
        flat = self.held if self.held is not None else self.content.back()
        self.held = flat
        self.waiting -= 1
        if self.waiting <= 0:
            self._next_round()
        return flat

    def leave(self, asked_in: int) -> None:
        """A handle is gone."""
        self.handles -= 1
        if asked_in != self.round:
            self.waiting -= 1
            if self.waiting <= 0:
                self._next_round()

    def _next_round(self) -> None:
        self.round += 1
        self.waiting = self.handles
        self.held = None


class Handle:
    """One saved tensor: where it lies in a kept storage."""

    __slots__ = ("asked_in", "layout", "owner", "slot")

    def __init__(self, slot: Slot, tensor: Tensor, offset: int, owner: Owner | None) -> None:
        self.slot, self.owner = slot, owner
        self.layout = (tensor.dtype, tensor.shape, tensor.stride(), offset)
        self.asked_in = -1
        slot.handles += 1
        slot.waiting += 1

    def tensor(self) -> Tensor:
        """The saved tensor, in memory."""
        if self.owner is not None:
            self.owner.asked()
        slot, round_ = self.slot, self.slot.round
        if self.asked_in == round_:
            round_ += 1
        with torch.no_grad():
            flat = slot.ask(self.asked_in)
            dtype, shape, stride, offset = self.layout
            if flat.dtype is not dtype:
                flat = flat.view(dtype)
            self.asked_in = round_
            return flat.as_strided(shape, stride, offset)

    def __del__(self) -> None:
        self.slot.leave(self.asked_in)


class Stayed:
    """A saved tensor that is left alone. Where hooks are, autograd leaves it to them to see that
    nobody changed it."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        # An operator's output holds the operator, which holds this: a cycle that nothing collects.
        # A leaf is nobody's output, and a backward of the backward goes on to it.
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = tensor._version

    def tensor(self) -> Tensor:
        """The saved tensor. ReplayMismatch when it was changed in place since."""
        if self._tensor._version != self._version:
            raise ReplayMismatch(
                f"a tensor of shape {tuple(self._tensor.shape)} that a block needs in backward was "
                "changed in place after the forward",
                expected="weights and inputs as they were until backward is over",
                hint="Step the optimizer after backward, not between forward and backward.",
            )
        return self._tensor


class SavedTensors:
    """The saved tensors of the blocks of one span. Holds nothing by itself: handles live in
    autograd's graph, and die with it."""

    def __init__(self, smallest_bytes: int = SMALLEST_BYTES) -> None:
        self.smallest_bytes = smallest_bytes
        # Live storage -> (version of its content, what was kept of it).
        self._kept: weakref.WeakKeyDictionary[
            torch.UntypedStorage, tuple[int, weakref.ref[Slot]]
        ] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def of(
        self,
        block: nn.Module,
        call: BlockCall,
        keep: Keep,
        *,
        wanted: Callable[[Tensor], bool] = lambda tensor: True,
        owner: Owner | None = None,
    ) -> Iterator[None]:
        """What autograd saves inside goes to `keep`, where `wanted(tensor)`; it is shown the tensor
        as autograd sees it, with its history."""
        shared = storages(block.parameters()) | storages(block.buffers()) | storages(_others(call))

        def pack(tensor: Tensor) -> Stayed | Handle:
            stays = not _is_plain(tensor) or tensor.untyped_storage()._cdata in shared
            kept = tensor if stays or not wanted(tensor) else self.put(tensor, keep, owner)
            return kept if isinstance(kept, Handle) else Stayed(kept)

        with saved_tensors_hooks(pack, restored):
            yield

    def put(self, tensor: Tensor, keep: Keep, owner: Owner | None = None) -> Tensor | Handle:
        """A handle of the tensor; the tensor itself when it is small or of a kind left alone."""
        if not _is_plain(tensor):
            return tensor
        storage, itemsize = tensor.untyped_storage(), tensor.itemsize
        begin, count = int(tensor.storage_offset()), _span(tensor)
        if count * itemsize < self.smallest_bytes or storage.nbytes() % itemsize:
            return tensor
        whole = storage.nbytes() // itemsize
        with torch.no_grad():
            if 4 * count < whole:
                # A small part of something large, which is not there for this block alone.
                part = keep(tensor.detach().as_strided((count,), (1,), begin), tensor)
                return Handle(Slot(part), tensor, 0, owner)
            slot = self._known(storage, tensor._version)
            if slot is None:
                slot = Slot(keep(tensor.detach().as_strided((whole,), (1,), 0), tensor))
                self._kept[storage] = tensor._version, weakref.ref(slot)
        return Handle(slot, tensor, begin, owner)

    def _known(self, storage: torch.UntypedStorage, version: int) -> Slot | None:
        known = self._kept.get(storage)
        if known is None or known[0] != version:
            return None
        return known[1]()


def restored(kept: Tensor | Stayed | Handle) -> Tensor:
    """The tensor of what `put` returned, or of what was saved in `SavedTensors.of`."""
    return kept if isinstance(kept, Tensor) else kept.tensor()


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """What the storages of these tensors are known by while they live."""
    return {t.untyped_storage()._cdata for t in tensors if _is_plain(t)}


def _others(call: BlockCall) -> Iterator[Tensor]:
    """Tensors among a block's arguments; the place of the hidden state is empty."""
    todo = [*call.args, *call.kwargs.values()]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()


def _is_plain(tensor: Tensor) -> bool:
    """Strided, with a storage of its own, and bytes that are its values."""
    return (
        type(tensor) in (Tensor, nn.Parameter, FakeTensor)
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last in memory."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
