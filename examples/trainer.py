"""Hugging Face's Trainer under a byte budget: one line more, the same losses.

A small Llama trains on the Python standard library's source, cut into lines of changing length.
The plan finds the largest batch by itself, and the first steps are measured against its promise.

    python examples/trainer.py
"""

import ast
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from shoestring.integrations import measured, plan_trainer
from shoestring.units import format_bytes


def examples() -> list[dict[str, list[int]]]:
    """Bytes of source code, 64 to 128 in a row."""
    source = Path(ast.__file__).read_bytes()
    rows = [source[i : i + 64 + i // 160 % 65] for i in range(0, 32_000, 160)]
    return [{"input_ids": list(row), "labels": list(row)} for row in rows]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [fill[name]] * (longest - len(row[name])) for row in rows])
        for name in fill
    }


class KeepsLosses(Trainer):
    def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def make_trainer(directory: str) -> KeepsLosses:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8}
    config = LlamaConfig(vocab_size=256, **shape, num_attention_heads=4, attention_dropout=0.1)
    args = TrainingArguments(
        output_dir=directory, max_steps=20, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, learning_rate=1e-3, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_steps=10, dataloader_pin_memory=False,
    )  # fmt: skip
    return KeepsLosses(
        model=LlamaForCausalLM(config), args=args, train_dataset=examples(), data_collator=collate
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        plain = make_trainer(directory)
        roomy = plan_trainer(plain, budget="10 GiB", allow=["keep"], seconds=False).peak_bytes
        plain.train()

        trainer = make_trainer(directory)
        budget = roomy * 3 // 4
        plan = plan_trainer(trainer, budget=budget, allow="bitwise")
        print(plan)
        trainer.train()

    print(f"everything kept {format_bytes(roomy)}, budget {format_bytes(budget)}")
    print(measured(trainer))
    print(f"loss {trainer.losses[0]:.3f} -> {trainer.losses[-1]:.3f}; equal to the run with "
          f"everything kept: {trainer.losses == plain.losses}")  # fmt: skip
    assert trainer.losses == plain.losses
    assert measured(trainer).measured <= budget


if __name__ == "__main__":
    main()
