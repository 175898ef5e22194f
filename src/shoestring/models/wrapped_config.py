"""Which transformer of diffusers is wrapped, how it is cut and how it is called.

Read without torch's weights and without diffusers; see `models/wrapped.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """How an architecture is called, and where its layers are.

    lists: its lists of layers, in the order in which they run; everything else is a block's end.
    labels: the argument that takes classes; `null` names the setting whose value means no class.
    given: arguments that take embeddings, such as those of a text: rows that are handed over.
    fixed: arguments that are the same in every call.
    top: the timestep at the highest noise; the lowest has timestep 0.
    packed: images go in as tokens of 2 x 2 pixels, with their places (Flux).
    """

    lists: tuple[str, ...]
    labels: str = ""
    null: str = ""
    given: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    top: float = 1000.0
    packed: bool = False


_TEXTS = ("encoder_hidden_states", "pooled_projections")
ARCHITECTURES: dict[str, Call] = {
    "DiTTransformer2DModel": Call(
        lists=("transformer_blocks",), labels="class_labels", null="num_embeds_ada_norm"
    ),
    "SD3Transformer2DModel": Call(lists=("transformer_blocks",), given=_TEXTS),
    "FluxTransformer2DModel": Call(
        lists=("transformer_blocks", "single_transformer_blocks"), given=_TEXTS, top=1.0,
        packed=True,
    ),
    "AuraFlowTransformer2DModel": Call(
        lists=("joint_transformer_blocks", "single_transformer_blocks"), given=_TEXTS[:1], top=1.0
    ),
    "SanaTransformer2DModel": Call(lists=("transformer_blocks",), given=_TEXTS[:1]),
}  # fmt: skip
BY_NUMBER = {"ChromaTransformer2DModel", "HiDreamImageTransformer2DModel"}
"""Refused: their forward picks what a layer is given by the layer's number in the list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrappedConfig:
    """A transformer of diffusers in blocks. ConfigError for blocks that do not divide its layers.

    architecture, settings: the class and its own config.  layers: of each list.  low, high: the
    noise, as the objective tells it, that is timestep 0 and `call.top`.  rows: shape of a row of
    each of `call.given`; there are `classes` and one more, which is no class.
    """

    architecture: str
    settings: Mapping[str, Any]
    call: Call
    layers: tuple[int, ...]
    blocks: int
    low: float
    high: float
    size: int
    height: int | None = None
    channels: int = 1
    classes: int = 0
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = sum(self.layers)
        if self.blocks < 1 or count < 1 or count % self.blocks:
            known = [n for n in range(1, count + 1) if count % n == 0]
            below = [n for n in known if n < self.blocks][-1:]
            near = [*below, *[n for n in known if n > self.blocks][:1]]
            raise ConfigError(
                f"the {count} layers of {self.architecture} in {self.blocks} blocks",
                expected="a number of blocks that divides the layers",
                hint=f"The nearest: {' or '.join(map(str, near))}." if near else None,
            )
        if set(self.rows) != set(self.call.given):
            raise ConfigError(
                f"{self.architecture} is given {sorted(self.rows) or 'no embeddings'}",
                expected=f"{', '.join(self.call.given) or 'none'}",
            )

    @property
    def tall(self) -> int:
        """Pixels of an image's height."""
        return self.size if self.height is None else self.height

    @property
    def answers(self) -> int:
        """Classes that are denoised: none, it draws images."""
        return 0

    @property
    def row(self) -> int:
        """Numbers of a row of the table: all that is given for one class; 0 = there is none."""
        total = 0
        for shape in self.rows.values():
            width = 1
            for length in shape:
                width *= length
            total += width
        return total

    def owned(self, block: int) -> list[tuple[str, list[int]]]:
        """The layers of block b of 1..B by list, under their numbers there; a list may have none.

        ConfigError for a block that there is not.
        """
        if isinstance(block, bool) or block not in range(1, self.blocks + 1):
            raise ConfigError(f"block {block}", expected=f"1 to {self.blocks}")
        share = sum(self.layers) // self.blocks
        first, found = (block - 1) * share, []
        for name, count in zip(self.call.lists, self.layers, strict=True):
            start, stop = max(first, 0), min(first + share, count)
            found.append((name, list(range(start, stop))))
            first -= count
        return found

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "WrappedConfig":
        """The config that `to_json` gave. ConfigError for anything else."""
        try:
            values = dict(data)
            call = dict(values.pop("call"))
            call["lists"], call["given"] = tuple(call["lists"]), tuple(call["given"])
            values["layers"] = tuple(values["layers"])
            values["rows"] = {k: tuple(v) for k, v in values["rows"].items()}
            return cls(call=Call(**call), **values)
        except (TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"a wrapped model that cannot be read ({error})") from None
