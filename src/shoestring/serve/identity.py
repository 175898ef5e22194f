"""Which model something was made for: its shape, and a sample of its weights."""

import hashlib
import json
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

_SAMPLE = 64  # numbers of each parameter
_SHAPE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "rope_parameters",
)  # fmt: skip


def shape_of(config: PreTrainedConfig) -> str:
    """Hex of what a text config says of keys and values."""
    found: dict[str, Any] = {name: getattr(config, name, None) for name in _SHAPE}
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()[:32]


def weights_of(model: nn.Module) -> str:
    """Hex of some numbers of every parameter, rounded as bfloat16 so that a model is itself in
    sixteen bits too."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        step = max(weight.numel() // _SAMPLE, 1)
        sample = weight.detach().reshape(-1)[::step][:_SAMPLE].to("cpu")
        digest.update(name.replace("_orig_mod.", "").encode())  # of a compiled model
        kept = sample.float().bfloat16() if sample.is_floating_point() else sample
        digest.update(bytes(kept.contiguous().view(torch.uint8).tolist()))
    return digest.hexdigest()[:32]
