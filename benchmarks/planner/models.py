"""The two models of the planner's question: a plain GPT block stack and a Hugging Face Llama."""

# B batch, T tokens, D width, H heads

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class Block(nn.Module):
    """A pre-norm block with fused attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.out(self.attend(self.qkv(self.norm_1(x_BTD))))
        return x_BTD + self.mlp(self.norm_2(x_BTD))

    def attend(self, qkv: Tensor) -> Tensor:
        B, T, _ = qkv.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(B, T, -1)


class PlainGPT(nn.Module):
    """Blocks between an embedding and a head; `depth` 4, `width` 256 is the G4 of the tables."""

    def __init__(
        self, depth: int = 4, width: int = 256, heads: int = 4, vocabulary: int = 1024
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x_BTD = self.embed(ids)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: Tensor = self.head(x_BTD)
        return logits


def plain_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the next token; batch: ids and targets, both (B, T)."""
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["targets"].flatten())


def plain_batch(rows: int = 4, tokens: int = 256, vocabulary: int = 1024) -> dict[str, Tensor]:
    """Random ids and targets."""
    shape = (rows, tokens)
    return {
        "ids": torch.randint(0, vocabulary, shape),
        "targets": torch.randint(0, vocabulary, shape),
    }


def llama(
    depth: int = 6, width: int = 128, heads: int = 4, kv_heads: int = 2, vocabulary: int = 1024
) -> LlamaForCausalLM:
    """A small random Llama with grouped-query attention."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=kv_heads,
            max_position_embeddings=512,
        )
    )  # fmt: skip


def llama_batch(rows: int = 4, tokens: int = 128, vocabulary: int = 1024) -> dict[str, Tensor]:
    """Random ids, used as labels as well."""
    ids = torch.randint(0, vocabulary, (rows, tokens))
    return {"input_ids": ids, "labels": ids.clone()}
