"""offload_optimizer: the optimizer's states live outside memory.

Idea: a parameter's states are needed only while that parameter is stepped. Between two steps they
lie in a file that is mapped into memory (on a CPU) or in pinned host memory (on a GPU); the step
goes parameter by parameter, fetching one's states and putting them away again (ZeRO-Offload, arXiv
2101.06840, and ZeRO-Infinity, arXiv 2104.07857, for the idea; the arithmetic stays on the device).
Equations: none change.
Memory: on a CPU none, on a GPU the states of one parameter at a time. What is smaller than a page
(4,096 bytes) stays.
Time: every state is read and written once a step: 8 bytes a parameter each way for AdamW, as fast
as the disk (or the bus) is; on a CPU from the page cache where there is memory for it.
Exactness: bitwise; states are the same numbers in another place, also in the state_dict.
Limits: an optimizer that treats parameters one by one. Room on the disk is taken before the first
step, but for an optimizer that decides by the values of its tensors (Adafactor). Each process has a
file of its own.
Source: arXiv 2101.06840, section 4; arXiv 2104.07857, section 5.
"""

import contextlib
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError
from ..mapped import MappedFile, release, room
from ..optim.stepping import Around, evaluated, refuse_coupled, step_one
from .base import MakeOptimizer, Method, Promises

SMALLEST = mmap.PAGESIZE
"""States of fewer bytes stay in memory: in the file each would take a page."""
MORE = 1 << 24
"""Least bytes of a further file, for states whose room could not be told beforehand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadOptimizerConfig:
    """Where the states are kept."""

    directory: str | None = None
    """On a CPU: of the mapped file. Left out: that of SHOESTRING_SPILL_DIR, or the system's."""

    def __post_init__(self) -> None:
        if self.directory is not None and not isinstance(self.directory, str):
            raise ConfigError(
                f"offload_optimizer: directory = {self.directory!r}", expected="a path"
            )


class _BornOutside(TorchFunctionMode):
    """Zeros in the shape of a parameter, as most states begin, are made in the file at once."""

    def __init__(self, parameter: nn.Parameter, place: Callable[[Tensor, torch.dtype], Tensor]):
        super().__init__()
        self._parameter, self._place = parameter, place

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros_like and args and args[0] is self._parameter:
            if kwargs.keys() <= {"dtype", "memory_format"}:
                return self._place(self._parameter, kwargs.get("dtype") or self._parameter.dtype)
        return func(*args, **kwargs)


class PutAway(Around):
    """An optimizer whose states are put away after each parameter's step."""

    def __init__(self, inner: Optimizer, nbytes: int, directory: str | None) -> None:
        super().__init__(inner)
        self._directory = directory
        self._files = [MappedFile(nbytes, directory)]
        self._homes: dict[tuple[int, str], Tensor] = {}
        self._born: list[Tensor] = []  # in the file, in the step that is being made

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step one parameter after the other, each with its states fetched and put away."""
        loss = evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._fetch(parameter)
                    with self._birthplace(parameter):
                        step_one(self.inner, group, parameter)
                    self._put_away(parameter)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a state_dict, with or without this method; the states are put away."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                self._put_away(parameter)

    def put_state(self, parameter: nn.Parameter, key: str, value: Any) -> None:
        """Set one entry of a parameter's state, and put it away."""
        super().put_state(parameter, key, value)
        self._put_away(parameter)

    def _birthplace(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
        """For a parameter's first step: a new file is full of zeros, so none need to be written."""
        plain = type(parameter) in (nn.Parameter, FakeTensor)  # a subclass is something of its own
        if plain and parameter.device.type == "cpu" and not self.state.get(parameter):
            return _BornOutside(parameter, self._zeros)
        return contextlib.nullcontext()

    def _zeros(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        if like.numel() * dtype.itemsize < SMALLEST or not _is_dense(like):
            return torch.zeros(like.shape, dtype=dtype, device=like.device)
        made = self._home(like, dtype)
        self._born.append(made)
        return made

    def _fetch(self, parameter: nn.Parameter) -> None:
        if parameter.device.type == "cpu":
            return  # the step works in the mapped file
        state = self.state.get(parameter, {})
        for key, value in state.items():
            if (id(parameter), key) in self._homes:
                state[key] = value.to(parameter.device)

    def _put_away(self, parameter: nn.Parameter) -> None:
        state = self.state.get(parameter, {})
        for key, value in state.items():
            # A subclass of Tensor is something of its own; what holds it knows where.
            if type(value) not in (Tensor, FakeTensor) or value.nbytes < SMALLEST:
                continue
            if any(value is made for made in self._born):
                self._homes[id(parameter), key] = value
            home = self._homes.get((id(parameter), key))
            if home is None or (home.shape, home.dtype) != (value.shape, value.dtype):
                home = self._homes[id(parameter), key] = self._home(value, value.dtype)
            if value is not home:
                home.copy_(value.detach())
                state[key] = home
            release(home)
        self._born.clear()

    def _home(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A place for a state in the shape of this tensor."""
        if value.device.type != "cpu":
            pin = not isinstance(value, FakeTensor)
            return torch.empty_like(value, device="cpu", pin_memory=pin)
        size = room(value.shape, dtype)
        if size > self._files[-1].left:  # a state that did not exist when the room was taken
            self._files.append(MappedFile(max(size, MORE), self._directory))
        flat = self._files[-1].tensor((value.numel(),), dtype)
        # A kernel may count on states that lie in memory as the parameter does.
        in_order = _is_dense(value)
        return flat.as_strided(value.shape, value.stride()) if in_order else flat.view(value.shape)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def states_room(make: MakeOptimizer, parameters: Sequence[nn.Parameter]) -> int:
    """Bytes that the states of these parameters take in a mapped file, from a step on fakes."""
    if detect_fake_mode() is not None:
        return 1 << 60  # nothing is taken
    found = 0
    # A learning rate, for one, may be a tensor that is real.
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = make([nn.Parameter(_shaped(p), requires_grad=p.requires_grad) for p in parameters])
        for group in made.param_groups:
            for fake in group["params"]:
                fake.grad = torch.zeros_like(fake)
                try:
                    step_one(made, group, fake)
                except DataDependentOutputException:
                    return 0  # it decides by values, as Adafactor does: room is taken as it goes
                for value in made.state.pop(fake, {}).values():
                    if isinstance(value, Tensor) and value.nbytes >= SMALLEST:
                        found += room(value.shape, value.dtype)
                fake.grad = None
    return found


def _shaped(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)


class OffloadOptimizer(Method):
    """Keep the optimizer's states outside memory."""

    name = "offload_optimizer"
    promises = Promises(
        fidelity="exact",
        grade="bitwise",
        applies_to="optimizer",
        saved_grows_with=frozenset(),
        maps_files=True,
    )
    Config = OffloadOptimizerConfig

    def optimizer(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        make: MakeOptimizer,
        config: OffloadOptimizerConfig,
    ) -> PutAway:
        """The optimizer that `make` makes, with its states outside memory.

        ConfigError for an optimizer that couples parameters, SpillError when the disk has no room
        for all states: it is taken here, before the first step.
        """
        made = make(parameters)
        refuse_coupled("offload_optimizer", make, made, parameters)
        on_cpu = all(p.device.type == "cpu" for g in made.param_groups for p in g["params"])
        return PutAway(made, states_room(make, parameters) if on_cpu else 0, config.directory)
