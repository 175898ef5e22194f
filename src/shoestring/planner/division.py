"""Weights divided over a group of processes: what the chain model makes of it.

Divided are weights, gradients and optimizer states. Not divided are activations, the batch, and
for the time that a unit runs its weights and gradients. Every block is a unit, gathered while it
runs forward and, with the one before it already under way, backward; what is left of the model
(stem and head) is a unit that is gathered as long as anything runs, and whose gradients are whole
until backward ends.

The promise of a plan is a simulation with the model really divided (`Division.divide`); the
numbers here only guide the search to the plans worth simulating, and are corrected by two of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from .chain import BlockCost, Chain


@dataclass(frozen=True, kw_only=True)
class Division:
    """size: processes.  divide: divides a model whose methods are in place, fake ones too."""

    size: int
    divide: Callable[[nn.Module], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """Bytes of weights, and of those that are trained, by unit; the last is what is no block."""

    weights: tuple[int, ...]
    trained: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, blocks: Sequence[nn.Module]) -> "Units":
        """Each weight once, with the first unit that has it."""
        seen: set[int] = set()
        weights, trained = [], []
        for unit in (*blocks, model):
            own: list[Tensor] = [p for p in unit.parameters() if id(p) not in seen]
            seen |= {id(p) for p in own}
            weights.append(sum(p.nbytes for p in own))
            trained.append(sum(p.nbytes for p in own if p.requires_grad))
        return cls(weights=tuple(weights), trained=tuple(trained))


def divided_chain(
    chain: Chain, resident: int, end: int, units: Units, *, size: int, accumulates: bool
) -> tuple[Chain, int, int]:
    """(chain, resident bytes, peak at the end of backward) of a process of `size`.

    accumulates: gradients are there before backward, and counted in `resident` and `end`.
    """
    there = sum(units.weights) + (sum(units.trained) if accumulates else 0)
    less = there - _share(there, size)
    rest = units.weights[-1]
    blocks = tuple(
        _divided_block(block, weights, trained, size=size, accumulates=accumulates)
        for block, weights, trained in zip(
            chain.blocks, units.weights, units.trained, strict=False
        )
    )  # fmt: skip
    arrived = sum(b.gradients for b in chain.blocks) - sum(b.gradients for b in blocks)
    # Summed in a buffer of their own, beside the gradients.
    summed = 2 * units.trained[-1] if accumulates else units.trained[-1]
    gradients = units.trained[-1] if accumulates else chain.turn_gradients
    return (
        replace(chain, blocks=blocks, turn_gradients=gradients),
        resident - less + rest,
        end - less - arrived + rest + summed,
    )


def _divided_block(
    block: BlockCost, weights: int, trained: int, *, size: int, accumulates: bool
) -> BlockCost:
    forward = 2 * weights  # what was gathered, and the weights made of it
    backward = 3 * weights + (trained if accumulates else 0)  # and those of the one before it
    options = tuple(
        replace(
            o,
            forward_peak=o.forward_peak + forward,
            backward_peak=o.backward_peak + backward,
        )
        for o in block.options
    )
    return replace(
        block,
        options=options,
        walk_peak=block.walk_peak + forward,
        again_peak=block.again_peak + backward,
        gradients=_share(block.gradients, size),
    )


def _share(count: int, size: int) -> int:
    return -(-count // size)
