"""Denoising by one block of layers of a pretrained decoder, beside its ordinary objective.

The text enters the block as two streams of S rows: clean rows, which are what the layers before
it made of the text (without a graph), and noised ones. Noised row i stands for the token that
*follows* i, which is what row i of a decoder predicts: z_i = y + sigma eps, y the input embedding
of token i + 1 at length 1, one sigma a sample, from the levels that the block owns. It sees
what clean row i sees, clean row i, and itself (`ops.block_masks`, shifted); clean rows see nothing
noised, so what they compute, and any cache of them, is as ever. Both streams have the same
positions. After the block come the model's own last norm, head and loss, on the noised rows alone:

    loss = mean over i of -log p(token i+1 | z_i, tokens <= i),   no weight: EDM's is of squares

The layers before the block run once without a graph, those after it not at all. So gradients,
states and activations are of one block. How it is done: for one forward of the model a station
stands in each layer's `forward`, around whatever runs the layer; the model's own code makes
positions, masks and the loss.

Below a sigma of about 1 / sqrt(2 ln V) the token can be read out of z, so a mean over levels says
little. Structural, and no objective to train a decoder with alone: it unlearns its own.
Source: DiffusionBlocks, arXiv 2506.14202, 5.4; Block Diffusion, 2503.09573 (mask). That noised
rows alone are modulated, starting from none, and that the prefix is deep, is ours.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError, StackError
from ..ops import preconditioning as ops
from ..ops.block_masks import block_mask
from ..ops.noise_levels import LogNormal, Partition
from ..stack import BlockCall, Stack, hidden_of, with_hidden
from . import next_token
from .scaffolding import NAME, Modulation, Scaffold, embeddings_of

# N texts, S tokens, D width

ATTENTION = ("sdpa", "eager")
"""Of transformers: those that use a mask (N, 1, rows, columns)."""


@dataclass(frozen=True, slots=True)
class Draw:
    """level (N,), float64; noise (N, S, D)."""

    level: Tensor
    noise: Tensor

    @classmethod
    def blank(cls, count: int, length: int, width: int) -> "Draw":
        """As large as a real one, to be planned with."""
        return cls(torch.ones(count, dtype=torch.float64), torch.zeros(count, length, width))


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderDenoising:
    """Which block owns which levels. ConfigError for levels that are no sigma."""

    partition: Partition

    def __post_init__(self) -> None:
        if not isinstance(self.partition.law, LogNormal):
            raise ConfigError(
                f"tokens with noise levels in {self.partition.law.kind}",
                expected="levels of kind sigma",
            )

    def draw(
        self, block: int, count: int, length: int, width: int, generator: torch.Generator
    ) -> Draw:
        """What one step of a block (1..B) needs beside the text."""
        level = self.partition.sample(block, count, generator)
        return Draw(level, torch.randn(count, length, width, generator=generator))

    def loss(self, model: Any, batch: next_token.Batch, block: int, draw: Draw) -> Tensor:
        """Mean nats a target, a scalar with its graph.

        batch: as for `next_token.loss`.  block: 1..B, the first layers first.
        StackError for a decoder that cannot be read as said above.
        """
        stack = Stack.of(model)
        self.partition.check_block(block)
        layers = len(stack) // self.partition.blocks
        start = (block - 1) * layers
        z, level = noised(model, batch["input_ids"], draw)
        scales = ops.edm_scales(level, z.shape[-1] ** -0.5)
        scaffold = scaffold_of(stack, start)
        rows, modulations = scaffold(ops.spread(scales.inner, z) * z, scales.noise)
        passing = _Passing(start, rows, modulations, attention_of(model))
        with _stations(stack, passing):
            return next_token.loss(model, batch)


def noised(model: Any, ids_NS: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """z (N, S, D) and sigma (N,), float32. The last row has no target: it is noise around
    whatever, and its loss is not asked for."""
    weight = embeddings_of(model).weight
    with torch.no_grad():
        y = F.normalize(F.embedding(ids_NS.roll(-1, dims=1), weight).float(), dim=-1)
        level = draw.level.to(y.device, torch.float32)
        return ops.edm_noised(y, draw.noise.to(y.device), level), level


def scaffold_of(stack: Stack, start: int) -> Scaffold:
    """Of the block that begins with layer `start`. StackError where there is none."""
    scaffold = getattr(stack.blocks[start], NAME, None)
    if not isinstance(scaffold, Scaffold):
        raise StackError(
            f"layer {start} of {stack!r} has no {NAME!r}",
            expected="a model that put_scaffolding has prepared for as many blocks",
        )
    return scaffold


def attention_of(model: Any) -> str:
    """The attention that the model runs. StackError for one that may not use a mask of rows and
    columns."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if name not in ATTENTION:
        raise StackError(
            f"{type(model).__name__} runs the attention {name!r}",
            expected=f"one of {list(ATTENTION)}, which use a mask of rows and columns",
            hint='Load it with attn_implementation="sdpa".',
        )
    return str(name)


# ---- one forward -------------------------------------------------------------------------------


@dataclass
class _Passing:
    """One forward of a model through one block, and what its stations share."""

    start: int
    rows: Tensor
    modulations: list[Modulation]
    attention: str
    output: Any = None
    """What the block's last layer returned: layers after it hand it on."""
    masks: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)
    """By the id of the model's own mask, which is held so that no other gets it."""

    def run(self, position: int, layer: nn.Module, inner: Any, args: Any, kwargs: Any) -> Any:
        """What layer `position` gives in this forward."""
        place = position - self.start
        if place < 0:
            with torch.no_grad():
                return inner(*args, **kwargs)
        call = BlockCall.bind(inner, (), named(layer, args, kwargs))
        hidden = call.hidden
        assert hidden is not None
        if place >= len(self.modulations):
            return with_hidden(self.output, hidden)
        length = self.rows.shape[1]
        if place == 0:
            hidden = torch.cat((hidden.detach(), self.rows.to(hidden.dtype)), dim=1)
        call.kwargs = self.twofold(layer, call.kwargs, length, hidden.dtype)
        output = modulated(call, hidden, length, self.modulations[place])
        if place == len(self.modulations) - 1:
            self.output = output = with_hidden(output, hidden_of(output)[:, length:])
        return output

    def twofold(
        self, layer: nn.Module, given: dict[str, Any], length: int, dtype: torch.dtype
    ) -> dict[str, Any]:
        """A layer's other arguments, for both streams."""
        kind = type(layer).__name__
        if not isinstance(given.get("position_embeddings"), tuple | list):
            raise StackError(
                f"{kind} is called with {', '.join(given)}: positions of noised rows cannot be "
                "given to it",
                expected="position_embeddings (cosines and sines), as rotary decoders have them",
            )
        made = dict(given)
        for name, value in given.items():
            if name == "attention_mask":
                made[name] = self.mask(value, kind, length, dtype)
            elif name == "position_embeddings":
                made[name] = tuple(torch.cat((part, part), dim=-2) for part in value)
            elif name in ("position_ids", "cache_position") and isinstance(value, Tensor):
                made[name] = torch.cat((value, value), dim=-1)
            elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                raise StackError(
                    f"{kind} is called with a tensor {name!r}, whose rows for noised tokens are "
                    "not known",
                    expected="attention_mask, position_embeddings, position_ids, cache_position",
                )
        return made

    def mask(self, own: Any, kind: str, length: int, dtype: torch.dtype) -> Tensor:
        """For both streams, out of the model's own (None: causal). Once for all layers."""
        if id(own) not in self.masks:
            made = two_streams(own, kind, length, self.rows.device)
            if self.attention == "eager" and made.dtype == torch.bool:
                made = torch.where(made, 0.0, torch.finfo(dtype).min).to(dtype)
            self.masks[id(own)] = (own, made)
        return self.masks[id(own)][1]


def two_streams(own: Any, kind: str, length: int, device: torch.device) -> Tensor:
    """The mask (N or 1, 1, 2 S, 2 S) of clean and noised rows: bool, or added to the scores, as
    the model's own is. A noised row sees what the clean row of its position does (padding and
    windows too), and itself; no other noised row, and no clean row sees one.

    own: (N, 1, S, S), or None where the model is plainly causal. StackError for anything else.
    """
    if own is None:
        return block_mask(length, shifted=True, device=device)[None, None]
    if not isinstance(own, Tensor) or own.dim() != 4 or own.shape[-2:] != (length, length):
        shape = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
        raise StackError(
            f"{kind} is called with an attention mask {shape}",
            expected=f"one of (texts, 1 or heads, {length}, {length}), or none",
        )
    if own.dtype == torch.bool:
        none, itself = torch.zeros_like(own), torch.eye(length, dtype=torch.bool, device=device)
    else:
        none = torch.full_like(own, torch.finfo(own.dtype).min)
        itself = none[0, 0].clone().fill_diagonal_(0.0)
    clean = torch.cat((own, none), dim=-1)
    return torch.cat((clean, torch.cat((own, itself.expand_as(own)), dim=-1)), dim=-2)


def modulated(call: BlockCall, hidden: Tensor, length: int, how: Modulation) -> Any:
    """A layer on both streams; its branch's input and output modulated on the noised rows, n:
    with x = n (1 + scale) + shift, n + (1 + gate) (layer(x) - x). Nothing is added up where the
    modulation is 0, so that a layer is itself then."""
    shift, scale, gate = (part.to(hidden.dtype) for part in how)
    clean, rows = hidden[:, :length], hidden[:, length:]
    x = rows * (1 + scale) + shift
    output = call(torch.cat((clean, x), dim=1))
    both = hidden_of(output)
    changed = both[:, length:] + (rows - x) + gate * (both[:, length:] - x)
    return with_hidden(output, torch.cat((both[:, :length], changed), dim=1))


def named(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer's call by name."""
    signature = inspect.signature(type(layer).forward)
    bound = signature.bind(layer, *args, **kwargs).arguments
    found: dict[str, Any] = {}
    for place, (name, value) in enumerate(bound.items()):
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise StackError(
                f"{type(layer).__name__} is called with arguments that have no names",
                expected="a layer whose forward names its arguments",
            )
        elif place:  # the first is the layer
            found[name] = value
    return found


@contextlib.contextmanager
def _stations(stack: Stack, passing: _Passing) -> Iterator[None]:
    """Every layer runs by way of `passing`, around what runs it otherwise."""
    before = [layer.__dict__.get("forward") for layer in stack.blocks]
    try:
        for position, layer in enumerate(stack.blocks):
            inner = before[position] or type(layer).forward.__get__(layer)
            layer.__dict__["forward"] = _station(passing, position, layer, inner)
        yield
    finally:
        for layer, forward in zip(stack.blocks, before, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = forward


def _station(passing: _Passing, position: int, layer: nn.Module, inner: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return passing.run(position, layer, inner, args, kwargs)

    return forward
