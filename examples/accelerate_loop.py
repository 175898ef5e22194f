"""A loop written with Accelerate, under a byte budget: bf16, accumulation and clipping included.

python examples/accelerate_loop.py
"""

import ast
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from shoestring.integrations import plan_accelerated
from shoestring.meter import Meter
from shoestring.units import format_bytes

CLIP = 1.0


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape, num_attention_heads=4)).train()


def make_optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def make_loader() -> DataLoader:
    source = torch.frombuffer(bytearray(Path(ast.__file__).read_bytes()), dtype=torch.uint8)
    rows = source[: 80 * 128].view(80, 128).tolist()

    def collate(batch: list[list[int]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor(batch)
        return {"input_ids": ids, "labels": ids}

    return DataLoader(rows, batch_size=4, collate_fn=collate)


def train(accelerator, model, optimizer, loader) -> tuple[list[float], int]:
    """The loop as it was: it knows nothing of plans. (losses, peak of the first two updates)"""
    losses = []

    def step(batch) -> None:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())

    batches = iter(loader)
    with Meter(model) as meter:
        for _ in range(4):
            step(next(batches))
    for batch in batches:
        step(batch)
    return losses, meter.peak_bytes


def main() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = make_model()
    prepared = accelerator.prepare(model, make_optimizer(list(model.parameters())), make_loader())
    expected, roomy = train(accelerator, *prepared)

    model, budget = make_model(), roomy * 3 // 4
    plan = plan_accelerated(
        accelerator, model, next(iter(make_loader())), budget=budget, allow="bitwise",
        optimizer=make_optimizer, grad_clip=CLIP,
    )  # fmt: skip
    plan.apply(model)
    print(plan)
    prepared = accelerator.prepare(model, plan.optimizer(model), make_loader())
    losses, measured = train(accelerator, *prepared)

    print(f"unplanned {format_bytes(roomy)}, budget {format_bytes(budget)}, promised "
          f"{format_bytes(plan.peak_bytes)}, measured {format_bytes(measured)}")  # fmt: skip
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, equal: {losses == expected}")
    assert losses == expected
    assert measured <= plan.peak_bytes <= budget


if __name__ == "__main__":
    main()
