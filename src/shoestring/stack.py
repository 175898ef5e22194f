"""What a model is to us: a stack of blocks with a stem before it and a head after it.

`Stack.of(model)` finds the list of layers of any Hugging Face or plain PyTorch model by
structure, and `apply` takes over how its blocks are *run*, never what they hold. A `Runner` is
put into each block's instance `forward`: the modules, their names, their place in the list,
their class and their hooks stay as they were (hooks on the block itself fire once a step, also
when the block is replayed), so `state_dict`, `save_pretrained`, `generate`, PEFT injection and
`deepcopy` behave as before. `restore` takes the runners out again.

A runner stands for *one* block and keeps that block's own arguments. What spans several blocks
lives in the executor that the runners of a span share.
"""

import inspect
import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StackError

log = logging.getLogger("shoestring")

# Arguments that carry a cache from call to call. A block that is run twice would grow it twice.
CACHE_ARGUMENTS = frozenset(
    {"past_key_values", "past_key_value", "layer_past", "cache_params", "use_cache"}
)


@dataclass(frozen=True, slots=True)
class Span:
    """A run of neighbouring blocks start..stop-1 executed by one method."""

    start: int
    stop: int
    method: str
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class BlockCall:
    """One call of a block: its hidden state, and everything else bound.

    `call(hidden)` evaluates the block's own forward on another hidden state with the same other
    arguments. The hidden state is the first floating tensor among the arguments.
    """

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str
    hidden: Tensor | None

    def __call__(self, hidden: Tensor) -> Any:
        if isinstance(self.place, int):
            args = (*self.args[: self.place], hidden, *self.args[self.place + 1 :])
            return self.forward(*args, **self.kwargs)
        return self.forward(*self.args, **{**self.kwargs, self.place: hidden})

    @classmethod
    def bind(
        cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> "BlockCall":
        """Find the hidden state and put a hole where it stood, so that nothing here keeps it."""
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for place, value in places:
            if isinstance(value, Tensor) and value.is_floating_point():
                return cls(forward, *_without(place, args, kwargs), place, value)
        raise StackError(
            "a block was called without a floating-point tensor",
            expected="the hidden state among the block's arguments",
        )


def _without(
    place: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with None at that place."""
    if isinstance(place, int):
        return (*args[:place], None, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: None}


class Executor:
    """How the blocks of one span are run. The runners of the span share it.

    It holds no module and no tensor between steps, so that deleting or copying a model needs no
    care. `always`: also runs when gradients are off (it changes the function, not only memory).
    `compiles`: torch.compile can look into it; where it cannot, the blocks run uncompiled.
    """

    always: bool = False
    compiles: bool = True

    def run(self, position: int, block: nn.Module, call: BlockCall) -> Any:
        """Run the block at `position` (0 = first of the span); returns what the block returns."""
        raise NotImplementedError


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block returned: the output itself, or its first element."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, Tensor):
        raise StackError(
            f"a block returned {type(output).__name__}",
            expected="a tensor, or a tuple whose first element is the hidden state",
        )
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The same output with another hidden state in it."""
    if isinstance(output, tuple | list):
        return type(output)([hidden, *output[1:]])
    return hidden


# torch's own decorator for what Dynamo must not look into; torch.compiler.disable does the same,
# but loads the compiler (a second) as soon as it is named.
uncompiled: Callable[[Callable[..., Any]], Callable[..., Any]] = getattr(
    torch, "_disable_dynamo", torch.compiler.disable
)
_orders = itertools.count()


class Applied:
    """One call of `Stack.apply`: the runners that it put in refer to it, so that exactly those
    are taken out again. A deepcopy of the model gets one of its own."""

    __slots__ = ("order",)

    def __init__(self) -> None:
        self.order = next(_orders)


class Runner:
    """Stands in a block's instance `forward`. Refers to the block weakly: no cycle, and a
    deepcopy of the block gets a runner of its own."""

    def __init__(
        self,
        block: nn.Module,
        inner: Callable[..., Any] | None,
        executor: Executor,
        position: int,
        applied: Applied,
    ) -> None:
        self._block = weakref.ref(block)
        self.inner = inner  # what stood in the instance before, if anything
        self.executor = executor
        self.position = position
        self.applied = applied
        # Not a bound method: that would be a cycle.
        self._call = Runner._run if executor.compiles else _run_uncompiled

    @property
    def original(self) -> Callable[..., Any]:
        inner = self.inner
        if isinstance(inner, Runner) and inner.executor.always and self.executor.always:
            return inner.original  # the same architecture, run another way: not one in the other
        if inner is not None:
            return inner
        block = self._block()
        assert block is not None
        return type(block).forward.__get__(block)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self, *args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() or self.executor.always):
            return self.original(*args, **kwargs)
        block = self._block()
        assert block is not None
        if torch.is_grad_enabled():
            args, kwargs = without_cache(block, args, kwargs)
        return self.executor.run(self.position, block, BlockCall.bind(self.original, args, kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Runner":
        from copy import deepcopy

        block = self._block()
        assert block is not None
        # deepcopy registers the new block before it copies the block's attributes.
        new_block = memo.get(id(block), block)
        inner = deepcopy(self.inner, memo) if isinstance(self.inner, Runner) else self.inner
        executor, applied = deepcopy(self.executor, memo), deepcopy(self.applied, memo)
        return Runner(new_block, inner, executor, self.position, applied)

    def __reduce__(self) -> Any:
        return Runner, (self._block(), self.inner, self.executor, self.position, self.applied)


# For executors that torch.compile cannot look into.
_run_uncompiled = uncompiled(Runner._run)


def _less(forward: Any, applied: Applied) -> Any:
    """What stands in a block's `forward`, without the runners of that application."""
    if not isinstance(forward, Runner):
        return forward
    inner = _less(forward.inner, applied)
    if forward.applied is applied:
        return inner
    forward.inner = inner
    return forward


_cache_dropped = False


def without_cache(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments without a key/value cache: training does not read one, and running a block
    again in backward would append to it a second time. StackError when the cache has entries for
    this block already (prefix tuning): without them it would compute something else."""
    cache_utils = sys.modules.get("transformers.cache_utils")
    cache_type = getattr(cache_utils, "Cache", ()) if cache_utils else ()
    dropped = False

    def clean(value: Any) -> Any:
        nonlocal dropped
        if isinstance(value, cache_type):
            if _is_filled(value, block):
                raise StackError(
                    f"{type(block).__name__} is called with gradients on and a key/value cache "
                    "that has entries already (prefix tuning does this)",
                    expected="an empty cache or none, because a planned block runs without one",
                    hint="Train such a model without a plan.",
                )
            dropped = True
            return None
        return value

    args = tuple(clean(a) for a in args)
    new_kwargs = {}
    for name, value in kwargs.items():
        value = clean(value)
        if name in CACHE_ARGUMENTS and value is not None and value is not False:
            dropped = dropped or value is not True
            value = False if name == "use_cache" else None
        new_kwargs[name] = value
    global _cache_dropped
    if dropped and not _cache_dropped:
        _cache_dropped = True
        log.info("the key/value cache is dropped while gradients are on (use_cache is ignored)")
    return args, new_kwargs


def _is_filled(cache: Any, block: nn.Module) -> bool:
    """Whether a transformers cache has entries for this block, found by its layer index."""
    cache = getattr(cache, "self_attention_cache", cache)
    numbers = (getattr(m, "layer_idx", None) for m in block.modules())
    index = next((n for n in numbers if isinstance(n, int)), 0)
    layers = getattr(cache, "layers", ())
    return index < len(layers) and bool(getattr(layers[index], "is_initialized", False))


class Stack:
    """The blocks of a model, and how they are run."""

    def __init__(self, model: nn.Module, path: str, blocks: Sequence[nn.Module]) -> None:
        self.model = model
        self.path = path
        self.blocks = tuple(blocks)
        self._applied: list[Applied] | None = None  # None: this object never applied anything

    def __len__(self) -> int:
        return len(self.blocks)

    def __repr__(self) -> str:
        kinds = sorted({type(b).__name__ for b in self.blocks})
        return f"Stack({self.path or '<the model>'}: {len(self)} blocks of {', '.join(kinds)})"

    @classmethod
    def of(cls, model: nn.Module, path: str | None = None) -> "Stack":
        """The stack of `model`, found by structure, or the list at `path`.

        Looks for the nn.ModuleList or nn.Sequential that holds most parameters in two or more
        blocks. StackError when there is none, or when several compete (an encoder and a
        decoder): pass `path` then.
        """
        if path is not None:
            return cls(model, path, _blocks_at(model, path))
        found = list(_candidates(model, ""))
        if not found:
            raise StackError(
                f"no stack of blocks found in {type(model).__name__}",
                expected="an nn.ModuleList or nn.Sequential with two or more parametric blocks",
                hint="Pass path='...' naming the list of layers, or put the layers into an "
                "nn.ModuleList.",
            )
        sizes = {where: sum(_numel(b) for b in blocks) for where, blocks in found}
        best = max(sizes, key=lambda where: sizes[where])
        rivals = [w for w in sizes if w != best and sizes[w] > 0.5 * sizes[best]]
        if rivals:
            raise StackError(
                f"{type(model).__name__} has several lists of layers: {sorted([best, *rivals])}",
                expected="one that holds most of the parameters",
                hint=f"Choose one with path=, for example path={best!r}.",
            )
        return cls(model, best, dict(found)[best])

    def apply(self, executors: Sequence[tuple[int, int, Executor]]) -> None:
        """Run blocks start..stop-1 by an executor, in place. Overlaps are an error."""
        taken: set[int] = set()
        for start, stop, _ in executors:
            span = set(range(start, stop))
            if not (0 <= start < stop <= len(self)) or span & taken:
                raise StackError(
                    f"span [{start}, {stop}) does not fit a stack of {len(self)} blocks",
                    expected="spans inside the stack that do not overlap",
                )
            taken |= span
        applied = Applied()
        self._applied = [*(self._applied or ()), applied]
        for start, stop, executor in executors:
            for position, block in enumerate(self.blocks[start:stop]):
                inner = block.__dict__.get("forward")
                if isinstance(inner, Runner) and not inner.executor.always:
                    inner = inner.inner  # a plan replaces a plan; an architecture stays below
                block.__dict__["forward"] = Runner(block, inner, executor, position, applied)

    def restore(self) -> None:
        """Take out the runners that the last `apply` of this object put in, and no others.

        On an object that never applied anything: those that came last, a plan's before those
        that make up the model's architecture.
        """
        if self._applied is None:
            applied = self._last_applied()
        else:
            applied = self._applied.pop() if self._applied else None
        if applied is None:
            return
        for block in self.blocks:
            forward = _less(block.__dict__.get("forward"), applied)
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward

    def _last_applied(self) -> Applied | None:
        forwards = [block.__dict__.get("forward") for block in self.blocks]
        runners = [f for f in forwards if isinstance(f, Runner)]
        if not runners:
            return None
        return max(runners, key=lambda r: (not r.executor.always, r.applied.order)).applied

    @property
    def executors(self) -> list[Executor | None]:
        """The executor of each block, None where the block runs as it is."""
        runners = [block.__dict__.get("forward") for block in self.blocks]
        return [r.executor if isinstance(r, Runner) else None for r in runners]


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _longest_run(blocks: list[nn.Module]) -> list[nn.Module]:
    """The longest run of neighbours of one class."""
    best: list[nn.Module] = []
    run: list[nn.Module] = []
    for block in blocks:
        run = [*run, block] if run and type(run[-1]) is type(block) else [block]
        best = run if len(run) > len(best) else best
    return best


def _blocks_of(container: nn.Module) -> list[nn.Module]:
    """The blocks a container offers: all of an nn.ModuleList; of an nn.Sequential the longest
    run of one class (what stands before and after it is stem and head)."""
    children = list(container.children())
    if isinstance(container, nn.ModuleList):
        blocks = children
    elif isinstance(container, nn.Sequential):
        blocks = run if len(run := _longest_run(children)) > 1 else []
    else:
        return []
    return blocks if len(blocks) > 1 and all(_numel(b) for b in blocks) else []


def _candidates(module: nn.Module, path: str) -> Iterator[tuple[str, list[nn.Module]]]:
    """Outermost containers of blocks; what lies inside a block (experts, say) is not looked at."""
    if blocks := _blocks_of(module):
        yield path, blocks
        inside = {id(b) for b in blocks}
    else:
        inside = set()
    for name, child in module.named_children():
        if id(child) not in inside:
            yield from _candidates(child, f"{path}.{name}" if path else name)


def _blocks_at(model: nn.Module, path: str) -> list[nn.Module]:
    try:
        container = model.get_submodule(path)
    except AttributeError as error:
        raise StackError(f"{type(model).__name__} has nothing at {path!r} ({error})") from None
    blocks = list(container.children())
    if not isinstance(container, nn.ModuleList | nn.Sequential) or not blocks:
        raise StackError(
            f"{path!r} is {type(container).__name__} with {len(blocks)} children",
            expected="an nn.ModuleList or nn.Sequential with at least one block",
        )
    return blocks
