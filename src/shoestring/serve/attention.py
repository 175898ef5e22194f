"""Attention over a compressed cache, for `transformers`' AttentionInterface.

A query is rotated once. Its products with the keys are taken where the codes lie, and the weighted
sum of values is rotated back once, so no key or value ever is:

    s_t = scale |k_t - mu| <R q, c_t>        out = R^T sum_t a_t |v_t| c'_t

Codes are decoded a block of tokens at a time. Sinks, codes and exact tokens share one softmax, kept
as a running maximum, mass and sum (Milakov and Gimelshein, arXiv 1805.02867), in float32. The mean
key mu is taken from exact keys and sinks too. Newest tokens see each other exactly, however many
come at a time; until something is coded it is torch's own attention on the tokens as they are.

What comes without our cache (sliding layers, no cache) goes to torch's attention as well, so a
model may stay attached.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import ConfigError, StackError
from .layer import PAYLOAD, CompressedLayer
from .store import BLOCK

# B rows of the batch, H heads of keys, G heads of queries for each, m queries, n slots, t tokens

NAME = "shoestring_compressed"


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
            raise ConfigError(f"{type(module).__name__} uses {what}", expected=_PLAIN)
    if layer is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    if dropout:
        raise ConfigError(f"dropout of {dropout} in attention over codes", expected="model.eval()")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(query, layer, attention_mask, scaling)
    layer.attended(attention_mask)
    return out.transpose(1, 2).contiguous(), None


_NOT_COMPUTED = {
    "softcap": "a soft cap on scores", "s_aux": "attention sinks that are parameters",
    "position_bias": "a bias on scores",
}  # fmt: skip
_PLAIN = "plain scaled dot products, for a compressed cache"

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class Attached:
    """A model whose attention is ours, until `detach` or the end of a `with`."""

    def __init__(self, model: nn.Module) -> None:
        check_model(model)
        self.model: Any = model
        self.before = _implementation(model)
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
            raise ConfigError(f"{name} has {_NOT_COMPUTED['s_aux']}", expected=_PLAIN)


def check_config(config: Any) -> None:
    """ConfigError for a text config whose scores are capped."""
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:
        raise ConfigError(
            f"attn_logit_softcapping = {cap}: {_NOT_COMPUTED['softcap']}", expected=_PLAIN
        )


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
    coded, recent = layer.coded, layer.recent
    assert coded is not None
    assert recent is not None
    m, n = query.shape[2], layer.get_seq_length()
    H, groups = recent.keys.shape[1], query.shape[1] // recent.keys.shape[1]
    if mask is None and m > 1:
        mask = torch.ones(m, n, dtype=torch.bool, device=query.device).tril(n - m)[None, None]
    if not len(coded):
        return nn.functional.scaled_dot_product_attention(
            query, recent.keys, recent.values, mask, scale=scaling, enable_gqa=groups > 1
        )
    q = (query.float() * scaling).unflatten(1, (H, groups)).flatten(2, 3)
    softmax = _Softmax(q, recent.values.shape[-1])
    _add_codes(softmax, q, layer, mask, m)
    softmax.total = coded.codes[1].rotate.inverse(softmax.total)
    if layer.sinks:
        _add_sinks(softmax, q, layer, mask, m)
    for start in range(0, len(recent), BLOCK):
        keys = _centred(recent.keys[:, :, start : start + BLOCK], layer)
        values = recent.values[:, :, start : start + BLOCK]
        first = len(coded) + start
        part = None if mask is None else mask[..., first : first + keys.shape[2]]
        softmax.add(_masked(q @ keys.mT, part, m), values.float())
    out = softmax.result().unflatten(2, (groups, m)).flatten(1, 2)
    return out.to(query.dtype)


def _add_codes(
    softmax: _Softmax, q: Tensor, layer: CompressedLayer, mask: Tensor | None, m: int
) -> None:
    assert layer.coded is not None
    key_code, value_code = layer.coded.codes
    turned = key_code.rotate(q)
    begin, end = layer.sinks and min(layer.starts), max(layer.starts) + layer.sinks
    slots = layer.sink_slots()
    for first, keys, values in layer.coded.tiles():
        count = keys.scale.shape[2]
        part = None if mask is None else mask[..., first : first + count]
        scores = _masked(turned @ key_code.rotated(keys).mT, part, m)
        if layer.sinks and first < end and begin < first + count:
            places = torch.arange(first, first + count, device=q.device)
            hidden = (places[None, :, None] == slots[:, None]).any(-1)
            scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        softmax.add(scores, value_code.rotated(values))


def _add_sinks(
    softmax: _Softmax, q: Tensor, layer: CompressedLayer, mask: Tensor | None, m: int
) -> None:
    assert layer.coded is not None
    assert layer.sink_keys is not None
    assert layer.sink_values is not None
    slots, n = layer.sink_slots(), layer.get_seq_length()
    scores = q @ _centred(layer.sink_keys, layer).mT
    if mask is not None:
        mask = mask.expand(len(slots), -1, -1, -1)
        where = slots.clamp(max=n - 1)[:, None, None].expand(*mask.shape[:3], -1)
        scores = _masked(scores, mask.gather(-1, where), m)
    there = (slots < len(layer.coded))[:, None, None]  # the others are among the exact ones
    softmax.add(scores.masked_fill(~there, -torch.inf), layer.sink_values.float())


def _centred(keys: Tensor, layer: CompressedLayer) -> Tensor:
    return keys.float() if layer.mean is None else keys.float() - layer.mean


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
    assert layer.coded is not None
    assert layer.recent is not None
    assert layer.sink_keys is not None
    assert layer.sink_values is not None
    (B, heads, m, _), n = query.shape, layer.get_seq_length()
    keys, values = layer.recent.keys.double(), layer.recent.values.double()
    if layer.mean is not None:
        keys = keys - layer.mean
    tiles = [
        (layer.coded.codes[0].decode(k), layer.coded.codes[1].decode(v))
        for _, k, v in layer.coded.tiles()
    ]
    keys = torch.cat([*(k.double() for k, _ in tiles), keys], dim=2)
    values = torch.cat([*(v.double() for _, v in tiles), values], dim=2)
    for row, start in enumerate(layer.starts):
        for index in range(layer.sinks):
            if start + index < len(layer.coded):
                sink = layer.sink_keys[row, :, index].double()
                keys[row, :, start + index] = (
                    sink if layer.mean is None else sink - layer.mean[row, :, 0]
                )
                values[row, :, start + index] = layer.sink_values[row, :, index].double()
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
