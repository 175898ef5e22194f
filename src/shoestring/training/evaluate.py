"""Held-out loss and a sampled continuation, in no more memory than a training step.

Losses are summed as numbers, batch by batch: logits of one batch are all that ever exists.
Neither disturbs training: the random state, the training flags of all modules and the gradients
are as they were.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..data.packing import Batch, Rows
from ..errors import DataError
from ..objectives.next_token import IGNORED, Evaluation, evaluate, num_targets
from .distributed import World


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Loss on text the model was not trained on."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int

    def to_json(self) -> dict[str, float]:
        """As a dict of numbers."""
        return asdict(self)


class HeldOutRows:
    """Rows of held-out text, spread evenly over all of it, and the bytes their targets spell.

    count: how many rows, or all when there are fewer.  batch: rows scored at once.
    """

    def __init__(self, rows: Rows, tokenizer: Any, *, count: int, batch: int, world: World) -> None:
        total = len(rows)
        count = min(count, total)
        chosen = [i * total // count for i in range(count)]
        spelled = Spelling(tokenizer)
        self.num_bytes = sum(spelled.num_bytes(rows.row(i)[1].tolist()) for i in chosen)
        if not self.num_bytes:
            raise DataError(
                "the held-out rows spell no text", expected="at least one byte to score",
                hint="Hold out a larger share, or another text.",
            )  # fmt: skip
        self.batch = batch
        self._rows, self._world = rows, world
        self._mine = chosen[world.rank :: world.size]

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._mine), self.batch):
            yield self._rows.batch(self._mine[start : start + self.batch])

    def score(self, model: nn.Module) -> HeldOut:
        """The model's loss on these rows; every process scores its own."""
        mine = evaluate(model, self, device=self._world.device)
        if self._world.shards:
            self._keep_up(model)
        nats, targets = self._world.sum([mine.nats, mine.targets])
        whole = Evaluation(nats, int(targets))
        bits = whole.bits_per_byte(self.num_bytes)
        return HeldOut(whole.loss, bits, whole.targets, self.num_bytes)

    def _keep_up(self, model: nn.Module) -> None:
        """Forwards for nothing, where other processes have more batches: a divided model is
        gathered by all processes together."""
        made = sum(bool(num_targets(batch)) for batch in self)
        counts = [0.0] * self._world.size
        counts[self._world.rank] = made
        missing = int(max(self._world.sum(counts))) - made
        row = self._rows.batch([0])
        row = {name: tensor.to(self._world.device) for name, tensor in row.items()}
        with evaluating(model), torch.no_grad():
            for _ in range(missing):
                model(**row, use_cache=False)


class Spelling:
    """How many bytes of text tokens stand for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        # Byte-level vocabularies write every byte as one character, so lengths are exact even
        # where a row begins inside a character; others can only be asked for their text.
        self._is_byte_level = type(decoder).__name__ == "ByteLevel"

    def num_bytes(self, ids: Sequence[int]) -> int:
        """UTF-8 bytes of the text; special tokens and ignored labels spell nothing."""
        spelling = [i for i in ids if i != IGNORED and i not in self._special]
        if self._is_byte_level:
            return sum(map(len, self._tokenizer.convert_ids_to_tokens(spelling)))
        text: str = self._tokenizer.decode(spelling, clean_up_tokenization_spaces=False)
        return len(text.encode())


def continuation(
    model: Any, prompt: torch.Tensor, *, num_tokens: int, seed: int, end: int | None = None
) -> torch.Tensor:
    """`num_tokens` sampled after a prompt of shape (1, T), by the model's own generate; (1, N)."""
    with evaluating(model), torch.no_grad(), _own_random_numbers(seed, prompt.device):
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            do_sample=True,
            temperature=0.8,
            top_k=50,
            eos_token_id=end,
            pad_token_id=end,
        )
    new: torch.Tensor = out[:, prompt.shape[1] :]
    return new


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
