"""block_coordinate: one block has gradients and states at a time, the others stand still.

Idea: block coordinate descent with Adam inside (BAdam, arXiv 2404.02827): the blocks of the stack
(or runs of so many `layers` of them) are taken one after the other, each for K steps of the
optimizer. What is not trained in a turn
requires no gradient, so none is made for it, and backward ends at the block whose turn it is.
Equations: with pi the order of a round, for i in pi: m = v = 0, then K times
theta_i <- theta_i - update(grad of theta_i, m, v); all other theta stay.
Memory: weights, and gradients and states of one block instead of all D: 12 bytes a parameter of
that block for AdamW in float32. Blocks below it save nothing for backward; the turn of the lowest
needs most.
Time: a step needs no weight gradients but one block's, and on average half of the backward.
Exactness: structural: weights are trained in turns, which is another algorithm. Within a turn a
step is bit-equal to the optimizer's on that block alone.
Limits: a single process. No method around it that steps parameter by parameter, none inside that
keeps states elsewhere, no reversible stack, no weights shared between blocks.
Source: arXiv 2404.02827, Algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ConfigError, StackError, nearest_divisors
from ..optim.stepping import Around, refuse_coupled
from ..optim.turns import InTurns, Order, refuse_owned, release_all
from ..stack import Stack
from .base import MakeOptimizer, Method, Promises, Undo

ORDERS = ("random", "ascending", "descending")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCoordinateConfig:
    """How long a turn is and whose is next."""

    steps: int = 100
    """Of the optimizer in a turn: the paper's K."""
    order: Order = "random"
    """"random": a new permutation for each round; "ascending": from the stem up."""
    seed: int = 0
    """Of the random order; it draws for nothing else."""
    layers: int = 1
    """Neighbouring blocks of the stack that have their turn together; a divisor of their number."""
    ends: bool = False
    """Whether what is outside of the blocks (embeddings, head) takes a turn too, as one part."""

    def __post_init__(self) -> None:
        for name in ("steps", "layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"block_coordinate: {name} = {value!r}", expected="a whole number, 1 or more"
                )
        if self.order not in ORDERS:
            raise ConfigError(
                f"block_coordinate: order = {self.order!r}", expected=f"one of {list(ORDERS)}"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"block_coordinate: seed = {self.seed!r}", expected="a whole number")
        if not isinstance(self.ends, bool):
            raise ConfigError(f"block_coordinate: ends = {self.ends!r}", expected="true or false")


class BlockCoordinate(Method):
    """Train the blocks of the stack in turns."""

    name = "block_coordinate"
    promises = Promises(
        fidelity="structural",
        applies_to="optimizer",
        saved_grows_with=frozenset(),
        takes_turns=True,
    )
    Config = BlockCoordinateConfig

    def apply(self, model: nn.Module, config: BlockCoordinateConfig) -> Undo:
        """Changes nothing yet: `optimizer` does. Undo releases that optimizer, which gives
        `requires_grad` back as it was."""
        return lambda: release_all(list(model.parameters()))

    def optimizer(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        make: MakeOptimizer,
        config: BlockCoordinateConfig,
    ) -> InTurns:
        """The optimizer that `make` makes, for one block after the other; the first turn begins.

        StackError for a model without a stack, a reversible one, one with weights shared between
        blocks, and while another optimizer trains it in turns. ConfigError for an optimizer that
        couples parameters or is around another one, and in a group of processes.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                raise ConfigError(
                    "block_coordinate in a group of processes: which weights have gradients "
                    "changes from turn to turn, which what averages them does not follow",
                    expected="a single process",
                )
        refuse_owned(parameters)
        parts = _parts(model, parameters, config)
        made = make(parameters)
        if isinstance(made, Around):
            raise ConfigError(
                f"block_coordinate cannot throw away the states of {type(made).__name__}",
                expected="an optimizer that keeps its states itself",
                hint="Leave out block_coordinate, or what is around the optimizer.",
            )
        refuse_coupled("block_coordinate", make, made, parameters)
        return InTurns(made, parts, steps=config.steps, order=config.order, seed=config.seed)


def _parts(
    model: nn.Module, parameters: Sequence[nn.Parameter], config: BlockCoordinateConfig
) -> list[list[nn.Parameter]]:
    """The trained parameters of each block, lowest first; then those outside of the blocks, if
    they take part."""
    stack = Stack.of(model)
    if any(e is not None and e.always for e in stack.executors):
        raise StackError(
            f"block_coordinate cannot train {stack!r} in turns: it is reversible, and its streams "
            "are rebuilt through all blocks",
            expected="a stack whose blocks run as they are",
        )
    wanted = {id(p) for p in parameters if p.requires_grad}
    inside = {id(p) for p in model.parameters()}
    if strangers := [p for p in parameters if id(p) not in inside]:
        raise ConfigError(
            f"block_coordinate: {len(strangers)} of {len(parameters)} parameters are not of this "
            f"{type(model).__name__}",
            expected="parameters of the model that is trained",
        )
    if len(stack) % config.layers:
        raise ConfigError(
            f"block_coordinate: layers = {config.layers} does not divide the {len(stack)} of "
            f"{stack!r}",
            expected="a divisor",
            hint=f"The nearest: {nearest_divisors(len(stack), config.layers)}.",
        )
    parts = [
        [p for block in stack.blocks[i : i + config.layers] for p in block.parameters()]
        for i in range(0, len(stack), config.layers)
    ]
    parts = [[p for p in part if id(p) in wanted] for part in parts]
    places = [id(p) for part in parts for p in part]
    rest = [p for p in model.parameters() if id(p) in wanted and id(p) not in {*places}]
    _refuse_shared(model, stack, places)
    if config.ends:
        parts.append(rest)
    parts = [part for part in parts if part]
    if not parts:
        raise StackError(
            f"the blocks of {stack!r} have no weights to train",
            expected="blocks with weights that require gradients",
        )
    return parts


def _refuse_shared(model: nn.Module, stack: Stack, places: Sequence[int]) -> None:
    """StackError for a weight that has its place in two blocks, or in one and outside."""
    blocks = {module for block in stack.blocks for module in block.modules()}
    outside = {
        id(p)
        for module in model.modules()
        if module not in blocks
        for p in module.parameters(recurse=False)
    }
    if len({*places}) < len(places) or outside & {*places}:
        raise StackError(
            f"blocks of {stack!r} share weights with one another or with what is outside of them",
            expected="weights of each block's own: whose turn would it be?",
        )
