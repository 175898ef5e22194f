"""A plain pretrained decoder fine-tuned by a reversible rule, and served as the plain one.

A small Llama is first trained as it is; then BDIA (arXiv 2407.09093) goes on from its weights with
memory nearly flat in depth. In eval mode the model *is* the plain one, so nothing is converted.

    python examples/pretrained_reversible.py
"""

import ast
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shoestring
from shoestring.methods.reversible import restore
from shoestring.units import format_bytes


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape, num_attention_heads=4))


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    source = torch.frombuffer(bytearray(Path(ast.__file__).read_bytes()), dtype=torch.uint8)
    rows = source[: count * 4 * 96].long().view(count, 4, 96)
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def train(model: LlamaForCausalLM, data: list[dict[str, torch.Tensor]], lr: float) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def held_out(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> float:
    return model.eval()(**batch).loss.item()


def saved_bytes(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> int:
    model.train()
    with shoestring.Meter(model) as meter:
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    return meter.retained_bytes


def main() -> None:
    *data, test = batches(40)
    model = make_model()
    train(model, data[:25], lr=3e-3)
    before, stored = held_out(model, test), saved_bytes(model, test)

    shoestring.reversible(model, rule="bdia")
    same = held_out(model, test)
    rebuilt = saved_bytes(model, test)
    train(model, data[25:], lr=1e-3)
    after = held_out(model, test)
    restore(model)
    plain = held_out(model, test)

    print(f"held-out loss: pretrained {before:.4f}, made reversible {same:.4f}")
    print(f"after reversible fine-tuning {after:.4f}, restored to the plain class {plain:.4f}")
    print(f"kept for backward: {format_bytes(stored)} plain, {format_bytes(rebuilt)} reversible")
    assert same == before
    assert plain == after < before
    assert rebuilt < stored / 2


if __name__ == "__main__":
    main()
