"""An optimizer that trains parts of the weights in turns: only one part has gradients at a time.

Parameters of all other parts do not require gradients, so backward makes none for them and does
not go below the lowest that does. States are those of the part whose turn it is.
"""

import contextlib
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ConfigError, StackError
from .stepping import Around, evaluated

Order = Literal["random", "ascending", "descending"]
TURN, STEP = "turn", "step_of_turn"
"""Where the order is: keys of the first group, so that a state_dict has them."""
_OWNERS: Any = WeakIdKeyDictionary()
"""Parameter -> weak reference to the optimizer that trains it in turns."""


class InTurns(Around):
    """An optimizer that steps one part of its parameters for `steps` steps, then the next.

    A turn begins with no states. `param_groups` are those of the optimizer inside, with all
    parameters. `release` gives `requires_grad` back as it was; so does dropping the optimizer.
    """

    takes_turns = True

    def __init__(
        self,
        inner: Optimizer,
        parts: Sequence[Sequence[nn.Parameter]],
        *,
        steps: int,
        order: Order = "random",
        seed: int = 0,
    ) -> None:
        """parts: parameters of each, lowest first; what is in none is not trained.  steps: of a
        turn.  seed: of a random order, a new one for each round of turns.

        StackError while another one trains some of these parameters.
        """
        trained = [p for group in inner.param_groups for p in group["params"] if p.requires_grad]
        refuse_owned(trained)
        super().__init__(inner)
        self.parts = tuple(tuple(part) for part in parts)
        self.steps, self._chosen, self._seed = steps, order, seed
        self._trained = trained
        for parameter in trained:
            _OWNERS[parameter] = weakref.ref(self)
        self._give_back = weakref.finalize(self, _require_gradients, trained)
        self._give_back.atexit = False
        self._go_to(0, 0)

    @property
    def turn(self) -> int:
        """How many turns came before this one."""
        return int(self.param_groups[0][TURN])

    @property
    def active(self) -> int:
        """The part whose turn it is."""
        round_, place = divmod(self.turn, len(self.parts))
        return self._order(round_)[place]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the parameters whose turn it is; after the last step of it the next turn begins."""
        if not self._give_back.alive:
            raise StackError(
                "step() of an optimizer that was released: all weights have gradients again",
                expected="a new optimizer",
            )
        loss = evaluated(closure)
        with self._only_active():
            self.inner.step()
        place = self.param_groups[0]
        place[STEP] += 1
        if place[STEP] >= self.steps:
            self.end_turn()
        return loss

    def end_turn(self) -> None:
        """Begin the next turn now: the gradients and states of this one go."""
        for parameter in self._trained:
            self.state.pop(parameter, None)
        self._go_to(self.turn + 1, 0)

    def go_to(self, turn: int, step: int) -> None:
        """Go on in the middle of a turn, before states are put: of a run that is taken up."""
        for parameter in self._trained:
            self.state.pop(parameter, None)
        self._go_to(turn, step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a state_dict of this optimizer. From one that does not take turns only the settings
        of the groups are used: a turn begins without states."""
        super().load_state_dict(state_dict)
        place = self.param_groups[0]
        if TURN not in place:
            self.go_to(0, 0)
        else:
            self._go_to(place[TURN], place[STEP])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """ConfigError: parts were made of the parameters that there were."""
        raise ConfigError(
            "an optimizer that trains in turns takes no further parameters",
            expected="all of them when it is made",
        )

    def release(self) -> None:
        """Give `requires_grad` back as it was; there are no steps after that."""
        self._give_back()

    def _go_to(self, turn: int, step: int) -> None:
        self.param_groups[0].update({TURN: turn, STEP: step})
        active = {id(p) for p in self.parts[self.active]}
        for parameter in self._trained:
            parameter.requires_grad_(id(parameter) in active)
            if not parameter.requires_grad:
                parameter.grad = None
                self.state.pop(parameter, None)

    def _order(self, round_: int) -> list[int]:
        places = list(range(len(self.parts)))
        if self._chosen == "random":
            # Of each round by itself, so that where it is says all. random() is the same in every
            # version of Python, shuffle() is not.
            draw = random.Random(f"{self._seed} {round_}").random
            places.sort(key=lambda _: draw())
        return places[::-1] if self._chosen == "descending" else places

    @contextlib.contextmanager
    def _only_active(self) -> Iterator[None]:
        """The optimizer inside sees only what is trained in this turn."""
        groups = self.inner.param_groups
        members = [group["params"] for group in groups]
        active = {id(p) for p in self.parts[self.active]}
        try:
            for group in groups:
                group["params"] = [p for p in group["params"] if id(p) in active]
            self.inner.param_groups = [group for group in groups if group["params"]]
            yield
        finally:
            self.inner.param_groups = groups
            for group, those in zip(groups, members, strict=True):
                group["params"] = those


def refuse_owned(parameters: Sequence[nn.Parameter]) -> None:
    """StackError when an optimizer trains some of these in turns already."""
    if _owners(parameters):
        raise StackError(
            "these parameters have an optimizer already that trains them in turns",
            expected="one at a time",
            hint="Call its release(), or drop the last reference to it, first.",
        )


def release_all(parameters: Sequence[nn.Parameter]) -> None:
    """Release what trains these in turns."""
    for owner in _owners(parameters):
        owner.release()


def _owners(parameters: Sequence[nn.Parameter]) -> list[InTurns]:
    owners = (_OWNERS[p]() for p in parameters if p in _OWNERS)
    return list({id(each): each for each in owners if each is not None}.values())


def _require_gradients(trained: Sequence[nn.Parameter]) -> None:
    for parameter in trained:
        parameter.requires_grad_(True)
        _OWNERS.pop(parameter, None)
