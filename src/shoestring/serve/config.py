"""What of a model's config a cache needs, and which models it cannot serve."""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from ..errors import ConfigError

PLAIN = "plain scaled dot products, for a compressed cache"


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


def shapes(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """Heads of keys, and their width, for each layer of full attention."""
    kinds, _ = get_layer_types_and_kwargs(config)
    found = []
    for kind, each in zip(kinds, config.per_layer_config, strict=True):
        if kind == "full_attention":
            heads = getattr(each, "num_key_value_heads", None) or each.num_attention_heads
            width = getattr(each, "head_dim", None) or each.hidden_size // each.num_attention_heads
            found.append((heads, width))
    return found


def numbers(config: PreTrainedConfig) -> int:
    """Of keys and values of one token, in all layers of full attention."""
    return sum(2 * heads * width for heads, width in shapes(config))


def check_config(config: Any) -> None:
    """ConfigError for a text config whose scores are capped."""
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:
        raise ConfigError(f"attn_logit_softcapping = {cap}: a soft cap on scores", expected=PLAIN)


def check_count(name: str, count: object) -> None:
    """ConfigError for what is no count."""
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < 2**63:
        raise ConfigError(f"{name} = {count!r}", expected="a whole number, 0 or more")
