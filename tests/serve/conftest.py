"""Tiny models with the layouts that caches meet: grouped queries, sliding beside full layers."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM


def llama():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gemma():
    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=128, sliding_window=12,
        layer_types=["sliding_attention", "full_attention"] * 2,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture(params=[llama, gemma], ids=["grouped", "hybrid"])
def model(request):
    """Weights are scaled up, so that attention is not flat and tokens do not tie."""
    torch.manual_seed(3)
    made = request.param()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "lm_head" not in name:
                weight.mul_(4)
            elif weight.ndim == 2:
                weight.mul_(20 if "lm_head" in name else 1)
    return made


@pytest.fixture
def grouped():
    return llama()
