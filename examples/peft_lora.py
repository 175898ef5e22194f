"""LoRA under a byte budget: plan the wrapped model, train, take the plan out, merge.

python examples/peft_lora.py
"""

import ast
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import shoestring
from shoestring.units import format_bytes


def make_model() -> PeftModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape, num_attention_heads=4))
    adapters = LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
    return get_peft_model(base, adapters).train()


def make_optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, fused=True)


def make_batches(count: int) -> list[dict[str, torch.Tensor]]:
    source = torch.frombuffer(bytearray(Path(ast.__file__).read_bytes()), dtype=torch.uint8)
    rows = source[: count * 4 * 128].long().view(count, 4, 128)
    return [{"input_ids": ids, "labels": ids} for ids in map(torch.clone, rows)]


def train(model: PeftModel, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    torch.manual_seed(1)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])

    def step(batch: dict[str, torch.Tensor]) -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return [step(batch) for batch in batches]


def main() -> None:
    batches = make_batches(20)
    given = {"optimizer": make_optimizer, "allow": "bitwise"}
    roomy = shoestring.plan(make_model(), batches[0], budget="10 GiB", seconds=False, **given)
    expected = train(make_model(), batches)

    model = make_model()
    budget = roomy.peak_bytes // 2
    plan = shoestring.plan(model, batches[0], budget=budget, **given)
    plan.apply(model)
    print(plan)
    losses = train(model, batches)
    verified = plan.verify(lambda: train(model, batches[:1] * 2))

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        saved = sorted(path.name for path in Path(directory).glob("adapter*"))
    plan.restore(model)  # before merging: the blocks are the base model's own again
    merged = model.merge_and_unload()

    print(f"everything kept {format_bytes(roomy.peak_bytes)}, budget {format_bytes(budget)}")
    print(verified)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; equal to the unplanned run: ", end="")
    print(losses == expected)
    print(f"saved: {', '.join(saved)}; merged into a {type(merged).__name__}")
    assert losses == expected
    assert verified.measured <= budget


if __name__ == "__main__":
    main()
