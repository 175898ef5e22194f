"""A transformer of diffusers made without the layers that are not wanted, by its own constructor.

The constructor runs as it is. While it does, every layer of another block is made on the meta
device and then let go, so that its weights never take memory; all else (embeddings, buffers, the
wanted layers) comes out as ever, with the weights and draws that the constructor gives it. Which
layer is which is learned from a first run that is wholly on the meta device.
"""

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .wrapped_config import ARCHITECTURES, BY_NUMBER, Call

Place = tuple[str, int]
"""A layer: its list, its number there."""
Wanted = Callable[[Place], bool]
_SKIPS = {"skip", "skips", "res_hidden_states", "res_hidden_states_tuple"}
_U_SHAPED = ("down_blocks", "up_blocks", "down_block", "up_block")


class Owned(nn.ModuleList):
    """Some layers of a list under the numbers that they have in the whole, so that the names of
    their weights stay. Who goes through the list, or asks for its first, meets these alone."""

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        super().__init__()
        for number, layer in layers.items():
            self.add_module(str(number), layer)

    def __getitem__(self, index: int | slice) -> Any:
        return list(self._modules.values())[index]


def class_of(architecture: str) -> Any:
    """The class of diffusers. ConfigError where there is no such class, or no diffusers."""
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise ConfigError(
            f"{architecture} needs diffusers, which cannot be imported ({error})",
            expected="diffusers", hint="pip install 'shoestring[diffusion]'",
        ) from error  # fmt: skip
    found = getattr(diffusers, architecture, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.ModelMixin)):
        raise ConfigError(
            f"diffusers {diffusers.__version__} has no model {architecture!r}",
            expected=f"the name of a transformer of diffusers, such as {', '.join(ARCHITECTURES)}",
        )
    return found


def skeleton(architecture: str, settings: Mapping[str, Any]) -> nn.Module:
    """The whole model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return _constructed(architecture, settings)


def call_of(model: nn.Module, call: Call | None = None) -> Call:
    """How a model is cut and called. ConfigError for architectures that are not known and for
    those whose layers are no chain, with what was looked for."""
    name = type(model).__name__
    lists = {n: m for n, m in model.named_children() if isinstance(m, nn.ModuleList) and len(m)}
    _refuse_skips(model, lists)
    call = call or ARCHITECTURES.get(name)
    there = ", ".join(f"{n} ({len(m)})" for n, m in lists.items()) or "none"
    if call is None:
        raise ConfigError(
            f"{name} is not an architecture that is known; its lists of layers: {there}",
            expected=f"one of {', '.join(ARCHITECTURES)}",
            hint="Any other whose layers are a chain can be wrapped by saying how it is called: "
            "call=Call(lists=('transformer_blocks',), given=(...)).",
        )
    missing = [n for n in call.lists if n not in lists]
    if missing and len(missing) == len(call.lists):
        raise ConfigError(
            f"{name} has no list of layers {', '.join(missing)}; it has {there}",
            expected=f"lists of layers named {', '.join(call.lists)}",
        )
    return call


def _refuse_skips(model: nn.Module, lists: Mapping[str, nn.ModuleList]) -> None:
    why = next((n for n in _U_SHAPED if hasattr(model, n)), "")
    for name, layers in lists.items():
        for number, layer in enumerate(layers):
            found = _SKIPS & set(inspect.signature(layer.forward).parameters)
            if found:
                why = why or f"layer {number} of {name} takes {sorted(found)[0]!r}"
    if why:
        raise ConfigError(
            f"{type(model).__name__} is U-shaped ({why}): late layers read what early ones gave",
            expected="layers that are a chain, of which each reads the one before it",
            hint="A block of it would need another block's activations; recompute layers instead.",
        )


def made(
    architecture: str, settings: Mapping[str, Any], call: Call, wanted: Wanted, seed: int
) -> nn.Module:
    """The model with the wanted layers and everything beside layers, on the CPU, with the weights
    that its constructor draws from this seed. Layers that are not wanted never have memory."""
    first = skeleton_in_order(architecture, settings, call)
    turns = {kind: iter(places) for kind, places in first.items()}

    def device_of(kind: type, _: nn.Module) -> contextlib.AbstractContextManager[Any]:
        place = next(turns[kind])
        return torch.device("cpu" if place is None or wanted(place) else "meta")

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        with _around_construction(first, device_of):
            model = _constructed(architecture, settings)
    keep(model, call, wanted)
    lost = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if lost:
        raise ConfigError(
            f"{lost[0]} of {architecture} is made together with layers of other blocks",
            expected="layers that are made one by one",
        )
    return model


def keep(model: nn.Module, call: Call, wanted: Wanted) -> None:
    """Let go of all layers that are not wanted."""
    for name in call.lists:
        layers = enumerate(getattr(model, name))
        setattr(model, name, Owned({n: each for n, each in layers if wanted((name, n))}))


def skeleton_in_order(
    architecture: str, settings: Mapping[str, Any], call: Call
) -> dict[type, list[Place | None]]:
    """By class of layers: what place in the lists each one made has, in the order of making; None
    for those of the same class that stand elsewhere."""
    whole = skeleton(architecture, settings)
    seen: dict[type, list[nn.Module]] = {type(m): [] for n in call.lists for m in getattr(whole, n)}

    def note(kind: type, module: nn.Module) -> contextlib.AbstractContextManager[Any]:
        seen[kind].append(module)
        return contextlib.nullcontext()

    with torch.device("meta"), _around_construction(seen, note):
        whole = _constructed(architecture, settings)
    places = {id(m): (n, i) for n in call.lists for i, m in enumerate(getattr(whole, n))}
    return {kind: [places.get(id(m)) for m in modules] for kind, modules in seen.items()}


def _constructed(architecture: str, settings: Mapping[str, Any]) -> nn.Module:
    kind = class_of(architecture)
    if architecture in BY_NUMBER:
        raise ConfigError(
            f"{architecture} gives each layer what belongs to its number, and blocks have none",
            expected="layers that are all called alike",
        )
    try:
        return kind.from_config(dict(settings))
    except (TypeError, ValueError, NotImplementedError, ArithmeticError) as error:
        raise ConfigError(
            f"{architecture} cannot be made of its settings: {error}", expected="a config of it"
        ) from error


@contextlib.contextmanager
def _around_construction(
    kinds: Mapping[type, Any],
    enter: Callable[[type, nn.Module], contextlib.AbstractContextManager[Any]],
) -> Iterator[None]:
    """While it lasts, a module of one of these classes is made inside of `enter(its class, it)`;
    not so what is made inside of one of them."""
    own = {kind: vars(kind).get("__init__") for kind in kinds}
    inside = False

    def around(kind: type) -> Callable[..., None]:
        real = kind.__init__  # type: ignore[misc]

        def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            nonlocal inside
            if inside or type(self) is not kind:
                real(self, *args, **kwargs)
                return
            inside = True
            try:
                with enter(kind, self):
                    real(self, *args, **kwargs)
            finally:
                inside = False

        return init

    changed = {kind: around(kind) for kind in kinds}
    try:
        for kind, init in changed.items():
            setattr(kind, "__init__", init)  # noqa: B010  a class's, which has no such name
        yield
    finally:
        for kind, had in own.items():
            if had is None:
                delattr(kind, "__init__")
            else:
                setattr(kind, "__init__", had)  # noqa: B010
