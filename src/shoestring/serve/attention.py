"""Attention over a compressed cache, for `transformers`' AttentionInterface.

A query is turned once. Its products with the keys are taken where the codes lie, and the weighted
sum of values is turned back once, so no key or value ever is (z = A (x - mu) is what is coded):

    s_t = <A^-T q, z_t> + <q, mu>        out = A'^-1 sum_t a_t z'_t + mu' sum_t a_t

Codes are decoded a block of tokens at a time. Sinks, codes and exact tokens share one softmax, kept
as a running maximum, mass and sum (Milakov and Gimelshein, arXiv 1805.02867), in float32. Newest
tokens see each other exactly, however many come at a time; until something is coded it is torch's
own attention on the tokens as they are.

What comes without our cache (sliding layers, no cache) goes to torch's attention as well, so a
model may stay attached.
"""

import weakref
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import ConfigError, StackError
from ..ops import row_kernel
from ..ops.row_code import RowCode
from . import coding
from .config import PLAIN
from .layer import PAYLOAD, CompressedLayer, Part, split

# B rows of the batch, H heads of keys, G heads of queries for each, m queries, n slots, t tokens

NAME = "shoestring_compressed"
BLOCK = 256
"""Tokens that are decoded at a time."""
FEW = 16
"""Queries up to which the compiled kernel is faster than matrix products of decoded blocks."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, G H, m, d) -> (B, m, G H, d), None. ConfigError for what changes scores in a way
    that this does not compute: soft caps, sinks as parameters, position biases, dropout."""
    layer = getattr(key, PAYLOAD, None)
    for name, what in _NOT_COMPUTED.items():
        if kwargs.get(name) is not None:
            raise ConfigError(f"{type(module).__name__} uses {what}", expected=PLAIN)
    if layer is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    if kwargs.get("output_attentions"):
        raise ConfigError("output_attentions over codes", expected="none: they are never made")
    if dropout:
        raise ConfigError(f"dropout of {dropout} in attention over codes", expected="model.eval()")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    wanted = (query.shape[2], layer.get_seq_length())
    if attention_mask is not None and attention_mask.shape[-2:] != wanted:
        layer.refuse()
        raise ConfigError(
            f"a mask of {tuple(attention_mask.shape[-2:])} queries and tokens", expected=str(wanted)
        )
    out = attend(query, layer, attention_mask, scaling)
    layer.attended(attention_mask)
    return out.transpose(1, 2).contiguous(), None


_NOT_COMPUTED = {
    "softcap": "a soft cap on scores", "s_aux": "attention sinks that are parameters",
    "position_bias": "a bias on scores",
}  # fmt: skip

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


_BEFORE = "_shoestring_attention_before"


class Attached:
    """A model whose attention is ours, until `detach` or the end of a `with`."""

    def __init__(self, model: nn.Module) -> None:
        check_model(model)
        self.model: Any = model
        now = _implementation(model)
        # Attached already: what was there before that is what comes back.
        self.before = getattr(model, _BEFORE, "sdpa") if now == NAME else now
        setattr(model, _BEFORE, self.before)
        self._set(NAME)
        if _implementation(model) != NAME:
            raise StackError(
                f"{type(model).__name__} does not let its attention be replaced",
                expected="a model that takes its attention from transformers' AttentionInterface",
            )

    def detach(self) -> None:
        """The attention that was there before is back."""
        self._set(self.before)

    def _set(self, name: str) -> None:
        if _implementation(self.model) != name:
            self.model.set_attn_implementation(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(model: nn.Module) -> Attached:
    """Makes the model's attention ours, at once. ConfigError or StackError where it cannot be."""
    return Attached(model)


def check_model(model: nn.Module) -> None:
    """ConfigError for attention with sinks as parameters, StackError for no transformers model."""
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        raise StackError(
            f"the attention of a {type(model).__name__} cannot be set",
            expected="a transformers model",
        )
    for name, module in model.named_modules():
        if isinstance(getattr(module, "sinks", None), nn.Parameter):
            raise ConfigError(f"{name} has {_NOT_COMPUTED['s_aux']}", expected=PLAIN)


def _implementation(model: Any) -> str:
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


# ---- the computation ---------------------------------------------------------------------------


class _Softmax:
    """Weighted sums of values under a softmax that is still growing. rows: (B, H, G m)."""

    def __init__(self, query: Tensor, width: int) -> None:
        rows = query.shape[:3]
        self.high = query.new_full((*rows, 1), -torch.inf)
        self.mass = query.new_zeros(*rows, 1)
        self.total = query.new_zeros(*rows, width)

    def add(self, scores: Tensor, values: Tensor) -> None:
        """scores (B, H, G m, t), values (B, H, t, d)."""
        high = torch.maximum(self.high, scores.amax(-1, keepdim=True))
        at = torch.where(high.isfinite(), high, 0.0)  # rows that have seen nothing yet
        weights, kept = (scores - at).exp(), (self.high - at).exp()
        self.mass = self.mass * kept + weights.sum(-1, keepdim=True)
        self.total = self.total * kept + weights @ values
        self.high = high

    def result(self) -> Tensor:
        """(B, H, G m, d); zeros for rows that see nothing, as torch has it."""
        return torch.where(self.mass > 0, self.total / self.mass, 0.0)


def attend(query: Tensor, layer: CompressedLayer, mask: Tensor | None, scaling: float) -> Tensor:
    """query (B, G H, m, d) of the newest tokens, mask (B, heads or 1, m, n) boolean or added, None
    for a causal one -> (B, G H, m, d). The layer is not changed."""
    assert layer.fresh is not None
    keys, values = layer.fresh
    m, n = query.shape[2], layer.get_seq_length()
    groups = query.shape[1] // layer.form.heads
    parts = layer.parts()
    coded = [part for part in parts if part.code is not None]
    exact = [part for part in parts if part.code is None]
    if coded and m <= FEW and coding.kernel_takes(keys) and _is_plain(mask, layer, m, n):
        return _by_kernel(query, layer, parts, scaling)
    if (
        coded
        and m == 1
        and query.is_cuda
        and coding.without_triton() is None
        and _is_plain(mask, layer, m, n)
    ):
        return _by_triton(query, layer, parts, scaling)
    if mask is None and (m > 1 or max(layer.starts) > 0):
        mask = torch.ones(m, n, dtype=torch.bool, device=query.device).tril(n - m)[None, None]
        mask = mask & (torch.arange(n, device=query.device) >= _begins(layer)[:, None, None, None])
    if not coded:
        pairs = [split(part.rows, layer.form.heads) for part in exact] + [(keys, values)]
        keys, values = (torch.cat(each, dim=2) for each in zip(*pairs, strict=True))
        return nn.functional.scaled_dot_product_attention(
            query, keys, values, mask, scale=scaling, enable_gqa=groups > 1
        )
    q = (query.float() * scaling).unflatten(1, (layer.form.heads, groups)).flatten(2, 3)
    softmax = _over_codes(q, layer, coded, mask, m)
    _add_sinks(softmax, q, layer, mask, m)
    for part in exact:
        _add_exact(softmax, q, layer, part, mask, m)
    shown = None if mask is None else mask[..., n - keys.shape[2] :]
    softmax.add(_masked(q @ keys.float().mT, shown, m), values.float())
    out = softmax.result().unflatten(2, (groups, m)).flatten(1, 2)
    return out.to(query.dtype)


def _begins(layer: CompressedLayer) -> Tensor:
    """(B,), the slot of each row's first token."""
    return torch.tensor(layer.starts, device=layer.device)


def _by_kernel(
    query: Tensor, layer: CompressedLayer, parts: list[Part], scaling: float
) -> Tensor:  # fmt: skip
    assert layer.fresh is not None
    assert layer.sinks is not None
    _, inverse = layer.form.turn.to(query.device)
    basis = row_kernel.Basis(inverse, _mean_or_zeros(layer))
    segments = [
        row_kernel.Segment(None if code is None else coding.kernel_code(code), rows, visible)
        for code, rows, visible in _segments(layer, parts)
    ]
    out = row_kernel.attend(
        query.float(), *layer.fresh, segments, basis, scaling, threads=torch.get_num_threads()
    )
    return out.to(query.dtype).transpose(1, 2)


def _by_triton(
    query: Tensor, layer: CompressedLayer, parts: list[Part], scaling: float
) -> Tensor:  # fmt: skip
    from ..ops import row_triton

    assert layer.fresh is not None
    _, inverse = layer.form.turn.to(query.device)
    segments = [
        row_triton.TritonSegment(
            None if code is None else coding.triton_code(code, query.device), rows, visible
        )
        for code, rows, visible in _segments(layer, parts)
    ]
    out = row_triton.attend(
        query.float(), *layer.fresh, segments, inverse, _mean_or_zeros(layer), scaling
    )
    return out.to(query.dtype).transpose(1, 2)


def _segments(
    layer: CompressedLayer, parts: list[Part]
) -> Iterator[tuple[RowCode | None, Tensor, Tensor | None]]:
    """Code, rows, and which of them each batch row sees (B, 2), None for all: not padding, and
    sinks apart."""
    assert layer.sinks is not None
    begins = [start + layer.form.sinks for start in layer.starts]
    oldest = max(begins)
    for part in parts:
        count, visible = part.rows.shape[1], None
        if oldest > part.first:
            seen = [[min(max(begin - part.first, 0), count), count] for begin in begins]
            visible = torch.tensor(seen, device=part.rows.device)
        yield part.code, part.rows, visible
    if layer.form.sinks:
        there = [[0, count] for count in layer.sinks_there()]
        yield None, layer.sinks, torch.tensor(there, device=layer.sinks.device)


def _mean_or_zeros(layer: CompressedLayer) -> Tensor:
    """(2, B or 1, H, d) float32."""
    mean = layer.mean()
    return (layer.form.turn.no_mean().to(layer.device) if mean is None else mean).float()


def _is_plain(mask: Tensor | None, layer: CompressedLayer, m: int, n: int) -> bool:
    """Whether a mask hides what comes later and padding in front, and no more. All layers get the
    same mask, which is looked at once."""
    if max(layer.starts) >= layer.settled:
        return False  # where rows begin is not known yet
    if mask is None:
        return True
    # Tensors of inference mode have no version.
    key = (tuple(layer.starts), m, n, 0 if mask.is_inference() else mask._version)
    seen = _SEEN.get("last")
    if seen is not None and seen[0]() is mask and seen[1] == key:
        return bool(seen[2])
    plain = mask.dtype == torch.bool and mask.shape[1] == 1
    if plain:
        slots = torch.arange(n, device=mask.device)
        wanted = slots >= torch.tensor(layer.starts, device=mask.device)[:, None, None]
        wanted = wanted & (slots <= slots[n - m :, None])
        plain = bool((mask[:, 0] == wanted).all())
    _SEEN["last"] = (weakref.ref(mask), key, plain)
    return plain


_SEEN: dict[str, tuple[weakref.ref[Tensor], object, bool]] = {}


def _over_codes(
    q: Tensor, layer: CompressedLayer, parts: list[Part], mask: Tensor | None, m: int
) -> _Softmax:
    """What the coded tokens give, turned back."""
    _, inverse = layer.form.turn.to(q.device)
    turned, mean = q @ inverse[0], layer.mean()
    softmax = _Softmax(q, turned.shape[-1])
    moved = None if mean is None else (q * mean[0].float().unsqueeze(2)).sum(-1, keepdim=True)
    for part in parts:
        assert part.code is not None
        for at in range(0, part.rows.shape[1], BLOCK):
            z = coding.decode(part.rows[:, at : at + BLOCK], part.code)
            scores = turned @ z[:, 0].mT
            scores = scores if moved is None else scores + moved
            softmax.add(_shown(scores, layer, part.first + at, mask, m), z[:, 1])
    softmax.total = softmax.total @ inverse[1].mT
    if mean is not None:
        softmax.total = softmax.total + softmax.mass * mean[1].float().unsqueeze(2)
    return softmax


def _add_exact(
    softmax: _Softmax, q: Tensor, layer: CompressedLayer, part: Part, mask: Tensor | None, m: int
) -> None:
    for at in range(0, part.rows.shape[1], BLOCK):
        keys, values = split(part.rows[:, at : at + BLOCK], layer.form.heads)
        scores = q @ keys.float().mT
        softmax.add(_shown(scores, layer, part.first + at, mask, m), values.float())


def _add_sinks(
    softmax: _Softmax, q: Tensor, layer: CompressedLayer, mask: Tensor | None, m: int
) -> None:
    assert layer.sinks is not None
    if not layer.form.sinks:
        return
    keys, values = split(layer.sinks, layer.form.heads)
    starts = torch.tensor(layer.starts, device=q.device)
    places = torch.arange(layer.form.sinks, device=q.device)
    there = places < torch.tensor(layer.sinks_there(), device=q.device)[:, None]
    scores = q @ keys.float().mT
    if mask is not None:
        mask = mask.expand(len(starts), -1, -1, -1)
        slots = (starts[:, None] + places).clamp(max=mask.shape[-1] - 1)
        scores = _masked(
            scores, mask.gather(-1, slots[:, None, None].expand(*mask.shape[:3], -1)), m
        )
    softmax.add(scores.masked_fill(~there[:, None, None], -torch.inf), values.float())


def _shown(
    scores: Tensor, layer: CompressedLayer, first: int, mask: Tensor | None, m: int
) -> Tensor:
    """Scores (B, H, G m, t) of tokens in tiers, from slot `first` on, without those of padding, of
    sinks, which are attended to apart, and of what the mask hides."""
    stop = first + scores.shape[-1]
    if mask is not None:
        scores = _masked(scores, mask[..., first:stop], m)
    begins = [start + layer.form.sinks for start in layer.starts]
    if max(begins) > first:
        slots = torch.arange(first, stop, device=scores.device)
        hidden = slots < torch.tensor(begins, device=scores.device)[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    return scores


def _masked(scores: Tensor, mask: Tensor | None, m: int) -> Tensor:
    """scores (B, H, G m, t), mask (B or 1, H G or 1, m, t)."""
    if mask is None:
        return scores
    H = scores.shape[1]
    mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (H, -1))
    apart = scores.unflatten(2, (-1, m))
    if mask.dtype == torch.bool:
        return apart.masked_fill(~mask, -torch.inf).flatten(2, 3)
    return (apart + mask).flatten(2, 3)


# ---- twin --------------------------------------------------------------------------------------


def attended_ref(
    query: Tensor, layer: CompressedLayer, mask: Tensor | None, scaling: float
) -> Tensor:
    """Twin of `attend`: everything decoded, one softmax over it, row by row in float64."""
    assert layer.fresh is not None
    (B, heads, m, _), n = query.shape, layer.get_seq_length()
    pairs, mean = [], layer.mean()
    for part in layer.parts():
        if part.code is None:
            pairs.append([x.double() for x in split(part.rows, layer.form.heads)])
            continue
        z = part.code.decode(part.rows, torch.float64).transpose(0, 1)  # (2, B, H, n, D)
        x = z @ layer.form.turn.inverse.double()[:, None].mT
        pairs.append(list(x if mean is None else x + mean.unsqueeze(3)))
    pairs.append([x.double() for x in layer.fresh])
    keys, values = (torch.cat(each, dim=2) for each in zip(*pairs, strict=True))
    assert layer.sinks is not None
    sink_keys, sink_values = split(layer.sinks, layer.form.heads)
    for row, there in enumerate(layer.sinks_there()):
        at = layer.starts[row]
        keys[row, :, at : at + there] = sink_keys[row, :, :there].double()
        values[row, :, at : at + there] = sink_values[row, :, :there].double()
    if mask is None:
        mask = torch.ones(m, n, dtype=torch.bool).tril(n - m)[None, None]
    mask = mask.expand(B, heads, m, n)
    out = torch.zeros(B, heads, m, values.shape[-1], dtype=torch.float64)
    for row in range(B):
        for head in range(heads):
            at = head * keys.shape[1] // heads
            scores = query[row, head].double() @ keys[row, at].T * scaling
            scores = (
                scores.masked_fill(~mask[row, head], -torch.inf)
                if mask.dtype == torch.bool
                else scores + mask[row, head]
            )
            out[row, head] = torch.nan_to_num(scores.softmax(-1)) @ values[row, at]
    return out
