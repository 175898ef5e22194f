"""Small models and training steps with something to find in them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

Step = Callable[[], Any]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Plain(nn.Module):
    """Gives logits; its loss is the loop's business."""

    def __init__(self, width: int = 64, blocks: int = 6, vocabulary: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Stackless(nn.Module):
    """No list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.gelu(self.one(x)))


def llama(vocabulary: int = 96, width: int = 32, layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
            num_hidden_layers=layers, num_attention_heads=2, use_cache=False,
        )
    ).train()  # fmt: skip


def ids(batch: int, tokens: int, vocabulary: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, vocabulary, (batch, tokens))


def own_loss(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, *, none: bool = True
) -> Step:
    """The step of a Hugging Face model."""

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=none)

    return step


def loop_loss(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, *, none: bool = True
) -> Step:
    """The step of a plain model, with a loss of the loop."""

    def step() -> None:
        logits = model(tokens).flatten(0, 1)
        loss = F.cross_entropy(logits, tokens.flatten())
        del logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=none)

    return step


def adamw(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, **(settings or {"fused": True}))
