"""A small model, data of changing lengths, and a Trainer that writes down every loss."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

VOCABULARY = 256
LONGEST = 48


def model(depth: int = 4, *, vocabulary: int = VOCABULARY, **changes: Any) -> LlamaForCausalLM:
    """A Llama with dropout, so that equal losses are equal random numbers, too."""
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4}
    settings = {**shape, "num_key_value_heads": 2, "attention_dropout": 0.1, **changes}
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=depth, **settings)
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


class Lines(Dataset):
    """Token ids of 8 to 48 tokens, or all of 48; `draws` makes every look at an example draw."""

    def __init__(self, count: int = 60, *, equal: bool = False, draws: bool = False) -> None:
        generator = torch.Generator().manual_seed(5)
        lengths = torch.randint(8, LONGEST + 1, (count,), generator=generator).tolist()
        lengths = [LONGEST] * count if equal else lengths
        lengths[count // 2] = LONGEST
        make = functools.partial(torch.randint, 0, VOCABULARY, generator=generator)
        self.rows = [make((n,)).tolist() for n in lengths]
        self.draws = draws
        self.looks = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        self.looks += 1
        if self.draws:
            torch.rand(3)
        return {"input_ids": self.rows[index]}


def padded(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows padded to the longest of the batch."""
    ids = [torch.tensor(e["input_ids"]) for e in examples]
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(i) for i in ids])
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    labels = input_ids.masked_fill(~mask, -100)
    return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels}


class Recording(Trainer):
    """Keeps the loss of every batch."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.__dict__.setdefault("losses", []).append(loss.clone())
        return loss


def arguments(tmp_path: Any, **changes: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(tmp_path), "max_steps": 20, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4, "learning_rate": 1e-3, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1000,
        "seed": 3, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def trainer(
    tmp_path: Any, *, kind: type[Trainer] = Recording, of: Any = None, data: Any = None,
    settings: dict[str, Any] | None = None, **changes: Any,
) -> Any:  # fmt: skip
    """A trainer of a fresh model on fresh data."""
    return kind(
        model=of if of is not None else model(),
        args=arguments(tmp_path, **changes),
        train_dataset=data if data is not None else Lines(),
        data_collator=padded,
        **(settings or {}),
    )


def losses(of: Any) -> Tensor:
    """Losses of all batches of a run."""
    of.train()
    return torch.stack(of.losses)
