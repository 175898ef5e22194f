"""The same step with something changed, on fake tensors: what a change would save.

The step is the watched one as far as it is known: the model and how it was called, its own loss
or the one that was given, the optimizer with its settings, how many backwards a step has, and two
habits that cost memory and a simulation would not have by itself: gradients kept from step to
step, and the output held on to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ShoestringError
from ..methods import MakeOptimizer
from ..planner.fake import Profile, simulate
from ..planner.given import Loss, loss_of
from ..planner.make import factory_of
from .capture import Call

Change = Callable[[nn.Module], object]


def loss_in(output: Any) -> Tensor | None:
    """The loss that a model returned: the output itself, its `loss`, or its first element."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    else:
        output = getattr(output, "loss", output)
    return output if isinstance(output, Tensor) and output.numel() == 1 else None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A step that can be simulated with a change in it."""

    model: nn.Module
    call: Call
    optimizer: Optimizer | None
    loss: Loss | None = None
    accumulate: int = 1
    clips: bool = False
    keeps_gradients: bool = False
    keeps_output: bool = False
    autocast: torch.dtype | None = None
    factory: MakeOptimizer | None = None
    """In place of the optimizer's own."""
    batch: Mapping[str, Any] | None = None
    """In place of the call's own."""

    def run(self, *changes: Change) -> Profile:
        """A step, and all later ones, with changes made to the model before."""

        def apply(model: nn.Module) -> None:
            for change in changes:
                change(model)

        again = self.keeps_gradients or self.keeps_output
        held: list[Any] = []
        return simulate(
            self.model, self.batch or self.call.batch(), apply=apply,
            optimizer=self._factory(), loss=self._loss(held),
            steps=2 if again else 1, later=not again,
            autocast=self.autocast or self.call.autocast, accumulate=self.accumulate,
            grad_clip=1.0 if self.clips else None, mask="given",
        )  # fmt: skip

    def peak(self, *changes: Change) -> int | None:
        """Its peak in bytes; None when this model does not take such a change."""
        try:
            return self.run(*changes).peak_bytes
        except (ShoestringError, RuntimeError, ValueError, TypeError, NotImplementedError):
            return None

    def having(self, **fields: Any) -> "Trial":
        """Another step."""
        return replace(self, **fields)

    def _factory(self) -> MakeOptimizer:
        make = self.factory or (factory_of(self.optimizer) if self.optimizer else _without_states)
        assert make is not None
        if not self.keeps_gradients:
            return make

        def keeping(parameters: list[nn.Parameter]) -> Optimizer:
            made = make(parameters)
            zero = made.zero_grad
            made.zero_grad = lambda set_to_none=True: zero(set_to_none=False)  # type: ignore[method-assign]
            return made

        return keeping

    def _loss(self, held: list[Any]) -> Loss:
        def own(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
            output = model(**batch)
            if self.keeps_output:
                held[:] = [output]  # as a variable: the last one is there until the next is made
            return loss_of(model, batch, lambda *_: loss_in(output))  # type: ignore[arg-type]

        return self.loss or own


def _without_states(parameters: list[nn.Parameter]) -> Optimizer:
    """For a step in which no optimizer was seen."""
    return torch.optim.SGD(parameters, lr=0.0, foreach=False)
