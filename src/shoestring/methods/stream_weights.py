"""stream_weights: a block's weights are in memory only while the block runs.

Idea: the weights of the blocks live in a file that is mapped, and are copied into memory just
before a part of a block (its attention, its MLP, ...) runs, forward or again in backward. What
autograd holds of them goes with the rest of what it saved, so blocks that are run again in
backward leave nothing. The pages of what comes next are asked for meanwhile. Together with a step
inside backward and states outside memory, what must fit is a few layers, not the model.
Equations: none change.
Memory: none for the blocks' weights from step to step; the weights of one block while it runs (in
backward all of its parts), of all blocks between forward and backward where they are kept.
Time: one copy of every weight in forward and one more where a block is run again, and what the
disk takes where the file does not fit the page cache.
Exactness: bitwise; a copy computes as the original.
Limits: on the CPU. Weights smaller than a page, weights that a block's own code uses outside its
parts, and weights shared between modules stay in memory. Not for a reversible stack. Gradients
are as large as ever unless the optimizer steps inside backward.
Source: MeBP, arXiv 2510.03425; MegaTrain, arXiv 2604.05091; LLMQ, arXiv 2512.15306 (the idea of
weights that visit); the mapped copy is ours.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..errors import ConfigError, StackError
from ..mapped import MappedFile, release, room, spill_directory, will_need
from ..meter import count_again, is_outside, leave_out
from ..stack import Stack
from .base import Method, Promises, Undo

SMALLEST_BYTES = 4096
"""Weights below a page stay in memory."""
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamWeightsConfig:
    """Which weights live outside memory, and where."""

    what: str = "all"
    """"all", or "frozen": only weights that are not trained."""
    directory: str = ""
    """Where the file is made; SHOESTRING_SPILL_DIR or the system's temporary directory when
    left out. A directory in memory (tmpfs) saves nothing."""

    def __post_init__(self) -> None:
        if self.what not in ("all", "frozen"):
            raise ConfigError(f"stream_weights: what = {self.what!r}", expected="'all' or 'frozen'")


class Fetch(torch.autograd.Function):
    """A copy in memory of a weight outside; its gradient is the weight's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Order:
    """The parts of a model in the order of their blocks: what to ask for next, what to let go."""

    def __init__(self, blocks: int) -> None:
        self.parts: list[list[weakref.ref[Gate]]] = [[] for _ in range(blocks)]
        self._block = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Order":
        return Order(0)  # a copy's weights are in memory: there are no pages to care for

    def fetched(self, gate: "Gate") -> None:
        """The weights of this part have been copied: its pages may go, its neighbours' come."""
        if not self.parts:
            return
        for weight in gate.weights():
            release(weight)
        forward = gate.block >= self._block
        if gate.block != self._block:
            self._each(self._block, release)  # an optimizer may have used them since
            self._each(gate.block + (1 if forward else -1), will_need)
        self._block = gate.block

    def _each(self, block: int, do: Callable[[Tensor], None]) -> None:
        if 0 <= block < len(self.parts):
            for reference in self.parts[block]:
                if (gate := reference()) is not None:
                    for weight in gate.weights():
                        do(weight)


class Gate:
    """Stands in the `forward` of a part of a block: fetches its weights, runs it, drops them."""

    def __init__(
        self, part: nn.Module, inner: Any, block: int, names: list[tuple[str, str]], order: Order
    ) -> None:
        self._part = weakref.ref(part)
        self.inner = inner  # what stood in the instance before, if anything
        self.block = block
        self.names = names  # (path of a module in the part, name of its weight)
        self.order = order

    @property
    def part(self) -> nn.Module:
        part = self._part()
        assert part is not None
        return part

    def weights(self) -> Iterator[Tensor]:
        """The weights outside that this part uses."""
        for path, name in self.names:
            weight = self.part.get_submodule(path)._parameters[name]
            if weight is not None:
                yield weight

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part = self.part
        forward = self.inner if self.inner is not None else type(part).forward.__get__(part)
        with contextlib.ExitStack() as stack:
            for path, name in self.names:
                place: dict[str, Any] = part.get_submodule(path)._parameters
                weight = place[name]
                stack.callback(place.__setitem__, name, weight)
                place[name] = Fetch.apply(weight) if weight.requires_grad else weight.clone()
            self.order.fetched(self)
            return forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Gate":
        from copy import deepcopy

        # deepcopy registers the new module before it copies the module's attributes.
        inner = deepcopy(self.inner, memo) if self.inner is not None else None
        order = deepcopy(self.order, memo)
        return Gate(memo.get(id(self.part), self.part), inner, self.block, self.names, order)


class StreamWeights(Method):
    """Weights that visit."""

    name = "stream_weights"
    promises = Promises(
        fidelity="exact",
        grade="bitwise",
        applies_to="weights",
        saved_grows_with=frozenset({"depth"}),  # copies of the weights of blocks that are kept
        maps_files=True,
    )
    Config = StreamWeightsConfig

    def build(self, build: Callable[[], nn.Module], config: StreamWeightsConfig) -> nn.Module:
        """See `build_outside`."""
        return build_outside(build, directory=config.directory or None)

    def apply(self, model: nn.Module, config: StreamWeightsConfig) -> Undo:
        """Move the weights of the blocks into a file, and have them fetched; in place.

        StackError when nothing can be moved. The result moves them back.
        """
        stack = Stack.of(model)
        _refuse(model, stack)
        parts = list(_parts(model, stack, config))
        weights = {id(w): w for _, part, names in parts for w in _named(part, names)}
        if not weights:
            raise StackError(
                f"stream_weights finds nothing to move in {stack!r}",
                expected="weights in modules inside the blocks, "
                f"{SMALLEST_BYTES} bytes or larger" + _FROZEN[config.what],
            )
        _move_out(list(weights.values()), config.directory)
        order, gates = Order(len(stack)), []
        for block, part, names in parts:
            gate = Gate(part, vars(part).get("forward"), block, names, order)
            part.__dict__["forward"] = gate
            order.parts[block].append(weakref.ref(gate))
            gates.append(gate)

        def undo() -> None:
            for gate in gates:
                if vars(gate.part).get("forward") is gate:
                    if gate.inner is None:
                        del gate.part.__dict__["forward"]
                    else:
                        gate.part.__dict__["forward"] = gate.inner
            _move_in(weights.values())

        return undo


_FROZEN = {"all": "", "frozen": " that are not trained"}


def _refuse(model: nn.Module, stack: Stack) -> None:
    if any(e is not None and e.always for e in stack.executors):
        raise StackError(
            f"stream_weights cannot run {stack!r}: it is reversible",
            expected="a stack whose blocks run as modules",
        )
    gates = (m.__dict__.get("forward") for m in model.modules())
    if any(isinstance(g, Gate) for g in gates):
        raise StackError(
            "the weights of this model are streamed already",
            hint="stream_weights can be applied once.",
        )
    device = next(model.parameters()).device
    if device.type not in ("cpu", "meta"):
        raise StackError(
            f"stream_weights cannot run a model on {device}",
            expected="a model on the CPU",
        )


def _parts(
    model: nn.Module, stack: Stack, config: StreamWeightsConfig
) -> Iterator[tuple[int, nn.Module, list[tuple[str, str]]]]:
    """(number of the block, a part of it, the weights in it that can be moved)."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1

    def moves(weight: Tensor | None) -> bool:
        return (
            weight is not None
            and not weight.is_meta
            and weight.nbytes >= SMALLEST_BYTES
            and weight.is_contiguous()
            and type(weight.data) in (Tensor, FakeTensor)
            and uses[id(weight)] == 1  # a shared one would come and go for the others, too
            and not (config.what == "frozen" and weight.requires_grad)
        )

    for number, block in enumerate(stack.blocks):
        for part in _with_forward(block):
            names = [
                (path, name)
                for path, module in part.named_modules()
                for name, weight in module._parameters.items()
                if moves(weight)
            ]
            if names:
                yield number, part, names


def _with_forward(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules inside that are called, not only gone through."""
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            yield from _with_forward(child)
        else:
            yield child


def _named(part: nn.Module, names: list[tuple[str, str]]) -> Iterator[Tensor]:
    for path, name in names:
        weight = part.get_submodule(path)._parameters[name]
        assert weight is not None
        yield weight


def _move_out(weights: list[Tensor], directory: str) -> None:
    """Put the data of these weights into one file; fake ones are only marked."""
    if isinstance(weights[0].data, FakeTensor):
        spill_directory(directory or None)  # what cannot be done is not to be planned
        leave_out(weights)
        return
    inside = [w for w in weights if not is_outside(w.untyped_storage())]
    file = MappedFile(sum(room(w.shape, w.dtype) for w in inside), directory or None)
    for weight in inside:
        _into(file, weight)


def _into(file: MappedFile, weight: Tensor) -> None:
    data = file.tensor(weight.shape, weight.dtype)
    data.copy_(weight.data)
    weight.data = data
    release(weight)


def _move_in(weights: Any) -> None:
    for weight in weights:
        if isinstance(weight.data, FakeTensor):
            count_again([weight])
        else:
            weight.data = weight.data.clone()


# ---- models that never are in memory as a whole --------------------------------------------------


def build_outside(build: Callable[[], nn.Module], *, directory: str | None = None) -> nn.Module:
    """The model that `build()` makes, with the weights of its blocks outside memory from the
    moment they are made, so that it never is in memory as a whole.

    build: makes a module, or loads one: `lambda: AutoModelForCausalLM.from_pretrained(...)`.
    What is not in the blocks (embeddings, head) is brought into memory. `stream_weights`, or a
    plan with it, then fetches the blocks' weights while they run. SpillError when the disk
    has no room.
    """
    files = _Files(directory)
    register = nn.Module.register_parameter

    def outside(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and _may_leave(parameter):
            # The same object, so that what is tied to it stays tied.
            files.take(parameter)

    nn.Module.register_parameter = outside  # type: ignore[method-assign,assignment]
    try:
        model = build()
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
    in_blocks = {id(p) for block in Stack.of(model).blocks for p in block.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in in_blocks and is_outside(parameter.untyped_storage()):
            parameter.data = parameter.data.clone()
    return model


def _may_leave(parameter: nn.Parameter) -> bool:
    return (
        type(parameter.data) is Tensor
        and parameter.device.type == "cpu"
        and parameter.nbytes >= SMALLEST_BYTES
        and parameter.is_contiguous()
        and not is_outside(parameter.untyped_storage())
    )


class _Files:
    """Mapped files as they are needed, for nobody knows how large a model will be."""

    CHUNK_BYTES = 1 << 28

    def __init__(self, directory: str | None) -> None:
        self.directory = directory
        self.file: MappedFile | None = None

    def take(self, parameter: nn.Parameter) -> None:
        """Move a parameter's data out."""
        needed = room(parameter.shape, parameter.dtype)
        if self.file is None or needed > self.file.left:
            self.file = MappedFile(max(needed, self.CHUNK_BYTES), self.directory)
        _into(self.file, parameter)
