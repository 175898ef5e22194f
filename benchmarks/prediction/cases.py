"""The training steps that are predicted and measured: model, batch and settings by name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
VOCABULARY = 1024


def adamw(**settings: Any) -> OptimizerFactory:
    return lambda parameters: torch.optim.AdamW(parameters, **settings)


@dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    model: dict[str, Any] = field(default_factory=dict)
    rows: int = 2
    tokens: int = 128
    mask: str = "none"
    """none, padded (a quarter of the first row), or ones"""
    checkpointed: bool = False
    dtype: torch.dtype = torch.float32
    optimizer: str = "fused"
    settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `simulate`: autocast, accumulate, grad_clip."""

    def build(self) -> nn.Module:
        model = _build(self.family, self.model)
        if self.checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model if self.dtype is torch.float32 else model.to(self.dtype)

    def batch(self) -> dict[str, Tensor]:
        vocabulary = self.model.get("vocab_size", VOCABULARY)
        ids = torch.randint(5, vocabulary, (self.rows, self.tokens))
        batch = {"input_ids": ids, "labels": ids.clone()}
        if self.mask != "none":
            batch["attention_mask"] = torch.ones_like(ids)
        if self.mask == "padded":
            batch["attention_mask"][0, : self.tokens // 4] = 0
        return batch

    def factory(self) -> OptimizerFactory:
        return adamw(**{"default": {}}.get(self.optimizer, {self.optimizer: True}))


_WIDTH = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", _WIDTH),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_WIDTH, "head_dim": 32}),
    "GPT-2": (
        "GPT2Config", "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 256, "n_layer": 3, "n_head": 8},
    ),
    "Gemma-2": ("Gemma2Config", "Gemma2ForCausalLM", {**_WIDTH, "head_dim": 32}),
    "Gemma-3": (
        "Gemma3TextConfig", "Gemma3ForCausalLM", {**_WIDTH, "head_dim": 32, "sliding_window": 64},
    ),
    "Mixtral": (
        "MixtralConfig", "MixtralForCausalLM",
        {**_WIDTH, **_EXPERTS, "intermediate_size": 256},
    ),
    "Qwen3-MoE": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {**_WIDTH, **_EXPERTS, "head_dim": 32, "moe_intermediate_size": 256},
    ),
    "BERT": (
        "BertConfig", "BertForMaskedLM",
        {k: v for k, v in _WIDTH.items() if k != "num_key_value_heads"},
    ),
}  # fmt: skip


def _build(family: str, changes: dict[str, Any]) -> nn.Module:
    config, head, settings = _FAMILIES[family]
    made = getattr(transformers, config)(**{**settings, **changes}, pad_token_id=0)
    model: nn.Module = getattr(transformers, head)(made)
    return model


_NARROW = {"rows": 1, "tokens": 16}
CASES = {
    "Llama, as many key heads": Case(family="Llama", model={"num_key_value_heads": 8}),
    "Llama, grouped queries": Case(family="Llama"),
    "Llama, grouped, 8 layers": Case(family="Llama", model={"num_hidden_layers": 8}),
    "Llama, grouped, padded": Case(family="Llama", mask="padded"),
    "Llama, 4 x 256 tokens, padded": Case(family="Llama", rows=4, tokens=256, mask="padded"),
    "Llama, eager attention": Case(family="Llama", model={"attn_implementation": "eager"}),
    "Llama, checkpointed": Case(family="Llama", checkpointed=True),
    "Llama, checkpointed, padded": Case(family="Llama", checkpointed=True, mask="padded"),
    "Llama, bf16": Case(family="Llama", dtype=torch.bfloat16),
    "Llama, autocast bf16": Case(family="Llama", settings={"autocast": torch.bfloat16}),
    "Llama, vocabulary 32000": Case(
        family="Llama", model={"vocab_size": 32000, "num_hidden_layers": 2}
    ),
    "Llama, 2 accumulated, clipped": Case(
        family="Llama", settings={"accumulate": 2, "grad_clip": 1.0}
    ),
    "Llama, 16 tokens, AdamW default": Case(family="Llama", optimizer="default", **_NARROW),
    "Llama, 16 tokens, AdamW foreach": Case(family="Llama", optimizer="foreach", **_NARROW),
    "Llama, 16 tokens, AdamW fused": Case(family="Llama", **_NARROW),
    "Qwen3": Case(family="Qwen3"),
    "Qwen3, padded": Case(family="Qwen3", mask="padded"),
    "Qwen3, checkpointed, padded": Case(family="Qwen3", checkpointed=True, mask="padded"),
    "GPT-2, dropout": Case(family="GPT-2"),
    "GPT-2, dropout, checkpointed": Case(family="GPT-2", checkpointed=True),
    "Gemma-2": Case(family="Gemma-2"),
    "Gemma-3, padded": Case(family="Gemma-3", mask="padded"),
    "Mixtral": Case(family="Mixtral"),
    "Qwen3-MoE, padded": Case(family="Qwen3-MoE", mask="padded"),
    "BERT, dropout, padded": Case(family="BERT", mask="padded"),
    "BERT, dropout, autocast": Case(family="BERT", settings={"autocast": torch.bfloat16}),
    "Llama, grouped, mask of ones": Case(family="Llama", mask="ones"),
}
