"""Models and loops for the methods of the optimizer, one around another."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoestring.meter import Meter
from shoestring.methods import METHODS
from shoestring.methods.base import MakeOptimizer
from shoestring.models.gpt import GPT, GPTConfig
from shoestring.planner import simulate
from shoestring.planner.fake import Profile

VOCABULARY = 96
Chain = Sequence[tuple[str, Mapping[str, Any]]]
"""Methods with settings, the innermost first."""


def gpt(dropout: float = 0.0, tied: bool = False) -> nn.Module:
    torch.manual_seed(1)
    config = GPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=256, max_position_embeddings=64, num_hidden_layers=2, dropout=dropout,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return GPT(config).train()


def batch(rows: int = 2, tokens: int = 16, seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids}


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, fused=True)


def made(
    model: nn.Module, chain: Chain, base: MakeOptimizer, parameters: list[nn.Parameter]
) -> Any:
    """The optimizer, through every method of the chain."""
    make = base
    for name, settings in chain:
        how = METHODS[name]
        make = functools.partial(_around, how, model, make, how.configure(settings))
    return make(parameters)


def _around(how: Any, model: nn.Module, make: Any, config: Any, parameters: Any) -> Any:
    return how.optimizer(model, parameters, make, config)


def put(model: nn.Module, chain: Chain, base: MakeOptimizer = adamw) -> Any:
    """Every method applied to the model, and its optimizer."""
    for name, settings in chain:
        METHODS[name].apply(model, METHODS[name].configure(settings))
    return made(model, chain, base, list(model.parameters()))


def train(
    model: nn.Module, stepping: Any, steps: int, start: int = 0, tokens: int = 16
) -> list[float]:
    """Losses of steps start..steps-1."""
    losses = []
    for step in range(start, steps):
        torch.manual_seed(step)
        loss = model(**batch(tokens=tokens, seed=step)).loss
        loss.backward()
        stepping.step()
        stepping.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def measured(chain: Chain, base: MakeOptimizer, tokens: int = 4) -> Meter:
    """Two steps, counted."""
    model = gpt()
    stepping = put(model, chain, base)
    data = batch(tokens=tokens)
    with Meter(model, stepping, history=True) as meter:
        for _ in range(2):
            model(**data).loss.backward()
            stepping.step()
            stepping.zero_grad()
    return meter


def predicted(chain: Chain, base: MakeOptimizer, tokens: int = 4, **how: Any) -> Profile:
    """The same on fake tensors."""
    twins: list[nn.Module] = []

    def apply(twin: nn.Module) -> None:
        for name, settings in chain:
            METHODS[name].apply(twin, METHODS[name].configure(settings))
        twins.append(twin)

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return made(twins[0], chain, base, parameters)

    return simulate(gpt(), batch(tokens=tokens), apply=apply, optimizer=make, **how)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
