"""Bytes of every block, option and of the turn, from a fake twin of the model.

One fake forward captures with what each block is called. Each *distinct* block (class, shapes,
settings, arguments) is then run alone, forward and backward, by the executor of every method
that is on offer, under the Tracker that also counts real steps. Nothing is allocated.

What the chain model needs beyond the blocks (head and loss, gradients of the head, what the
stem leaves alive) comes from one more pass of the twin with its blocks taken out.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from ..effort import unseen_so_far
from ..errors import StackError
from ..meter import Tracker
from ..methods import MakeOptimizer
from ..optim import InTurns
from ..rows import cut, rows_of
from ..stack import BlockCall, Executor, Runner, Stack, hidden_of, with_hidden
from .chain import BlockCost, Chain, Option
from .division import Division, Units, divided_chain
from .ends import sink
from .evaluation import Evaluate, batch_bytes, evaluation_profile
from .fake import (
    Profile,
    _autocast,
    each_turn,
    fake_batch,
    fake_model,
    fused_adamw,
    hold,
    simulate,
)
from .given import Batch, Loss, explained, loss_of
from .made_for import Watched
from .quick import QuickFakeMode, optimizers_may_read
from .ways import Offer, Way, apply_ways, frees_gradients, optimizer_for, stack_of, takes_turns


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training step as the user makes it: what is planned for and simulated."""

    model: Any
    """A module, a Hugging Face config or its path, or a callable that builds a module."""
    batch: Batch
    optimizer: MakeOptimizer | None = None
    loss: Loss | None = None
    autocast: torch.dtype | None = None
    accumulate: int = 1
    grad_clip: float | None = None
    division: Division | None = None
    """Over how many processes its weights are divided, and how."""
    evaluate: Evaluate | None = None
    """What runs without gradients between steps, if anything does."""
    beside: int = 0
    """Bytes that lie in memory all the time, such as a copy that is being saved."""

    @property
    def make(self) -> MakeOptimizer:
        """Parameters -> the optimizer of the loop."""
        return self.optimizer or fused_adamw

    def cut(self, ways: Iterable[Way]) -> "Step":
        """The step with its batch in parts, as a batch method among `ways` has it."""
        for way in ways:
            if way.applies_to == "batch":
                parts = min(way.config["parts"], rows_of(self.batch))
                first, passes = cut(self.batch, parts)[0], self.accumulate * parts
                return replace(self, batch=first, accumulate=passes, loss=self._loss_in_parts())
        return self

    def _loss_in_parts(self) -> Loss:
        """The loss with what `Plan.backward` does to it, to the last byte: the sum so far is kept
        while the next part runs, and what the loop divides by is not what the part is weighted
        by."""
        sums: list[Tensor] = []

        def weighted(model: nn.Module, batch: Batch) -> Tensor:
            value = loss_of(model, batch, self.loss)
            sums[:] = [value.detach()]
            return value * 1.0 if self.accumulate > 1 else value

        return weighted

    @property
    def keeps_gradients(self) -> bool:
        """Whether the loop does something with all gradients after backward."""
        return self.accumulate > 1 or self.grad_clip is not None

    def simulate(
        self, put: Callable[[nn.Module], object] | None = None, ways: Sequence[Way] = ()
    ) -> Profile:
        """The first step and all later ones, on a fake twin with methods put in place by `put`,
        and an optimizer made as those among `ways` say."""
        apply, make = self._placed(put, ways)
        return simulate(
            self.model, self.batch, apply=apply, optimizer=make, loss=self.loss,
            autocast=self.autocast, accumulate=self.accumulate, grad_clip=self.grad_clip,
            steps=1, later=True, beside=self.waiting,
        )  # fmt: skip

    @property
    def waiting(self) -> int:
        """Bytes beside a training step: a loop over held-out batches leaves its last one alive."""
        scored = self.evaluate if isinstance(self.evaluate, Mapping) else {}
        return self.beside + batch_bytes(scored)

    def evaluation(
        self, put: Callable[[nn.Module], object] | None = None, ways: Sequence[Way] = ()
    ) -> Profile | None:
        """The evaluation, with what `simulate` puts in place; None where there is none. The batch
        of the last step lies beside it."""
        if self.evaluate is None:
            return None
        loss = self.loss.loss if isinstance(self.loss, Watched) else self.loss
        apply, make = self._placed(put, ways)
        return evaluation_profile(
            self.model, self.evaluate, apply=apply, optimizer=make, loss=loss,
            autocast=self.autocast, beside=self.beside + batch_bytes(self.batch),
        )  # fmt: skip

    def _placed(
        self, put: Callable[[nn.Module], object] | None, ways: Sequence[Way]
    ) -> tuple[Callable[[nn.Module], None], MakeOptimizer]:
        """What puts methods into a twin, and what makes its optimizer then."""
        twins: list[nn.Module] = []

        def apply(model: nn.Module) -> None:
            twins.append(model)
            if put is not None:
                put(model)
            if self.division is not None:
                self.division.divide(model)

        def make(parameters: list[nn.Parameter]) -> Optimizer:
            return optimizer_for(twins[0], ways, self.make)(parameters)

        return apply, make

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss, as the step computes it."""
        with _autocast(model, self.autocast):
            return loss_of(model, batch, self.loss)


class _Source(torch.autograd.Function):
    """A new tensor that wants a gradient and has no past; its gradient is dropped."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, make: Callable[[], Tensor], arrived: Any) -> Tensor:
        ctx.arrived = arrived
        return make()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        if ctx.arrived is not None:
            ctx.arrived(gradients[0])
        return None, None, None


def source(like: Tensor, make: Callable[[], Tensor] | None = None, arrived: Any = None) -> Tensor:
    """A tensor as `like` (shape, strides, dtype, device) at the end of a cut graph."""
    anchor = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)
    out: Tensor = _Source.apply(anchor, make or (lambda: torch.empty_like(like)), arrived)
    return out


@dataclass
class Captured:
    """How one block was called: its arguments with a hole for the hidden state, and what it
    returned. Tensors stand for shapes only."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str
    hidden: Tensor
    output: Any

    def call(self, block: nn.Module, hidden: Tensor) -> BlockCall:
        return BlockCall(forward_of(block), self.args, self.kwargs, self.place, hidden)


def forward_of(block: nn.Module) -> Callable[..., Any]:
    """The block's forward below any runner, patches of its own included."""
    own = vars(block).get("forward")
    while isinstance(own, Runner):
        own = own.inner
    return own if own is not None else type(block).forward.__get__(block)


class _Capture(Executor):
    """Runs blocks as they are and notes how they were called."""

    def __init__(self) -> None:
        self.calls: dict[int, Captured] = {}

    def run(self, position: int, block: nn.Module, call: BlockCall) -> Any:
        hidden = call.hidden
        assert hidden is not None
        output = call(hidden)
        meta = tree_map_only(Tensor, _as_meta, output)
        # What other parts computed (an encoder's states) has its graph there, not here.
        args, kwargs = tree_map_only(Tensor, _without_past, (call.args, call.kwargs))
        self.calls[position] = Captured(args, kwargs, call.place, _as_meta(hidden), meta)
        return output


def _without_past(tensor: Tensor) -> Tensor:
    """As it is, or cut off from what computed it, where that has a gradient to come."""
    return tensor if tensor.grad_fn is None else tensor.detach().requires_grad_()


def _as_meta(tensor: Tensor) -> Tensor:
    """The same shape without a storage, so that noting it keeps nothing alive."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Cut(Executor):
    """Takes the blocks out: each hands on a fresh tensor, graph cut before and after."""

    def __init__(self, twin: "Twin", tracker: Tracker) -> None:
        self.twin, self.tracker = twin, tracker
        self.base = self.turn_peak = self.turn_gradients = 0
        self.stem: list[Tensor] = []

    def run(self, position: int, block: nn.Module, call: BlockCall) -> Any:
        captured = self.twin.calls[position]
        last = position == len(self.twin.stack) - 1
        if position == 0 and call.hidden is not None and call.hidden.requires_grad:
            self.stem.append(sink(call.hidden))
        call.hidden = None
        if last:
            self.base = self.tracker.live_bytes
            self.tracker.ledger.peak = self.base
        output = tree_map_only(Tensor, self.twin.empty, captured.output)
        like = hidden_of(captured.output)
        fresh = source(like, lambda: self.twin.empty(like), self._arrived if last else None)
        return with_hidden(output, fresh)

    def _arrived(self, gradient: Tensor) -> None:
        """The backward of head and loss is done."""
        ledger = self.tracker.ledger
        self.turn_peak = ledger.peak - self.base
        self.turn_gradients = max(0, ledger.live - self.base - gradient.untyped_storage().nbytes())
        ledger.peak = ledger.live  # what comes is the stem's


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One block run alone by one executor. Bytes above what was there before it."""

    forward_peak: int
    saved: int
    backward_peak: int
    gradients: int
    output: int
    forward_work: float
    backward_work: float


@dataclass(frozen=True, slots=True)
class Turn:
    """What a step holds beside its blocks. Bytes."""

    resident: int
    """Alive while the blocks run: weights, batch, what the stem leaves."""
    peak: int
    """Of head and loss, forward and backward, above that."""
    gradients: int
    """Of the head, there when the blocks' backward begins."""
    stem_peak: int
    """Of the stem's backward, weights and the head's gradients included, but none of the blocks."""


class _Work(TorchDispatchMode):
    """What to put in place of seconds when nothing is timed: one unit a multiply-add, and some
    for every byte written, or said to be worth one written. Only good for comparing ways to run
    one model."""

    PER_BYTE = 16

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __enter__(self) -> Self:
        self._unseen_before = unseen_so_far()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.total += self.PER_BYTE * (unseen_so_far() - self._unseen_before)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out) / 2
        if not func.is_view:
            self.total += self.PER_BYTE * sum(
                t.nbytes for t in tree_leaves(out) if isinstance(t, Tensor)
            )
        return out


@dataclass
class Twin:
    """A fake twin with its stack and how its blocks are called."""

    step: Step
    apply: Callable[[nn.Module], object] | None = None
    calls: dict[int, Captured] = field(default_factory=dict)
    patches: tuple[Way, ...] = ()
    """What is in place now, by `patched`."""

    def __post_init__(self) -> None:
        self._made: Any = None
        self.mode = QuickFakeMode()
        self.model = fake_model(self.step.model, self.mode)
        self.batch = fake_batch(self.step.batch, self.mode)
        with self.mode:
            if self.apply is not None:
                self.apply(self.model)
            self.model.train()
            self.stack = stack_of(self.model)
            self._capture()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _capture(self) -> None:
        note = _Capture()
        with self._running(note), torch.enable_grad(), explained(type(self.model).__name__):
            self.step.forward(self.model, self.batch)
        missing = set(range(len(self.stack))) - set(note.calls)
        if missing:
            raise StackError(
                f"blocks {sorted(missing)} of {self.stack!r} were not called in a forward",
                expected="a batch that runs every block",
            )
        self.calls = note.calls

    @contextlib.contextmanager
    def patched(self, patches: Iterable[Way]) -> Iterator[None]:
        """The twin with patches in place; the blocks are called as without them. Where weights
        are trained in turns it is that of the lowest block, which needs most."""
        patches = tuple(patches)
        with self.mode:
            undo = apply_ways(self.model, patches, ())
            if takes_turns(patches):
                self._made = optimizer_for(self.model, patches, self.step.make)(self._trained())
                while self._made.active:
                    self._made.end_turn()
        self.patches = patches
        try:
            yield
        finally:
            self.patches, self._made = (), None
            with self.mode:
                undo()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def _gradients(self, module: nn.Module) -> Iterator[None]:
        """Gradients of the module as the step treats them: there before, kept, or freed."""
        trained = [p for p in module.parameters() if p.requires_grad]
        hooks = []
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter) if self.step.accumulate > 1 else None
            if frees_gradients(self.patches):
                hooks.append(parameter.register_post_accumulate_grad_hook(_drop_gradient))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in trained:
                parameter.grad = None

    @contextlib.contextmanager
    def _running(self, executor: Executor) -> Iterator[None]:
        self.stack.apply([(0, len(self.stack), executor)])
        try:
            yield
        finally:
            self.stack.restore()

    def empty(self, like: Tensor) -> Tensor:
        """A new fake tensor shaped as a captured one."""
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self.device)

    def kinds(self) -> list[int]:
        """For every block the lowest index of a block that costs the same."""
        seen: dict[Any, int] = {}
        keys = [fingerprint(b, self.calls[i]) for i, b in enumerate(self.stack.blocks)]
        return [seen.setdefault(key, i) for i, key in enumerate(keys)]

    def measure(self, index: int, way: Way) -> Measured:
        """Block `index` alone, forward and backward, run as `way` says."""
        block, captured = self.stack.blocks[index], self.calls[index]
        executor = way.executor(Stack(self.model, self.stack.path, [block]), 0, 1)
        with self.mode, self._gradients(block), Tracker() as tracker:
            tracker.seed(block)
            tracker.assign("other", _shared_tensors(captured))
            tracker.assign("other", [torch.zeros((), device=self.device)])
            return self._measure(tracker, block, captured, executor)

    def _measure(
        self, tracker: Tracker, block: nn.Module, captured: Captured, executor: Executor
    ) -> Measured:
        ledger = tracker.ledger
        base = ledger.peak = ledger.live
        make, work = captured.call, _Work()

        def new() -> Tensor:
            return source(captured.hidden, lambda: self.empty(captured.hidden))

        with work, _autocast(self.model, self.step.autocast), torch.enable_grad():
            output = executor.run(0, block, make(block, new()))
        forward_peak, forward_work = ledger.peak - base, work.total
        size = hidden_of(output).untyped_storage().nbytes()
        end = sink(hidden_of(output))
        del output
        saved = ledger.live - base
        ledger.peak = ledger.live
        with work:
            end.backward()
        del end
        return Measured(
            forward_peak=forward_peak, saved=saved, backward_peak=ledger.peak - base,
            gradients=max(0, ledger.live - base), output=size,
            forward_work=forward_work, backward_work=work.total - forward_work,
        )  # fmt: skip

    def turn(self) -> "Turn":
        """Head and loss, and the stem's backward, with the blocks taken out."""
        with self.mode, self._gradients(self.model), Tracker() as tracker:
            tracker.seed(self.model)
            tracker.assign("other", tree_leaves(self.batch))
            waiting = hold(tracker, self.step.waiting, self.model)
            cut = _Cut(self, tracker)
            with self._running(cut):
                loss = self.step.forward(self.model, self.batch)
                # Together, as a weight that stem and head share waits for both its gradients.
                torch.autograd.backward([loss, *cut.stem])
                stem_peak = tracker.ledger.peak if cut.stem else 0
            del waiting
        return Turn(cut.base, cut.turn_peak, cut.turn_gradients, stem_peak)

    def optimizer(self, ways: Iterable[Way]) -> tuple[int, int]:
        """(bytes of the optimizer's states, peak while it steps: weights and batch included), as
        `ways` have it; of turns the most that any needs."""
        if self._made is not None:
            self._made.release()
        with self.mode, optimizers_may_read(self.mode), Tracker() as tracker:
            tracker.seed(self.model)
            tracker.assign("other", tree_leaves(self.batch))
            waiting = hold(tracker, self.step.waiting, self.model)
            ledger = tracker.ledger
            before = ledger.live
            chosen = optimizer_for(self.model, ways, self.step.make)(self._trained())
            ledger.peak = ledger.live
            states = 0
            for _ in each_turn(chosen) if isinstance(chosen, InTurns) else (0,):
                for _ in range(min(2, getattr(chosen, "steps", 2))):
                    # The second finds the states that the first has made. One backward in which
                    # gradients come one by one: some step as soon as one is there, and leave none.
                    torch.autograd.backward([sink(parameter) for parameter in self._trained()])
                    chosen.step()
                    chosen.zero_grad(set_to_none=True)
                    states = max(states, ledger.live - before)
            del waiting
            return states, ledger.peak


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _shared_tensors(captured: Captured) -> list[Tensor]:
    return [t for t in tree_leaves((captured.args, captured.kwargs)) if isinstance(t, Tensor)]


_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def fingerprint(block: nn.Module, captured: Captured) -> Any:
    """Equal for blocks that cost the same: class, parameters, settings, arguments."""
    parts: list[Any] = [
        repr(block), _shape(captured.hidden), captured.place,
        tuple((n, _shape(p), p.requires_grad) for n, p in block.named_parameters()),
    ]  # fmt: skip
    for name, module in block.named_modules():
        settings = [
            (key, value)
            for key, value in vars(module).items()
            # Which layer it is does not change what it costs.
            if isinstance(value, _PLAIN) and not key.endswith(("idx", "index", "layer_id"))
        ]
        patched = type(vars(module).get("forward"))
        parts.append((name, type(module), patched, tuple(settings)))
    tree = tree_map_only(Tensor, _shape, (captured.args, captured.kwargs))
    parts.append(repr([x if isinstance(x, tuple | bool | int) else type(x)
                       for x in tree_leaves(tree)]))  # fmt: skip
    return tuple(parts)


def _shape(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def measure_chain(
    twin: Twin, offer: Offer, known: dict[int, BlockCost] | None = None
) -> tuple[Chain, list[int], int, int]:
    """(chain with bytes, and work in place of seconds; kind of each block; resident bytes; peak at
    the end of backward).

    known: costs by kind that were measured before, with the same blocks; more are put in.
    """
    kinds = twin.kinds()
    known = {} if known is None else known
    for kind in sorted(set(kinds) - set(known)):
        known[kind] = _block_cost(twin, kind, offer)
    costs = dict(known)
    turn = twin.turn()
    resident = turn.resident
    if offer.streams:
        # What a stack of one holds for backward is its pair of streams: there once, at any depth.
        streams = max(c.held for c in costs.values())
        resident += streams
        costs = {kind: _above(cost, cost.held) for kind, cost in costs.items()}
    chain = Chain(
        blocks=tuple(costs[k] for k in kinds), turn_peak=turn.peak, turn_gradients=turn.gradients
    )
    end = turn.stem_peak + sum(costs[k].gradients for k in kinds)
    if (division := twin.step.division) is not None:
        units = Units.of(twin.model, twin.stack.blocks)
        chain, resident, end = divided_chain(
            chain, resident, end, units, size=division.size, accumulates=twin.step.accumulate > 1
        )
    return chain, kinds, resident, end


def _above(cost: BlockCost, base: int) -> BlockCost:
    """The cost above `base` bytes that are there anyway."""
    options = tuple(
        replace(
            o, saved=max(0, o.saved - base), forward_peak=o.forward_peak - base,
            backward_peak=o.backward_peak - base,
        )
        for o in cost.options
    )  # fmt: skip
    return replace(
        cost, held=cost.held - base, walk_peak=cost.walk_peak - base,
        again_peak=cost.again_peak - base, options=options,
    )  # fmt: skip


def _block_cost(twin: Twin, index: int, offer: Offer) -> BlockCost:
    measured = [twin.measure(index, way) for way in offer.kept]
    options = tuple(
        Option(
            name=way.label, saved=m.saved, forward_peak=m.forward_peak,
            backward_peak=m.backward_peak, seconds=m.forward_work + m.backward_work,
        )
        for way, m in zip(offer.kept, measured, strict=True)
    )  # fmt: skip
    cost = BlockCost(
        held=0, output=measured[0].output, walk_peak=0, walk_seconds=0.0, again_peak=0,
        again_seconds=0.0, gradients=measured[0].gradients, options=options, redone=False,
    )  # fmt: skip
    if offer.redo is None:
        return cost
    redo = twin.measure(index, offer.redo)
    return replace(
        cost, held=redo.saved, walk_peak=redo.forward_peak, walk_seconds=redo.forward_work,
        again_peak=redo.backward_peak, again_seconds=redo.backward_work, redone=True,
    )  # fmt: skip
