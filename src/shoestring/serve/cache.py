"""A context cache of a few bits a number, in one line of anybody's `generate`.

    model.generate(**inputs, past_key_values=CompressedCache(model))

Layers of full attention are ours (`layer`); all others, sliding and linear ones, stay
transformers' own. Given a model, the cache makes the model's attention ours; given a config,
`cache.attach(model)` does.
"""

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from ..errors import ConfigError, OutOfBudget
from ..units import format_bytes, parse_bytes
from . import prefix
from .attention import Attached, attach, check_model
from .calibration import Calibration
from .choose import budget_forms, plain_forms
from .config import check_count, text_config
from .form import layer_bytes
from .layer import CompressedLayer, check_crop


class CompressedCache(Cache):
    """config_or_model: of transformers.

    Either bits, which need no calibration:
    key_bits, value_bits: 1 to 8 for each number; keys need more than values in most models.
    window: newest tokens that stay exact.
    centre: take a mean key of each head from all keys alike, which no softmax sees.
    seed: of the random rotation.

    Or a budget (`budget`): "4700B" a token, or "3.25bits" a number, in the mean over a context of
    `context` tokens, everything counted. It is met by bits that differ with age, layer, head and
    direction as `calibration` (of this model) says they matter.

    dtype: of exact tokens, as a budget counts them; the model's where None.

    sinks: first tokens that stay exact.

    ConfigError, before anything is allocated, for settings or a model that cannot be.
    """

    def __init__(
        self,
        config_or_model: PreTrainedConfig | nn.Module,
        *,
        key_bits: int = 4,
        value_bits: int = 4,
        window: int = 128,
        sinks: int = 4,
        centre: bool = True,
        seed: int = 0,
        budget: str | float | None = None,
        context: int = 2048,
        calibration: Calibration | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        model = config_or_model if isinstance(config_or_model, nn.Module) else None
        if model is not None:
            check_model(model)
        config = text_config(config_or_model)
        if not isinstance(calibration, Calibration | None):
            raise ConfigError(
                f"calibration = {calibration!r:.80}", expected="a Calibration",
                hint="Calibration.load(directory) reads one.",
            )  # fmt: skip
        if budget is None and calibration is not None:
            raise ConfigError(
                "a calibration without a budget", expected='a budget too, such as "3.25bits"'
            )
        if calibration is not None:
            calibration.check(config_or_model)
        self.settings: dict[str, Any] = {"sinks": sinks, "seed": seed}
        if budget is not None:
            dtype = dtype or getattr(model, "dtype", None) or config.dtype or torch.float32
            named = str(dtype).removeprefix("torch.")
            self.settings |= {"budget": budget, "context": context, "dtype": named}
            self.forms = budget_forms(
                config, budget, context=context, calibration=calibration, sinks=sinks, seed=seed,
                dtype=dtype,
            )  # fmt: skip
        else:
            self.settings |= {
                "key_bits": key_bits, "value_bits": value_bits, "window": window, "centre": centre
            }  # fmt: skip
            self.forms = plain_forms(
                config, key_bits=key_bits, value_bits=value_bits, window=window, sinks=sinks,
                centre=centre, seed=seed,
            )  # fmt: skip
        self.calibrated_on = None if calibration is None else calibration.digest
        forms = iter(self.forms)
        super().__init__(
            layers=[
                CompressedLayer(next(forms))
                if kind == "full_attention"
                else DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs)
                for kind, kwargs in zip(*get_layer_types_and_kwargs(config), strict=True)
            ]
        )
        self._model = None if model is None else weakref.ref(model)
        if model is not None:
            attach(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # a copy need not know it

    def attach(self, model: nn.Module) -> Attached:
        """Makes the model's attention ours, at once; as a context, until its end."""
        return attach(model)

    def save(self, model: nn.Module, directory: str | Path, *, entropy: bool = True) -> None:
        """What was read, into a directory that appears whole or not: `load` takes it up again, bit
        for bit. entropy: a few percent less, and a little longer.

        ConfigError for a cache that is empty, or that has sliding or linear layers."""
        known = None if self._model is None else self._model()
        if known is not None and known is not model:
            raise ConfigError(
                "a prefix to be saved as another model's", expected="the model the cache is of"
            )
        prefix.save(self, model, directory, entropy=entropy)

    @classmethod
    def load(
        cls,
        model: nn.Module,
        directory: str | Path,
        *,
        calibration: Calibration | None = None,
    ) -> "CompressedCache":
        """What `save` kept. CheckpointError for a damaged directory; ConfigError where it is of
        another model or calibration."""
        kept = prefix.Prefix(directory)
        prefix.check_model(kept.facts, model)
        digest = None if calibration is None else calibration.digest
        if kept.facts.get("calibration") != digest:
            raise ConfigError(
                "the prefix was coded with "
                + ("another calibration" if kept.facts.get("calibration") else "no calibration"),
                expected="the calibration that it was made with, or none where there was none",
            )
        cache = cls(model, calibration=calibration, **kept.settings)
        kept.fill(cache, getattr(model, "device", None))
        return cache

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens away; 0 or negative. ConfigError, before any layer is changed,
        for a positive count, more than there are, and sliding layers that have let tokens go."""
        check_crop(tokens_to_remove, self.get_seq_length())
        for index, layer in enumerate(self.layers):
            if isinstance(layer, CompressedLayer):
                layer.check_whole()
                continue
            if not tokens_to_remove or getattr(layer, "record_past", False):
                continue
            if not getattr(layer, "is_sliding", False):
                if layer.is_croppable:
                    continue
                what = "has a state that holds them all"
            elif layer.get_seq_length() < layer.sliding_window:
                continue
            else:
                what = "is sliding and has let older tokens go"
            raise ConfigError(
                f"crop({tokens_to_remove}): layer {index} {what}",
                expected="activate_past_recording() before the tokens that are cropped",
            )
        super().crop(tokens_to_remove)

    @property
    def compressed(self) -> list[CompressedLayer]:
        """The layers that are ours."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @property
    def nbytes(self) -> int:
        """Of every tensor that the cache owns, those of other layers too; a storage counts once,
        and whole. Tables and the rotation, which all caches share, are not among them."""
        found: list[Tensor] = []
        for layer in self.layers:
            found += layer.tensors() if isinstance(layer, CompressedLayer) else _tensors(layer)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in found}
        return sum(storage.nbytes() for storage in storages.values())

    def bytes_per_token(self) -> int:
        """Bytes that one more token of one row takes in layers of full attention, once it is in
        the last tier: codes and scales."""
        return sum(form.tiers[-1].code.row_bytes for form in self.forms if form.tiers[-1].code)

    def bytes_at(
        self, tokens: int, *, batch: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:  # fmt: skip
        """Bytes of the layers of full attention with that many tokens in each row: codes, with the
        room they have to grow, exact tokens of `dtype`, sinks and means."""
        check_count("tokens", tokens)
        return sum(layer_bytes(form, tokens, batch, dtype) for form in self.forms)

    def longest_context(self, budget: int | str, *, dtype: torch.dtype = torch.float32) -> int:
        """The most tokens of one row whose context takes at most that many bytes ("2GB").
        OutOfBudget where not even one does."""
        room, few, many = parse_bytes(budget), 1, 2
        if self.bytes_at(1, dtype=dtype) > room:
            least = self.bytes_at(1, dtype=dtype)
            raise OutOfBudget(
                f"a context in {budget}", expected=f"{format_bytes(least)} or more",
                smallest_bytes=least,
            )  # fmt: skip
        while self.bytes_at(many, dtype=dtype) <= room:
            few, many = many, 2 * many
        while many - few > 1:
            middle = (few + many) // 2
            fits = self.bytes_at(middle, dtype=dtype) <= room
            few, many = (middle, many) if fits else (few, middle)
        return few


def _tensors(layer: CacheLayerMixin) -> list[Tensor]:
    found: list[Tensor] = []
    for value in vars(layer).values():
        for each in value.values() if isinstance(value, dict) else [value]:
            many: list[Any] = list(each) if isinstance(each, list | tuple) else [each]
            found += [x for x in many if isinstance(x, Tensor)]
    return found
