"""A budget that full fine-tuning does not fit into: the plan puts adapters in, beside frozen
weights at 8 or 4 bits; what they learn is saved, and merged into an ordinary model.

    python examples/adapters_by_plan.py
"""

import tempfile
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shoestring
from shoestring.methods.lora import merge
from shoestring.planner import planner

warnings.simplefilter("ignore", FutureWarning)
torch.manual_seed(0)
CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=4, tie_word_embeddings=True,
)  # fmt: skip
ids = torch.randint(0, 256, (2, 64))
batch = {"input_ids": ids, "labels": ids}


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def main() -> None:
    model = LlamaForCausalLM(CONFIG).train()
    whole = planner(model, batch, optimizer=adamw, seconds=False)
    plan = shoestring.plan(
        model, batch, budget="6 MiB", optimizer=adamw,
        allow=["lora", "quantized_base", "recompute", "chunked_loss"],
    )  # fmt: skip
    print(f"all weights, exact: {whole.smallest_bytes / 2**20:.1f} MiB at least")
    print(f"this plan: {plan.peak_bytes / 2**20:.1f} MiB with {[w.label for w in plan.patches]}")

    plan.apply(model)
    optimizer = plan.optimizer(model)  # of what is trained now
    losses = []

    def step() -> None:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))

    print(plan.verify(step))
    for _ in range(18):
        step()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory + "/adapters")  # peft's files
        merge(model)
        plan.restore(model)
        model.save_pretrained(directory + "/model")  # an ordinary model, in float32
        again = LlamaForCausalLM.from_pretrained(directory + "/model").eval()
    with torch.no_grad():
        off = float((again(input_ids=ids).logits - adapted).abs().max())
    print(f"saved and read: logits off by at most {off:.1e}")
    assert off < 1e-3


if __name__ == "__main__":
    main()
