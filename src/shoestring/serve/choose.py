"""Which form a cache takes: from bits that are given, or the best one for a budget of bytes.

A budget is met by giving bits where they save the most. The squared error of a coordinate of b bits
is D(b) of its variance (`ops.row_code.error`), and w D(b) nats for a group of weight w; a bit more
for a group costs a byte for every token of its tier. Since D is convex, taking steps in order of
nats saved for a byte is the best there is, for all tiers, layers, heads and groups together
(Shoham and Gersho, 1988).

Forms of the same settings are made once: their tables are what all caches of a model share.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import ConfigError, ShoestringError
from ..ops.row_code import GROUP, RowCode, error, padded
from ..units import parse_bytes
from .calibration import BANDS, Calibration, stretched
from .config import check_count, numbers, shapes
from .form import LayerForm, Tier, Turn, layer_bytes
from .store import room_for

# H heads, d width, g = d / 8 groups; side 0 keys, side 1 values

_Widths = tuple[tuple[int, int], ...]
_KEPT = 16  # forms of different settings

LEAST_MEAN = 16
"""Keys that a mean is worth being taken of."""
LEAST_WIDTH = 3
"""Numbers that a rotation makes alike."""
LEAST_BITS, LEAST_PLAIN_BITS = 0.5, 2.0
"""Of a number, in the mean. Without a calibration directions are lost at random, and with less than
two bits a model says nothing any more."""
MOST_BITS = 8
SCALE_BYTES = (2, 2, 2, 1)
"""Of a calibrated tier's scales: far coordinates have few levels, in which a coarse one is lost."""
SHORT_WINDOW = 32
"""Exact tokens where a budget is to be met without a calibration."""
KEYS_TO_VALUES = 8.0
"""How much more an error of a key counts then: one and a half bits."""


def plain_forms(
    config: PreTrainedConfig,
    *,
    key_bits: int,
    value_bits: int,
    window: int,
    sinks: int,
    centre: bool,
    seed: int,
) -> list[LayerForm]:
    """For each layer of full attention: an exact window, then the same bits for all."""
    check_count("window", window)
    check_count("sinks", sinks)
    check_count("seed", seed)
    if not isinstance(centre, bool):
        raise ConfigError(f"centre = {centre!r}", expected="True or False")
    if centre and window < LEAST_MEAN:
        raise ConfigError(
            f"window = {window} with centre=True",
            expected=f"{LEAST_MEAN} or more: the mean is of as many keys as the window holds",
            hint="Take a longer window, or centre=False.",
        )
    widths = tuple(shapes(config))
    return list(_plain(widths, (key_bits, value_bits), window, sinks, centre, seed))


@lru_cache(maxsize=_KEPT, typed=True)
def _plain(
    widths: _Widths, bits: tuple[int, int], window: int, sinks: int, centre: bool, seed: int
) -> tuple[LayerForm, ...]:
    found = []
    for heads, width in widths:
        turn = random_turn(heads, width, seed)
        code = RowCode.uniform(heads, width, *bits)
        tiers = ([Tier(window, None)] if window else []) + [Tier(None, code)]
        found.append(LayerForm(heads, width, turn, tuple(tiers), sinks, centre))
    return tuple(found)


def budget_forms(
    config: PreTrainedConfig,
    budget: str | float,
    *,
    context: int,
    calibration: Calibration | None,
    sinks: int,
    seed: int,
    dtype: torch.dtype,
) -> list[LayerForm]:
    """The forms that lose the least with `budget` bytes a token, in the mean over `context` tokens,
    everything counted. ConfigError where that is less than the smallest form takes."""
    check_count("sinks", sinks)
    check_count("seed", seed)
    if not isinstance(context, int) or context <= SHORT_WINDOW:
        raise ConfigError(f"context = {context!r}", expected=f"more than {SHORT_WINDOW} tokens")
    total = bytes_a_token(budget, config) * context
    widths = tuple(shapes(config))
    return list(_budgeted(widths, total, context, calibration, sinks, seed, dtype))


@lru_cache(maxsize=_KEPT, typed=True)
def _budgeted(
    widths: _Widths,
    total: float,
    context: int,
    calibration: Calibration | None,
    sinks: int,
    seed: int,
    dtype: torch.dtype,
) -> tuple[LayerForm, ...]:
    """total: bytes of a whole context."""
    if calibration is None:
        parts = _plain_parts(widths, context, seed)
    else:
        parts = _calibrated_parts(len(widths), context, calibration)
    none = [[torch.zeros_like(w, dtype=torch.uint8) for w in each] for each in parts.weights]
    empty = _forms(parts, widths, sinks, none)
    fixed = sum(layer_bytes(form, context, 1, dtype) for form in empty)
    groups = sum(each[0].numel() for each in parts.weights)
    bits = LEAST_PLAIN_BITS if calibration is None else LEAST_BITS
    least = fixed + sum(parts.rooms) * groups * GROUP * bits / 8
    if total < least:
        raise ConfigError(
            f"a budget of {total / context:.0f} bytes a token over {context} tokens",
            expected=f"{int(-(-least // context))} or more: {fixed / context:.0f} go to scales, "
            "exact tokens and room to grow",
            hint="Take a longer context to spread them over"
            + (", or a calibration." if calibration is None else "."),
        )
    return _forms(parts, widths, sinks, allocate(parts.weights, parts.rooms, total - fixed))


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a form is made of, but for the bits. weights: of each layer (tiers, 2, H, g); turns: of
    each layer; tokens: of each coded tier, in a context; exact: tokens before them."""

    weights: list[Tensor]
    turns: list[Turn]
    tokens: list[int]
    scale_bytes: tuple[int, ...]
    exact: int

    @property
    def rooms(self) -> list[int]:
        """Tokens that each coded tier has room for; the last is not bounded, and grows."""
        return [*self.tokens[:-1], room_for(self.tokens[-1])]


def _calibrated_parts(layers: int, context: int, calibration: Calibration) -> _Parts:
    bands = [low for low in BANDS if low < context]
    tokens = [high - low for low, high in zip(bands, (*bands[1:], context), strict=True)]
    weights = [
        stretched(each, calibration.row, context)[: len(bands)] for each in calibration.weights
    ]
    turns = [calibration.turn(layer) for layer in range(layers)]
    return _Parts(weights, turns, tokens, SCALE_BYTES, 0)


def _plain_parts(widths: _Widths, context: int, seed: int) -> _Parts:
    """Keys count more than values, all else alike; a mean needs some exact tokens."""
    weights, turns = [], []
    for heads, width in widths:
        weight = torch.ones(1, 2, heads, padded(width) // GROUP)
        weight[:, 0] = KEYS_TO_VALUES
        weights.append(weight)
        turns.append(random_turn(heads, width, seed))
    return _Parts(weights, turns, [context - SHORT_WINDOW], (2,), SHORT_WINDOW)


def _forms(
    parts: _Parts, widths: _Widths, sinks: int, bits: list[list[Tensor]]
) -> tuple[LayerForm, ...]:  # fmt: skip
    found = []
    rooms = [*parts.tokens[:-1], None]
    for layer, (heads, width) in enumerate(widths):
        tiers = [Tier(parts.exact, None)] if parts.exact else []
        for tier, room in enumerate(rooms):
            weight = parts.weights[layer][tier].double().clamp_min(1e-12)
            tiers.append(Tier(room, RowCode(bits[layer][tier], weight, parts.scale_bytes[tier])))
        turn, centre = parts.turns[layer], parts.exact > 0
        found.append(LayerForm(heads, width, turn, tuple(tiers), sinks, centre))
    return tuple(found)


def allocate(weights: list[Tensor], tokens: list[int], total: float) -> list[list[Tensor]]:
    """weights: of each layer (tiers, 2, H, g), nats; tokens: of each tier; total: bytes for codes
    -> bits of each layer and tier, uint8 (2, H, g)."""
    flat = torch.cat([each.double().flatten(1) for each in weights], dim=1).numpy()
    errors = np.array([error(bits) for bits in range(MOST_BITS + 1)])
    room = np.array(tokens)[:, None, None]
    saved = flat[:, :, None] * -np.diff(errors) / room  # (tiers, groups, steps)
    order = np.argsort(-saved, axis=None, kind="stable")
    taken = np.zeros(saved.size, dtype=bool)
    spent = np.cumsum(np.broadcast_to(room, saved.shape).ravel()[order])
    taken[order[spent <= total]] = True
    bits = torch.from_numpy(taken.reshape(saved.shape).sum(-1).astype(np.uint8))
    found, at = [], 0
    for each in weights:
        size = each[0].numel()
        found.append([tier.view(each.shape[1:]).clone() for tier in bits[:, at : at + size]])
        at += size
    return found


def bytes_a_token(budget: str | float, config: PreTrainedConfig) -> float:
    """Of a budget as "4700B", as a count of bytes, or as "3.25bits" of each number. ConfigError for
    what is none of these."""
    wanted = 'bytes a token ("4700B"), or bits a number ("3.25bits")'
    if isinstance(budget, str) and budget.strip().endswith("bits"):
        try:
            bits = float(budget.strip().removesuffix("bits"))
        except ValueError:
            raise ConfigError(f"budget = {budget!r}", expected=wanted) from None
        found = bits * numbers(config) / 8
    else:
        try:
            found = parse_bytes(budget) if isinstance(budget, str) else float(budget)
        except (ShoestringError, TypeError, ValueError):
            raise ConfigError(f"budget = {budget!r}", expected=wanted) from None
    if not 0 < found < float("inf"):
        raise ConfigError(f"budget = {budget!r}", expected=wanted)
    return found


@cache
def random_turn(heads: int, width: int, seed: int) -> Turn:
    """One rotation for all; ConfigError for heads too narrow for one."""
    if width < LEAST_WIDTH:
        raise ConfigError(f"heads of width {width}", expected=f"{LEAST_WIDTH} or more")
    return Turn.random(heads, width, seed)
