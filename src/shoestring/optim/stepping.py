"""Optimizers stepped one parameter at a time, and put around one another.

torch's optimizers update every parameter by itself, though their `step` goes over all of them.
Here one is made to see a single parameter for the time of a step, so that what it does can be
put anywhere: inside backward, or between fetching a state and putting it away.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.optim import Optimizer

from ..errors import ConfigError

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
TRIAL_STEPS = 3
_found: dict[Any, str | None] = {}


def step_one(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> None:
    """Step `parameter` alone, with the settings of its group."""
    groups, members = optimizer.param_groups, group["params"]
    optimizer.param_groups, group["params"] = [group], [parameter]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups, group["params"] = groups, members


def put_state(optimizer: Optimizer, parameter: nn.Parameter, key: str, value: Any) -> None:
    """Set one entry of a parameter's state where the optimizer wants it to be kept."""
    if isinstance(optimizer, Around):
        optimizer.put_state(parameter, key, value)
    else:
        optimizer.state[parameter][key] = value


class Around(Optimizer):
    """An optimizer around another one, whose groups, states and hooks it shares.

    What a loop, a scheduler or a checkpoint sees is the one inside; subclasses say what `step`
    does. Hooks on steps, also those the one inside came with, fire once for each `step`.
    """

    takes_turns: ClassVar[bool] = False
    """Whether only a part of the parameters is trained at a time; see `InTurns`."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.defaults = inner.defaults
        self._share()
        # Everything torch's constructor sets up but groups of its own.
        self.__setstate__({})
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(self, name, getattr(inner, name))
            setattr(inner, name, OrderedDict())
        for name in ("state_dict_pre", "state_dict_post", "load_state_dict_pre",
                     "load_state_dict_post"):  # fmt: skip
            setattr(self, f"_optimizer_{name}_hooks", getattr(inner, f"_optimizer_{name}_hooks"))

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def state_dict(self) -> dict[str, Any]:
        """As the optimizer inside has it."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a state_dict of this optimizer, or of the one inside."""
        self.inner.load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters."""
        self.inner.add_param_group(param_group)

    def put_state(self, parameter: nn.Parameter, key: str, value: Any) -> None:
        """Set one entry of a parameter's state."""
        put_state(self.inner, parameter, key, value)

    def __getstate__(self) -> NoReturn:
        raise ConfigError(
            f"{type(self).__name__} cannot be copied or pickled",
            expected="its state_dict(), loaded into another one",
        )


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What the closure given to `step` returns; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def coupling(
    make: MakeOptimizer, made: Optimizer, parameters: Sequence[nn.Parameter]
) -> str | None:
    """Why `made` must not be stepped one parameter at a time; None when it can be.

    Found out by trying, once for each kind of optimizer and its settings: `make` is called for
    two pairs of tiny parameters, of which one is stepped together and the other one by one, last
    first. Only equal bits pass. make: what made it; parameters: as it was given.
    """
    if isinstance(made, Around) and made.takes_turns:
        return "it trains one part of them after another, and throws states away in between"
    key = _kind(made)
    if key not in _found:
        like = parameters[0]
        with unset_fake_temporarily():
            _found[key] = _try(make, like)
    return _found[key]


def refuse_coupled(
    method: str, make: MakeOptimizer, made: Optimizer, parameters: Sequence[nn.Parameter]
) -> None:
    """ConfigError, in the name of `method`, for an optimizer that couples parameters."""
    if reason := coupling(make, made, parameters):
        release = getattr(made, "release", None)  # what it did to the model ends with it
        if release is not None:
            release()
        raise ConfigError(
            f"{method} cannot step {type(made).__name__} one parameter at a time: {reason}",
            expected="an optimizer that updates each parameter by its own gradient and state",
            hint=f"Leave out {method}, or take AdamW.",
        )


def _kind(made: Optimizer) -> Any:
    names = []
    inner: Any = made
    while isinstance(inner, Around):
        names.append(type(inner))
        inner = inner.inner
    settings = [
        (k, repr(v))
        for group in made.param_groups
        for k, v in sorted(group.items())
        if k != "lr" and isinstance(v, bool | int | float | str | tuple | None)
    ]
    return (*names, type(inner), tuple(settings))


def _try(make: MakeOptimizer, like: nn.Parameter) -> str | None:
    try:
        together, apart = _tiny(like), _tiny(like)
        one, other = make(together), make(apart)
        for number in range(TRIAL_STEPS):
            for pair in (together, apart):
                for place, parameter in enumerate(pair):
                    parameter.grad = torch.sin(parameter.detach() * (3 + number) + place)
            one.step()
            for group in reversed(other.param_groups):
                for parameter in reversed(list(group["params"])):
                    step_one(other, group, parameter)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        return f"trying it on two small parameters failed: {error}"
    if not all(_same(a, b) for a, b in zip(together, apart, strict=True)):
        return "two parameters stepped one by one do not come out as when stepped together"
    states = zip(together, apart, strict=True)
    if not all(_same(one.state.get(a, {}), other.state.get(b, {})) for a, b in states):
        return "its states differ when parameters are stepped one by one"
    return None


def _tiny(like: nn.Parameter) -> list[nn.Parameter]:
    device = "cpu" if isinstance(like, FakeTensor) else like.device
    made = []
    for place in (1, 2):
        shape = (3,) * like.ndim
        values = torch.linspace(-1, place, 3**like.ndim, dtype=torch.float64).view(shape)
        made.append(nn.Parameter(values.to(device, like.dtype)))
    return made


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(one == other)
