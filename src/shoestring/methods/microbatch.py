"""microbatch: the batch is run in parts by rows, one after another, and the gradients add up.

Idea: what a step saves for backward grows with the rows in it; the gradient of a mean over all
rows is the weighted sum of the gradients of the parts.
Equations: grad L = sum over parts i of (n_i / n) grad L_i, n_i what the mean of part i is over.
Memory: activations and logits of rows / parts rows; gradients are there through the forward.
Time: none but what smaller matrix products lose.
Exactness: reassociated. With dropout other numbers are drawn: same distribution.
Limits: the loop has to hand over the whole step (`Plan.backward`). Not for models whose loss is no
mean over rows or targets: batch statistics (BatchNorm), auxiliary losses of routers.
Source: gradient accumulation, as in every framework; the weighting by targets is that of
objectives/next_token.py.
"""

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError, StackError
from .base import Method, Promises, Undo


@dataclass(frozen=True, kw_only=True, slots=True)
class MicrobatchConfig:
    """How the rows are cut."""

    parts: int = 2
    """Number of parts; the last ones have a row less where they do not divide evenly."""

    def __post_init__(self) -> None:
        if not isinstance(self.parts, int) or isinstance(self.parts, bool) or self.parts < 1:
            raise ConfigError(f"microbatch: parts = {self.parts!r}", expected="a positive number")


class Microbatch(Method):
    """Fewer rows at a time."""

    name = "microbatch"
    promises = Promises(fidelity="exact", grade="reassociated", bound_eps=32, applies_to="batch")
    Config = MicrobatchConfig
    variants = ({"parts": 2}, {"parts": 4}, {"parts": 8}, {"parts": 16}, {"parts": 32})

    def apply(self, model: nn.Module, config: MicrobatchConfig) -> Undo:
        """Nothing is changed in the model. StackError where parts are not the whole."""
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                raise StackError(
                    f"microbatch would change what {name} ({type(module).__name__}) computes: it "
                    "uses the statistics of the whole batch",
                    expected="a model that treats every row alone",
                )
        if getattr(getattr(model, "config", None), "output_router_logits", False):
            raise StackError(
                "microbatch would change the auxiliary loss of this model's routers, which is no "
                "mean over rows",
                expected="a model whose loss is a mean over rows or targets",
            )
        return lambda: None
