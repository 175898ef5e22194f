"""What a schedule costs on a chain of blocks: the model that the solver searches over.

A chain is a list of blocks, each with the bytes and seconds of its ways to run, and the turn
(head and loss) at its end. A schedule is a list of pieces: `Kept` keeps the graph of one block
from forward to backward; `Redone` holds only its first block's input and rebuilds the others on
the way back, as `rebuild` says (the settings of a method that rebuilds from inputs, one to one).

`evaluate` walks a schedule event by event, in the order the executors run it, and returns its
peak and seconds. Bytes count what lives beyond weights, optimizer states and gradients that
exist before the step. Gradients that appear during backward are counted where they appear: that
is why the same option is worth more in a lower block than in the last.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

Walk = tuple[int, int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to keep (part of) a block's graph from forward to backward. Bytes; seconds."""

    name: str
    saved: int
    """Held from forward to backward, the block's input included where the graph keeps it."""
    forward_peak: int
    """Highest point of the block's forward: its input, output and what it saves included."""
    backward_peak: int
    """Highest point of its backward: `saved`, the incoming gradient and the gradients of its
    own parameters included."""
    seconds: float
    """Forward and backward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCost:
    """What one block costs at its place in the chain. Bytes; seconds."""

    held: int
    """To hold its input."""
    output: int
    """Its output, and so the gradient that comes back to it."""
    walk_peak: int
    """A forward that keeps nothing: input and output included."""
    walk_seconds: float
    again_peak: int
    """Running it again with gradients from its input, then backward: the input, the incoming
    gradient and the gradients of its own parameters included."""
    again_seconds: float
    gradients: int = 0
    """Parameter gradients that appear with its backward (0 where they existed before)."""
    options: tuple[Option, ...] = ()
    redone: bool = True
    """Whether the block may be run again from its input at all."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Blocks in order, and the turn from forward to backward."""

    blocks: tuple[BlockCost, ...]
    turn_peak: int
    """Head and loss, forward and backward: the last block's output included."""
    turn_gradients: int = 0
    """Gradients that exist when the last block's backward begins (those of the head)."""

    @cached_property
    def gradients_above(self) -> tuple[int, ...]:
        """Gradients present when block i's own backward begins."""
        above = [self.turn_gradients]
        for block in reversed(self.blocks[1:]):
            above.append(above[-1] + block.gradients)
        return tuple(reversed(above))


@dataclass(frozen=True, slots=True)
class Kept:
    """Block `index` keeps its graph, by its option number `option`."""

    index: int
    option: int


@dataclass(frozen=True, slots=True)
class Redone:
    """Blocks start..stop-1 keep only the input of the first. `rebuild`: (i, k, held), as in the
    settings of recompute, with indices of the whole chain."""

    start: int
    stop: int
    rebuild: tuple[Walk, ...] = ()


Piece = Kept | Redone
Schedule = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Peak bytes and seconds of a schedule, and the moment of the peak."""

    peak_bytes: int
    seconds: float
    instant: str


class _Account:
    """Running maximum with the name of the moment."""

    def __init__(self) -> None:
        self.peak, self.instant, self.seconds = 0, "start", 0.0

    def at(self, level: int, instant: str) -> None:
        if level > self.peak:
            self.peak, self.instant = level, instant


def evaluate(chain: Chain, schedule: Iterable[Piece]) -> Outcome:
    """Peak bytes and seconds of a schedule on a chain.

    The pieces must cover the blocks in order. Source of the accounting: arXiv 1911.13214
    (Rotor), with gradients that appear on the way added.
    """
    account, levels, used = _Account(), [], 0
    pieces = list(schedule)
    for piece in pieces:
        levels.append(used)
        used += _forward(chain, piece, used, account)
    account.at(used + chain.turn_peak, "loss")
    for piece, below in zip(reversed(pieces), reversed(levels), strict=True):
        if isinstance(piece, Kept):
            block = chain.blocks[piece.index]
            option = block.options[piece.option]
            above = chain.gradients_above[piece.index]
            account.at(below + option.backward_peak + above, f"backward of block {piece.index}")
            account.seconds += option.seconds
        else:
            _redo(chain, piece, below, account)
    return Outcome(account.peak, account.seconds, account.instant)


def _forward(chain: Chain, piece: Piece, used: int, account: _Account) -> int:
    """Bytes a piece leaves behind after its forward."""
    if isinstance(piece, Kept):
        option = chain.blocks[piece.index].options[piece.option]
        account.at(used + option.forward_peak, f"forward of block {piece.index}")
        return option.saved
    held = chain.blocks[piece.start].held
    for i in range(piece.start, piece.stop):
        block = chain.blocks[i]
        extra = held if i > piece.start else 0
        account.at(used + extra + block.walk_peak, f"forward of block {i}")
        account.seconds += block.walk_seconds
    return held


def _redo(chain: Chain, piece: Redone, below: int, account: _Account) -> None:
    """Backward through a piece that holds one input: walk up, run again, and so on down."""
    walks = {(i, k): held for i, k, held in piece.rebuild}
    blocks = chain.blocks
    held = [piece.start]  # ascending
    for k in range(piece.stop - 1, piece.start - 1, -1):
        block, above = blocks[k], chain.gradients_above[k]
        if held[-1] != k:
            base = held[-1]
            stops = set(walks.get((base, k), range(base + 1, k)))
            for i in range(base, k):
                level = below + sum(blocks[h].held for h in held) + block.output + above
                moving = blocks[i].walk_peak - (blocks[i].held if i == held[-1] else 0)
                account.at(level + moving, f"rebuilding the input of block {k}")
                account.seconds += blocks[i].walk_seconds
                if i + 1 in stops or i + 1 == k:
                    held.append(i + 1)
        held.pop()
        level = below + sum(blocks[h].held for h in held)
        account.at(level + block.again_peak + above, f"backward of block {k}")
        account.seconds += block.again_seconds


def nested(chain: Chain, segment: int) -> Schedule:
    """The classic scheme: hold every `segment`-th input, rebuild a segment's inputs at once
    (Chen et al., arXiv 1604.06174; sqrt(n) blocks a segment give O(sqrt n) memory)."""
    n = len(chain.blocks)
    return tuple(Redone(a, min(a + segment, n)) for a in range(0, n, segment))


def keep_all(chain: Chain, option: int = 0) -> Schedule:
    """Every block keeps its graph."""
    return tuple(Kept(i, option) for i in range(len(chain.blocks)))


def redone_blocks(schedule: Sequence[Piece]) -> list[int]:
    """The blocks that are run again."""
    return [i for p in schedule if isinstance(p, Redone) for i in range(p.start, p.stop)]
