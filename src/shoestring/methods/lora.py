"""lora: small matrices beside frozen weights are trained, and nothing else.

Idea: a weight W stays as it is, and B A is added to what it does, A of `rank` rows and B of as
many columns; only these have gradients and states (LoRA, arXiv 2106.09685, section 4). The frozen
weights may be kept at 8 or 4 bits (QLoRA, arXiv 2305.14314): they are read, never written.
Equations: y = W x + (alpha / rank) B A x; B begins at zero, so at first the function does not
change.
Memory: no gradients and states for W; with base "int8" or "nf4" W at 1 byte or 0.56 instead of 4.
What a block saves for backward is about as much as before.
Time: two thin products more for each weight; no gradient of W. A quantised W is decoded for every
product, forward and backward.
Exactness: structural: another, smaller set of functions is trained, and a quantised base is another
function from the start.
Limits: linear layers of the blocks. Weights shared between modules stay as they are. Taking it out
forgets what was learned: `merge` adds it to the weights first. A quantised base comes back as it
was decoded.
Source: arXiv 2106.09685; arXiv 2305.14314; adapters are peft's, NF4 is bitsandbytes'.
"""

import contextlib
import importlib.util
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses import FakeTensor

from ..errors import ConfigError, StackError
from ..ops.weight_codes import check_library, decode_layer, keep_in_codes
from ..stack import Stack
from .base import Method, Promises, Undo


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Which linear layers of the blocks get adapters, and what becomes of their weights."""

    rank: int = 16
    alpha: float = 0.0
    """0: twice the rank."""
    targets: tuple[str, ...] = ()
    """Last parts of the names of linear layers, such as "q_proj"; left out, all of the blocks'."""
    base: Literal["float", "int8", "nf4"] = "float"
    """How the frozen weights of those layers are kept."""
    seed: int = 0
    """Of the first adapters."""

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ConfigError(f"lora: rank = {self.rank!r}", expected="1 or more")
        if self.base not in ("float", "int8", "nf4"):
            raise ConfigError(f"lora: base = {self.base!r}", expected="'float', 'int8' or 'nf4'")
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not number or not math.isfinite(self.alpha) or self.alpha < 0:
            raise ConfigError(f"lora: alpha = {self.alpha!r}", expected="0 or more")
        if not isinstance(self.seed, int):
            raise ConfigError(f"lora: seed = {self.seed!r}", expected="a whole number")
        good = isinstance(self.targets, list | tuple)
        if not good or not all(isinstance(name, str) for name in self.targets):
            raise ConfigError(
                f"lora: targets = {self.targets!r}", expected="a list of names of layers"
            )
        object.__setattr__(self, "targets", tuple(self.targets))  # JSON makes lists of them


log = logging.getLogger(__name__)


# ---- adapters ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Put:
    """What was changed in a model."""

    layers: dict[str, nn.Linear]
    wanted: list[nn.Parameter]
    """Parameters that were trained before."""


class Lora(Method):
    """Adapters beside frozen weights."""

    name = "lora"
    promises = Promises(
        fidelity="structural",
        applies_to="adapters",
        saved_grows_with=frozenset({"depth", "batch", "length"}),
        changes_weights=True,
    )
    Config = LoraConfig

    def apply(self, model: nn.Module, config: LoraConfig) -> Undo:
        """Freeze the model and put adapters in, in place; the result takes them out and forgets
        them (see `merge`). Their names are peft's: `...q_proj.lora_A.default.weight`.

        ConfigError without peft (or bitsandbytes, for a quantised base). StackError for a model
        without such layers, with adapters already, or with gradients.
        """
        _refuse_missing("peft", "pip install 'shoestring[peft]'")
        if config.base == "nf4":
            check_library()
        put = _Put(_layers(model, config), [p for p in model.parameters() if p.requires_grad])
        if any(p.grad is not None for p in model.parameters()):
            raise StackError(
                f"{type(model).__name__} has gradients",
                expected="a model between two steps",
                hint="optimizer.zero_grad(set_to_none=True) first.",
            )
        decode: list[Undo] = []

        def undo() -> None:
            _take_out(model, put)
            for each in decode:
                each()
            for parameter in put.wanted:
                parameter.requires_grad_(True)

        try:
            model.requires_grad_(False)
            _inject(model, put, config)
            if config.base != "float":  # last, as codes lose what they do not hold
                decode.append(keep_in_codes(put.layers.values(), config.base))
        except BaseException:
            undo()
            raise
        return undo


def merge(model: nn.Module) -> int:
    """Add what adapters have learned to the weights beside them, which stay changed when the
    adapters are taken out; says how many there were. A quantised weight is decoded for it.

    StackError for a model without adapters. A second call adds nothing.
    """
    merged = 0
    for module in model.modules():
        if _is_adapted(module):
            layer: Any = module
            decode_layer(layer.base_layer)
            if not layer.merged:
                layer.merge()
            merged += 1
    if not merged:
        raise StackError(
            f"{type(model).__name__} has no adapters", expected="a model that lora was applied to"
        )
    return merged


def _layers(model: nn.Module, config: LoraConfig) -> dict[str, nn.Linear]:
    """The linear layers of the blocks that are meant, by name in the model."""
    stack = Stack.of(model)
    inside = {id(m) for block in stack.blocks for m in block.modules()}
    shared = _shared(model)
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if _is_adapted(module):
            raise StackError(
                f"{name} has an adapter already", expected="a model without",
                hint="Plan it as it is: adapters that are there are what is trained.",
            )  # fmt: skip
        if id(module) not in inside or type(module) is not nn.Linear:
            continue
        if "forward" in module.__dict__ or id(module.weight) in shared:
            continue
        if not config.targets or name.rpartition(".")[2] in config.targets:
            found[name] = module
    if not found:
        wanted = f" called {list(config.targets)}" if config.targets else ""
        raise StackError(
            f"the blocks of {type(model).__name__} have no linear layers{wanted}",
            expected="torch.nn.Linear inside blocks",
        )
    return found


def _shared(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    twice: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def _inject(model: nn.Module, put: _Put, config: LoraConfig) -> None:
    from peft import LoraConfig as Theirs
    from peft import inject_adapter_in_model

    theirs = Theirs(
        r=config.rank, lora_alpha=config.alpha or 2 * config.rank,
        target_modules=list(put.layers), bias="none",
    )  # fmt: skip
    weights = [layer.weight for layer in put.layers.values()]
    # Where one block is timed all others have no data, and peft leaves there what is made there.
    device = next((w.device for w in weights if not w.is_meta), weights[0].device)
    is_fake = isinstance(weights[0], FakeTensor)
    with (
        _drawn_from(config.seed), warnings.catch_warnings(), torch.device(device),
        _left_where_made() if is_fake else contextlib.nullcontext(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        inject_adapter_in_model(theirs, model)
    _say_adapted(model, adapted=True)
    adapters = [p for n, p in model.named_parameters() if ".lora_" in n]
    for adapter in adapters:
        # Codes are whole numbers, and 16 bits are too few to add small updates to.
        if adapter.dtype != torch.float32:
            adapter.data = adapter.data.float()
        adapter.requires_grad_(True)


def _take_out(model: nn.Module, put: _Put) -> None:
    if any(_has_learned(module) for module in model.modules()):
        log.warning(
            "adapters that were trained are taken out and forgotten: "
            "shoestring.methods.lora.merge(model) before that keeps what they learned"
        )
    for name, layer in put.layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    with contextlib.suppress(AttributeError):
        del model.peft_config
    _say_adapted(model, adapted=False)


def _say_adapted(model: Any, *, adapted: bool) -> None:
    """transformers' save_pretrained then writes the adapters, as PeftModel.from_pretrained reads
    them."""
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = adapted


def _has_learned(module: nn.Module) -> bool:
    """Whether there is an adapter that does something and is not in the weights."""
    if not _is_adapted(module):
        return False
    layer: Any = module
    b = layer.lora_B["default"].weight
    if isinstance(b, FakeTensor) or b.is_meta or layer.merged:
        return False
    return bool(b.detach().any())


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


@contextlib.contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _left_where_made() -> Iterator[None]:
    """peft moves modules, which fake tensors do not bear; they are made in the right place."""
    original = nn.Module.to
    nn.Module.to = lambda self, *arguments, **settings: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]


def _refuse_missing(package: str, how: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"lora needs {package}, which is not installed", expected=package, hint=how
        )
