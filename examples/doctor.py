"""A training loop in trouble, the doctor's page about it, and the same loop after following it.

The loop keeps its gradients through the forward, holds on to every output, and takes the loss of a
large vocabulary all at once.

    python examples/doctor.py
"""

from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shoestring
from shoestring.doctor import Diagnosis
from shoestring.methods import method
from shoestring.units import format_bytes

VOCABULARY = 8000


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, use_cache=False, **shape)
    ).train()


def in_trouble(model: LlamaForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    outputs = []

    def step() -> None:
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        outputs.append(output.logits)

    return step


def as_prescribed(model: LlamaForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    chunks = method("chunked_loss")
    chunks.apply(model, chunks.configure())

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def examine(make_step: Callable[..., Callable[[], None]]) -> Diagnosis:
    model, ids = make_model(), torch.randint(VOCABULARY, (2, 128))
    step = make_step(model, ids)
    with shoestring.Doctor(model, warm_up=1) as doctor:
        for _ in range(3):
            step()
    return doctor.diagnosis


def main() -> None:
    before = examine(in_trouble)
    print(before)
    names = [advice.name for advice in before.advice]
    assert {"leak", "set_to_none", "chunked_loss"} <= set(names), names
    assert before.leak is not None

    after = examine(as_prescribed)
    saved = before.peak_bytes - after.peak_bytes
    print(f"\nafter following it: {format_bytes(after.peak_bytes)}, {format_bytes(saved)} less")
    assert after.leak is None
    assert saved > before.peak_bytes / 4


if __name__ == "__main__":
    main()
