"""Your own loop, your own model, a byte budget: three lines more.

A Llama with random weights trains on the Python standard library's source; the plan makes it fit
into three quarters of what it would take, and the losses stay bit-equal to the unplanned run.

    python examples/three_lines.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shoestring
from shoestring.units import format_bytes


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape, **heads)).train()


def make_optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def make_batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Bytes of this file's own library: the standard library's `ast` module."""
    import ast
    from pathlib import Path

    source = torch.frombuffer(bytearray(Path(ast.__file__).read_bytes()), dtype=torch.uint8)
    rows = source[: count * 4 * 128].long().view(count, 4, 128)
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def train(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    optimizer = make_optimizer(list(model.parameters()))
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def main() -> None:
    batches = make_batches(12)
    roomy = {"budget": "10 GiB", "optimizer": make_optimizer, "seconds": False}
    plain = shoestring.plan(make_model(), batches[0], **roomy)
    expected = train(make_model(), batches)

    model = make_model()
    budget = plain.peak_bytes * 3 // 4
    plan = shoestring.plan(
        model, batches[0], budget=budget, optimizer=make_optimizer, allow="bitwise"
    )
    plan.apply(model)
    print(plan)
    losses = train(model, batches)
    verified = plan.verify(lambda: train(model, batches[:2]))

    print(f"unplanned peak {format_bytes(plain.peak_bytes)}, budget {format_bytes(budget)}")
    print(verified)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; equal to the unplanned run: ", end="")
    print(losses == expected)
    assert losses == expected
    assert verified.measured <= budget


if __name__ == "__main__":
    main()
