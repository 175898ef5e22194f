"""TRL's SFTTrainer under a byte budget, with adapters: one line more, the same losses.

Prompts and completions are made of the standard library's own functions: the line that defines
one, and its body. The tokenizer is trained on that source.

    python examples/sft.py
"""

import ast
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from shoestring.data import open_source, train_tokenizer
from shoestring.integrations import measured, plan_trainer
from shoestring.units import format_bytes


def functions() -> Dataset:
    """Each function of a few modules: its first line, and the rest."""
    rows = []
    for name in ("ast", "argparse", "inspect", "textwrap", "tempfile"):
        source = Path(ast.__file__).with_name(f"{name}.py").read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                first, _, rest = ast.get_source_segment(source, node).partition("\n")
                rows.append({"prompt": first, "completion": "\n" + rest})
    return Dataset.from_list(rows)


def make_trainer(directory: str) -> SFTTrainer:
    source = open_source(Path(ast.__file__))
    tokenizer = train_tokenizer(source, 512, sample_bytes=100_000, cache=directory)
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, num_attention_heads=4))
    args = SFTConfig(
        output_dir=directory, max_steps=20, per_device_train_batch_size=4, learning_rate=1e-3,
        max_length=128, activation_checkpointing=False,  # the plan does it where it pays
        bf16=False, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_steps=1, dataloader_pin_memory=False,
    )  # fmt: skip
    return SFTTrainer(
        model=model, args=args, train_dataset=functions(), processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip


def losses(trainer: SFTTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        plain = make_trainer(directory)
        roomy = plan_trainer(plain, budget="10 GiB", allow=["keep"], seconds=False).peak_bytes
        expected = losses(plain)

        trainer = make_trainer(directory)
        budget = roomy * 9 // 10
        print(plan_trainer(trainer, budget=budget, allow="bitwise", seconds=False))
        found = losses(trainer)
        trainer.save_model(f"{directory}/adapter")
        saved = sorted(path.name for path in Path(directory, "adapter").glob("adapter*"))

    print(f"everything kept {format_bytes(roomy)}, budget {format_bytes(budget)}")
    print(measured(trainer))
    print(f"loss {found[0]:.3f} -> {found[-1]:.3f}, equal to everything kept: {found == expected}")
    print(f"saved: {', '.join(saved)}")
    assert found == expected
    assert measured(trainer).measured <= budget


if __name__ == "__main__":
    main()
