"""low_bit_states: AdamW's two moments in 8 bits (or 4) a value.

Idea: divide every block of a moment by its largest magnitude and keep, for each value, the index
of a map that is fine near zero (Dettmers et al., arXiv 2110.02861); with 4 bits the second moment
gets a linear map without zero (Li et al., arXiv 2309.01507).
Equations: with Q as rounding, m = Q(b1 m + (1 - b1) g), v = Q(b2 v + (1 - b2) g^2); the update
is made from the moments before they are rounded, in float32.
Memory: 2.03 bytes a parameter for both moments (8 bits, blocks of 256), 1.06 (4 bits, blocks of
128), instead of 8. Tensors of fewer than 4,096 values stay float32. The step holds 2.4 MB at most.
Time: a table look-up and a comparison for each value of a moment, each way.
Exactness: network and gradient are the given ones. The moments are so in expectation, with 8 bits
and stochastic rounding; the update, which divides by a root, nearly so. 4 bits and rounding to the
nearest are biased, and no plan takes them by itself.
Limits: Adam and AdamW. A state kept in other bits cannot be loaded.
Source: arXiv 2110.02861, section 2; arXiv 2309.01507, section 3.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..errors import ConfigError
from ..optim import ChunkedAdamW
from .base import MakeOptimizer, Method, Promises


@dataclass(frozen=True, kw_only=True, slots=True)
class LowBitStatesConfig:
    """How the moments are kept."""

    bits: Literal[8, 4] = 8
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    seed: int = 0
    """Of the generator that rounds; it draws for nothing else."""

    def __post_init__(self) -> None:
        if self.bits not in (8, 4) or isinstance(self.bits, bool):
            raise ConfigError(f"low_bit_states: bits = {self.bits!r}", expected="8 or 4")
        if self.rounding not in ("stochastic", "nearest"):
            raise ConfigError(
                f"low_bit_states: rounding = {self.rounding!r}",
                expected="'stochastic' or 'nearest'",
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"low_bit_states: seed = {self.seed!r}", expected="a whole number")


class LowBitStates(Method):
    """Keep AdamW's moments in few bits."""

    name = "low_bit_states"
    promises = Promises(fidelity="unbiased", applies_to="optimizer", saved_grows_with=frozenset())
    Config = LowBitStatesConfig

    def optimizer(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        make: MakeOptimizer,
        config: LowBitStatesConfig,
    ) -> ChunkedAdamW:
        """AdamW with the settings of the one that `make` makes. ConfigError for any other kind."""
        return ChunkedAdamW.like(
            make(parameters), bits=config.bits, rounding=config.rounding, seed=config.seed
        )
