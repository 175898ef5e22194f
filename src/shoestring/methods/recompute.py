"""recompute: keep the inputs of some blocks, run the blocks again in backward.

Idea: a block's inside is not kept but computed again when backward reaches it (Chen et al.,
arXiv 1604.06174). Here a block's *input* need not be kept either: it is rebuilt from a lower
held one by running the blocks between without gradients, as a schedule says (Griewank and
Walther's Revolve, and the nested sqrt(n) scheme, are such schedules).
Equations: none change.
Memory: one input (batch x tokens x width) per held block, plus the inside of one block. With
every block held: n inputs. With every s-th held: n/s, and s more while a segment is rebuilt.
Time: one more forward of the block, less its last matmul; one more without gradients for every
block whose input is rebuilt (twice for deeper schedules).
Exactness: bitwise; dropout draws the same numbers, norm statistics move once.
Limits: to rebuild an input, the blocks must hand the hidden state on unchanged (checked). Hooks
on modules *inside* a block fire again on every run; hooks on the block itself fire once.
Source: arXiv 1604.06174; Griewank and Walther, ACM algorithm 799; arXiv 1911.13214.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..errors import ConfigError, StackError
from ..stack import BlockCall, Executor, Stack, hidden_of
from ..tape import Evaluation, replayed
from .base import Method, Promises


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputeConfig:
    """Which inputs are held, and what else."""

    hold: tuple[int, ...] | None = None
    """Blocks (0 = first of the span) whose input is held from forward on; None = all. The
    first is always held."""
    rebuild: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    """(i, k, held): on the walk from held block i up to block k, the inputs of these blocks
    between are held as well. Walks not listed hold all inputs they pass."""
    save: Literal["nothing", "attention", "matmuls"] = "nothing"
    """What of a block's inside is kept all the same: the attention outputs, or the outputs of
    all matrix products and attentions (selective by op)."""

    def __post_init__(self) -> None:
        if self.save not in ("nothing", "attention", "matmuls"):
            raise ConfigError(
                f"recompute: save = {self.save!r}",
                expected="'nothing', 'attention' or 'matmuls'",
            )
        # JSON gives lists; keep the value hashable and comparable.
        if self.hold is not None:
            object.__setattr__(self, "hold", tuple(self.hold))
        walks = tuple((i, k, tuple(held)) for i, k, held in self.rebuild)
        object.__setattr__(self, "rebuild", walks)


class _Piece:
    """One block of one forward: how to run it again, and its input or the way to it.

    Lives as long as autograd needs the block, or a block above whose input is rebuilt from it.
    """

    __slots__ = ("below", "evaluation", "held", "index", "rebuilt", "version")

    def __init__(self, index: int, evaluation: Evaluation, below: "_Piece | None") -> None:
        self.index = index
        self.evaluation = evaluation
        self.below = below  # None where the input is held
        self.held: Tensor | None = None
        self.rebuilt: Tensor | None = None
        self.version = 0  # of the output, to see an in-place change of it

    def input(self, walks: dict[tuple[int, int], tuple[int, ...]]) -> Tensor:
        if self.held is not None:
            return self.held
        if self.rebuilt is None:
            self._rebuild(walks)
        value, self.rebuilt = self.rebuilt, None
        assert value is not None
        return value

    def _rebuild(self, walks: dict[tuple[int, int], tuple[int, ...]]) -> None:
        path = [self]
        while path[-1].held is None and (path[-1] is self or path[-1].rebuilt is None):
            below = path[-1].below
            assert below is not None
            path.append(below)
        base, *steps = reversed(path)
        hidden = base.held if base.held is not None else base.rebuilt
        assert hidden is not None
        keep = walks.get((base.index, self.index))
        with torch.no_grad():
            previous = base
            for piece in steps:
                hidden = hidden_of(previous.evaluation.again(hidden))
                if piece is self or keep is None or piece.index in keep:
                    piece.rebuilt = hidden
                previous = piece


class RecomputeExecutor(Executor):
    """Runs blocks as replayed regions whose inputs are held or rebuilt."""

    def __init__(self, config: RecomputeConfig) -> None:
        self.config = config
        self._walks = {(i, k): held for i, k, held in config.rebuild}
        # Dynamo sees neither what a hidden state carries to the next block nor a policy by op.
        self.compiles = config.hold is None and config.save == "nothing"

    def __deepcopy__(self, memo: dict[int, Any]) -> "RecomputeExecutor":
        return type(self)(self.config)

    def __reduce__(self) -> Any:
        return type(self), (self.config,)

    def _holds(self, position: int) -> bool:
        hold = self.config.hold
        return position == 0 or hold is None or position in hold

    def run(self, position: int, block: nn.Module, call: BlockCall) -> Any:
        hidden = call.hidden
        assert hidden is not None
        call.hidden = None
        below = None if self._holds(position) else self._piece_below(position, hidden)
        piece = _Piece(position, Evaluation(call, block), below)
        if below is None:
            piece.held = hidden.detach()
        output = replayed(
            piece.evaluation, hidden, lambda: piece.input(self._walks), contexts=self._contexts()
        )
        if not self._holds(position + 1):
            # The next block may need this piece to rebuild its input; a frozen block leaves
            # nothing in the graph that keeps it alive, so the output carries it there.
            handed_on = hidden_of(output)
            piece.version = handed_on._version
            handed_on._shoestring_piece = piece  # type: ignore[attr-defined]
        return output

    def _piece_below(self, position: int, hidden: Tensor) -> _Piece:
        piece = getattr(hidden, "_shoestring_piece", None)
        if piece is None or piece.index != position - 1 or piece.version != hidden._version:
            raise StackError(
                f"between blocks {position - 1} and {position} of this span the model changes "
                "the hidden state, so the input of a block cannot be rebuilt from a lower one",
                expected="every block called once, on what the block before it returned",
                hint="Use recompute with hold=None (every input held).",
            )
        del hidden._shoestring_piece  # type: ignore[attr-defined]
        return piece

    def _contexts(self) -> Any:
        if self.config.save == "nothing":
            return None
        keep = _ATTENTION if self.config.save == "attention" else _ATTENTION | _MATMULS

        def policy(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
            # A matmul with a transposed weight is reached through its view-free overload.
            saved = getattr(op, "overloadpacket", op) in keep
            return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

        return lambda: create_selective_checkpoint_contexts(policy)


def _packets(*names: str) -> frozenset[Any]:
    return frozenset(getattr(torch.ops.aten, n) for n in names if hasattr(torch.ops.aten, n))


_ATTENTION = _packets(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
_MATMULS = _packets("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution")


class Recompute(Method):
    """Hold inputs, run blocks again."""

    name = "recompute"
    promises = Promises(fidelity="exact", grade="bitwise", applies_to="span", rebuilds="input")
    Config = RecomputeConfig
    variants = ({"save": "attention"}, {"save": "matmuls"})

    def executor(self, stack: Stack, start: int, stop: int, config: Any) -> Executor:
        for index in config.hold or ():
            if not 0 <= index < stop - start:
                raise ConfigError(
                    f"recompute: hold names block {index} of a span of {stop - start}",
                    expected=f"indices from 0 to {stop - start - 1}",
                )
        return RecomputeExecutor(config)
