"""quantized_base: frozen weights of the blocks at 8 or 4 bits.

Idea: a weight that is not trained is only read, so it can be kept in few bits and decoded for the
time of each product (QLoRA, arXiv 2305.14314). What is trained beside it (adapters, biases, norms)
keeps its dtype.
Equations: y = D(c) x + b with codes c fixed; dx = D(c)^T dy. The codes have no gradient.
Memory: a weight of n values takes n bytes and 4 a row ("int8"), or 0.5625 n ("nf4"), instead of 4 n
or 2 n; one decoded weight more while its product runs, forward and backward.
Time: the weight is decoded for every product: about its bytes written and read once more.
Exactness: structural: another function from the start, by the error of the codes.
Limits: `torch.nn.Linear` inside blocks, frozen, 4096 bytes or larger, used once. Undone, the
weights are what was decoded. The file of a model in codes is no file of the model.
Source: arXiv 2305.14314; NF4 is bitsandbytes' (`torch.ops.bitsandbytes.quantize_4bit`).
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..errors import ConfigError, StackError
from ..ops.weight_codes import BASES, check_library, is_coded, keep_in_codes
from ..stack import Stack
from .base import Method, Promises, Undo

SMALLEST_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedBaseConfig:
    """How frozen weights are kept."""

    base: Literal["int8", "nf4"] = "nf4"

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise ConfigError(
                f"quantized_base: base = {self.base!r}", expected=f"one of {list(BASES)}"
            )


class QuantizedBase(Method):
    """Frozen weights in codes."""

    name = "quantized_base"
    promises = Promises(
        fidelity="structural",
        applies_to="weights",
        saved_grows_with=frozenset(),
        changes_weights=True,
        for_frozen=True,
    )
    Config = QuantizedBaseConfig
    variants = ({"base": "int8"}, {"base": "nf4"})

    def apply(self, model: nn.Module, config: QuantizedBaseConfig) -> Undo:
        """Keep the frozen linear weights of the blocks in codes, in place; the result decodes them.

        ConfigError without bitsandbytes, for "nf4". StackError where nothing is frozen, or all of
        it is in codes already.
        """
        stack = Stack.of(model)
        if config.base == "nf4":
            check_library()
        uses: dict[int, int] = {}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        linear: list[Any] = list(
            dict.fromkeys(m for block in stack.blocks for m in block.modules() if _is_linear(m))
        )
        if any(map(is_coded, linear)):
            raise StackError(
                "weights of this model are in codes already",
                hint="quantized_base can be applied once, and not beside lora with a base in "
                "codes.",
            )
        taken = [
            m for m in linear
            if not m.weight.requires_grad and m.weight.nbytes >= SMALLEST_BYTES
            and uses[id(m.weight)] == 1 and m.weight.is_floating_point()
            and "forward" not in m.__dict__
        ]  # fmt: skip
        if not taken:
            trained = sum(m.weight.requires_grad for m in linear)
            raise StackError(
                f"quantized_base finds no frozen weights in {stack!r}: {trained} of its "
                f"{len(linear)} linear layers are trained",
                expected=f"frozen weights of linear layers, {SMALLEST_BYTES} bytes or larger",
                hint="Weights in codes cannot be trained; train adapters beside them: "
                'allow=["lora", "quantized_base"], or freeze them with requires_grad_(False).',
            )
        return keep_in_codes(taken, config.base)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear
