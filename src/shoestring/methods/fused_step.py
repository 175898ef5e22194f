"""fused_step: each parameter is stepped within backward, and its gradient is freed at once.

Idea: once a parameter's gradient is complete, nothing else in the step needs it, so the optimizer
may update that parameter there and then (LOMO, arXiv 2306.09782, section 3.1, for plain SGD; here
for any optimizer that treats parameters one by one).
Equations: none change.
Memory: the gradients of all parameters are never there together: of weight matrices about one at
a time, instead of 2 or 4 bytes a parameter. With states of the optimizer kept elsewhere or in few
bits, these are the largest part of what is left.
Time: the same operations, in another order, and Python's part of a step for each parameter.
Exactness: bitwise, for what `step` would have done. Clipping by parameter is another rule than
clipping by the norm of all.
Limits: one backward a step. Nothing that needs all gradients at once: accumulation over passes,
the norm of all, GradScaler, a step left out after its backward, more than one process.
Source: arXiv 2306.09782; torch's tutorial on optimizers in backward.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ConfigError, StackError
from ..optim.stepping import Around, evaluated, refuse_coupled, step_one
from .base import MakeOptimizer, Method, Promises

_OWNERS: Any = WeakIdKeyDictionary()
"""Parameter -> weak reference to the optimizer that steps it within backward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedStepConfig:
    """What is done to a gradient before it is used."""

    clip: Literal["none", "parameter"] = "none"
    """"parameter": each gradient is scaled to a norm of at most `max_norm`, by itself."""
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.clip not in ("none", "parameter"):
            raise ConfigError(
                f"fused_step: clip = {self.clip!r}",
                expected="'none' or 'parameter'",
                hint="The norm of all gradients is known only when all of them are there."
                if self.clip in ("global", "norm", "all")
                else None,
            )
        good = isinstance(self.max_norm, int | float) and math.isfinite(self.max_norm)
        if not good or isinstance(self.max_norm, bool) or self.max_norm <= 0:
            raise ConfigError(
                f"fused_step: max_norm = {self.max_norm!r}", expected="a positive number"
            )


class SteppedInBackward(Around):
    """An optimizer whose parameters are stepped by hooks as soon as their gradients are there.

    `step` steps what has a gradient all the same (one set by hand), and ends the update.
    `release` takes the hooks out; so does dropping the optimizer.
    """

    def __init__(self, inner: Optimizer, config: FusedStepConfig) -> None:
        self._config = config
        self._task: int | None = None  # the backward since the last step
        self._handles: list[RemovableHandle] = []
        self._places: dict[int, int] = {}  # number of a parameter's group
        _refuse_owned(_parameters(inner))
        super().__init__(inner)
        self._hook(0)
        weakref.finalize(self, _remove, self._handles).atexit = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """End the update that backward has made."""
        loss = evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(group, parameter)
        self._task = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. StackError when the update that backward made was not ended by `step`."""
        if self._task is not None:
            self._task = None
            raise StackError(
                "zero_grad() after a backward that no step() followed: with fused_step, backward "
                "has updated the weights already",
                expected="loss.backward(), then step()",
                hint="An update cannot be left out after its backward: go back to a checkpoint, "
                "or leave out fused_step.",
            )
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        self._hook(before)

    def release(self) -> None:
        """Take the hooks out: from now on gradients stay, and `step` uses them."""
        _remove(self._handles)
        for parameter in _parameters(self.inner):
            _OWNERS.pop(parameter, None)

    @property
    def _step_supports_amp_scaling(self) -> NoReturn:
        # What GradScaler asks for before its first step.
        raise StackError(
            "GradScaler.step() with fused_step: backward has used the scaled gradients already",
            expected="bfloat16 autocast, which needs no scaling",
            hint="The weights were updated by scaled gradients: start again.",
        )

    def _hook(self, first: int) -> None:
        """Hooks on the parameters of the groups from `first` on."""
        owner = weakref.ref(self)

        def arrived(parameter: nn.Parameter) -> None:
            optimizer = owner()
            if optimizer is not None:
                optimizer._arrived(parameter)

        for number, group in enumerate(self.param_groups[first:], start=first):
            for parameter in group["params"]:
                self._places[id(parameter)] = number
                if parameter.requires_grad:
                    self._handles.append(parameter.register_post_accumulate_grad_hook(arrived))
                    _OWNERS[parameter] = owner

    def _arrived(self, parameter: nn.Parameter) -> None:
        task = torch._C._current_graph_task_id()
        if self._task not in (None, task):
            raise StackError(
                "a second backward before step(): with fused_step, the first one has updated the "
                "weights and freed its gradients",
                expected="one backward for each step(), not within another one (checkpoints with "
                "use_reentrant=True)",
                hint="Take larger microbatches instead of accumulating, or leave out fused_step. "
                "The weights hold the update of the first backward.",
            )
        self._task = task
        self._step(self.param_groups[self._places[id(parameter)]], parameter)

    def _step(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        if self._config.clip == "parameter":
            nn.utils.clip_grad_norm_([parameter], self._config.max_norm, foreach=False)
        step_one(self.inner, group, parameter)
        # Fused kernels change weights behind autograd's back. What of this backward still needs
        # the old ones must fail, not use the new ones.
        torch.autograd.graph.increment_version(parameter)
        parameter.grad = None


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _refuse_owned(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        owner = _OWNERS.get(parameter)
        if owner is not None and owner() is not None:
            raise StackError(
                "these parameters have an optimizer already that steps them within backward",
                expected="one at a time",
                hint="Call its release(), or drop the last reference to it, first.",
            )


class FusedStep(Method):
    """Step each parameter within backward and free its gradient."""

    name = "fused_step"
    promises = Promises(
        fidelity="exact",
        grade="bitwise",
        applies_to="optimizer",
        saved_grows_with=frozenset(),
        frees_gradients=True,
    )
    Config = FusedStepConfig

    def optimizer(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        make: MakeOptimizer,
        config: FusedStepConfig,
    ) -> SteppedInBackward:
        """The optimizer that `make` makes, stepped within backward.

        ConfigError for an optimizer that couples parameters or needs a closure, and in a group of
        processes. StackError while another one steps these parameters.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                raise ConfigError(
                    "fused_step in a group of processes: each would step by gradients of its own",
                    expected="a single process",
                )
        _refuse_owned(parameters)
        made = make(parameters)
        refuse_coupled("fused_step", make, made, parameters)
        return SteppedInBackward(made, config)
