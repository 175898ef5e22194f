"""What the dispatcher does not see: random states, and storages resized behind its back.

Each watch replaces a function of torch's for as long as a Tracker is entered and returns what
puts it back; nested trackers wrap one another, and each counts for itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def watch_rng_states(made: Callable[[Tensor], None]) -> Callable[[], None]:
    """Report the tensors `torch.get_rng_state` hands out (5,056 bytes each on CPU)."""
    original = torch.random.get_rng_state

    def get_rng_state() -> Tensor:
        state = original()
        made(state)
        return state

    torch.get_rng_state = torch.random.get_rng_state = get_rng_state

    def undo() -> None:
        torch.get_rng_state = torch.random.get_rng_state = original

    return undo


def watch_resize(resized: Callable[[torch.UntypedStorage, int], None]) -> Callable[[], None]:
    """Report storages that `UntypedStorage.resize_` grew or shrank, and the bytes they had."""
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, nbytes: int) -> Any:
        before = storage.nbytes()
        out = original(storage, nbytes)
        resized(storage, before)
        return out

    torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment,method-assign]

    def undo() -> None:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    return undo
