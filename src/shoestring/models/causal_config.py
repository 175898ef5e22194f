"""The shape of an autoregressive denoiser in blocks; see `models/causal.py`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .dit_config import DiTConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalConfig(DiTConfig):
    """Shape of a `Causal`, of texts of `length` tokens. ConfigError for images, for several blocks
    that are recurrent, and for ends that leave no core."""

    beside: bool = True
    """Noised rows begin with the clean row beside them added, and need not find it first."""
    prelude: int = 0
    """Recurrent: of the layers, those that read a text once. 0 = a block that is not recurrent."""
    coda: int = 0
    """Recurrent: of the layers, the last ones. Those between are the core."""

    def __post_init__(self) -> None:
        # dataclasses with slots have no class cell for super()
        DiTConfig.__post_init__(self)
        self._require(
            bool(self.vocabulary) and not self.classes and not self.answers,
            "an autoregressive model of images or classes", "a vocabulary and a length",
        )  # fmt: skip
        ends = self.prelude + self.coda
        self._require(
            min(self.prelude, self.coda) >= 0 and ends < self.layers and not (
                self.coda and not self.prelude),
            f"{self.prelude} layers before and {self.coda} after the core, of {self.layers}",
            "both 0, or 1 or more before it and fewer than all together",
        )  # fmt: skip
        self._require(
            not self.prelude or self.blocks == 1,
            f"a recurrent model in {self.blocks} blocks",
            "1: it is one denoiser, whose layers are run again",
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CausalConfig":
        """The config that `to_json` gave. ConfigError for anything else."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"a model that cannot be read ({error})") from None
