"""Tensors outside the memory that is counted: in a mapped file, which the system may write out.

Whoever puts a tensor there says so, for real and fake tensors alike, and a Tracker passes its
storage over. Their copies inside are charged as everything else.
"""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

_OUTSIDE: "weakref.WeakSet[torch.UntypedStorage]" = weakref.WeakSet()


def leave_out(tensors: Iterable[Tensor]) -> None:
    """From now on no Tracker counts the storages of these tensors."""
    _OUTSIDE.update(tensor.untyped_storage() for tensor in tensors)


def count_again(tensors: Iterable[Tensor]) -> None:
    """Undo `leave_out`."""
    for tensor in tensors:
        _OUTSIDE.discard(tensor.untyped_storage())


def is_outside(storage: torch.UntypedStorage) -> bool:
    """Whether this storage was left out."""
    return storage in _OUTSIDE
