"""The optimizer that a trainer makes, as a function of parameters.

A planner asks for it on fake parameters, and an optimizer method of a plan perhaps on some of the
real ones. The trainer's own is made once, as the trainer makes it, and read off: its class, its
groups by parameter, its settings.
"""

import inspect
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError


class Remade:
    """parameters -> an optimizer like `optimizer`, or itself for the parameters it was made for.

    Parameters that stand for others (those of a twin) are told by their place among `trained`.
    """

    def __init__(self, optimizer: Optimizer, trained: list[nn.Parameter]) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"the trainer's optimizer is a {type(optimizer).__name__}",
                expected="a torch.optim.Optimizer",
                hint="Choose another one with TrainingArguments(optim=...).",
            )
        self.optimizer = optimizer
        self.trained = trained
        places = {id(p): i for i, p in enumerate(trained)}
        self._groups = [
            (
                {places[id(p)] for p in group["params"] if id(p) in places},
                {k: v for k, v in group.items() if k not in ("params", "initial_lr")},
            )
            for group in optimizer.param_groups
        ]
        known = inspect.signature(type(optimizer).__init__).parameters
        self._settings = {k: v for k, v in optimizer.defaults.items() if k in known}

    def __call__(self, parameters: list[nn.Parameter]) -> Optimizer:
        if [id(p) for p in parameters] == [id(p) for p in self.trained]:
            return self.optimizer
        groups = self._grouped(parameters)
        made: Optimizer = type(self.optimizer)(groups, **self._settings)
        return made

    def _grouped(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        places = {id(p): i for i, p in enumerate(self.trained)}
        if len(parameters) == len(self.trained):
            at = range(len(parameters))
        else:
            # Of some that are nobody's, the group is unknown, and does not change what they take.
            at = [places.get(id(p), min(self._groups[0][0], default=0)) for p in parameters]  # type: ignore[assignment]
        grouped = [
            {"params": [p for p, i in zip(parameters, at, strict=True) if i in mine], **settings}
            for mine, settings in self._groups
        ]
        return [group for group in grouped if group["params"]]


def inner(optimizer: Any) -> Optimizer:
    """The optimizer inside of Accelerate's wrapper."""
    found: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found
