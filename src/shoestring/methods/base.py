"""What every method declares, and the two shapes a method can have.

A *span method* says how a run of neighbouring blocks is executed (an `Executor`). A *loss*,
*module* or *weights method* patches a model in place and returns how to undo it. An *optimizer
method* says how the optimizer is made, and may change the model for it first. What a method
promises is data: `tests/contract` turns every promise into a test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError, closest
from ..optim.stepping import MakeOptimizer as MakeOptimizer
from ..stack import Executor, Stack

Undo = Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Promises:
    """What a method promises, relative to the network as given."""

    fidelity: Literal["exact", "unbiased", "structural"]
    """exact: same function, same gradient; unbiased: same gradient in expectation;
    structural: another function is trained, or by another algorithm."""
    grade: Literal["bitwise", "reassociated"] | None = None
    """For exact methods: equal bit for bit, or equal up to the order of sums."""
    bound_eps: float | None = None
    """For reassociated methods: gradient error, relative (L2), in multiples of the dtype's
    epsilon."""
    gradient_error: float | None = None
    """For unbiased methods: most that one draw of the gradient is off, relative (L2 over all
    parameters), with the default settings."""
    applies_to: Literal["span", "loss", "module", "weights", "adapters", "batch", "optimizer"]
    """A run of blocks; the loss; parts of blocks; where the weights are; what is trained in their
    place; how the batch is run; the optimizer."""
    rebuilds: Literal["nothing", "input", "streams"] = "nothing"
    """What a span method needs to run a block again in backward: nothing (all is kept), the
    block's input (held, or rebuilt from a lower one), or the streams above it."""
    saved_grows_with: frozenset[str] = frozenset({"depth", "batch", "length"})
    """What the bytes saved for backward grow with."""
    always_allowed: bool = False
    """Whether plans may use it whatever they are allowed: what all others are held against."""
    frees_gradients: bool = False
    """For optimizer methods: whether a gradient is used and freed within backward."""
    takes_turns: bool = False
    """For optimizer methods: whether it makes an `InTurns`, of which one part of the weights has
    gradients at a time. A plan then promises the peak of the turn that needs most."""
    maps_files: bool = False
    """Whether tensors live in mapped files: the process's resident memory then counts pages that
    the system may take back."""
    changes_weights: bool = False
    """Whether `apply` gives the weights another dtype, or trains others: blocks then cost something
    else."""
    for_frozen: bool = False
    """Whether it only does something to weights that are not trained: beside adapters, say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoConfig:
    """For methods without settings."""


class Method:
    """One way to spend less memory. Subclasses fill in the class attributes."""

    name: ClassVar[str]
    promises: ClassVar[Promises]
    Config: ClassVar[type] = NoConfig
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    """Other settings that a planner should try beside the default ones."""

    def configure(self, settings: Mapping[str, Any] | None = None) -> Any:
        """Settings (JSON-able) -> `Config`. ConfigError names an unknown one and the nearest."""
        settings = dict(settings or {})
        known = [f.name for f in fields(self.Config)]
        for key in settings:
            if key not in known:
                raise ConfigError(
                    f"method {self.name!r} has no setting {key!r}",
                    expected=f"one of {known}" if known else "no settings",
                    hint=closest(key, known),
                )
        return self.Config(**settings)

    def fits(self, stack: Stack, config: Any = None) -> str | None:
        """None when the method can run this stack, else the reason why not.

        config: with which settings; the default ones when left out."""
        return None

    def gradient_error(self, config: Any) -> float | None:
        """Unbiased methods: the promised error of one draw, with these settings."""
        return self.promises.gradient_error

    def executor(self, stack: Stack, start: int, stop: int, config: Any) -> Executor:
        """Span methods: how the blocks start..stop-1 are run."""
        raise ConfigError(
            f"method {self.name!r} does not run spans of blocks",
            expected=f"a span method; it applies to the {self.promises.applies_to}",
        )

    def apply(self, model: nn.Module, config: Any) -> Undo:
        """All but span methods: change the model in place, return how to undo it."""
        if self.promises.applies_to == "optimizer":
            return lambda: None
        raise ConfigError(
            f"method {self.name!r} runs spans of blocks", hint="Use Stack.apply with a Span."
        )

    def build(self, build: Callable[[], nn.Module], config: Any) -> nn.Module:
        """The model that `build` makes, for `apply`; weights methods may put it elsewhere while it
        is made."""
        return build()

    def optimizer(
        self, model: nn.Module, parameters: list[nn.Parameter], make: MakeOptimizer, config: Any
    ) -> Optimizer:
        """Optimizer methods: what the loop gets in the place of `make(parameters)`.

        The loop around it stays as it is: `step`, `zero_grad`, `param_groups` (a scheduler
        changes `lr` there), `state_dict` and `load_state_dict` work as on any optimizer. The
        model has been through `apply`; both run on fake tensors as on real ones.
        """
        raise ConfigError(
            f"method {self.name!r} makes no optimizer",
            expected=f"an optimizer method; it applies to the {self.promises.applies_to}",
        )
