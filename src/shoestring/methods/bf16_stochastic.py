"""bf16_stochastic: bfloat16 weights without a float32 copy, rounded by chance.

Idea: a bfloat16 weight cannot take an update smaller than 2^-9 of it: rounded to the nearest, it
stays where it is, for ever. Rounded up or down at random, in proportion, it moves as it should on
average (Gupta et al., arXiv 1502.02551; Zamirai et al., arXiv 2010.06192).
Equations: w = SR(AdamW(w, g)), computed in float32; SR adds a uniform 16-bit integer to the bits
of the float32 value and clears the low 16.
Memory: 2 bytes a parameter for the weight and 2 for its gradient, instead of 4 and 4 (or of 2, 4
and 2 to 4 with a float32 copy). Moments are float32 (8 bytes) unless another method keeps them in
fewer bits. The step holds 2.4 MB at most, whatever the size of a parameter.
Time: one random number a weight and step; bfloat16 arithmetic in the network, which is slower than
float32 on CPUs without instructions for it.
Exactness: given the moments, a weight's update is its float32 update in expectation. The network
is computed in bfloat16: another precision, not another function.
Limits: Adam and AdamW. Undoing gives float32 weights with what bfloat16 held.
Source: arXiv 1502.02551, section 3; arXiv 2010.06192, section 4.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ConfigError, StackError
from ..optim import ChunkedAdamW
from ..stack import Stack
from .base import MakeOptimizer, Method, Promises, Undo


@dataclass(frozen=True, kw_only=True, slots=True)
class Bf16StochasticConfig:
    """How weights are rounded."""

    seed: int = 0
    """Of the generator that rounds; it draws for nothing else."""

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"bf16_stochastic: seed = {self.seed!r}", expected="a whole number")


class Bf16Stochastic(Method):
    """bfloat16 weights that are rounded by chance."""

    name = "bf16_stochastic"
    promises = Promises(
        fidelity="unbiased",
        applies_to="optimizer",
        saved_grows_with=frozenset({"depth", "batch", "length"}),
        changes_weights=True,
    )
    Config = Bf16StochasticConfig

    def apply(self, model: nn.Module, config: Bf16StochasticConfig) -> Undo:
        """Cast every float32 parameter to bfloat16, in place: parameters, their names and ties
        stay, buffers stay float32. Undo casts them back.

        StackError for a model that trains neither float32 nor bfloat16 weights, and for one with
        gradients.
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        if not any(p.dtype in (torch.float32, torch.bfloat16) for p in trained):
            raise StackError(
                f"{type(model).__name__} has no weights to train in float32 or bfloat16",
                expected="weights that can be held in bfloat16",
            )
        cast = [p for p in model.parameters() if p.dtype == torch.float32]
        if any(p.grad is not None for p in cast):
            raise StackError(
                f"{type(model).__name__} has gradients in float32",
                expected="a model between two steps, after zero_grad()",
            )
        _refuse_streams(model)
        for parameter in cast:
            parameter.data = parameter.data.to(torch.bfloat16)

        def undo() -> None:
            for parameter in cast:
                parameter.data = parameter.data.to(torch.float32)
                parameter.grad = None

        return undo

    def optimizer(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        make: MakeOptimizer,
        config: Bf16StochasticConfig,
    ) -> ChunkedAdamW:
        """AdamW with the settings of the one that `make` makes. ConfigError for any other kind."""
        return ChunkedAdamW.like(make(parameters), stochastic_weights=True, seed=config.seed)


def _refuse_streams(model: nn.Module) -> None:
    """What its branches are given has the dtype that it was made reversible in."""
    try:
        executors = Stack.of(model).executors
    except StackError:
        return  # nothing there to be run by reversal
    if any(e is not None and e.always for e in executors):
        raise StackError(
            f"bf16_stochastic cannot cast {type(model).__name__}: it is reversible, and its "
            "streams give its branches float32",
            expected="a model that runs as its modules say",
            hint="Cast it to bfloat16 first, make it reversible then, and leave out apply.",
        )
