"""offload: what a block saves for backward waits outside of memory until backward needs it.

Idea: between its forward and its backward a block's activations are only kept. On a CUDA device
they go to pinned memory of the host, on a CPU to a file (`spill.py`), and come back when backward
reaches the block. Either all that autograd saved goes ("saved"), or the block is run again in
backward and only its input goes ("input").
Equations: none change.
Memory: "saved": nothing but small tensors (under 4096 bytes) is held from forward to backward, and
backward holds what its present operator asks for (CPU), or what one block and the one below it
saved (CUDA, where it is fetched ahead). "input": nothing is held; one block's inside, as recompute.
Time: all that is saved is moved out and back, or the inputs and one more forward. On CUDA the
copies run beside the computing; on a CPU they do not.
Exactness: bitwise. Values, strides and the sharing of storages come back as they were.
Limits: a CPU's tensors need a directory on a disk. Tensors that autograd would only have referred
to (a block's input) are written, too. Kinds of devices other than CPU and CUDA are refused.
Source: save_on_cpu of torch.autograd.graph (the hook); vDNN, arXiv 1602.08124 (fetching ahead).
"""

import weakref
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import ConfigError, SpillError
from ..mapped import spill_directory
from ..saved import Content, Handle, SavedTensors, restored
from ..spill import Away, FilePlace, HostPlace, Place
from ..stack import BlockCall, Executor, Stack
from ..tape import Evaluation, replayed
from .base import Method, Promises


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadConfig:
    """What goes, and where to."""

    what: Literal["saved", "input"] = "saved"
    """All that a block saves, or the input of a block that is run again in backward."""
    directory: str | None = None
    """For tensors of a CPU; SHOESTRING_SPILL_DIR, or the system's one for temporary files, when
    left out."""

    def __post_init__(self) -> None:
        if self.what not in ("saved", "input"):
            raise ConfigError(f"offload: what = {self.what!r}", expected="'saved' or 'input'")


class Parcel:
    """What went away in the forward of one block. Lives with what autograd keeps of it.

    Parcels of a span are strung in the order of the forward, by weak references: when backward
    asks for something of one, the one below is told to start coming.
    """

    __slots__ = ("__weakref__", "_above", "_asked", "_below", "_contents")

    def __init__(self, below: "Parcel | None") -> None:
        self._contents: list[weakref.ref[Any]] = []
        self._below = weakref.ref(below) if below is not None else None
        self._above: weakref.ref[Parcel] | None = None
        self._asked = False
        if below is not None:
            below._above = weakref.ref(self)

    def add(self, content: Away) -> Content:
        self._contents.append(weakref.ref(content))
        return content

    def asked(self) -> None:
        """Backward of this block has begun."""
        if self._asked:
            return
        self._asked = True
        self._start()
        above, below = (ref() if ref is not None else None for ref in (self._above, self._below))
        if above is not None:
            above._asked = False  # ready for another backward
        if below is not None:
            below._asked = False
            below._start()

    def _start(self) -> None:
        for reference in self._contents:
            content = reference()
            if content is not None:
                content.start()

    def let_go(self) -> None:
        """The memory that the tensors came from must be free from now on."""
        for reference in self._contents:
            content = reference()
            if content is not None:
                content.let_go()


class OffloadExecutor(Executor):
    """Runs blocks; what they save goes to a place."""

    compiles = False

    def __init__(self, config: OffloadConfig, blocks: int) -> None:
        self.config, self.blocks = config, blocks
        self._saved = SavedTensors()
        self._places: dict[str, Place] = {}
        self._latest: weakref.ref[Parcel] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "OffloadExecutor":
        return type(self)(self.config, self.blocks)

    def __reduce__(self) -> Any:
        return type(self), (self.config, self.blocks)

    def run(self, position: int, block: nn.Module, call: BlockCall) -> Any:
        hidden = call.hidden
        assert hidden is not None
        call.hidden = None
        before = self._latest() if self._latest is not None and position else None
        parcel = Parcel(before)
        self._latest = weakref.ref(parcel)
        place = self._place(hidden.device.type)

        def keep(flat: Tensor, tensor: Tensor) -> Content:
            return parcel.add(place.put(flat))

        if self.config.what == "saved":
            with self._saved.of(block, call, keep, owner=parcel):
                output = call(hidden)
        elif hidden.requires_grad or any(p.requires_grad for p in block.parameters()):
            input_ = self._saved.put(hidden, keep, parcel)
            output = _again(block, call, hidden, input_)
        else:
            output = call(hidden)
        # One block's copies may be under way while the next computes, and no more.
        if before is not None:
            before.let_go()
        if position == self.blocks - 1:
            parcel.let_go()
        return output

    def _place(self, device: str) -> Place:
        place = self._places.get(device)
        if place is None:
            place = HostPlace() if device == "cuda" else FilePlace(self.config.directory)
            self._places[device] = place
        return place


def _again(block: nn.Module, call: BlockCall, hidden: Tensor, input_: Tensor | Handle) -> Any:
    """The block, to be run again on what comes back."""
    return replayed(Evaluation(call, block), hidden, lambda: restored(input_))


class Offload(Method):
    """What blocks save waits in a file or in the host's memory."""

    name = "offload"
    promises = Promises(fidelity="exact", grade="bitwise", applies_to="span")
    Config = OffloadConfig
    variants = ({"what": "saved"}, {"what": "input"})

    def fits(self, stack: Stack, config: Any = None) -> str | None:
        devices = {p.device.type for block in stack.blocks for p in block.parameters()}
        unknown = devices - {"cpu", "cuda"}
        if unknown:
            return f"there is no place for tensors of {', '.join(sorted(unknown))}"
        if "cpu" in devices:
            try:
                spill_directory(config.directory if config is not None else None)
            except SpillError as error:
                return str(error)
        return None

    def executor(self, stack: Stack, start: int, stop: int, config: Any) -> Executor:
        return OffloadExecutor(config, stop - start)
