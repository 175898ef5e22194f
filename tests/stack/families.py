"""Small models of many families, built from config, with a batch for each.

Every one has 4 blocks of width 32, 16 tokens and two rows (one padded), and dropout wherever the
family knows it, so that a test of exactness also tests the random state.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 67
DEPTH = 4
WIDTH = 32
TOKENS = 16

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**COMMON, "num_key_value_heads": 2, "attention_dropout": 0.1}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: how to build it, where its layers are, what it is fed."""

    name: str
    build: Callable[[str], nn.Module]
    """attention implementation ("eager" or "sdpa") -> model in train mode."""
    path: str
    batch: Callable[[], dict[str, Tensor]]
    generates: bool = False
    attentions: tuple[str, ...] = ("sdpa", "eager")
    lora: tuple[str, ...] | str = "all-linear"


def _hf(model_class: str, config_class: str, **settings: Any) -> Callable[[str], nn.Module]:
    def build(attention: str) -> nn.Module:
        import transformers

        torch.manual_seed(1)
        config = getattr(transformers, config_class)(**copy.deepcopy(settings))
        config._attn_implementation = attention
        return getattr(transformers, model_class)(config).train()

    return build


def tokens() -> dict[str, Tensor]:
    """Two rows, the second padded at its end; the padding is not learned."""
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -5:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def images() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
        "labels": torch.tensor([1, 0]),
    }


class PlainBlock(nn.Module):
    """A residual block with dropout; `pair` blocks return (hidden, extra)."""

    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up_proj = nn.Linear(WIDTH, 64)
        self.down_proj = nn.Linear(64, WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.pair = pair

    def forward(self, x: Tensor) -> Any:
        extra = self.up_proj(self.norm(x))
        x = x + self.dropout(self.down_proj(F.gelu(extra)))
        return (x, extra.mean()) if self.pair else x


class PlainModel(nn.Module):
    """Blocks in an nn.ModuleList, each called in turn."""

    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(PlainBlock(pair) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.pair = pair

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
        x = self.embed(input_ids)
        extra = x.new_zeros(())
        for block in self.blocks:
            out = block(x)
            x, extra = (out[0], extra + out[1]) if self.pair else (out, extra)
        logits = self.head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.01 * extra
        return SimpleNamespace(loss=loss, logits=logits)


class SequentialModel(nn.Sequential):
    """Stem, blocks and head in one nn.Sequential."""

    def __init__(self) -> None:
        blocks = [PlainBlock() for _ in range(DEPTH)]
        super().__init__(nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.Linear(WIDTH, VOCABULARY))

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> Any:
        logits = super().forward(input_ids)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def _plain(kind: Callable[[], nn.Module]) -> Callable[[str], nn.Module]:
    def build(attention: str) -> nn.Module:
        torch.manual_seed(1)
        return kind().train()

    return build


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="llama",
            build=_hf("LlamaForCausalLM", "LlamaConfig", **DECODER),
            path="model.layers",
            batch=tokens,
            generates=True,
        ),
        Family(
            name="qwen3",
            build=_hf(
                "Qwen3ForCausalLM",
                "Qwen3Config",
                head_dim=8,
                # Without dropout sdpa takes its fused path, which draws nothing.
                **{**DECODER, "attention_dropout": 0.0},
            ),
            path="model.layers",
            batch=tokens,
            generates=True,
        ),
        Family(
            name="mistral",
            build=_hf("MistralForCausalLM", "MistralConfig", sliding_window=5, **DECODER),
            path="model.layers",
            batch=tokens,
            generates=True,
        ),
        Family(  # alternates sliding and full attention masks
            name="gemma2",
            build=_hf("Gemma2ForCausalLM", "Gemma2Config", head_dim=8, sliding_window=5, **DECODER),
            path="model.layers",
            batch=tokens,
            generates=True,
            attentions=("eager",),  # soft-capped scores: transformers has no sdpa for it
        ),
        Family(  # two masks and two rotary tables
            name="gemma3",
            build=_hf(
                "Gemma3ForCausalLM",
                "Gemma3TextConfig",
                head_dim=8,
                sliding_window=5,
                layer_types=["sliding_attention", "full_attention"] * 2,
                **DECODER,
            ),
            path="model.layers",
            batch=tokens,
            generates=True,
        ),
        Family(
            name="gpt2",
            build=_hf(
                "GPT2LMHeadModel",
                "GPT2Config",
                vocab_size=VOCABULARY,
                n_embd=WIDTH,
                n_layer=DEPTH,
                n_head=4,
                n_positions=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
            path="transformer.h",
            batch=tokens,
            generates=True,
            lora=("c_attn", "c_fc"),
        ),
        Family(
            name="mixtral",
            build=_hf(
                "MixtralForCausalLM",
                "MixtralConfig",
                num_local_experts=4,
                output_router_logits=True,
                router_jitter_noise=0.1,
                **DECODER,
            ),
            path="model.layers",
            batch=tokens,
            generates=True,
            lora=("q_proj", "v_proj"),
        ),
        Family(
            name="qwen3_moe",
            build=_hf(
                "Qwen3MoeForCausalLM",
                "Qwen3MoeConfig",
                head_dim=8,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=24,
                output_router_logits=True,
                **DECODER,
            ),
            path="model.layers",
            batch=tokens,
            generates=True,
            lora=("q_proj", "v_proj"),
        ),
        Family(  # state-space and attention layers, dense and expert MLPs in turn
            name="jamba",
            build=_hf(
                "JambaForCausalLM",
                "JambaConfig",
                mamba_d_state=4,
                mamba_expand=2,
                attn_layer_period=2,
                attn_layer_offset=1,
                expert_layer_period=2,
                expert_layer_offset=1,
                num_experts=2,
                **DECODER,
            ),
            path="model.layers",
            batch=tokens,
            generates=True,
            lora=("q_proj", "in_proj"),
        ),
        Family(
            name="bert",
            build=_hf("BertForMaskedLM", "BertConfig", **COMMON),
            path="bert.encoder.layer",
            batch=tokens,
        ),
        Family(  # reads layer.attention_type; global and local masks
            name="modernbert",
            build=_hf(
                "ModernBertForMaskedLM",
                "ModernBertConfig",
                local_attention=6,
                global_attn_every_n_layers=2,
                attention_dropout=0.1,
                mlp_dropout=0.1,
                embedding_dropout=0.1,
                cls_token_id=1,
                sep_token_id=2,
                **COMMON,
            ),
            path="model.layers",
            batch=tokens,
        ),
        Family(
            name="vit",
            build=_hf(
                "ViTForImageClassification",
                "ViTConfig",
                image_size=16,
                patch_size=4,
                hidden_size=WIDTH,
                num_hidden_layers=DEPTH,
                num_attention_heads=4,
                intermediate_size=48,
                hidden_dropout_prob=0.1,
                attention_probs_dropout_prob=0.1,
            ),
            path="vit.layers",
            batch=images,
        ),
        Family(
            name="module_list",
            build=_plain(PlainModel),
            path="blocks",
            batch=tokens,
            attentions=("none",),
            lora=("up_proj",),
        ),
        Family(
            name="module_list_of_tuples",
            build=_plain(lambda: PlainModel(pair=True)),
            path="blocks",
            batch=tokens,
            attentions=("none",),
            lora=("up_proj",),
        ),
        Family(
            name="sequential",
            build=_plain(SequentialModel),
            path="",
            batch=tokens,
            attentions=("none",),
            lora=("up_proj",),
        ),
    )
}


@dataclass(frozen=True)
class Step:
    """What one training step gave."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    random_state: Tensor


def step(model: nn.Module, batch: Mapping[str, Tensor], *, seed: int = 3, **extra: Any) -> Step:
    """Forward and backward once, from cleared gradients and a fixed seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = model(**batch, **extra).loss
    loss.backward()
    gradients = {
        name: None if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return Step(loss.detach().clone(), gradients, torch.get_rng_state())


def assert_same(one: Step, other: Step) -> None:
    """Loss, every gradient and the random state afterwards equal bit for bit."""
    assert torch.equal(one.loss, other.loss), (one.loss, other.loss)
    assert one.gradients.keys() == other.gradients.keys()
    different = [
        name
        for name, g in one.gradients.items()
        if (g is None) != (other.gradients[name] is None)
        or (g is not None and not torch.equal(g, other.gradients[name]))
    ]
    assert not different, different
    assert torch.equal(one.random_state, other.random_state)
