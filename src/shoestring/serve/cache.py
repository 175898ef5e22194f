"""A context cache of a few bits a number, in one line of anybody's `generate`.

    model.generate(**inputs, past_key_values=CompressedCache(model))

Layers of full attention are ours (`layer`); all others, sliding and linear ones, stay
transformers' own. Given a model, the cache makes the model's attention ours; given a config,
`cache.attach(model)` does.
"""

from functools import cache, partial
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

from ..errors import ConfigError
from ..ops.vector_code import VectorCode
from .attention import Attached, attach, check_config, check_model
from .layer import CompressedLayer, check_crop
from .store import BLOCK, SLACK


class CompressedCache(Cache):
    """config_or_model: of transformers.

    key_bits, value_bits: 1 to 8 for each number; keys need more than values in most models.
    window: newest tokens that stay exact; sinks: first tokens that do.
    centre: take a mean key of each head from all keys alike, which no softmax sees.
    seed: of the random rotation; scale_dtype: of the scale that each vector has.

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
        scale_dtype: torch.dtype = torch.float16,
    ) -> None:
        model = config_or_model if isinstance(config_or_model, nn.Module) else None
        if model is not None:
            check_model(model)
        config = text_config(config_or_model)
        for name, count in (("window", window), ("sinks", sinks)):
            if not isinstance(count, int) or count < 0:
                raise ConfigError(f"{name} = {count!r}", expected="a count of tokens, 0 or more")
        codes = partial(_code, seed=seed, scale_dtype=scale_dtype)
        for _, key_width, value_width in shapes(config):
            codes(key_width, key_bits), codes(value_width, value_bits)
        super().__init__(
            layers=[
                CompressedLayer(
                    codes, key_bits=key_bits, value_bits=value_bits, window=window, sinks=sinks,
                    centre=centre,
                ) if kind == "full_attention" else DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs)
                for kind, kwargs in zip(*get_layer_types_and_kwargs(config), strict=True)
            ]
        )  # fmt: skip
        if model is not None:
            attach(model)

    def attach(self, model: nn.Module) -> Attached:
        """Makes the model's attention ours, at once; as a context, until its end."""
        return attach(model)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens away; 0 or negative. ConfigError, before any layer is changed,
        for a positive count, more than there are, and sliding layers that have let tokens go."""
        check_crop(tokens_to_remove, self.get_seq_length())
        for index, layer in enumerate(self.layers):
            if not getattr(layer, "is_sliding", False) or layer.record_past:
                continue
            if tokens_to_remove and layer.get_seq_length() >= layer.sliding_window:
                raise ConfigError(
                    f"crop({tokens_to_remove}): sliding layer {index} has let older tokens go",
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

    @staticmethod
    def bytes_per_token(
        config: PreTrainedConfig, *, key_bits: int = 4, value_bits: int = 4
    ) -> int:  # fmt: skip
        """Bytes that one more token of one row takes in layers of full attention, once it is
        coded: codes and scales."""
        total = 0
        for heads, key_width, value_width in shapes(text_config(config)):
            key, value = _code(key_width, key_bits), _code(value_width, value_bits)
            total += heads * (key.vector_bytes + value.vector_bytes)
        return total

    @classmethod
    def bytes_at(
        cls,
        config: PreTrainedConfig,
        tokens: int,
        *,
        batch: int = 1,
        key_bits: int = 4,
        value_bits: int = 4,
        window: int = 128,
        sinks: int = 4,
        centre: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Bytes of the layers of full attention with that many tokens in each row: whole blocks of
        codes, the window's buffers, sinks and means."""
        blocks = -(-max(tokens - window, 0) // BLOCK) if tokens else 0
        per_token = cls.bytes_per_token(config, key_bits=key_bits, value_bits=value_bits)
        total = blocks * BLOCK * per_token
        for heads, key_width, value_width in shapes(text_config(config)):
            exact = (window + SLACK + sinks) * (key_width + value_width) * dtype.itemsize
            total += heads * (exact + 4 * key_width * centre)
        return batch * total


def text_config(config_or_model: PreTrainedConfig | nn.Module) -> PreTrainedConfig:
    """The config of the decoder; ConfigError for what we cannot serve."""
    config = getattr(config_or_model, "config", config_or_model)
    if not isinstance(config, PreTrainedConfig):
        raise ConfigError(
            f"a cache for {type(config_or_model).__name__}",
            expected="a transformers model, or its config",
        )
    config = config.get_text_config(decoder=True)
    check_config(config)
    if getattr(config, "kv_lora_rank", None):
        raise ConfigError(
            f"{config.model_type} has latent attention", expected="keys and values in heads",
            hint="What it keeps of a token is small already.",
        )  # fmt: skip
    if "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise ConfigError(
            f"layers of {config.model_type} share keys and values",
            expected="keys and values of its own for each layer",
        )
    kinds, _ = get_layer_types_and_kwargs(config)
    if "full_attention" not in kinds:
        raise ConfigError(
            f"{config.model_type} has no layer of full attention, but {sorted(set(kinds))}",
            expected="one or more",
        )
    if unknown := sorted({*kinds} - {*DYNAMIC_LAYER_TYPE_MAPPING}):
        raise ConfigError(f"layers of {unknown}", expected=sorted(DYNAMIC_LAYER_TYPE_MAPPING))
    return config


def shapes(config: PreTrainedConfig) -> list[tuple[int, int, int]]:
    """Heads of keys, width of a key, width of a value, for each layer of full attention."""
    kinds, _ = get_layer_types_and_kwargs(config)
    found = []
    for kind, each in zip(kinds, config.per_layer_config, strict=True):
        if kind == "full_attention":
            heads = getattr(each, "num_key_value_heads", None) or each.num_attention_heads
            width = getattr(each, "head_dim", None) or each.hidden_size // each.num_attention_heads
            found.append((heads, width, width))
    return found


@cache
def _code(
    width: int, bits: int, seed: int = 0, scale_dtype: torch.dtype = torch.float16
) -> VectorCode:  # fmt: skip
    return VectorCode(width, bits, seed=seed, scale_dtype=scale_dtype)


def _tensors(layer: CacheLayerMixin) -> list[Tensor]:
    found: list[Tensor] = []
    for value in vars(layer).values():
        for each in value.values() if isinstance(value, dict) else [value]:
            many: list[Any] = list(each) if isinstance(each, list | tuple) else [each]
            found += [x for x in many if isinstance(x, Tensor)]
    return found
