"""A hundred steps on real text: the losses are those of stored activations, bit for bit."""

import argparse
import contextlib
from pathlib import Path

import pytest
import torch
from torch import nn

from shoestring.methods.reversible import restore, reversible
from shoestring.models.gpt import GPT, GPTConfig

STEPS, BATCH, LENGTH = 100, 4, 32


def text_bytes() -> torch.Tensor:
    """The source of a standard library module, as byte tokens."""
    return torch.tensor(list(Path(argparse.__file__).read_bytes()), dtype=torch.long)


def build(rule: str, *, keep_top: int = 0, dropout: float = 0.1) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=LENGTH, dropout=dropout,
    )  # fmt: skip
    model = GPT(config).train()
    return reversible(model, rule=rule, keep_top=keep_top) if rule != "residual" else model


def train(model: nn.Module, *, autocast: bool = False, steps: int = STEPS) -> list[float]:
    """AdamW; every fourth step accumulates two parts. The losses."""
    data = text_bytes()
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    losses = []
    for step in range(steps):
        parts = 2 if step % 4 == 0 else 1
        for _ in range(parts):
            starts = torch.randint(0, len(data) - LENGTH, (BATCH,), generator=generator)
            ids = torch.stack([data[s : s + LENGTH] for s in starts.tolist()])
            with context:
                loss = model(input_ids=ids, labels=ids).loss / parts
            loss.backward()
            losses.append(float(loss.detach()) * parts)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(("rule", "steps"), [("feistel", STEPS), ("bdia", 15)])
def test_training_by_reversal_is_that_of_stored_activations(rule, steps):
    ours, stored = build(rule), build(rule, keep_top=4)
    losses = train(ours, steps=steps), train(stored, steps=steps)
    assert losses[0] == losses[1]
    for (name, p), q in zip(ours.named_parameters(), stored.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert sum(losses[0][-10:]) / 10 < 0.9 * losses[0][0]


def test_bf16_autocast_follows_stored_activations_too():
    losses = [train(build("feistel", keep_top=k), autocast=True, steps=8) for k in (0, 4)]
    assert losses[0] == losses[1]


def evaluated(model: nn.Module) -> float:
    data = text_bytes()[-16 * LENGTH :].view(16, LENGTH)
    with torch.no_grad():
        return float(model.eval()(input_ids=data, labels=data).loss)


def test_a_model_trained_by_bdia_is_served_plain_without_loss():
    model = build("bdia", dropout=0.0)
    train(model, steps=30)
    as_trained = evaluated(model)
    assert evaluated(restore(model)) == as_trained
    plain = build("residual", dropout=0.0)
    train(plain, steps=30)
    # Other coefficients were trained; the served network is about as good as a plain one.
    assert as_trained == pytest.approx(evaluated(plain), rel=0.15)
