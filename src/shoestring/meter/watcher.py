"""Who wants to know more than sums: told of every storage a Tracker counts, as it happens."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .ledger import Charge, Ledger


class Watcher:
    """Does nothing; subclasses override what they need. `Charge.note` is theirs to fill."""

    def started(self, operator: str, args: tuple[Any, ...]) -> None:
        """An operator is about to run; the phase is known."""

    def made(self, charge: Charge, tensor: Tensor) -> None:
        """A storage was charged; `tensor` is what showed it."""

    def gone(self, charge: Charge) -> None:
        """A storage died, or the tracking ended with it alive; its category is final."""

    def resized(self, charge: Charge, nbytes: int) -> None:
        """A storage is about to get another size."""

    def settled(self, ledgers: Iterable[Ledger], operator: str, scratch: int) -> None:
        """An operator is done that allocated, and held `scratch` bytes for itself."""

    def forward_ended(self, charges: Iterable[Charge]) -> None:
        """A backward begins; what is held for it has its category."""

    def stepped(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""
