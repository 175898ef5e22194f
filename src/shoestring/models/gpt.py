"""A plain GPT made of blocks, in Hugging Face clothes.

Pre-norm blocks (RMSNorm, rotary positions, grouped-query attention through SDPA, SwiGLU), each
with an attention and an MLP branch and nothing else, so that it can be trained as it is
(`rule="residual"`) or as a reversible network (any rule of `streams.RULES`). As a
`PreTrainedModel` it has generate, save_pretrained and from_pretrained; importing this module
registers it with the Auto classes.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..errors import ConfigError
from ..methods.reversible import reversible

# B batch, T tokens, S tokens seen (cache included), D model width, H heads, K key/value heads,
# E head width


class GPTConfig(PretrainedConfig):
    """Shape of a GPT. ConfigError when widths and heads do not divide."""

    model_type = "shoestring_gpt"

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 256,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 1024,
        rule: str = "residual",
        dropout: float = 0.0,
        rope_theta: float = 10000.0,
        tie_word_embeddings: bool = True,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        # 8/3 of the width in three matrices costs what 4 in two does.
        self.intermediate_size = intermediate_size or -(-8 * hidden_size // 3 // 32) * 32
        self.max_position_embeddings = max_position_embeddings
        self.rule = rule
        self.dropout = dropout
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self.use_cache = kwargs.pop("use_cache", True)
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        if hidden_size % (2 * num_attention_heads):
            raise ConfigError(
                f"hidden_size = {hidden_size} with num_attention_heads = {num_attention_heads}",
                expected="an even width for every head",
            )
        if num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads = {self.num_key_value_heads}",
                expected=f"a divisor of num_attention_heads = {num_attention_heads}",
            )
        super().__init__(**kwargs)


def rotary(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, 1, T, E), float32, for positions (B, T)."""
    inverse = theta ** (
        -torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    )
    angles = positions[:, None, :, None].float() * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BHTE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), halves paired."""
    first, second = x_BHTE.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BHTE * cos.to(x_BHTE.dtype) + turned * sin.to(x_BHTE.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer_idx = layer
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.width = config.hidden_size // self.heads
        self.qkv_proj = nn.Linear(
            config.hidden_size, (self.heads + 2 * self.kv_heads) * self.width, bias=False
        )
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
    ) -> Tensor:
        B, T, D = hidden.shape
        H, K, E = self.heads, self.kv_heads, self.width
        q, k, v = (
            part.view(B, T, -1, E).transpose(1, 2)
            for part in self.qkv_proj(hidden).split((H * E, K * E, K * E), dim=-1)
        )
        q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if K != H:
            k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, is_causal=attention_mask is None and T > 1
        )
        return self.dropout(self.o_proj(out.transpose(1, 2).reshape(B, T, D)))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
    ) -> Tensor:
        hidden = hidden + self.attention(
            self.attention_norm(hidden), position_embeddings, attention_mask, past_key_values
        )
        return hidden + self.mlp(self.mlp_norm(hidden))


class GPTPreTrained(PreTrainedModel):
    """What the two classes below share."""

    config_class = GPTConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, Attention | MLP):
            out = module.o_proj if isinstance(module, Attention) else module.down_proj
            nn.init.normal_(out.weight, std=std / (2 * self.config.num_hidden_layers) ** 0.5)


class GPTModel(GPTPreTrained):
    """Embedding, blocks, final norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [Block(config, layer) for layer in range(config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, T) or inputs_embeds (B, T, D) -> last_hidden_state (B, T, D)."""
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise ConfigError(
                "output_hidden_states and output_attentions are not supported by GPT",
                hint="Use forward hooks on the layers of a model with rule='residual'.",
            )
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = hidden.shape
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training or torch.is_grad_enabled():
            past_key_values = None
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=hidden.device).expand(B, T)
        positions = rotary(
            position_ids, hidden.shape[-1] // self.config.num_attention_heads,
            self.config.rope_theta,
        )  # fmt: skip
        mask = causal_mask(attention_mask, B, T, past, hidden.device)
        for layer in self.layers:
            hidden = layer(
                hidden,
                position_embeddings=positions,
                attention_mask=mask,
                past_key_values=past_key_values,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values
        )


def causal_mask(
    padding: Tensor | None, B: int, T: int, past: int, device: torch.device
) -> Tensor | None:
    """Boolean (B, 1, T, S) mask, True = may look; None where SDPA's own causal mask does.

    A padding mask (B, S) is used whatever its values, so memory does not depend on them."""
    if padding is None and (past == 0 or T == 1):
        return None
    if padding is not None and padding.dim() == 4:
        return padding
    rows = torch.arange(past, past + T, device=device)[:, None]
    allowed = (torch.arange(past + T, device=device)[None, :] <= rows)[None, None]
    if padding is not None:
        allowed = allowed & padding[:, None, None, : past + T].bool()
        # A query that may look nowhere would give NaN: padded queries see themselves.
        allowed = allowed | torch.eye(T, past + T, device=device, dtype=torch.bool)[None, None]
    return allowed


class GPT(GPTPreTrained, GenerationMixin):
    """A causal language model: GPTModel and a head, tied by default."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.model = GPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        if config.rule != "residual":
            known = getattr(config, "shoestring", None) or {}
            bits = "auto" if known.get("auto", True) else known["scale_bits"]
            reversible(
                self,
                rule=config.rule,
                streams=known.get("streams", "int32"),
                scale_bits=cast(Any, bits),
            )
            # A loaded model goes on with the grid it was saved with.
            config.shoestring["scale_bits"] = known.get(
                "scale_bits", config.shoestring["scale_bits"]
            )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """labels (B, T), -100 ignored, are shifted here: the loss is of the next token."""
        count = {k: kwargs.pop(k) for k in ("num_items_in_batch",) if k in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **count
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values
        )


AutoConfig.register(GPTConfig.model_type, GPTConfig)
AutoModelForCausalLM.register(GPTConfig, GPT)
